// Where conversations live: this browser's IndexedDB. Traces are kept apart, since they are large and rarely read.
// Single words, a key or a theme, live in its other storages.

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

  /** All conversations that can be read, in no order. */
  async conversations() {
    const ids = await settled(this.#of("conversations").getAllKeys());
    const reads = await Promise.allSettled(ids.map((id) => this.conversation(id))); // getAll would fail as a whole
    return reads.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
  }

  async conversation(id) {
    return settled(this.#of("conversations").get(id));
  }

  /** takeIn(kept) is called first, with what is stored: another tab may have saved the same conversation meanwhile. */
  async save(conversation, takeIn) {
    const conversations = this.#of("conversations", "readwrite");
    const kept = await settled(conversations.get(conversation.id));
    if (kept?.nodes) takeIn(kept);
    await written(conversations.put(conversation, conversation.id));
  }

  /** Removes a conversation and the traces of these nodes: all or nothing. */
  async remove(conversation, nodeIds) {
    const transaction = this.#database.transaction(STORES, "readwrite");
    for (const id of nodeIds) transaction.objectStore("traces").delete(id);
    await written(transaction.objectStore("conversations").delete(conversation.id));
    this.tell(conversation, []);
  }

  /** The trace of an answer as JSON, or undefined. */
  trace(nodeId) {
    return settled(this.#of("traces").get(nodeId));
  }

  saveTrace(nodeId, trace) {
    return written(this.#of("traces", "readwrite").put(trace, nodeId));
  }

  /** Tells other tabs that a conversation was saved or removed. writing: ids of its answers on their way in this tab. */
  tell({ id }, writing) {
    this.#channel.postMessage({ id, writing });
  }

  /** Calls back with what another tab told: {id, writing}. */
  onChange(callback) {
    this.#channel.onmessage = (event) => callback(event.data);
  }
}

/** A word in "sessionStorage" or "localStorage"; where the browser blocks them, it lasts as long as the page. */
export class Word {
  #area;
  #name;
  #value = null;

  constructor(area, name) {
    this.#area = area;
    this.#name = name;
    try {
      this.#value = window[area].getItem(name);
    } catch {
      // blocked
    }
  }

  get value() {
    return this.#value;
  }

  set value(value) {
    this.#value = value;
    try {
      window[this.#area].setItem(this.#name, value);
    } catch {
      // blocked, or full
    }
  }
}
