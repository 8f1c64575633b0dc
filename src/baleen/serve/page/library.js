// All conversations and the traces of their answers: in memory as they are shown, and in the browser's store.

import { checked, copyOf, exportText, importText } from "./conversation.js";
import { Store } from "./store.js";
import { Trace } from "./trace.js";

const isAnswer = (node) => node.role === "assistant";

export class Library {
  #store = null;
  #conversations = new Map();
  #traces = new Map(); // id of an answer -> Trace, or null if it has none

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

  async save(conversation) {
    this.#conversations.set(conversation.id, conversation);
    await this.#store?.save(conversation);
  }

  /** Of an answer whose conversation was opened; null if it has none. */
  trace(node) {
    return this.#traces.get(node.id) ?? null;
  }

  /** The trace of an answer on its way; kept only once it is saved. */
  setTrace(node, trace) {
    this.#traces.set(node.id, trace);
  }

  async saveTrace(node) {
    await this.#store?.saveTrace(node.id, this.#traces.get(node.id).toJSON());
  }

  /** A trace that can't be read is left out. */
  async loadTraces(conversation) {
    const missing = Object.values(conversation.nodes).filter((node) => isAnswer(node) && !this.#traces.has(node.id));
    await Promise.allSettled(missing.map(async ({ id }) => this.#traces.set(id, Trace.from(await this.#store?.trace(id)))));
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
    return async () => {
      await this.save(conversation);
      for (const node of answers) if (this.trace(node)) await this.saveTrace(node);
    };
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
      for (const node of Object.values(conversation.nodes).filter(isAnswer)) {
        const trace = Trace.from(traces[node.id]);
        if (!trace || this.trace(node)) continue;
        this.setTrace(node, trace);
      }
      await this.save(conversation);
      for (const node of Object.values(conversation.nodes).filter((node) => this.trace(node))) await this.saveTrace(node);
      added++;
    }
    return { added, of: read.length };
  }

  /** Calls back with the id of a conversation that another tab changed or removed. mine(conversation): this tab is writing it. */
  onChange(mine, callback) {
    this.#store?.onChange(async (id) => {
      if (this.get(id) && mine(this.get(id))) return;
      const saved = await this.#store.conversation(id);
      if (saved) this.#conversations.set(id, saved);
      else this.#conversations.delete(id);
      callback(id);
    });
  }
}
