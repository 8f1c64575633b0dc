// Figures as people read them. Units: seconds, joules, US dollars.

const number = (value, digits = 3) =>
  value.toLocaleString("en", { maximumSignificantDigits: digits, useGrouping: value >= 1000 });

export const count = (value) => value.toLocaleString("en");

export const share = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

/** 12 s, 1 min 5 s. */
export function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** 85 ms, 2.4 s. */
export const delay = (seconds) => (seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`);

/** 0.52 J, 13.2 J, 1.4 kJ. */
export const energy = (joules) => (joules < 1000 ? `${number(joules)} J` : `${number(joules / 1000)} kJ`);

/** Two digits that count and no exponent: $0.0000013. */
export function money(usd) {
  if (usd >= 0.01 || usd === 0) return `$${usd.toFixed(2)}`;
  return `$${usd.toFixed(Math.min(12, 1 - Math.floor(Math.log10(usd))))}`;
}

export const speed = (tokensPerSecond) => number(tokensPerSecond, tokensPerSecond < 100 ? 2 : 3);

/** 135M, 5.6M, 671B. */
export function parameters(value) {
  const [scale, letter] = value >= 1e9 ? [1e9, "B"] : value >= 1e6 ? [1e6, "M"] : [1e3, "K"];
  return `${number(value / scale)}${letter}`;
}
