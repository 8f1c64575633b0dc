// The mixture at work: what one answer cost, its tokens, and the experts they went to.

import { element } from "./dom.js";
import { count, delay, energy, money, share, speed } from "./figures.js";
import { paint } from "./heatmap.js";

const MOST_TOKENS = 4000; // shown one by one
const BUSIEST = 3;

export class Mixture {
  #body;
  #map = null;
  #cell = null;
  #token = null;
  #drawn = 0;

  constructor(body) {
    this.#body = body;
  }

  /** Shows an answer anew. */
  show(node, trace) {
    Object.assign(this, { node, trace });
    this.#cell = this.#token = null;
    this.#drawn = 0;
    this.bill = element("dl", { class: "bill" });
    this.strip = element("div", { class: "strip", role: "listbox", tabindex: "0", "aria-label": "Tokens of the answer; arrow keys walk along them", dir: "auto" });
    this.canvas = element("canvas", { role: "img" });
    this.readout = element("p", { class: "readout", "aria-live": "polite" });
    this.table = element("div", { class: "scroll" });
    const tableBox = element("details", { ontoggle: () => this.#drawTable() }, element("summary", {}, "As a table"), this.table);
    this.tableBox = tableBox;
    this.#listen();
    this.#body.replaceChildren(
      this.bill,
      element("section", {},
        element("h3", {}, "Tokens"),
        element("p", { class: "quiet legend" }, element("span", { class: "guessed" }, "Underlined"), " ones were guessed ahead by MTP, and right.", trace.shape.layers > 0 && " Point at one to see its experts."),
        this.strip),
      element("section", { hidden: !trace.shape.layers },
        element("h3", {}, "Experts"),
        element("p", { class: "quiet" }, `A row a layer, a column an expert: ${trace.shape.experts_per_token} of ${trace.shape.experts} work on each token, beside the shared ones.`),
        element("div", { class: "scroll map" }, this.canvas), this.scale(), this.readout, tableBox),
    );
    this.update();
  }

  scale() {
    return element("p", { class: "scale quiet", "aria-hidden": "true" }, "unused", element("span", { class: "ramp" }), "most used");
  }

  /** The answer has grown or ended. */
  update() {
    const { trace } = this;
    this.#drawBill();
    for (const token of trace.tokens.slice(this.#drawn, MOST_TOKENS)) {
      this.strip.append(element("span", { role: "option", id: `token-${this.#drawn}`, "data-index": this.#drawn, "aria-selected": "false",
        class: [token.accepted && "guessed", token.part === "reasoning" && "reasoned"].filter(Boolean).join(" ") }, shown(token.text)));
      this.#drawn++;
    }
    this.paint();
    this.#drawTable();
    if (this.#token === null && this.#cell === null) this.#tellUsual();
  }

  paint() {
    const width = this.canvas.parentElement.clientWidth;
    const outlined = this.#token === null ? null : this.trace.rows[this.#token];
    this.#map = paint(this.canvas, this.trace, { width, outlined, cell: this.#cell });
    const busiest = this.#busiest();
    const { layers, experts } = this.trace.shape;
    this.canvas.setAttribute("aria-label",
      `Heat map of ${layers} layers by ${experts} experts.` + (this.trace.rows.length ? ` The busiest is ${expertName(this.trace, busiest)}, with ${share(busiest.share)} of the tokens; an even share would be ${share(this.trace.evenShare)}.` : ""));
  }

  #busiest() {
    const { trace } = this;
    const ofEach = Array.from({ length: trace.shape.layers }, (_, layer) => ({ layer, ...trace.busiest(layer, 1)[0] }));
    return ofEach.sort((a, b) => b.share - a.share)[0];
  }

  /** What is said where nothing is looked at: only of a whole answer, lest a screen reader be told at every step. */
  #tellUsual() {
    const { trace, node } = this;
    let words = "";
    if (trace.rows.length && node.state !== "running") {
      const busiest = this.#busiest();
      words = `Busiest: ${expertName(trace, busiest)}, ${share(busiest.share)} of the tokens. `
        + `An even share would be ${share(trace.evenShare)}.`;
    }
    if (this.readout.textContent !== words) this.readout.textContent = words;
  }

  #listen() {
    this.strip.addEventListener("pointerover", ({ target }) => target.dataset.index && this.#choose(Number(target.dataset.index)));
    this.strip.addEventListener("click", ({ target }) => target.dataset.index && this.#choose(Number(target.dataset.index)));
    this.strip.addEventListener("keydown", (event) => {
      const last = this.strip.children.length - 1;
      const at = this.#token ?? -1;
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, PageDown: at + 10, PageUp: at - 10 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.#choose(Math.max(0, Math.min(last, to)));
      this.strip.children[this.#token]?.scrollIntoView({ block: "nearest" });
    });
    this.canvas.addEventListener("pointermove", (event) => this.#point(this.#map?.at(event.offsetX, event.offsetY) ?? null));
    this.canvas.addEventListener("pointerleave", () => this.#point(null));
  }

  /** A token is looked at: its experts are outlined. */
  #choose(index) {
    this.strip.querySelectorAll(".chosen, .went").forEach((old) => (old.classList.remove("chosen", "went"), old.setAttribute("aria-selected", "false")));
    const chosen = this.strip.children[index];
    if (!chosen) return;
    chosen.classList.add("chosen");
    chosen.setAttribute("aria-selected", "true");
    chosen.setAttribute("aria-label", this.#say(index)); // only now, for experts come a step after their token
    this.strip.setAttribute("aria-activedescendant", chosen.id);
    this.#token = index;
    this.#cell = null;
    this.readout.textContent = this.#say(index);
    this.paint();
  }

  #say(index) {
    const { text, accepted } = this.trace.tokens[index];
    const row = this.trace.rows[index];
    const ofLayer = (chosen, layer) => `layer ${this.trace.layerName(layer)}: ${[...chosen].sort((a, b) => a - b).join(", ")}`;
    const none = this.node.state === "running" ? "no expert has read it yet" : "the last token, which no expert read";
    const experts = row?.map(ofLayer).join("; ") ?? none;
    const token = `“${shown(text)}”${accepted ? ", guessed ahead" : ""}`;
    return this.trace.shape.layers ? `${token} — ${experts}` : token;
  }

  /** An expert is looked at: its tokens light up. */
  #point(cell) {
    if (cell?.layer === this.#cell?.layer && cell?.expert === this.#cell?.expert) return;
    this.#cell = cell;
    this.#token = null;
    const went = new Set(cell ? this.trace.tokensOf(cell.layer, cell.expert) : []);
    [...this.strip.children].forEach((span, index) => {
      span.classList.remove("chosen");
      span.classList.toggle("went", went.has(index));
    });
    this.strip.classList.toggle("dimmed", Boolean(cell));
    if (cell) {
      const part = this.trace.share(cell.layer, cell.expert);
      this.readout.textContent = `${expertName(this.trace, cell, true)}: ${count(went.size)} tokens, ${share(part)}, ${(part / this.trace.evenShare).toFixed(1)} times an even share.`;
    } else this.#tellUsual();
    this.paint();
  }

  /** What the answer took. Until it has ended well there is no bill, only what was seen on the way. */
  #drawBill() {
    const { trace } = this;
    const { stats, state } = this.node;
    const written = trace.tokens.length;
    const bill = stats ? billOf(stats) : [
      ["Tokens", `${count(written)} written`, state === "running" ? "and counting" : "the bill comes only with a whole answer"],
      ["Guessed", `${count(trace.accepted)} ahead`, written ? share(trace.accepted / written) : ""],
    ];
    this.bill.replaceChildren(...bill.map(([name, value, more]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, element("strong", {}, value), " ", element("span", { class: "quiet" }, more)))));
  }

  #drawTable() {
    if (!this.tableBox.open) return;
    const { trace } = this;
    const columns = Math.min(BUSIEST, trace.shape.experts);
    const rows = Array.from({ length: trace.shape.layers }, (_, layer) =>
      element("tr", {}, element("th", { scope: "row" }, String(trace.layerName(layer))), ...trace.busiest(layer, columns).map((item) => element("td", {}, `${item.expert} (${share(item.share)})`))));
    const heads = ["Layer", "Busiest expert", "Second", "Third"].slice(0, columns + 1);
    this.table.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)))), element("tbody", {}, ...rows)));
  }
}

const expertName = (trace, { layer, expert }, first = false) => `${first ? "Layer" : "layer"} ${trace.layerName(layer)}, expert ${expert}`;

/** [name, value, what else is to say] of each figure. */
function billOf(stats) {
  const energyHow = { measured: "measured", estimated: "estimated from the device’s watts" }[stats.energy_how] ?? "";
  return [
    ["Speed", `${speed(stats.tokens_per_second ?? 0)} tokens/s`, stats.first_token_seconds != null ? `first after ${delay(stats.first_token_seconds)}` : ""],
    ["Tokens", `${count(stats.completion_tokens)} written`, `${count(stats.prompt_tokens)} read${stats.cached_tokens ? `, ${count(stats.cached_tokens)} from the cache` : ""}`],
    ["Guessed", stats.drafted ? `${count(stats.accepted)} of ${count(stats.drafted)} right` : "nothing", stats.drafted ? `${share(stats.accepted / stats.drafted)} of MTP’s guesses` : "no drafts by MTP"],
    ["Energy", stats.joules ? energy(stats.joules) : "unknown", stats.joules ? energyHow : "this machine tells no watts"],
    ["Cost", stats.usd ? money(stats.usd) : "unknown", stats.usd ? `${money(1e6 * stats.usd)} for a million such answers` : ""],
  ];
}

/** White space that can be seen. */
const shown = (text) => text.replaceAll("\n", "↵") || "·";
