// The panel at the right, or over all on a phone: settings, or the mixture. Focus goes in with it and comes back after.

import { byId } from "./dom.js";

const BUTTONS = { settings: "open-settings", mixture: "open-mixture" };
const COVERS_ALL = matchMedia("(max-width: 40rem)");

export class Panel {
  body = byId("panel-body");
  view = null; // "settings", "mixture" or null
  #opener = null;

  constructor() {
    COVERS_ALL.addEventListener("change", () => this.shade());
  }

  /** takeFocus: a person opened it, rather than the page. */
  open(view, title, takeFocus) {
    if (takeFocus && !byId("panel").contains(document.activeElement)) this.#opener = document.activeElement;
    this.view = view;
    byId("panel").hidden = false;
    this.shade();
    byId("panel-title").textContent = title;
    this.body.scrollTop = 0;
    this.#tellButtons();
    if (takeFocus) byId("panel-title").focus();
  }

  close() {
    if (!this.view) return;
    this.view = null;
    byId("panel").hidden = true;
    this.shade();
    this.body.replaceChildren();
    this.#tellButtons();
    (this.#opener?.isConnected ? this.#opener : byId("prompt")).focus();
  }

  /** What lies below this panel, or below the open list of conversations, can't be reached. */
  shade() {
    const listCovers = document.body.classList.contains("sidebar-open");
    document.querySelector("main").inert = listCovers || (this.view !== null && COVERS_ALL.matches);
  }

  #tellButtons() {
    for (const [view, id] of Object.entries(BUTTONS)) byId(id).setAttribute("aria-expanded", String(view === this.view));
  }
}
