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

  /** actions: {open(conversation), rename(conversation, title), exportOne(conversation), remove(conversation)} */
  constructor(actions) {
    this.#actions = actions;
    this.#search.addEventListener("input", () => this.#draw());
    this.#search.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" || event.key === "ArrowDown") event.preventDefault(), this.#list.querySelector(".title")?.focus();
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

  #walk(event) {
    if (!["ArrowDown", "ArrowUp"].includes(event.key) || !event.target.matches(".title")) return;
    event.preventDefault();
    const titles = [...this.#list.querySelectorAll(".title")];
    const next = titles[titles.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
    (next ?? this.#search).focus();
  }

  #draw() {
    const words = this.#search.value;
    const found = this.#shown.conversations
      .map((conversation) => ({ conversation, match: find(conversation, words) }))
      .filter(({ match }) => match)
      .sort((a, b) => b.conversation.updated - a.conversation.updated);
    const focused = this.#list.contains(document.activeElement) && document.activeElement.dataset.id;
    this.#list.replaceChildren();
    for (const [name, items] of Map.groupBy(found, ({ conversation }) => dayOf(conversation.updated))) {
      const heading = element("h2", {}, name);
      this.#list.append(heading, element("ul", {}, ...items.map((item) => this.#row(item))));
    }
    if (!found.length) this.#list.append(element("p", { class: "quiet" }, words ? "Nothing found." : "No conversations yet."));
    if (focused) this.#list.querySelector(`[data-id="${focused}"]`)?.focus();
  }

  #row({ conversation, match }) {
    const { id, title } = conversation;
    const current = id === this.#shown.current?.id;
    const snippet = match.snippet && element("span", { class: "snippet" }, match.snippet[0], element("mark", {}, match.snippet[1]), match.snippet[2]);
    const open = element("button", { class: "title", "data-id": id, "aria-current": current && "true", onclick: () => this.#actions.open(conversation) },
      element("span", { class: "name", dir: "auto" }, title || "New conversation"), snippet);
    const isOpen = this.#opened === id;
    const more = iconButton("more", `More for “${title || "New conversation"}”`, () => {
      this.#opened = isOpen ? null : id;
      this.#draw();
      this.#list.querySelector(`[data-more="${id}"]`)?.focus();
    }, { "aria-expanded": String(isOpen), "data-more": id });
    const row = element("li", {}, open, more);
    if (isOpen) {
      const act = (run) => () => ((this.#opened = null), run());
      row.append(element("div", { class: "more" },
        element("button", { onclick: () => this.#rename(row, conversation) }, "Rename"),
        element("button", { onclick: act(() => this.#actions.exportOne(conversation)) }, "Export"),
        element("button", { onclick: act(() => this.#actions.remove(conversation)) }, "Delete")));
    }
    return row;
  }

  #rename(row, conversation) {
    const input = element("input", { "aria-label": "Title", maxlength: "120" });
    input.value = conversation.title;
    const close = (save) => {
      this.#opened = null;
      if (save && input.value.trim()) this.#actions.rename(conversation, input.value.trim());
      else this.#draw();
    };
    input.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter") close(true);
      if (event.key === "Escape") event.stopPropagation(), close(false);
    });
    row.replaceChildren(input);
    input.focus();
    input.select();
    input.addEventListener("blur", () => row.isConnected && row.contains(input) && close(true));
  }
}

function dayOf(time) {
  const days = Math.floor((new Date().setHours(24, 0, 0, 0) - time) / DAY);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 7 ? "This week" : days < 31 ? "This month" : "Earlier";
}
