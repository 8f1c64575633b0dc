// The messages of a conversation, from the first to the last one shown.

import { shownPath, versionsOf } from "./conversation.js";
import { composing, copy, element, iconButton, isDone } from "./dom.js";
import { count, duration, energy, money, share, speed } from "./figures.js";
import { paintSmall } from "./heatmap.js";
import { Markdown } from "./markdown.js";

export class Thread {
  #root;
  #actions;
  #views = new Map();
  #conversation = null;

  /** actions: {render, edit(node, text), which tells whether it was sent, regenerate(node), show(node), inspect(node),
   * traceOf(node), isRunning(conversation), speedOf(node), announce(text)} */
  constructor(root, actions) {
    this.#root = root;
    this.#actions = actions;
  }

  /** Puts this conversation on the page; what was there already is kept, a streaming answer above all. */
  show(conversation) {
    if (conversation !== this.#conversation) this.#views.clear();
    this.#conversation = conversation;
    const views = new Map();
    for (const node of shownPath(conversation)) {
      const make = () => (node.role === "user" ? new UserView(node, this.#actions) : new AnswerView(node, this.#actions));
      views.set(node.id, this.#views.get(node.id) ?? make());
    }
    this.#views = views;
    const wanted = [...views.values()].map((view) => view.root);
    [...this.#root.children].forEach((child) => wanted.includes(child) || child.remove());
    wanted.forEach((child, index) => this.#root.children[index] === child || this.#root.insertBefore(child, this.#root.children[index] ?? null));
    for (const view of views.values()) view.update(conversation);
  }

  /** The theme changed. */
  repaint() {
    for (const view of this.#views.values()) view.repaint?.();
  }

  /** The last bit of an answer came, or some of it. Resolves when it is on the page. */
  update(node) {
    return this.#views.get(node.id)?.update(this.#conversation);
  }

  /** Opens the last message of the person for editing. */
  editLast() {
    [...this.#views.values()].findLast((view) => view instanceof UserView)?.edit();
  }
}

/** ‹ 2/3 › where a message has versions. */
function versionPicker(conversation, node, actions) {
  const versions = versionsOf(conversation, node);
  if (versions.length < 2) return null;
  const at = versions.indexOf(node);
  const step = (name, label, target) => iconButton(name, label, () => actions.show(target), { disabled: !target });
  return element("span", { class: "versions", role: "group", "aria-label": `Version ${at + 1} of ${versions.length}` },
    step("previous", "Previous version", versions[at - 1]), `${at + 1}/${versions.length}`, step("next", "Next version", versions[at + 1]));
}

function copyButton(text, what, actions) {
  const button = iconButton("copy", `Copy ${what}`, async () => {
    await copy(text());
    actions.announce("Copied");
    button.replaceChildren(...iconButton("done", "").childNodes);
    setTimeout(() => button.replaceChildren(...iconButton("copy", "").childNodes), 1500);
  });
  return button;
}

/** Replaces the buttons only where they changed, so that focus stays. */
function putActions(box, key, make) {
  if (box.dataset.key === key) return;
  const label = box.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  box.dataset.key = key;
  box.replaceChildren(...make().filter(Boolean));
  if (label) [...box.querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === label)?.focus();
}

const versionKey = (conversation, node) => versionsOf(conversation, node).map(({ id }) => (id === node.id ? "*" : "-")).join("");

class UserView {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.bubble = element("div", { class: "bubble", dir: "auto" }, node.content);
    this.buttons = element("div", { class: "actions" });
    this.root = element("article", { class: "message user" }, element("h2", { class: "unseen" }, "You"), this.bubble, this.buttons);
  }

  update(conversation) {
    const { node, actions } = this;
    const running = actions.isRunning(conversation);
    putActions(this.buttons, versionKey(conversation, node) + running, () => [
      versionPicker(conversation, node, actions),
      iconButton("edit", "Edit message", () => this.edit(), { disabled: running }),
      copyButton(() => node.content, "message", actions),
    ]);
  }

  edit() {
    if (this.root.querySelector("form")) return;
    const area = element("textarea", { "aria-label": "Edit message", dir: "auto", rows: "1" });
    area.value = this.node.content;
    const close = () => {
      form.replaceWith(this.bubble);
      this.buttons.hidden = false;
      this.root.querySelector('[aria-label="Edit message"]')?.focus();
    };
    const save = () => {
      const text = area.value.trim();
      if (!text || text === this.node.content || this.actions.edit(this.node, text)) close();
    };
    const keys = (event) => {
      if (composing(event)) return;
      if (event.target === area && isDone(event)) event.preventDefault(), save();
      if (event.key === "Escape") event.stopPropagation(), close();
    };
    const form = element("form", { class: "bubble editing", onsubmit: (event) => (event.preventDefault(), save()), onkeydown: keys },
      area,
      element("div", { class: "row" },
        element("span", { class: "quiet" }, "The old version stays as a branch."),
        element("button", { type: "button", onclick: close }, "Cancel"), element("button", { class: "primary" }, "Send")));
    this.buttons.hidden = true;
    this.bubble.replaceWith(form);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

const ENDINGS = {
  stopped: "Stopped.",
  length: "Cut off: the answer reached its greatest length.",
};

class AnswerView {
  constructor(node, actions) {
    Object.assign(this, { node, actions });
    this.note = element("p", { class: "note", hidden: true });
    this.summary = element("summary");
    this.thoughtBox = element("div", { class: "markdown", dir: "auto" });
    this.thought = element("details", { class: "thought", hidden: true }, this.summary, this.thoughtBox);
    this.box = element("div", { class: "markdown", dir: "auto" });
    this.waiting = element("p", { class: "waiting", "aria-hidden": "true" }, element("i"), element("i"), element("i"), element("i"));
    this.ending = element("p", { class: "note", hidden: true });
    this.buttons = element("div", { class: "actions" });
    this.root = element("article", { class: "message answer" },
      element("h2", { class: "unseen" }, `Answer of ${node.model}`), this.note, this.thought, this.box, this.waiting, this.ending, this.buttons);
    this.markdown = new Markdown(this.box, actions.render);
    this.thoughtMarkdown = new Markdown(this.thoughtBox, actions.render);
  }

  async update(conversation) {
    const { node, actions } = this;
    const running = node.state === "running";
    this.root.classList.toggle("running", running);
    this.root.setAttribute("aria-busy", running);
    this.waiting.hidden = !running || Boolean(node.content || node.reasoning);
    this.#tell(this.note, node.dropped && `The context is full: the oldest ${node.dropped === 1 ? "message is" : `${node.dropped} messages are`} no longer seen.`);
    this.#tell(this.ending, node.error ?? ENDINGS[node.state], node.state === "failed");
    const laidOut = [this.#showThought(running), this.markdown.set(node.content)];
    const busy = actions.isRunning(conversation);
    const trace = actions.traceOf(node);
    if (running) putActions(this.buttons, "running", () => [this.#fingerprint(null)]);
    else {
      putActions(this.buttons, `${versionKey(conversation, node)}${busy}${Boolean(trace)}`, () => [
        versionPicker(conversation, node, actions),
        copyButton(() => node.content, "answer", actions),
        iconButton("again", "Regenerate answer", () => actions.regenerate(node), { disabled: busy }),
        this.#fingerprint(trace),
      ]);
    }
    if (running) this.#follow(trace);
    await Promise.all(laidOut);
  }

  async #showThought(running) {
    const { node } = this;
    if (!node.reasoning) return;
    const thinking = running && node.thinkingSeconds === undefined;
    if (this.thought.hidden) this.thought.open = thinking;
    if (!thinking && this.wasThinking) this.thought.open = false;
    this.wasThinking = thinking;
    this.thought.hidden = false;
    this.thought.classList.toggle("thinking", thinking);
    const words = thinking ? "Thinking…" : node.thinkingSeconds === undefined ? "Thought" : `Thought for ${duration(node.thinkingSeconds)}`;
    if (this.summary.textContent !== words) this.summary.textContent = words;
    await this.thoughtMarkdown.set(node.reasoning);
  }

  /** The button that opens the mixture: the map in small, and the answer's figures. */
  #fingerprint(trace) {
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.figures = element("span", {}, trace ? figuresOf(this.node) : "");
    requestAnimationFrame(() => this.repaint());
    return element("button", { type: "button", class: "fingerprint", title: "The mixture at work", hidden: !trace, onclick: () => this.actions.inspect(this.node) },
      element("span", { class: "unseen" }, "The mixture at work:"), this.canvas, this.figures);
  }

  repaint() {
    const trace = this.actions.traceOf(this.node);
    if (trace && this.canvas.isConnected) paintSmall(this.canvas, trace);
  }

  // A few times a second is enough for the eye.
  #follow(trace) {
    if (!trace?.tokens.length || this.nextPaint) return;
    this.nextPaint = setTimeout(() => (this.nextPaint = null), 150);
    this.figures.parentElement.hidden = false;
    this.repaint();
    const rate = this.actions.speedOf(this.node);
    this.figures.textContent = `${count(trace.tokens.length)} tokens${rate ? ` · ${speed(rate)}/s` : ""}`;
  }

  #tell(box, words, isError = false) {
    box.hidden = !words;
    box.textContent = words || "";
    box.classList.toggle("error", isError);
  }
}

/** 118 tokens · 42/s · 66 % guessed ahead · 3.2 J · $0.0000013 */
function figuresOf({ stats }) {
  if (!stats) return "";
  return [
    `${count(stats.completion_tokens)} tokens`,
    stats.tokens_per_second && `${speed(stats.tokens_per_second)}/s`,
    stats.accepted && `${share(stats.accepted / stats.completion_tokens)} guessed ahead`,
    stats.joules && energy(stats.joules),
    stats.usd && money(stats.usd),
  ].filter(Boolean).join(" · ");
}
