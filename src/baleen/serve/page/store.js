// Where conversations live: this browser's IndexedDB. Traces are kept apart, since they are large and rarely read.

const NAME = "baleen";
const STORES = ["conversations", "traces"];

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class Store {
  #database;
  #channel = new BroadcastChannel(NAME);

  /** Throws where the browser keeps nothing, as some private windows do. */
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => STORES.forEach((name) => request.result.createObjectStore(name));
    const store = new Store();
    store.#database = await settled(request);
    return store;
  }

  #of(name, mode = "readonly") {
    return this.#database.transaction(name, mode).objectStore(name);
  }

  /** All conversations, in no order. */
  conversations() {
    return settled(this.#of("conversations").getAll());
  }

  conversation(id) {
    return settled(this.#of("conversations").get(id));
  }

  async save(conversation) {
    await settled(this.#of("conversations", "readwrite").put(conversation, conversation.id));
    this.#channel.postMessage(conversation.id);
  }

  async remove(conversation) {
    await settled(this.#of("conversations", "readwrite").delete(conversation.id));
    this.#channel.postMessage(conversation.id);
  }

  /** The trace of an answer as JSON, or undefined. */
  trace(nodeId) {
    return settled(this.#of("traces").get(nodeId));
  }

  saveTrace(nodeId, trace) {
    return settled(this.#of("traces", "readwrite").put(trace, nodeId));
  }

  removeTraces(nodeIds) {
    const traces = this.#of("traces", "readwrite");
    return Promise.all(nodeIds.map((id) => settled(traces.delete(id))));
  }

  /** Calls back with the id of a conversation that another tab saved or removed. */
  onChange(callback) {
    this.#channel.onmessage = (event) => callback(event.data);
  }
}
