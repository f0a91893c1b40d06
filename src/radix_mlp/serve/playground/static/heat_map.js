// Similarities of all pairs of texts: a picture that can be walked with the arrow keys.

import { el, oneLine } from "./dom.js";

const NUMBERS_UP_TO = 10;
const NEAREST = 5;

export function heatMap(values, texts) {
  const n = values.length;
  const canvas = el("canvas", { class: "heat", role: "img", "aria-label": summary(values) });
  const cursor = el("span", { class: "heat-cursor", hidden: true });
  const frame = el("div", {
    class: "heat-frame", tabIndex: 0, role: "group", "aria-roledescription": "heat map",
    "aria-label": `Similarity of ${n} texts; arrow keys move`,
  }, canvas, cursor);
  const readout = el("div", { class: "readout", "aria-live": "polite" });
  let place = [0, Math.min(1, n - 1)];

  const show = (row, column) => {
    place = [Math.max(0, Math.min(n - 1, row)), Math.max(0, Math.min(n - 1, column))];
    const [i, j] = place;
    cursor.hidden = false;
    for (const [name, at] of [["left", j / n], ["top", i / n], ["width", 1 / n], ["height", 1 / n]]) {
      cursor.style.setProperty(name, `${100 * at}%`);
    }
    readout.replaceChildren(
      el("b", {}, values[i][j].toFixed(3)),
      el("span", {}, `#${i + 1} `, el("q", {}, oneLine(texts[i]))),
      el("span", {}, `#${j + 1} `, el("q", {}, oneLine(texts[j]))));
  };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  frame.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    show(place[0] + move[0], place[1] + move[1]);
  });
  frame.addEventListener("focus", () => show(...place));
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(n * (event.clientY - box.top) / box.height), Math.floor(n * (event.clientX - box.left) / box.width));
  });

  const draw = () => paint(canvas, values);
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const scale = el("div", { class: "heat-scale", "aria-hidden": "true" }, lowest(values).toFixed(2),
    el("span", { class: "gradient" }), "1.00");
  show(...nearest(values)[0] ?? [0, 0]);
  return el("div", { class: "heat-view" }, el("div", {}, frame, scale), el("div", {}, readout, nearestList(values, texts)));
}

function paint(canvas, values) {
  const n = values.length, ratio = window.devicePixelRatio || 1, size = Math.round(canvas.clientWidth * ratio);
  if (!size) return;
  const side = size / n;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const [pale, deep] = ["--heat-pale", "--heat-deep"].map((name) => rgb(style.getPropertyValue(name)));
  const least = lowest(values), gap = n <= 40 ? ratio : 0;
  context.font = `${Math.round(12 * ratio)}px ui-monospace, monospace`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      const share = (values[i][j] - least) / (1 - least || 1);
      const color = pale.map((from, k) => Math.round(from + (deep[k] - from) * Math.max(0, Math.min(1, share))));
      context.fillStyle = `rgb(${color.join(" ")})`;
      context.fillRect(j * side, i * side, Math.max(1, side - gap), Math.max(1, side - gap));
      if (n <= NUMBERS_UP_TO) {
        const light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2];
        context.fillStyle = light > 128 ? "#0b1716" : "#ffffff";
        context.fillText(values[i][j].toFixed(2), (j + 0.5) * side, (i + 0.5) * side);
      }
    }
  }
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.trim().slice(at, at + 2), 16));
const lowest = (values) => Math.min(0.99, ...values.flat());

function nearest(values) {
  const pairs = [];
  for (let i = 0; i < values.length; i++) for (let j = i + 1; j < values.length; j++) pairs.push([i, j]);
  return pairs.sort((a, b) => values[b[0]][b[1]] - values[a[0]][a[1]]).slice(0, NEAREST);
}

function nearestList(values, texts) {
  const pairs = nearest(values);
  if (!pairs.length) return el("p", {}, "Two texts or more can be compared.");
  return el("div", {}, el("h3", {}, "Closest pairs"), el("ol", { class: "pairs" }, ...pairs.map(([i, j]) =>
    el("li", {}, el("b", {}, values[i][j].toFixed(3)), el("span", {}, `#${i + 1} `, oneLine(texts[i])),
      el("span", {}, `#${j + 1} `, oneLine(texts[j]))))));
}

function summary(values) {
  const [first] = nearest(values);
  if (!first) return "Similarity of one text with itself";
  const [i, j] = first;
  return `Similarity of ${values.length} texts; the closest are ${i + 1} and ${j + 1} with ${values[i][j].toFixed(3)}`;
}
