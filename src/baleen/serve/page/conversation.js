// A conversation is a tree of messages. To edit or regenerate adds a sibling; nothing is ever overwritten.
//
// conversation: {id, title, created, updated, model, system, sampling: {name: number}, thinking: true|false|null,
//                leaf: id of the last message shown, or null, nodes: {id: node}}
// node: {id, parent: id|null, role: "user"|"assistant", created, content, and of an answer: reasoning, thinkingSeconds,
//        model, state: "running"|"done"|"length"|"stopped"|"failed", error, dropped, stats}

const FORMAT = "baleen-conversations";
const VERSION = 1;
const ROLES = ["user", "assistant"];
const STATES = ["done", "length", "stopped", "failed"];

// crypto.randomUUID is there on https and localhost only.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation({ model = null, system = "", sampling = {}, thinking = null } = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model, system, sampling: { ...sampling }, thinking, leaf: null, nodes: {} };
}

/** Adds a message under `parent` and makes it the last one shown. */
export function add(conversation, parent, role, fields) {
  const node = { id: newId(), parent, role, created: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = node.created;
  if (!conversation.title && role === "user") conversation.title = titleOf(node.content);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 60).replace(/\s+\S*$/, "")}…` : line;
}

/** The messages from the first to the one with this id. */
function pathTo(conversation, id) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) path.unshift(node);
  return path;
}

export const shownPath = (conversation) => pathTo(conversation, conversation.leaf);

const childrenOf = (conversation, id) =>
  Object.values(conversation.nodes).filter((node) => node.parent === id).sort((a, b) => a.created - b.created);

/** The versions of a message, itself among them, oldest first. */
export const versionsOf = (conversation, node) => childrenOf(conversation, node.parent);

/** Shows this version of a message and what last followed on it. */
export function show(conversation, node) {
  let last = node;
  for (let next = [last]; next.length; next = childrenOf(conversation, last.id)) last = next.at(-1);
  conversation.leaf = last.id;
}

/** What the model is asked: the system prompt, and every message down to `id` that says anything. */
export function messagesFor(conversation, id) {
  const turns = pathTo(conversation, id).filter((node) => node.content).map(({ role, content }) => ({ role, content }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...turns] : turns;
}

/** Where a search finds its words: {title} or {snippet: [before, match, after]}, or null. */
export function find(conversation, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted || conversation.title.toLowerCase().includes(wanted)) return {};
  for (const { content } of Object.values(conversation.nodes)) {
    const at = content.toLowerCase().indexOf(wanted);
    if (at >= 0) {
      const end = at + wanted.length;
      return { snippet: [content.slice(Math.max(0, at - 24), at), content.slice(at, end), content.slice(end, end + 40)] };
    }
  }
  return null;
}

/** A copy with ids of its own, and the traces by them: it may be removed without the one it is a copy of. */
export function copyOf({ conversation, traces }) {
  const ids = new Map(Object.keys(conversation.nodes).map((id) => [id, newId()]));
  const nodes = Object.values(conversation.nodes).map((node) => ({ ...node, id: ids.get(node.id), parent: ids.get(node.parent) ?? null }));
  return {
    conversation: { ...conversation, id: newId(), leaf: ids.get(conversation.leaf) ?? null, nodes: Object.fromEntries(nodes.map((node) => [node.id, node])) },
    traces: Object.fromEntries([...ids].filter(([id]) => id in traces).map(([id, own]) => [own, traces[id]])),
  };
}

/** The text of an export. traces: Map from the id of an answer to its trace as JSON. */
export const exportText = (conversations, traces) =>
  JSON.stringify({
    format: FORMAT,
    version: VERSION,
    exported: new Date().toISOString(),
    conversations: conversations.map((c) => ({ ...c, traces: Object.fromEntries(Object.keys(c.nodes).filter((id) => traces.has(id)).map((id) => [id, traces.get(id)])) })),
  }, null, 1);

/** Reads an export: a list of {conversation, traces}. Throws an Error that says what is wrong; takes all of it or nothing. */
export function importText(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON: choose one that “Export” wrote");
  }
  if (read?.format !== FORMAT || !Array.isArray(read.conversations)) throw new Error("the file holds no Baleen conversations: choose one that “Export” wrote");
  if (read.version !== VERSION) throw new Error(`the file is of version ${read.version}, this page reads version ${VERSION}`);
  return read.conversations.map((raw, index) => {
    try {
      return { conversation: checked(raw), traces: isRecord(raw.traces) ? raw.traces : {} };
    } catch (error) {
      throw new Error(`conversation ${index + 1} of the file is damaged: ${error.message}`);
    }
  });
}

const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** Reads a conversation out of a file or the store; an answer that was on its way when it was kept counts as stopped.
 * Throws an Error that says what is wrong with it. */
export function checked(raw) {
  const need = (condition, what) => {
    if (!condition) throw new Error(what);
  };
  need(isRecord(raw) && isRecord(raw.nodes), "it has no messages");
  const text = (value, what) => (need(typeof value === "string", `${what} is not text`), value);
  const time = (value) => (need(Number.isFinite(value), "a time is missing"), value);
  const id = (value) => (need(/^[0-9a-f]{24}$/.test(value), "an id is malformed"), value);
  const nodes = {};
  for (const node of Object.values(raw.nodes)) {
    need(isRecord(node) && ROLES.includes(node.role), "a message has no role");
    const kept = { id: id(node.id), parent: node.parent === null ? null : id(node.parent), role: node.role, created: time(node.created), content: text(node.content, "a message") };
    if (node.role === "assistant") {
      kept.state = STATES.includes(node.state) ? node.state : "stopped";
      kept.reasoning = text(node.reasoning ?? "", "a thought");
      kept.model = text(node.model ?? "", "a model's name");
      if (node.error != null) kept.error = text(node.error, "an error");
      for (const name of ["thinkingSeconds", "dropped"]) if (Number.isFinite(node[name])) kept[name] = node[name];
      if (isRecord(node.stats)) kept.stats = Object.fromEntries(Object.entries(node.stats).filter(([, v]) => ["number", "string"].includes(typeof v)));
    }
    nodes[kept.id] = kept;
  }
  for (const node of Object.values(nodes)) {
    const seen = new Set();
    for (let at = node; at.parent !== null; at = nodes[at.parent]) {
      need(nodes[at.parent] && !seen.has(at.id), "its messages are no tree");
      seen.add(at.id);
    }
  }
  need(raw.leaf === null ? !Object.keys(nodes).length : nodes[raw.leaf], "its last message is missing");
  const sampling = Object.fromEntries(Object.entries(isRecord(raw.sampling) ? raw.sampling : {}).filter(([, v]) => Number.isFinite(v)));
  return {
    id: id(raw.id), title: text(raw.title, "the title"), created: time(raw.created), updated: time(raw.updated),
    model: raw.model == null ? null : text(raw.model, "the model's name"), system: text(raw.system ?? "", "the system prompt"),
    sampling, thinking: typeof raw.thinking === "boolean" ? raw.thinking : null, leaf: raw.leaf, nodes,
  };
}
