// Keyboard shortcuts, and the dialog that lists them.

import { byId, composing, element } from "./dom.js";

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
const MOD = isMac ? "⌘" : "Ctrl";

/** actions: {search, fresh, mixture, settings, help, escape} */
export function listenForKeys(actions) {
  const shortcuts = [
    ["Enter", "Send; Shift + Enter begins a new line"],
    ["Escape", "Stop the answer, or close what is open"],
    ["↑", "In the empty box: edit your last message"],
    [`${MOD} + K`, "Search conversations", (event, mod) => mod && event.key === "k", actions.search],
    [`${MOD} + Shift + O`, "New conversation", (event, mod) => mod && event.shiftKey && event.code === "KeyO", actions.fresh],
    [`${MOD} + .`, "The mixture at work, for the last answer", (event, mod) => mod && event.key === ".", actions.mixture],
    [`${MOD} + ,`, "Settings", (event, mod) => mod && event.key === ",", actions.settings],
    [`${MOD} + /`, "This list", (event, mod) => mod && event.key === "/", actions.help],
  ];
  byId("shortcuts").append(...shortcuts.flatMap(([keys, meaning]) => [
    element("dt", {}, ...keys.split(" + ").flatMap((key, index) => [index ? " + " : "", element("kbd", {}, key)])),
    element("dd", {}, meaning),
  ]));
  document.addEventListener("keydown", (event) => {
    if (composing(event)) return;
    const mod = isMac ? event.metaKey : event.ctrlKey;
    const [, , , run] = shortcuts.find(([, , matches]) => matches?.(event, mod)) ?? [];
    if (run) event.preventDefault(), run();
    else if (event.key === "Escape" && !document.querySelector("dialog[open]")) actions.escape();
  });
}
