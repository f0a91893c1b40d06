// The prefix tree: boxes as wide as they have tokens and as high as they have documents.

import { count, el, many, oneLine } from "./dom.js";

const LINE = 15;
const READABLE_ROW = { most: 30, least: 17 };
const LONG = 32;
const GUTTER = 84;
const STEP = 1.3;

/** Tokens -> units of width. Past `LONG` tokens, a piece grows with the logarithm. */
const shortened = (tokens) => (tokens <= LONG ? tokens : LONG * (1 + Math.log(tokens / LONG)));

export class Tree {
  /** `parts`: the elements frame, tree, detail, shorten. `onDocuments` gets the documents below what is pointed at. */
  constructor(parts, onDocuments) {
    Object.assign(this, parts);
    this.onDocuments = onDocuments;
    this.zoom = { x: 1, y: 1 };
    this.tree.addEventListener("keydown", (event) => this.onKey(event));
    this.tree.addEventListener("focusin", (event) => this.onFocus(event));
    this.tree.addEventListener("pointerover", (event) => this.onPoint(event));
    this.tree.addEventListener("pointerleave", () => this.point(this.current));
    this.tree.addEventListener("click", (event) => event.target.closest(".node")?.focus({ preventScroll: true }));
    this.shorten.addEventListener("change", () => this.place());
    new ResizeObserver(() => this.nodes && this.frame.clientWidth !== this.width && this.place()).observe(this.frame);
  }

  show({ nodes, rows }, labels) {
    this.nodes = nodes.map((node) => ({ ...node, children: [] }));
    this.rows = rows;
    this.roots = [];
    for (const node of this.nodes) {
      const up = node.parent < 0 ? null : this.nodes[node.parent];
      node.up = up;
      node.level = up ? up.level + 1 : 1;
      node.start = up ? up.start + up.tokens : 0;
      node.siblings = up ? up.children : this.roots;
      node.siblings.push(node);
      node.count = node.last - node.first;
      node.string = node.text[0].join("") + (node.left_out ? " … " : "") + node.text[1].join("");
    }
    this.ends = rows.map(() => null);
    for (const node of this.nodes) for (let row = node.first; row < node.last; row++) this.ends[row] = node;
    this.labels = rows.map((document) => el("span", { class: "row-label", "aria-hidden": "true" }, labels[document]));
    for (const node of this.nodes) node.box = this.boxOf(node);
    this.tree.replaceChildren(...this.nodes.map((node) => node.box), ...this.labels);
    this.byBox = new Map(this.nodes.map((node) => [node.box, node]));
    this.current = null;
    this.setCurrent(this.roots[0]);
    this.place();
    this.point(this.roots[0], false);
  }

  boxOf(node) {
    const depth = this.rows.length > 2 && node.count > 1 ? Math.log(node.count / 2) / Math.log(this.rows.length / 2) : 1;
    const shared = node.count > 1;
    const text = oneLine(node.string);
    return el("div", {
      class: `node ${shared ? "shared" : "own"} ${shared && depth > 0.62 ? "deep" : ""}`,
      role: "treeitem", tabIndex: -1,
      "aria-level": node.level, "aria-setsize": node.siblings.length, "aria-posinset": node.siblings.indexOf(node) + 1,
      "aria-label": `${shared ? `shared by ${node.count} documents` : `of document ${this.rows[node.first] + 1}`}, `
        + `${many(node.tokens, "token")}: ${text.slice(0, 300)}`,
      css: { "--depth": shared ? percentOf(depth) : "0%" },
    }, el("span", { class: "label" }, el("b", {}, count(node.tokens)), " ", text));
  }

  /** Lay everything out for the frame's width and the zoom. */
  place() {
    this.width = this.frame.clientWidth;
    const units = this.shorten.checked ? shortened : (tokens) => tokens;
    let widest = 1;
    for (const node of this.nodes) {
      node.x = node.up ? node.up.x + node.up.w : 0;
      node.w = units(node.tokens);
      widest = Math.max(widest, node.x + node.w);
    }
    const rows = this.rows.length, height = this.frameHeight();
    const { least, most } = READABLE_ROW;
    const readable = { x: Math.max(2.2, (this.width - GUTTER) / widest), y: clamp(height / rows, least, most) };
    const all = { x: (this.width - GUTTER) / widest, y: clamp(height / rows, 1, most) };
    const scale = this.zoom === "all" ? all : { x: readable.x * this.zoom.x, y: readable.y * this.zoom.y };
    this.scale = scale;
    const gap = scale.y >= 6 ? 2 : scale.y >= 3 ? 1 : 0;
    for (const node of this.nodes) {
      const box = { left: node.x * scale.x, top: node.first * scale.y, width: node.w * scale.x, height: node.count * scale.y };
      const h = Math.max(1, box.height - gap), w = Math.max(1, box.width - (box.width > 4 ? 2 : 0));
      setBox(node.box, { ...box, width: w, height: h });
      const lines = h < 11 ? 0 : Math.max(1, Math.floor((h - 4) / LINE));
      node.box.classList.toggle("blank", lines < 1 || w < 20);
      node.box.classList.toggle("tall", lines > 1);
      node.box.style.setProperty("--lines", String(Math.min(12, Math.max(1, lines))));
      node.box.style.setProperty("--line", `${lines <= 1 ? Math.min(h, 28) : LINE}px`);
    }
    this.labels.forEach((label, row) => {
      const end = this.ends[row];
      const x = end ? (end.x + end.w) * scale.x : 0;
      setBox(label, { left: x + 4, top: row * scale.y, height: Math.max(1, scale.y - gap) });
      label.hidden = scale.y < 11;
    });
    this.tree.style.setProperty("width", `${Math.ceil(widest * scale.x + (scale.y < 11 ? 0 : GUTTER))}px`);
    this.tree.style.setProperty("height", `${Math.ceil(rows * scale.y)}px`);
  }

  frameHeight() {
    return Math.max(200, Math.min(560, window.innerHeight * 0.62)) - 24;
  }

  setZoom(what) {
    if (what === "all") this.zoom = "all";
    else if (what === "reset") this.zoom = { x: 1, y: 1 };
    else {
      const by = what === "in" ? STEP : 1 / STEP;
      const from = this.zoom === "all" ? { x: 1, y: 1 } : this.zoom;
      this.zoom = { x: clamp(from.x * by, 0.2, 30), y: clamp(from.y * by, 0.15, 6) };
    }
    this.place();
    (this.current ?? this.roots[0])?.box.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  onKey(event) {
    const node = this.byBox?.get(event.target);
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = node.siblings.indexOf(node);
    const zooms = { "+": "in", "=": "in", "-": "out", 0: "reset", a: "all", A: "all" };
    const to = {
      ArrowRight: () => node.children[0],
      ArrowLeft: () => node.up,
      ArrowDown: () => node.siblings[at + 1] ?? this.beside(node, 1),
      ArrowUp: () => node.siblings[at - 1] ?? this.beside(node, -1),
      Home: () => this.roots[0],
      End: () => this.ends[this.rows.length - 1],
    }[event.key];
    if (to) {
      event.preventDefault();
      const target = to();
      if (target) this.go(target);
    } else if (event.key in zooms) {
      event.preventDefault();
      this.setZoom(zooms[event.key]);
    }
  }

  /** The next box above or below that is not a sibling, in about the same depth. */
  beside(node, by) {
    const row = by > 0 ? node.last : node.first - 1;
    let found = this.ends[row];
    while (found?.up && found.level > node.level) found = found.up;
    return found;
  }

  go(node) {
    node.box.focus({ preventScroll: true });
    const { frame } = this;
    const left = node.x * this.scale.x, top = node.first * this.scale.y, height = node.count * this.scale.y;
    if (left < frame.scrollLeft || left + 60 > frame.scrollLeft + frame.clientWidth) frame.scrollLeft = left - 20;
    if (top < frame.scrollTop || top + Math.min(height, 30) > frame.scrollTop + frame.clientHeight) {
      frame.scrollTop = top - 20;
    }
  }

  /** Move to a document's own end of the tree. */
  goToDocument(document) {
    const node = this.ends[this.rows.indexOf(document)];
    if (!node) return;
    this.go(node);
    this.frame.scrollIntoView({ block: "nearest" });
  }

  onFocus(event) {
    const node = this.byBox.get(event.target);
    if (node) {
      this.setCurrent(node);
      this.point(node);
    }
  }

  onPoint(event) {
    const node = this.byBox?.get(event.target.closest(".node"));
    if (node) this.point(node);
  }

  setCurrent(node) {
    if (this.current) this.current.box.tabIndex = -1;
    this.current = node;
    if (node) node.box.tabIndex = 0;
  }

  /** Mark a box and its way to the root, and show its text. */
  point(node, withDocuments = true) {
    for (const marked of this.tree.querySelectorAll(".on-path, .pointed")) marked.classList.remove("on-path", "pointed");
    if (!node) return;
    for (let up = node; up; up = up.up) up.box.classList.add("on-path");
    node.box.classList.add("pointed");
    this.detail.replaceChildren(...this.detailOf(node));
    this.onDocuments(withDocuments ? this.rows.slice(node.first, node.last) : []);
  }

  pointDocument(document) {
    const row = this.rows?.indexOf(document) ?? -1;
    if (row >= 0 && this.ends[row]) this.point(this.ends[row], false);
  }

  detailOf(node) {
    const saved = (node.count - 1) * node.tokens;
    const which = this.rows.slice(node.first, node.last).map((document) => document + 1).sort((a, b) => a - b);
    const names = which.slice(0, 12).map((number) => `#${number}`).join(" ") + (which.length > 12 ? " …" : "");
    const title = node.count > 1
      ? `${many(node.tokens, "token")}, computed once for ${count(node.count)} documents: saves ${count(saved)}`
      : `${many(node.tokens, "token")} of one document`;
    const tokens = (texts) => texts.map((text) => el("span", { class: "token" }, text.replace(/\n/g, "⏎\n")));
    return [
      el("p", {}, el("b", {}, title), ` · tokens ${count(node.start)} to ${count(node.start + node.tokens - 1)} · ${names}`),
      el("p", { class: "tokens" }, ...tokens(node.text[0]),
        ...(node.left_out ? [el("i", {}, ` … ${many(node.left_out, "token")} left out … `)] : []), ...tokens(node.text[1])),
    ];
  }
}

const clamp = (value, least, most) => Math.max(least, Math.min(most, value));
const percentOf = (share) => `${Math.round(100 * clamp(share, 0, 1))}%`;

function setBox(element, box) {
  for (const [name, value] of Object.entries(box)) element.style.setProperty(name, `${value.toFixed(2)}px`);
}
