// Elements and icons. Text always goes in as text: nothing here turns a string into HTML.

/** element("button", {class: "icon", onclick: f}, "text", child): attributes by name, listeners by on…, null left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Whether a key is an input method's. Of the Enter that ends a composition, Safari tells it by the code alone. */
export const composing = (event) => event.isComposing || event.keyCode === 229;

/** Whether Enter says that one is done. On a touch screen it begins a new line: its keyboard has no Shift + Enter. */
export const isDone = (event) => event.key === "Enter" && !event.shiftKey && !matchMedia("(pointer: coarse)").matches;

// Strokes on a grid of 24.
const PATHS = {
  add: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  list: "M4 7h16M4 12h16M4 17h10",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.500v5M9 14.500v5",
  mixture: "M5 5h3v3H5zM10.500 5h3v3h-3zM16 5h3v3h-3zM5 10.500h3v3H5zM10.500 10.500h3v3h-3zM16 10.500h3v3h-3zM5 16h3v3H5zM10.500 16h3v3h-3zM16 16h3v3h-3z",
  help: "M9 9a3 3 0 1 1 4.500 2.600c-1 .6-1.500 1.200-1.500 2.400M12 17.500v.1",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  end: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  done: "M5 12.500l4.500 4.500L19 7.500",
  again: "M19 12a7 7 0 1 1-2.200-5.100M19 4v4h-4",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  previous: "M14.500 6l-6 6 6 6",
  next: "M9.500 6l6 6-6 6",
  more: "M6 12h.1M12 12h.1M18 12h.1",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A small button: an icon, with its words for a screen reader and as the tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** Copies text; where the clipboard is closed (plain http from another machine), by way of a selection. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { class: "unseen" });
  area.value = text;
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser did not let this page copy");
}

/** Offers `text` as a file to save. */
export function download(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A message that goes by itself, though not while it has the pointer or the focus, with perhaps one thing to do about
 * it. Where there is nothing to do, it is not shown twice. */
export function toast(text, action = null, seconds = 8) {
  const toasts = byId("toasts");
  if (!action && [...toasts.children].some(({ firstChild }) => firstChild.textContent === text)) return;
  const shown = element("div", { class: "toast" }, element("span", {}, text));
  if (action) shown.append(element("button", { type: "button", onclick: () => (shown.remove(), action.run()) }, action.label));
  toasts.append(shown);
  const go = () => (shown.matches(":hover, :focus-within") ? setTimeout(go, 1000) : shown.remove());
  setTimeout(go, seconds * 1000);
}
