// The page: what is shown, what runs, and who is told.

import { Answer } from "./answer.js";
import { Api, ServerError } from "./api.js";
import { add, newConversation, show, shownPath } from "./conversation.js";
import { byId, composing, download, element, icon, isDone, toast } from "./dom.js";
import { count, parameters } from "./figures.js";
import { listenForKeys } from "./keys.js";
import { Library } from "./library.js";
import { listenForCopies } from "./markdown.js";
import { Mixture } from "./mixture.js";
import { Panel } from "./panel.js";
import { Scroller } from "./scroller.js";
import { showSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Word } from "./store.js";
import { Thread } from "./thread.js";

const SAVE_EVERY = 1000; // ms, of an answer on its way
const PAINT_EVERY = 150; // ms, of its mixture
const STARTERS = ["Hi, how are you?", "What did you do today?", "Tell me a story", "What can you do?"];

const api = new Api(askForKey);
const chosenTheme = new Word("localStorage", "baleen.theme");
const library = new Library();
const panel = new Panel();
const prompt = byId("prompt");
const narrow = matchMedia("(max-width: 56rem)"); // the list of conversations covers the page
const scroller = new Scroller(byId("scroller"), byId("thread"), byId("to-end"));
const mixture = new Mixture(panel.body);
const thread = new Thread(byId("thread"), {
  render: (text) => api.render(text),
  edit: (node, text) => send(text, node.parent),
  regenerate: (node) => isFree() && answer(node.parent),
  show: (node) => (show(current, node), save(current), draw()),
  inspect: (node) => (panel.view === "mixture" && inspected === node ? panel.close() : openMixture(node)),
  traceOf: (node) => library.trace(node),
  isRunning: (conversation) => Boolean(runningIn(conversation)),
  speedOf: (node) => running.get(node.id)?.speed ?? 0,
  announce,
});
const sidebar = new Sidebar({
  open: (conversation) => (open(conversation), closeSidebar()),
  rename: (conversation, title) => ((conversation.title = title), save(conversation), drawTitle()),
  exportOne: (conversation) => exportAll([conversation]),
  remove,
});
const running = new Map(); // id of an answer's node -> Answer

let models = [];
let current = newConversation();
let inspected = null; // the answer whose mixture is shown

// --- what a person does

/** Whether a question can be asked now; if not, the person is told why. */
function isFree() {
  if (!model()) toast("No model is there to answer: is the server running?");
  else if (runningIn(current)) toast("Stop the answer first.");
  else return true;
  return false;
}

/** Adds a message and asks for its answer. Returns whether it could. */
function send(text, parent = current.leaf) {
  if (!isFree()) return false;
  answer(add(current, parent, "user", { content: text }).id);
  return true;
}

function answer(parent) {
  const conversation = current;
  const node = add(conversation, parent, "assistant", { reasoning: "", model: model().id, state: "running" });
  const answer = new Answer(conversation, node, model());
  running.set(node.id, answer);
  library.begin(node, answer.trace);
  save(conversation);
  location.hash = conversation.id;
  draw();
  scroller.toEnd();
  announce("Answering");
  if (panel.view === "mixture") openMixture(node, false);
  let saving = null;
  const saveSoon = () => {
    saving ??= setTimeout(() => {
      saving = null;
      if (running.has(node.id) && library.get(conversation.id)) save(conversation, false);
    }, SAVE_EVERY);
  };
  answer.addEventListener("change", () => {
    if (conversation === current) thread.update(node);
    if (inspected === node) repaintSoon();
    saveSoon();
  });
  answer.addEventListener("end", () => finish(answer));
  answer.run(api);
}

async function finish({ conversation, node, trace }) {
  running.delete(node.id);
  conversation.updated = Date.now();
  if (!trace.tokens.length) library.setTrace(node, null);
  if (library.get(conversation.id)) save(conversation, true, [node]); // else it was removed meanwhile
  if (conversation !== current) return;
  if (inspected === node && panel.view === "mixture") mixture.update();
  draw();
  await thread.update(node);
  announce(node.error ?? `${node.content || "An empty answer."}${node.state === "stopped" ? " Stopped." : ""}`);
}

const runningIn = (conversation) => [...running.values()].find((answer) => answer.conversation === conversation);

function fresh() {
  const { model, system, sampling, thinking } = current;
  open(newConversation({ model, system, sampling, thinking }));
  closeSidebar();
  prompt.focus();
}

async function open(conversation) {
  current = conversation;
  location.hash = conversation.leaf ? conversation.id : "";
  await library.loadTraces(conversation);
  if (current !== conversation) return;
  if (panel.view === "settings") openSettings(false);
  if (panel.view === "mixture") lastTraced() ? openMixture(lastTraced(), false) : panel.close();
  draw();
  scroller.toEnd();
}

async function remove(conversation) {
  runningIn(conversation)?.stop();
  const bringBack = await library.remove(conversation).catch(couldNot("delete the conversation"));
  if (!bringBack) return drawList();
  if (conversation === current) fresh();
  else drawList();
  const undo = async () => (await bringBack().catch(couldNot("save the conversation")), open(conversation));
  toast("Conversation deleted", { label: "Undo", run: undo });
}

async function exportAll(conversations) {
  const name = conversations.length === 1 ? "conversation" : "conversations";
  const text = await library.exported(conversations).catch(couldNot(`export the ${name}`));
  if (text) download(`baleen-${name}-${new Date().toISOString().slice(0, 10)}.json`, text);
}

async function importFile(file) {
  try {
    const { added, of } = await library.import(await file.text());
    toast(`${count(added)} of ${count(of)} conversations added${added < of ? "; the others are here already" : ""}.`);
    drawList();
  } catch (error) {
    const fate = error instanceof DOMException ? "The import ended early" : "Nothing was imported"; // by the store, or the file
    toast(`${fate}: ${error.message}.`);
    drawList();
  }
}

/** answers: those whose traces are to be kept, too. */
async function save(conversation, listed = true, answers = []) {
  await library.save(conversation, answers).catch(couldNot("save the conversation"));
  if (listed) drawList();
}

/** Another tab changed or removed a conversation. */
async function changedElsewhere(id) {
  const changed = library.get(id);
  if (!changed || id !== current.id) return drawList();
  if (changed !== current) return open(changed); // it was removed, and brought back
  await library.loadTraces(changed);
  draw();
}

/** Tells what went wrong in the browser's store. */
const couldNot = (what) => (error) => toast(`This browser could not ${what}: ${error.message}`);

// --- what is shown

function draw() {
  thread.show(current);
  drawWelcome();
  drawList();
  drawComposer();
  drawModel();
  drawTitle();
}

const drawList = () => sidebar.show(library.all, current);

const drawTitle = () => (document.title = current.title ? `${current.title} – Baleen` : "Baleen");

function drawWelcome() {
  byId("welcome")?.remove();
  byId("thread").classList.toggle("empty", !current.leaf);
  if (current.leaf) return;
  const starters = STARTERS.map((text) => element("button", { type: "button", onclick: () => send(text) }, text));
  const logo = document.querySelector("#sidebar .logo").cloneNode(true);
  byId("thread").append(element("div", { id: "welcome" }, logo, element("p", { class: "big" }, "Say something."), element("div", { class: "starters" }, ...starters)));
}

function drawComposer() {
  const isRunning = Boolean(runningIn(current));
  const button = byId("send");
  button.replaceChildren(icon(isRunning ? "stop" : "send"));
  button.setAttribute("aria-label", isRunning ? "Stop" : "Send");
  button.title = isRunning ? "Stop (Escape)" : "Send (Enter)";
  button.disabled = !isRunning && !prompt.value.trim();
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
}

const model = () => models.find(({ id }) => id === current.model) ?? models[0];

function drawModel() {
  if (!model()) return;
  const { id, max_model_len: context, baleen: shape } = model();
  byId("model").value = id;
  byId("model-facts").textContent =
    `${parameters(shape.parameters)} parameters, ${parameters(shape.active_parameters)} at work · ${count(context)} tokens of context`;
}

/** Told to a screen reader: once at the beginning of an answer and once, whole, at its end; not word by word. */
function announce(text) {
  byId("announcer").textContent = text;
}

function openSettings(takeFocus = true) {
  panel.open("settings", "Settings", takeFocus);
  const conversation = current;
  const theme = document.documentElement.dataset.theme ?? "";
  const change = (apply) => (apply(), conversation.leaf && save(conversation));
  showSettings(panel.body, { conversation, model: model(), change, theme, setTheme });
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  chosenTheme.value = theme;
  repaint();
}

const lastTraced = () => shownPath(current).findLast((node) => library.trace(node));

function openMixture(node, takeFocus = true) {
  if (!node) return toast("The mixture shows how an answer was made: ask something first.");
  inspected = node;
  panel.open("mixture", "The mixture at work", takeFocus);
  mixture.show(node, library.trace(node));
}

let waiting = null;
function repaintSoon() {
  waiting ??= setTimeout(() => {
    waiting = null;
    if (panel.view === "mixture") mixture.update();
  }, PAINT_EVERY);
}

/** The theme changed: what is painted, rather than styled, is painted anew. */
function repaint() {
  if (panel.view === "mixture") mixture.paint();
  thread.repaint();
}

function openSidebar() {
  setSidebar(true);
  byId("close-sidebar").focus();
}

function closeSidebar() {
  if (!document.body.classList.contains("sidebar-open")) return;
  setSidebar(false);
  byId("open-sidebar").focus();
}

function setSidebar(isOpen) {
  document.body.classList.toggle("sidebar-open", isOpen);
  panel.shade();
  byId("backdrop").hidden = !isOpen;
  byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
}

function askForKey(again) {
  const dialog = byId("key-dialog");
  byId("key").value = "";
  byId("key-note").textContent = again ? "That key was refused." : "Kept until this tab is closed.";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    byId("key-form").onsubmit = (event) => (event.preventDefault(), resolve(byId("key").value), dialog.close());
    // The event comes a frame after the closing, when the dialog may be asking again.
    dialog.onclose = () => dialog.open || reject(new ServerError("The server asks for a key, and none was given.", 401));
  });
}

// --- wiring

const ICONS = {
  "close-sidebar": "close", "open-sidebar": "list", "open-mixture": "mixture", "open-settings": "settings",
  "open-help": "help", "close-panel": "close", "to-end": "end",
};

function listen() {
  for (const [id, name] of Object.entries(ICONS)) {
    byId(id).append(icon(name));
    byId(id).title = byId(id).getAttribute("aria-label");
  }
  byId("new").prepend(icon("add"));
  const clicks = {
    skip: (event) => (event.preventDefault(), prompt.focus()), // the address names the conversation
    new: fresh,
    "open-sidebar": openSidebar,
    "close-sidebar": closeSidebar,
    backdrop: closeSidebar,
    "open-settings": () => (panel.view === "settings" ? panel.close() : openSettings()),
    "open-mixture": () => (panel.view === "mixture" ? panel.close() : openMixture(lastTraced())),
    "open-help": () => byId("help").open || byId("help").showModal(),
    "close-panel": () => panel.close(),
    "export-all": () => exportAll(library.all),
    import: () => byId("import-file").click(),
  };
  for (const [id, run] of Object.entries(clicks)) byId(id).addEventListener("click", run);
  byId("import-file").addEventListener("change", async ({ target }) => {
    if (target.files[0]) await importFile(target.files[0]);
    target.value = "";
  });
  byId("model").addEventListener("change", ({ target }) => {
    current.model = target.value;
    if (current.leaf) save(current);
    drawModel();
    if (panel.view === "settings") openSettings(false);
  });
  listenToComposer();
  addEventListener("hashchange", () => {
    const wanted = library.get(location.hash.slice(1));
    if (wanted && wanted !== current) open(wanted);
  });
  addEventListener("resize", () => panel.view === "mixture" && mixture.paint());
  narrow.addEventListener("change", closeSidebar);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  listenForCopies(byId("thread"), announce);
  listenForKeys({
    search: () => (narrow.matches && openSidebar(), sidebar.focusSearch()),
    fresh,
    mixture: clicks["open-mixture"],
    settings: clicks["open-settings"],
    help: clicks["open-help"],
    escape,
  });
}

function listenToComposer() {
  prompt.addEventListener("input", drawComposer);
  prompt.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    if (isDone(event)) event.preventDefault(), submit();
    if (event.key === "ArrowUp" && !prompt.value && !runningIn(current)) event.preventDefault(), thread.editLast();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (runningIn(current)) runningIn(current).stop();
    else submit();
  });
}

function submit() {
  const text = prompt.value.trim();
  if (!text || !send(text)) return;
  prompt.value = "";
  drawComposer();
}

/** Closes what is open, the uppermost first; then it stops the answer. */
function escape() {
  if (document.body.classList.contains("sidebar-open")) closeSidebar();
  else if (document.activeElement === byId("search")) prompt.focus();
  else if (panel.view) panel.close();
  else runningIn(current)?.stop();
}

async function begin() {
  listen();
  if (await library.load()) library.onChange(changedElsewhere);
  else toast("This browser stores nothing here: conversations last until the page is closed.", null, 20);
  const wanted = library.get(location.hash.slice(1));
  if (wanted) await open(wanted);
  else draw();
  if (!narrow.matches) prompt.focus();
  try {
    models = await api.models();
    byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
    draw();
  } catch (error) {
    toast(error.message, { label: "Try again", run: () => location.reload() }, 600);
  }
}

begin();
