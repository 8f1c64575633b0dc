// An answer on its way: reads the stream into its node of the conversation and into its trace.

import { messagesFor } from "./conversation.js";
import { ServerError } from "./api.js";
import { Trace } from "./trace.js";

export class Answer extends EventTarget {
  #abort = new AbortController();
  #began = performance.now();
  #firstToken = null;

  /** model: its entry in /v1/models. Dispatches "change" at every chunk and "end" once. */
  constructor(conversation, node, model) {
    super();
    Object.assign(this, { conversation, node, model });
    this.trace = new Trace(model.baleen);
  }

  stop() {
    this.#abort.abort();
  }

  /** Tokens a second since the first one came. */
  get speed() {
    const seconds = (performance.now() - (this.#firstToken ?? performance.now())) / 1000;
    return seconds > 0.2 ? this.trace.tokens.length / seconds : 0;
  }

  /** Runs to the end, whatever that is: the node's state tells. */
  async run(api) {
    const { node } = this;
    try {
      for await (const chunk of api.chat(this.#request(), this.#abort.signal)) {
        this.#take(chunk);
        this.dispatchEvent(new Event("change"));
      }
      if (node.state === "running") node.state = "done";
    } catch (error) {
      if (error.name === "AbortError") node.state = "stopped";
      else if (error instanceof ServerError) Object.assign(node, { state: "failed", error: error.message });
      else {
        Object.assign(node, { state: "failed", error: "This page failed to read the answer." });
        console.error(error);
      }
    }
    this.#closeThought();
    this.dispatchEvent(new Event("end"));
  }

  #request() {
    const { conversation, model, node } = this;
    const thinking = model.baleen.thinking && conversation.thinking !== null;
    return {
      model: model.id,
      messages: messagesFor(conversation, node.parent),
      ...conversation.sampling,
      ...(thinking && { chat_template_kwargs: { thinking: conversation.thinking } }),
    };
  }

  #take({ choices: [choice], baleen = {} }) {
    const { node } = this;
    this.trace.take(baleen);
    if (this.trace.tokens.length) this.#firstToken ??= performance.now();
    if (baleen.dropped_messages) node.dropped = baleen.dropped_messages;
    if (baleen.stats) node.stats = baleen.stats;
    if (!choice) return;
    node.reasoning += choice.delta.reasoning_content ?? "";
    if (choice.delta.content) {
      this.#closeThought();
      node.content += choice.delta.content;
    }
    if (choice.finish_reason) node.state = choice.finish_reason === "length" ? "length" : "done";
  }

  #closeThought() {
    if (this.node.reasoning) this.node.thinkingSeconds ??= (performance.now() - this.#began) / 1000;
  }
}
