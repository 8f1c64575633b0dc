// The list of conversations: by day, searched, renamed, exported, removed.

import { find } from "./conversation.js";
import { byId, composing, element, iconButton } from "./dom.js";

const DAY = 86_400_000;

export class Sidebar {
  #actions;
  #list = byId("conversations");
  #search = byId("search");
  #shown = { conversations: [], current: null };
  #opened = null;
  #renaming = false;

  /** actions: {open(conversation), rename(conversation, title), exportOne(conversation), remove(conversation)} */
  constructor(actions) {
    this.#actions = actions;
    this.#search.addEventListener("input", () => this.#draw());
    this.#search.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" || event.key === "ArrowDown") event.preventDefault(), this.#list.querySelector(".title")?.focus();
      if (event.key === "Escape" && this.#search.value) event.preventDefault(), event.stopPropagation(), this.#clear();
    });
    this.#list.addEventListener("keydown", (event) => this.#walk(event));
  }

  show(conversations, current) {
    this.#shown = { conversations, current };
    this.#draw();
  }

  focusSearch() {
    this.#search.focus();
    this.#search.select();
  }

  #clear() {
    this.#search.value = "";
    this.#draw();
  }

  #walk(event) {
    if (!["ArrowDown", "ArrowUp"].includes(event.key) || !event.target.matches(".title")) return;
    event.preventDefault();
    const titles = [...this.#list.querySelectorAll(".title")];
    const next = titles[titles.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
    (next ?? this.#search).focus();
  }

  #draw() {
    if (this.#renaming) return; // a title that is being typed is not taken away
    const words = this.#search.value;
    const found = this.#shown.conversations
      .map((conversation) => ({ conversation, match: find(conversation, words) }))
      .filter(({ match }) => match)
      .sort((a, b) => b.conversation.updated - a.conversation.updated);
    const focused = this.#list.contains(document.activeElement) && document.activeElement.dataset.key;
    this.#list.replaceChildren();
    for (const [name, items] of Map.groupBy(found, ({ conversation }) => dayOf(conversation.updated))) {
      const heading = element("h2", {}, name);
      this.#list.append(heading, element("ul", {}, ...items.map((item) => this.#row(item))));
    }
    if (!found.length) this.#list.append(element("p", { class: "quiet" }, words ? "Nothing found." : "No conversations yet."));
    if (focused) this.#focus(focused);
  }

  #focus(key) {
    this.#list.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
  }

  #row({ conversation, match }) {
    const { id, title } = conversation;
    const current = id === this.#shown.current?.id;
    const snippet = match.snippet && element("span", { class: "snippet" }, match.snippet[0], element("mark", {}, match.snippet[1]), match.snippet[2]);
    const open = element("button", { class: "title", "data-key": id, "aria-current": current && "true", onclick: () => this.#actions.open(conversation) },
      element("span", { class: "name", dir: "auto" }, title || "New conversation"), snippet);
    const isOpen = this.#opened === id;
    const more = iconButton("more", `More for “${title || "New conversation"}”`, () => {
      this.#opened = isOpen ? null : id;
      this.#draw();
      this.#focus(`${id} More`);
    }, { "aria-expanded": String(isOpen), "data-key": `${id} More` });
    const row = element("li", {}, open, more);
    if (isOpen) {
      const act = (run) => () => ((this.#opened = null), run());
      const button = (name, onclick) => element("button", { "data-key": `${id} ${name}`, onclick }, name);
      row.append(element("div", { class: "more" },
        button("Rename", () => this.#rename(row, conversation)),
        button("Export", act(() => this.#actions.exportOne(conversation))),
        button("Delete", act(() => this.#actions.remove(conversation)))));
    }
    return row;
  }

  #rename(row, conversation) {
    const input = element("input", { "aria-label": "Title", maxlength: "120" });
    input.value = conversation.title;
    this.#renaming = true;
    const close = (save) => {
      if (!this.#renaming) return; // it is closing: to be taken away is a blur, too
      this.#renaming = false;
      this.#opened = null;
      if (save && input.value.trim()) this.#actions.rename(conversation, input.value.trim());
      this.#draw();
    };
    const closeByKey = (save) => (close(save), this.#focus(conversation.id));
    input.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter") event.preventDefault(), closeByKey(true);
      if (event.key === "Escape") event.stopPropagation(), closeByKey(false);
    });
    row.replaceChildren(input);
    input.focus();
    input.select();
    input.addEventListener("blur", () => close(true));
  }
}

function dayOf(time) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - time) / DAY);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 7 ? "This week" : days < 31 ? "This month" : "Earlier";
}
