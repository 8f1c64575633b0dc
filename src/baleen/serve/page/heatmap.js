// The experts of each layer as a grid: a row a layer, a column an expert, darker the more of the answer's tokens went there.

const SMALLEST = 5; // CSS pixels
const LABEL = 26;

/** Paints the map of `trace` on `canvas`; `outlined`: the experts of one token, a list a layer. Returns where cells are. */
export function paint(canvas, trace, { width, outlined = null, cell = null }) {
  const { layers, experts } = trace.shape;
  const gap = experts > 64 ? 0 : 1.5;
  const column = Math.max(SMALLEST, Math.min(34, (width - LABEL) / experts));
  const row = Math.max(12, Math.min(26, column * 1.1));
  const context = sized(canvas, LABEL + column * experts, row * layers);
  const colours = palette(canvas);
  const most = Math.max(2 * trace.evenShare, trace.largestShare);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let layer = 0; layer < layers; layer++) {
    context.fillStyle = colours.label;
    context.fillText(String(trace.layerName(layer)), 0, (layer + 0.5) * row);
    for (let expert = 0; expert < experts; expert++) {
      context.fillStyle = colours.at(trace.share(layer, expert) / most);
      block(context, LABEL + expert * column, layer * row, column - gap, row - 1.5, gap && 3);
    }
  }
  const outline = (layer, expert, colour) => {
    context.strokeStyle = colour;
    context.lineWidth = 2;
    context.strokeRect(LABEL + expert * column + 1, layer * row + 1, column - gap - 2, row - 3.5);
  };
  outlined?.forEach((chosen, layer) => chosen.forEach((expert) => outline(layer, expert, colours.mark)));
  if (cell) outline(cell.layer, cell.expert, colours.label);
  return {
    /** {layer, expert} under a point of the canvas, or null. */
    at(x, y) {
      const [layer, expert] = [Math.floor(y / row), Math.floor((x - LABEL) / column)];
      return layer >= 0 && layer < layers && expert >= 0 && expert < experts ? { layer, expert } : null;
    },
  };
}

/** The same, the size of a word: the answer's fingerprint. */
export function paintSmall(canvas, trace, width = 56, height = 14) {
  const { layers, experts } = trace.shape;
  const context = sized(canvas, width, height);
  const colours = palette(canvas);
  const most = Math.max(2 * trace.evenShare, trace.largestShare);
  for (let layer = 0; layer < layers; layer++) {
    for (let expert = 0; expert < experts; expert++) {
      context.fillStyle = colours.at(trace.share(layer, expert) / most);
      context.fillRect((expert * width) / experts, (layer * height) / layers, width / experts, height / layers);
    }
  }
}

function sized(canvas, width, height) {
  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(density, density);
  return context;
}

function block(context, x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, width, height, radius);
  context.fill();
}

/** The theme's colours, read from the style sheet: --heat-0 (never) to --heat-3 (most). */
function palette(canvas) {
  const style = getComputedStyle(canvas);
  const read = (name) => style.getPropertyValue(name).trim();
  const stops = [0, 1, 2, 3].map((step) => read(`--heat-${step}`).match(/[\d.]+/g).map(Number)); // "rgb(r, g, b)"
  const at = (value) => {
    const place = Math.min(1, Math.max(0, value)) ** 0.8 * 3;
    const low = Math.min(2, Math.floor(place));
    const mixed = stops[low].slice(0, 3).map((from, channel) => Math.round(from + (stops[low + 1][channel] - from) * (place - low)));
    return `rgb(${mixed})`;
  };
  return { at, label: read("--quiet"), mark: read("--mark") };
}
