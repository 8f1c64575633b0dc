// How one answer was made: its tokens, which of them MTP had guessed, and the experts each went to.
//
// As JSON: {shape: {layers, first_moe_layer, experts, experts_per_token}, tokens: [[text, part, accepted]], rows: [[[expert]]]}
// where rows[i] holds one list of experts a layer for token i. The last token was never read, so it has no row; those of
// a model without experts, which has 0 layers of them, have none either.

const PARTS = ["content", "reasoning"];

export class Trace {
  tokens = [];
  rows = [];
  accepted = 0;

  /** shape: the model's `baleen` in /v1/models. */
  constructor({ layers, first_moe_layer, experts, experts_per_token }) {
    this.shape = { layers, first_moe_layer, experts, experts_per_token };
    this.counts = new Uint32Array(layers * experts);
  }

  /** Takes the `baleen` of one chunk. */
  take({ tokens = [], experts = [] }) {
    for (const { text, part, accepted } of tokens) {
      this.tokens.push({ text, part, accepted: Boolean(accepted) });
      this.accepted += Boolean(accepted);
    }
    for (const row of experts) {
      this.rows.push(row);
      row.forEach((chosen, layer) => chosen.forEach((expert) => this.counts[layer * this.shape.experts + expert]++));
    }
  }

  /** Name of a layer as the model numbers it. */
  layerName(layer) {
    return this.shape.first_moe_layer + layer;
  }

  /** Share of the tokens that went to this expert. */
  share(layer, expert) {
    return this.rows.length ? this.counts[layer * this.shape.experts + expert] / this.rows.length : 0;
  }

  /** The share each expert would have if all were used alike. */
  get evenShare() {
    return this.shape.experts_per_token / this.shape.experts;
  }

  get largestShare() {
    return this.rows.length ? this.counts.reduce((most, count) => Math.max(most, count), 0) / this.rows.length : 0;
  }

  /** Indices of the tokens that went to this expert. */
  tokensOf(layer, expert) {
    return this.rows.flatMap((row, index) => (row[layer].includes(expert) ? [index] : []));
  }

  /** The experts of a layer, busiest first: [{expert, share}]. */
  busiest(layer, most) {
    const experts = Array.from({ length: this.shape.experts }, (_, expert) => ({ expert, share: this.share(layer, expert) }));
    return experts.sort((a, b) => b.share - a.share).slice(0, most);
  }

  toJSON() {
    const tokens = this.tokens.map(({ text, part, accepted }) => [text, PARTS.indexOf(part), Number(accepted)]);
    return { shape: this.shape, tokens, rows: this.rows };
  }

  /** Reads what toJSON wrote; null if it is anything else, since it may come out of a file. */
  static from(json) {
    const natural = (value, below) => Number.isInteger(value) && value >= 0 && value < below;
    try {
      const { shape, tokens, rows } = json;
      const sizes = [shape.layers, shape.first_moe_layer, shape.experts, shape.experts_per_token];
      if (!sizes.every((size) => natural(size, 4096)) || !shape.experts || !shape.experts_per_token) return null;
      const isRow = (row) => row.length === shape.layers && row.every((chosen) => chosen.every((expert) => natural(expert, shape.experts)));
      if (rows.length > tokens.length || !rows.every(isRow) || !tokens.every(([text]) => typeof text === "string")) return null;
      const trace = new Trace(shape);
      trace.take({ tokens: tokens.map(([text, part, accepted]) => ({ text, part: PARTS[part] ?? "content", accepted })), experts: rows });
      return trace;
    } catch {
      return null;
    }
  }
}
