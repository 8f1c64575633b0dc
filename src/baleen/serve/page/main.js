// The page: what is shown, what runs, and who is told.

import { Answer } from "./answer.js";
import { Api } from "./api.js";
import { add, exportText, importText, newConversation, newId, pathTo, show, shownPath } from "./conversation.js";
import { byId, download, element, icon, toast } from "./dom.js";
import { count, parameters } from "./figures.js";
import { listenForKeys } from "./keys.js";
import { listenForCopies } from "./markdown.js";
import { Mixture } from "./mixture.js";
import { showSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";
import { Trace } from "./trace.js";

const NEAR_END = 80; // pixels
const SAVE_EVERY = 1000; // ms, of an answer on its way
const STARTERS = ["Hi, how are you?", "What did you do today?", "Tell me a story", "What can you do?"];

const state = {
  store: null,
  models: [],
  conversations: new Map(),
  current: newConversation(),
  running: new Map(), // id of the node -> Answer
  traces: new Map(), // id of the node -> Trace, or null if it has none
  inspected: null,
  panel: null, // "settings", "mixture" or null
};

const api = new Api(askForKey);
const scroller = byId("scroller");
const prompt = byId("prompt");
const mixture = new Mixture(byId("panel-body"));
const thread = new Thread(byId("thread"), {
  render: (text) => api.render(text),
  edit: (node, text) => send(text, node.parent),
  regenerate: (node) => answer(node.parent),
  show: (node) => (show(state.current, node), save(state.current), draw()),
  inspect: (node) => (state.panel === "mixture" && state.inspected === node ? closePanel() : openMixture(node)),
  traceOf: (node) => state.traces.get(node.id) ?? null,
  isRunning: (conversation) => Boolean(runningIn(conversation)),
  speedOf: (node) => state.running.get(node.id)?.speed ?? 0,
  announce,
});
const sidebar = new Sidebar({
  open: (conversation) => (open(conversation), closeSidebar()),
  rename: (conversation, title) => ((conversation.title = title), save(conversation)),
  exportOne: (conversation) => exportAll([conversation]),
  remove,
});

// --- what a person does

/** Adds a message and asks for its answer. */
function send(text, parent = state.current.leaf) {
  if (!modelOfCurrent()) return toast("No model is there to answer: is the server running?");
  const node = add(state.current, parent, "user", { content: text });
  state.conversations.set(state.current.id, state.current);
  answer(node.id);
}

function answer(parent) {
  const [conversation, model] = [state.current, modelOfCurrent()];
  const node = add(conversation, parent, "assistant", { reasoning: "", model: model.id, state: "running" });
  const running = new Answer(conversation, node, model);
  state.running.set(node.id, running);
  state.traces.set(node.id, running.trace);
  save(conversation);
  location.hash = conversation.id;
  draw();
  toEnd();
  announce("Answering");
  if (state.panel === "mixture") openMixture(node, false);
  let saved = performance.now();
  running.addEventListener("change", () => {
    if (conversation === state.current) follow(() => thread.update(node));
    if (state.inspected === node && state.panel === "mixture") scheduleMixture();
    if (performance.now() - saved > SAVE_EVERY) (saved = performance.now()), state.store?.save(conversation);
  });
  running.addEventListener("end", () => finish(running));
  running.run(api);
}

async function finish({ conversation, node, trace }) {
  state.running.delete(node.id);
  conversation.updated = Date.now();
  if (!trace.tokens.length) state.traces.set(node.id, null);
  else await state.store?.saveTrace(node.id, trace.toJSON());
  save(conversation);
  if (state.inspected === node && state.panel === "mixture") mixture.update();
  if (conversation !== state.current) return;
  draw();
  await follow(() => thread.update(node));
  announce(node.error ?? `${node.content || "An empty answer"}${node.state === "stopped" ? " Stopped." : ""}`);
}

const runningIn = (conversation) => [...state.running.values()].find((answer) => answer.conversation === conversation);

function fresh() {
  const { model, system, sampling, thinking } = state.current;
  open(newConversation({ model, system, sampling, thinking }));
  closeSidebar();
  prompt.focus();
}

async function open(conversation) {
  state.current = conversation;
  location.hash = conversation.leaf ? conversation.id : "";
  await loadTraces(conversation);
  if (state.current !== conversation) return;
  if (state.panel === "settings") openSettings(false);
  if (state.panel === "mixture") lastAnswer() ? openMixture(lastAnswer(), false) : closePanel();
  draw();
  toEnd();
}

async function loadTraces(conversation) {
  const missing = Object.values(conversation.nodes).filter((node) => node.role === "assistant" && !state.traces.has(node.id));
  await Promise.all(missing.map(async ({ id }) => state.traces.set(id, Trace.from(await state.store?.trace(id)))));
}

/** Removes a conversation; until the toast goes, it can be had back. */
async function remove(conversation) {
  const answers = Object.values(conversation.nodes).filter((node) => node.role === "assistant").map((node) => node.id);
  runningIn(conversation)?.stop();
  await loadTraces(conversation);
  state.conversations.delete(conversation.id);
  await state.store?.remove(conversation);
  await state.store?.removeTraces(answers);
  if (conversation === state.current) fresh();
  else draw();
  const bringBack = async () => {
    state.conversations.set(conversation.id, conversation);
    for (const id of answers) if (state.traces.get(id)) await state.store?.saveTrace(id, state.traces.get(id).toJSON());
    save(conversation);
    open(conversation);
  };
  toast("Conversation deleted", { label: "Undo", run: bringBack });
}

async function exportAll(conversations) {
  await Promise.all(conversations.map(loadTraces));
  const traces = new Map([...state.traces].filter(([, trace]) => trace).map(([id, trace]) => [id, trace.toJSON()]));
  const day = new Date().toISOString().slice(0, 10);
  download(`baleen-${conversations.length === 1 ? "conversation" : "conversations"}-${day}.json`, exportText(conversations, traces));
}

/** Adds what the file holds. A conversation that is here already, but different, is added beside it. */
async function importFile(file) {
  try {
    const read = importText(await file.text());
    let added = 0;
    for (const { conversation, traces } of read) {
      const here = state.conversations.get(conversation.id);
      if (here && here.updated === conversation.updated) continue;
      if (here) conversation.id = newId();
      for (const id of Object.keys(conversation.nodes)) {
        const trace = Trace.from(traces[id]);
        if (trace && !state.traces.get(id)) state.traces.set(id, trace), await state.store?.saveTrace(id, trace.toJSON());
      }
      state.conversations.set(conversation.id, conversation);
      save(conversation);
      added++;
    }
    toast(`${count(added)} of ${count(read.length)} conversations added${added < read.length ? "; the others are here already" : ""}`);
  } catch (error) {
    toast(`Nothing was imported: ${error.message}.`);
  }
}

// --- what is kept

function save(conversation) {
  conversation.updated ||= Date.now();
  if (state.conversations.has(conversation.id)) state.store?.save(conversation).catch((error) => toast(`This browser could not save the conversation: ${error.message}`));
  drawList();
}

async function load() {
  try {
    state.store = await Store.open();
    navigator.storage?.persist?.();
  } catch {
    toast("This browser stores nothing here: conversations last until the page is closed.", null, 20);
    return;
  }
  for (const conversation of await state.store.conversations()) {
    for (const node of Object.values(conversation.nodes)) if (node.state === "running") node.state = "stopped"; // the page was closed in its midst
    state.conversations.set(conversation.id, conversation);
  }
  state.store.onChange(async (id) => {
    const saved = await state.store.conversation(id);
    if (runningIn(state.conversations.get(id))) return;
    if (saved) state.conversations.set(id, saved);
    else state.conversations.delete(id);
    if (id === state.current.id && saved) open(saved);
    else drawList();
  });
}

// --- what is shown

function draw() {
  thread.show(state.current);
  byId("thread").classList.toggle("empty", !state.current.leaf);
  drawWelcome();
  drawList();
  drawComposer();
  drawModel();
  document.title = state.current.title ? `${state.current.title} – Baleen` : "Baleen";
}

function drawList() {
  sidebar.show([...state.conversations.values()], state.current);
}

function drawWelcome() {
  byId("welcome")?.remove();
  if (state.current.leaf) return;
  const starters = STARTERS.map((text) => element("button", { type: "button", onclick: () => send(text) }, text));
  const logo = document.querySelector("#sidebar .logo").cloneNode(true);
  byId("thread").append(element("div", { id: "welcome" }, logo, element("p", { class: "big" }, "Say something."), element("div", { class: "starters" }, ...starters)));
}

function drawComposer() {
  const running = Boolean(runningIn(state.current));
  const button = byId("send");
  button.replaceChildren(icon(running ? "stop" : "send"));
  button.setAttribute("aria-label", running ? "Stop" : "Send");
  button.title = running ? "Stop (Escape)" : "Send (Enter)";
  button.disabled = !running && !prompt.value.trim();
}

const modelOfCurrent = () => state.models.find((model) => model.id === state.current.model) ?? state.models[0];

function drawModel() {
  const model = modelOfCurrent();
  byId("model").value = model?.id ?? "";
  const shape = model?.baleen;
  byId("model-facts").textContent = shape
    ? `${parameters(shape.parameters)} parameters, ${parameters(shape.active_parameters)} at work · ${count(model.max_model_len)} tokens of context`
    : "";
}

const nearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;

/** Lets the page grow, and stays at its end if it was there. */
async function follow(grow) {
  const stay = nearEnd();
  await grow();
  if (stay) toEnd();
}

const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);

/** Told to a screen reader: once at the beginning of an answer and once, whole, at its end; not word by word. */
function announce(text) {
  byId("announcer").textContent = text;
}

const resize = () => {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
};

// --- panels

let opener = null;

function openPanel(name, title, takeFocus) {
  if (takeFocus) opener = document.activeElement;
  state.panel = name;
  byId("panel").hidden = false;
  byId("panel").dataset.view = name;
  byId("panel-title").textContent = title;
  byId("open-settings").setAttribute("aria-expanded", name === "settings");
  byId("open-mixture").setAttribute("aria-expanded", name === "mixture");
  if (takeFocus) byId("panel-title").focus();
}

function closePanel() {
  if (!state.panel) return;
  state.panel = null;
  byId("panel").hidden = true;
  byId("panel-body").replaceChildren();
  byId("open-settings").setAttribute("aria-expanded", "false");
  byId("open-mixture").setAttribute("aria-expanded", "false");
  (opener?.isConnected ? opener : prompt).focus();
}

function openSettings(takeFocus = true) {
  openPanel("settings", "Settings", takeFocus);
  const { current } = state;
  showSettings(byId("panel-body"), {
    conversation: current,
    model: modelOfCurrent(),
    change: (apply) => (apply(), save(current)),
    theme: document.documentElement.dataset.theme ?? "",
    setTheme,
  });
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("baleen.theme", theme);
  repaint();
}

const lastAnswer = () => shownPath(state.current).findLast((node) => state.traces.get(node.id));

function openMixture(node, takeFocus = true) {
  if (!node) return toast("The mixture shows how an answer was made: ask something first.");
  state.inspected = node;
  openPanel("mixture", "The mixture at work", takeFocus);
  mixture.show(node, state.traces.get(node.id));
}

let mixtureTimer = null;
function scheduleMixture() {
  mixtureTimer ??= setTimeout(() => {
    mixtureTimer = null;
    if (state.panel === "mixture") mixture.update();
  }, 150);
}

function repaint() {
  if (state.panel === "mixture") mixture.paint();
  document.querySelectorAll(".fingerprint").forEach((button) => (button.parentElement.dataset.key = ""));
  thread.refresh();
}

function openSidebar() {
  document.body.classList.add("sidebar-open");
  byId("backdrop").hidden = false;
  byId("open-sidebar").setAttribute("aria-expanded", "true");
  byId("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("sidebar-open")) return;
  document.body.classList.remove("sidebar-open");
  byId("backdrop").hidden = true;
  byId("open-sidebar").setAttribute("aria-expanded", "false");
  byId("open-sidebar").focus();
}

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    byId("key-form").addEventListener("submit", (event) => (event.preventDefault(), dialog.close(), resolve(byId("key").value)), { once: true });
  });
}

const onPhone = () => matchMedia("(max-width: 56rem)").matches;

// --- wiring

function listen() {
  const icons = { "close-sidebar": "close", "open-sidebar": "list", "open-mixture": "mixture", "open-settings": "settings", "open-help": "help", "close-panel": "close", "to-end": "end" };
  for (const [id, name] of Object.entries(icons)) {
    byId(id).append(icon(name));
    byId(id).title = byId(id).getAttribute("aria-label");
  }
  byId("new").prepend(icon("add"));
  byId("new").addEventListener("click", fresh);
  byId("open-sidebar").addEventListener("click", openSidebar);
  byId("close-sidebar").addEventListener("click", closeSidebar);
  byId("backdrop").addEventListener("click", closeSidebar);
  byId("open-settings").addEventListener("click", () => (state.panel === "settings" ? closePanel() : openSettings()));
  byId("open-mixture").addEventListener("click", () => (state.panel === "mixture" ? closePanel() : openMixture(lastAnswer())));
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  byId("close-panel").addEventListener("click", closePanel);
  byId("export-all").addEventListener("click", () => exportAll([...state.conversations.values()]));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async ({ target }) => {
    if (target.files[0]) await importFile(target.files[0]);
    target.value = "";
  });
  byId("model").addEventListener("change", ({ target }) => {
    state.current.model = target.value;
    save(state.current);
    drawModel();
    if (state.panel === "settings") openSettings(false);
  });
  byId("to-end").addEventListener("click", toEnd);
  scroller.addEventListener("scroll", () => (byId("to-end").hidden = nearEnd()), { passive: true });
  prompt.addEventListener("input", () => (resize(), drawComposer()));
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), byId("composer").requestSubmit();
    if (event.key === "ArrowUp" && !prompt.value && !runningIn(state.current)) event.preventDefault(), thread.editLast();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const running = runningIn(state.current);
    const text = prompt.value.trim();
    if (running && document.activeElement !== prompt) running.stop();
    else if (!running && text) {
      prompt.value = "";
      resize();
      send(text);
    }
  });
  addEventListener("hashchange", () => {
    const wanted = state.conversations.get(location.hash.slice(1));
    if (wanted && wanted !== state.current) open(wanted);
  });
  addEventListener("resize", () => state.panel === "mixture" && mixture.paint());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  addEventListener("pagehide", () => state.running.forEach(({ conversation }) => state.store?.save(conversation)));
  listenForCopies(byId("thread"), announce);
  listenForKeys({
    search: () => (onPhone() && openSidebar(), sidebar.focusSearch()),
    fresh,
    mixture: () => openMixture(lastAnswer()),
    settings: () => openSettings(),
    help: () => byId("help").showModal(),
    escape: () => {
      if (document.body.classList.contains("sidebar-open")) closeSidebar();
      else if (runningIn(state.current)) runningIn(state.current).stop();
      else closePanel();
    },
  });
}

async function begin() {
  listen();
  await load();
  const wanted = state.conversations.get(location.hash.slice(1));
  if (wanted) await open(wanted);
  else draw();
  if (!onPhone()) prompt.focus();
  try {
    state.models = await api.models();
    byId("model").replaceChildren(...state.models.map((model) => element("option", { value: model.id }, model.id)));
    draw();
  } catch (error) {
    toast(error.message, { label: "Try again", run: () => location.reload() }, 600);
  }
}

begin();
