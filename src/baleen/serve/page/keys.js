// Keyboard shortcuts, and the dialog that lists them.

import { byId, composing, element } from "./dom.js";

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = isMac ? "⌘" : "Ctrl";

/** Whether it is the key with this sign or, on a layout without Latin letters, the one in its place. */
const isKey = (event, sign, place) => event.key === sign || (event.code === place && event.key > "~");

/** actions: {search, fresh, mixture, settings, help, escape} */
export function listenForKeys(actions) {
  const shortcuts = [
    ["Enter", "Send; Shift + Enter begins a new line"],
    ["Escape", "Close what is open, or stop the answer"],
    ["↑", "In the empty box: edit your last message"],
    [`${MOD} + K`, "Search conversations", (event) => isKey(event, "k", "KeyK"), actions.search],
    [`${MOD} + Shift + O`, "New conversation", (event) => event.shiftKey && event.code === "KeyO", actions.fresh],
    [`${MOD} + .`, "The mixture at work, for the last answer", (event) => isKey(event, ".", "Period"), actions.mixture],
    [`${MOD} + ,`, "Settings", (event) => isKey(event, ",", "Comma"), actions.settings],
    [`${MOD} + /`, "This list", (event) => isKey(event, "/", "Slash"), actions.help],
  ];
  byId("shortcuts").append(...shortcuts.flatMap(([keys, meaning]) => [
    element("dt", {}, ...keys.split(" + ").flatMap((key, index) => [index ? " + " : "", element("kbd", {}, key)])),
    element("dd", {}, meaning),
  ]));
  document.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    const mod = isMac ? event.metaKey : event.ctrlKey;
    const [, , , run] = (mod && shortcuts.find(([, , matches]) => matches?.(event))) || [];
    if (run) event.preventDefault(), run();
    else if (event.key === "Escape" && !document.querySelector("dialog[open]")) actions.escape();
  });
}
