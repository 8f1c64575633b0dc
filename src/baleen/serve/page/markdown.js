// An answer's Markdown, laid out by the server while it streams, no faster than it can be read.

import { copy, element, icon } from "./dom.js";

const SHORTEST_WAIT = 90; // ms
const WORK_SHARE = 6; // a layout that took t is followed by a pause of at least 6 t

// The one door by which a string becomes HTML; the page's policy knows it by this name. What comes through was
// sanitised by the server, and could still run nothing here.
const policy = window.trustedTypes?.createPolicy("baleen", { createHTML: (html) => html });

export class Markdown {
  #box;
  #render;
  #wanted = null;
  #shown = null;
  #working = null;

  /** box: the element to fill. render: async (text) -> HTML. */
  constructor(box, render) {
    this.#box = box;
    this.#render = render;
  }

  /** Show this text soon. Resolves when nothing newer is waiting and the text is on the page. */
  set(text) {
    this.#wanted = text;
    this.#working ??= this.#work().finally(() => (this.#working = null));
    return this.#working;
  }

  async #work() {
    while (this.#wanted !== this.#shown) {
      const text = this.#wanted;
      const began = performance.now();
      try {
        if (!this.#shown && !this.#box.firstChild && text.trim()) this.#box.append(element("p", { class: "plain" }, text));
        this.#put(text.trim() ? await this.#render(text) : "");
      } catch {
        // Too long to lay out, or no server: the words themselves are what matters.
        this.#box.replaceChildren(element("p", { class: "plain" }, text));
      }
      this.#shown = text;
      const wait = Math.max(SHORTEST_WAIT, WORK_SHARE * (performance.now() - began));
      if (this.#wanted !== text) await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  // Blocks that did not change stay, and with them a selection or a scrolled table.
  #put(html) {
    const fresh = document.createElement("template");
    fresh.innerHTML = policy ? policy.createHTML(html) : html;
    fresh.content.querySelectorAll("pre").forEach(withBar);
    const old = [...this.#box.childNodes];
    const blocks = [...fresh.content.childNodes];
    let same = 0;
    while (same < old.length && same < blocks.length && old[same].isEqualNode(blocks[same])) same++;
    old.slice(same).forEach((node) => node.remove());
    this.#box.append(...blocks.slice(same));
  }
}

/** A block of code gets a bar with its language and a button to copy it (the click is heard in listenForCopies). */
function withBar(pre) {
  const button = element("button", { type: "button", class: "copy-code" }, icon("copy"), "Copy");
  const frame = element("div", { class: "code" }, element("div", { class: "code-bar" }, element("span", {}, pre.dataset.language || "Text"), button));
  pre.setAttribute("tabindex", "0");
  pre.replaceWith(frame);
  frame.append(pre);
}

export function listenForCopies(root, announce) {
  root.addEventListener("click", async (event) => {
    const button = event.target.closest(".copy-code");
    if (!button) return;
    await copy(button.closest(".code").querySelector("pre").textContent.replace(/\n$/, ""));
    button.replaceChildren(icon("done"), "Copied");
    announce("Code copied");
    setTimeout(() => button.replaceChildren(icon("copy"), "Copy"), 1500);
  });
}
