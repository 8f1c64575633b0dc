// The panel of settings: of this conversation (system prompt, sampling, thinking) and of the page (theme, data).

import { element } from "./dom.js";

// name in the request: words, least, greatest, step, what it does, and what it is when neither person nor model says
const SAMPLING = [
  ["temperature", "Temperature", 0, 2, 0.01, "0 always takes the likeliest token; more is livelier"],
  ["top_p", "Top p", 0.01, 1, 0.01, "draw among the likeliest tokens that together have this probability"],
  ["top_k", "Top k", 0, 200, 1, "draw among this many of the likeliest tokens; 0 among all"],
  ["min_p", "Min p", 0, 1, 0.01, "leave out tokens less likely than this share of the likeliest"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.01, "against any token that was used", "0"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.01, "against tokens by how often they were used", "0"],
  ["max_tokens", "Longest answer", 1, 100_000, 1, "in tokens", "no limit"],
  ["seed", "Seed", 0, 2 ** 31 - 1, 1, "the same seed and settings draw the same answer", "by chance"],
];

const THINKING = [[null, "Model decides"], [true, "Think first"], [false, "Answer at once"]];
const THEMES = [["", "As the system"], ["light", "Light"], ["dark", "Dark"]];

/** Fills `body`. change(): the conversation was changed. theme: "", "light" or "dark". */
export function showSettings(body, { conversation, model, change, theme, setTheme }) {
  const system = element("textarea", { id: "system", rows: "5", dir: "auto", placeholder: "How the model should behave" });
  system.value = conversation.system;
  system.addEventListener("input", () => change(() => (conversation.system = system.value)));

  const fields = SAMPLING.map(([name, label, least, greatest, step, meaning, otherwise]) => {
    const usual = model?.baleen.sampling?.[name];
    const input = element("input", {
      id: `sampling-${name}`, type: "number", min: least, max: greatest, step, inputmode: "decimal",
      placeholder: usual ?? otherwise, "aria-describedby": `about-${name}`,
    });
    input.value = conversation.sampling[name] ?? "";
    input.addEventListener("input", () => {
      const valid = input.value === "" || input.checkValidity();
      input.setAttribute("aria-invalid", String(!valid));
      if (!valid || input.validity.badInput) return;
      change(() => {
        if (input.value === "") delete conversation.sampling[name];
        else conversation.sampling[name] = input.valueAsNumber;
      });
    });
    return element("div", { class: "field" },
      element("label", { for: input.id }, label), input, element("p", { id: `about-${name}`, class: "quiet" }, meaning));
  });
  const reset = element("button", {
    type: "button",
    onclick: () => {
      change(() => (conversation.sampling = {}));
      fields.forEach((field) => (field.querySelector("input").value = ""));
    },
  }, "Back to the model’s own");

  body.replaceChildren(
    element("section", {}, element("h3", {}, element("label", { for: "system" }, "System prompt")), system),
    ...(model?.baleen.thinking
      ? [choice("Thinking", "thinking", THINKING, conversation.thinking, (value) => change(() => (conversation.thinking = value)))]
      : []),
    element("section", {}, element("h3", {}, "Sampling"), element("div", { class: "fields" }, ...fields), reset),
    choice("Appearance", "theme", THEMES, theme, setTheme),
    element("p", { class: "quiet" }, "System prompt and sampling belong to this conversation; a new one begins with the same."),
  );
}

function choice(title, name, options, chosen, choose) {
  const radios = options.map(([value, words]) =>
    element("label", {}, element("input", { type: "radio", name, checked: value === chosen, onchange: () => choose(value) }), element("span", {}, words)));
  return element("fieldset", { class: "choice" }, element("legend", {}, title), element("div", {}, ...radios));
}
