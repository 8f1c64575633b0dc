// All conversations and the traces of their answers: in memory as they are shown, and in the browser's store.

import { checked, copyOf, exportText, importText, show } from "./conversation.js";
import { Store } from "./store.js";
import { Trace } from "./trace.js";

const isAnswer = (node) => node.role === "assistant";

export class Library {
  #store = null;
  #conversations = new Map();
  #traces = new Map(); // id of an answer -> Trace, or null if it has none
  #own = new Set(); // ids of the answers that this tab wrote
  #others = new Set(); // ids of those that other tabs said they were writing

  /** Reads what is kept. False where this browser keeps nothing: then all lives until the page is closed. */
  async load() {
    let records;
    try {
      this.#store = await Store.open();
      records = await this.#store.conversations();
    } catch {
      this.#store = null;
      return false;
    }
    for (const record of records) {
      try {
        this.#conversations.set(record.id, checked(record));
      } catch (error) {
        console.error("A conversation in this browser is damaged:", error);
      }
    }
    return true;
  }

  get all() {
    return [...this.#conversations.values()];
  }

  get(id) {
    return this.#conversations.get(id);
  }

  /** answers: those whose traces are to be kept, too. */
  async save(conversation, answers = []) {
    this.#conversations.set(conversation.id, conversation);
    const writing = [...this.#own].filter((id) => conversation.nodes[id]?.state === "running");
    try {
      await this.#store?.save(conversation, (kept) => this.#takeIn(conversation, kept));
      for (const { id } of answers.filter((node) => this.trace(node))) {
        await this.#store?.saveTrace(id, this.#traces.get(id).toJSON());
      }
    } finally {
      this.#store?.tell(conversation, writing);
    }
  }

  /** Takes in the messages that other tabs saved. An answer is written by one tab only: of ours, our copy counts, of
   * all others the stored one. The last message shown stays, or what was said below it follows. */
  #takeIn(conversation, kept) {
    const { nodes } = conversation;
    for (const node of Object.values(kept.nodes)) {
      if (this.#own.has(node.id) && nodes[node.id]) continue;
      if (node.state === "running" && !this.#others.has(node.id)) node.state = "stopped"; // its page was closed
      nodes[node.id] = Object.assign(nodes[node.id] ?? {}, node);
    }
    if (conversation.leaf) show(conversation, nodes[conversation.leaf]);
  }

  /** Of an answer whose conversation was opened; null if it has none. */
  trace(node) {
    return this.#traces.get(node.id) ?? null;
  }

  /** This tab begins to write an answer. Its trace is kept only once it is saved. */
  begin(node, trace) {
    this.#own.add(node.id);
    this.setTrace(node, trace);
  }

  setTrace(node, trace) {
    this.#traces.set(node.id, trace);
  }

  /** Leaves out a trace that can't be read, or that another tab has still to save. */
  async loadTraces(conversation) {
    const missing = Object.values(conversation.nodes).filter((node) => isAnswer(node) && !this.#traces.has(node.id));
    await Promise.allSettled(missing.map(async (node) => {
      const trace = Trace.from(await this.#store?.trace(node.id));
      if (trace) this.setTrace(node, trace);
    }));
  }

  /** Removes a conversation. Returns a function that brings it back, as long as the page is open. */
  async remove(conversation) {
    await this.loadTraces(conversation);
    const answers = Object.values(conversation.nodes).filter(isAnswer);
    this.#conversations.delete(conversation.id);
    try {
      await this.#store?.remove(conversation, answers.map(({ id }) => id));
    } catch (error) {
      this.#conversations.set(conversation.id, conversation);
      throw error;
    }
    return () => this.save(conversation, answers);
  }

  /** The text of a file that holds these conversations, their traces included. */
  async exported(conversations) {
    await Promise.all(conversations.map((conversation) => this.loadTraces(conversation)));
    const traces = new Map([...this.#traces].filter(([, trace]) => trace).map(([id, trace]) => [id, trace.toJSON()]));
    return exportText(conversations, traces);
  }

  /** Adds what a file holds; one that is here already, but different, is added beside it. Returns how many of how many.
   * Throws an Error that says what is wrong with the file: then nothing was added; or with the browser's store. */
  async import(text) {
    const read = importText(text);
    let added = 0;
    for (const own of read) {
      const here = this.get(own.conversation.id);
      if (here?.updated === own.conversation.updated) continue;
      const { conversation, traces } = here ? copyOf(own) : own;
      const answers = Object.values(conversation.nodes).filter(isAnswer);
      for (const node of answers) {
        const trace = Trace.from(traces[node.id]);
        if (!trace || this.trace(node)) continue;
        this.setTrace(node, trace);
      }
      await this.save(conversation, answers);
      added++;
    }
    return { added, of: read.length };
  }

  /** Calls back with the id of a conversation that another tab changed or removed. */
  onChange(callback) {
    this.#store?.onChange(async ({ id, writing }) => {
      for (const answer of writing) this.#others.add(answer);
      let kept;
      try {
        kept = await this.#store.conversation(id);
      } catch (error) {
        return console.error("A conversation that another tab changed can’t be read:", error);
      }
      if (kept) {
        const here = this.get(id) ?? { nodes: {} };
        const { nodes, leaf } = here;
        Object.assign(here, kept, { nodes, leaf: leaf ?? kept.leaf });
        this.#takeIn(here, kept);
        this.#conversations.set(id, here);
      } else this.#conversations.delete(id);
      callback(id);
    });
  }
}
