// Elements without markup: text only ever becomes text.

/** An element with properties, `data-` and `aria-` attributes, and children (elements or strings). */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "css") for (const [key, to] of Object.entries(value)) node.style.setProperty(key, to);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "role" || name === "for" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

const whole = new Intl.NumberFormat("en");

export const count = (value) => whole.format(value);
/** A share in words: what is not quite nothing, or not quite all, does not read as if it were. */
export function percent(value) {
  if (value > 0 && value < 0.005) return "<1%";
  return value > 0.995 && value < 1 ? ">99%" : `${Math.round(100 * value)}%`;
}
export const many = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Seconds, with as many digits as matter. */
export function duration(seconds) {
  const ms = 1000 * seconds;
  return ms >= 1000 ? `${seconds.toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

/** One line: what cannot be seen becomes visible. */
export const oneLine = (text) => text.replace(/\r?\n/g, "⏎").replace(/[\t\v\f\r]/g, " ");

/** A score: small ones keep their digits. */
export function score(value) {
  const size = Math.abs(value);
  return size >= 0.0005 || value === 0 ? value.toFixed(3) : value.toExponential(1);
}
