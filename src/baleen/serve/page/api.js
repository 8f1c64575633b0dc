// The server: models, answers as they are written, Markdown as HTML. Addresses are relative, so a proxy may put the
// page below a path of its own.

import { Word } from "./store.js";

/** What the server said: its message, its HTTP status (0 if it could not be reached) and its error's code. */
export class ServerError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export class Api {
  #askForKey;
  #asking = null;
  #key = new Word("sessionStorage", "baleen.key");

  /** askForKey: async () -> string, called when the server wants a key. */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /** [{id, max_model_len, baleen: {...}}] */
  async models() {
    const response = await this.#request("v1/models");
    return (await response.json()).data;
  }

  /** Markdown to HTML that is safe to show. */
  async render(text) {
    const response = await this.#request("render", { text });
    return (await response.json()).html;
  }

  /** Yields the chunks of a streamed chat completion. Throws ServerError where the stream breaks or says so. */
  async *chat(body, signal) {
    const request = { ...body, stream: true, baleen: { trace: true, fit: true } };
    const response = await this.#request("v1/chat/completions", request, signal);
    let rest = "";
    try {
      for await (const text of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
        const lines = (rest + text).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          if (!line.startsWith("data:")) continue;
          const data = line.slice(5).trim();
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw new ServerError(chunk.error.message, response.status, chunk.error.code);
          yield chunk;
        }
      }
    } catch (error) {
      if (error instanceof ServerError || error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server broke off.");
    }
    throw new ServerError("The server ended the answer without a word.");
  }

  async #request(path, body = null, signal = null) {
    const key = this.#key.value;
    const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, ...(body && { body: JSON.stringify(body) }) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server can’t be reached. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (this.#key.value === key) await this.#askOnce(key !== null); // else another request was given one
      return this.#request(path, body, signal);
    }
    const said = await response.json().then((json) => json.error ?? {}, () => ({}));
    throw new ServerError(said.message ?? `The server answered with status ${response.status}.`, response.status, said.code ?? null);
  }

  /** Requests that are refused meanwhile wait for the same key. */
  #askOnce(again) {
    this.#asking ??= this.#askForKey(again)
      .then((given) => (this.#key.value = given))
      .finally(() => (this.#asking = null));
    return this.#asking;
  }
}

// A stream is not an async iterator everywhere yet.
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
