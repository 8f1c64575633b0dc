// Where conversations live: this browser's IndexedDB. Traces are kept apart, since they are large and rarely read.

const NAME = "baleen";
const STORES = ["conversations", "traces"];

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Once it is on the disk: a full one may refuse what the request had been granted. */
const written = ({ transaction }) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error);
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
    await written(this.#of("conversations", "readwrite").put(conversation, conversation.id));
    this.#channel.postMessage(conversation.id);
  }

  async remove(conversation) {
    await written(this.#of("conversations", "readwrite").delete(conversation.id));
    this.#channel.postMessage(conversation.id);
  }

  /** The trace of an answer as JSON, or undefined. */
  trace(nodeId) {
    return settled(this.#of("traces").get(nodeId));
  }

  saveTrace(nodeId, trace) {
    return written(this.#of("traces", "readwrite").put(trace, nodeId));
  }

  async removeTraces(nodeIds) {
    const traces = this.#of("traces", "readwrite");
    for (const request of nodeIds.map((id) => traces.delete(id)).slice(-1)) await written(request);
  }

  /** Calls back with the id of a conversation that another tab saved or removed. */
  onChange(callback) {
    this.#channel.onmessage = (event) => callback(event.data);
  }
}
