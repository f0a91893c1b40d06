// The form, its requests (never more than one at a time, the last state always asked for), and what is shown of them.

import { answerView, savedView } from "./answers.js";
import { count, duration, el, many, score } from "./dom.js";
import { EXAMPLES, FIELDS } from "./examples.js";
import { Tree } from "./tree.js";

const byId = (id) => document.getElementById(id);
const TYPING = 350;

const tree = new Tree(
  { frame: byId("tree-frame"), tree: byId("tree"), detail: byId("detail"), shorten: byId("shorten") },
  (documents) => {
    const wanted = new Set(documents.map(String));
    for (const bar of document.querySelectorAll("[data-document]")) {
      bar.classList.toggle("lit", documents.length > 0 && wanted.has(bar.dataset.document));
    }
  });

let info = null;
let task = null;
const drafts = {};

// what was typed

function inputs() {
  const fields = FIELDS[task];
  const body = { task, documents: split(byId("documents").value) };
  if (fields.query) body.query = byId("query").value;
  if (fields.instruction && byId("instruction").value) body.instruction = byId("instruction").value;
  return body;
}

function split(text) {
  const parts = splitBy() === "blocks" ? text.split(/\r?\n[ \t]*\r?\n/) : text.split(/\r?\n/);
  return parts.filter((part) => part.trim()).map((part) => (splitBy() === "blocks" ? part.replace(/^\n+|\n+$/g, "") : part));
}

const splitBy = () => document.querySelector("input[name=split]:checked").value;

function showCount() {
  const given = split(byId("documents").value).length, most = info?.max_client_batch_size;
  byId("count").value = `${count(given)} given` + (most ? `, ${count(most)} at most` : "");
  byId("count").classList.toggle("over", Boolean(most) && given > most);
}

function fill({ query, instruction, documents, split: by }) {
  byId("query").value = query;
  byId("instruction").value = instruction;
  byId("documents").value = Array.isArray(documents) ? documents.join("\n") : documents;
  document.querySelector(`input[name=split][value=${by}]`).checked = true;
  showCount();
}

function setTask(name) {
  if (task) {
    drafts[task] = {
      query: byId("query").value, instruction: byId("instruction").value, documents: byId("documents").value,
      split: splitBy(),
    };
  }
  task = name;
  const fields = FIELDS[task];
  for (const field of ["query", "instruction"]) {
    document.querySelector(`[data-field=${field}]`).hidden = !fields[field];
  }
  document.querySelector("label[for=query]").textContent = fields.query ?? "";
  document.querySelector("label[for=instruction]").replaceChildren(fields.instruction ?? "", " ", el("small", {}, "optional"));
  byId("instruction-note").textContent = fields.note;
  byId("documents-label").textContent = fields.documents;
  byId("documents-hint").textContent = fields.hint ?? "";
  byId("documents-hint").hidden = !fields.hint;
  fill(drafts[task] ?? EXAMPLES[task]);
  document.body.classList.add("stale");
  run();
}

// requests

class Refused extends Error {
  constructor(status, message, type) {
    super(message);
    Object.assign(this, { status, type });
  }
}

async function ask(path, body) {
  const key = byId("key").value;
  const headers = { accept: "application/json" };
  if (body) headers["content-type"] = "application/json";
  if (key) headers.authorization = `Bearer ${key}`;
  let response, text;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), credentials: "same-origin",
      cache: "no-store",
    });
    text = await response.text();
  } catch (error) {
    throw new Refused(0, `The server was not reached: ${error.message}`);
  }
  let value = null;
  try { value = JSON.parse(text); } catch { /* plain text is shown as it is */ }
  if (response.ok && value !== null) return value;
  const message = value?.message ?? value?.error?.message ?? value?.error ?? text;
  const type = value?.type ?? value?.error_type;
  throw new Refused(response.status, String(message || response.statusText || "no reason given"), type);
}

let running = false, wanted = false;

/** Ask for what is typed now; while an answer is on its way, what is typed then is asked for after it. */
async function run() {
  clearTimeout(timer);
  if (!info) return connect();
  wanted = true;
  if (running) return;
  running = true;
  document.body.classList.add("busy");
  try {
    while (wanted) {
      wanted = false;
      await once(inputs());
    }
  } finally {
    running = false;
    document.body.classList.remove("busy");
  }
}

async function once(body) {
  const began = performance.now();
  try {
    const answer = await ask("playground/run", body);
    show(answer, body, (performance.now() - began) / 1000);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    showError(error);
  }
}

async function connect() {
  try {
    info = await ask("info");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    byId("model").textContent = "";
    showError(error);
    if (error.status === 401 && document.activeElement === document.body) byId("key").focus();
    return;
  }
  hideError();
  byId("model").replaceChildren(el("b", {}, info.served_model_name), ` ${info.model_dtype} on ${info.device}`);
  byId("form").hidden = false;
  byId("tasks").replaceChildren(byId("tasks").firstElementChild, ...info.tasks.map((name, place) =>
    el("label", {}, el("input", { type: "radio", name: "task", value: name, checked: place === 0 }),
      el("span", {}, FIELDS[name].name))));
  setTask(info.tasks[0]);
}

// what is shown

function show(answer, body, seconds) {
  hideError();
  const link = (document) => ({
    "data-document": document,
    title: "Show it in the tree",
    onclick: () => tree.goToDocument(document),
    onpointerenter: () => tree.pointDocument(document),
    onfocus: () => tree.pointDocument(document),
  });
  const held = document.activeElement?.dataset?.document;
  const [title, view] = answerView(answer, body.documents, link);
  byId("status").textContent = `${many(body.documents.length, FIELDS[body.task].noun)} answered in ${duration(seconds)}`;
  byId("saved").replaceChildren(...savedView(answer));
  byId("answer-title").textContent = title;
  byId("answer").replaceChildren(view);
  for (const id of ["saved", "answer-title", "tree-section"]) byId(id).hidden = false;
  tree.show(answer.tree, labelsOf(answer, body.documents));
  if (held) document.querySelector(`[data-document="${CSS.escape(held)}"]`)?.focus();
  // more may have been typed since
  document.body.classList.toggle("stale", JSON.stringify(inputs()) !== JSON.stringify(body));
}

/** What stands at the end of every document's row. */
function labelsOf(answer, documents) {
  const labels = documents.map((_, index) => `#${index + 1}`);
  if (answer.decisions) {
    // one prompt may hold several questions
    const rows = answer.decisions.map(() => []);
    for (const found of answer.decisions) rows[found.row].push(`#${found.index + 1}`);
    return rows.map((questions) => questions.join(" "));
  }
  for (const found of answer.ranking ?? []) labels[found.index] += ` ${score(found.score)}`;
  for (const found of answer.continuations ?? []) labels[found.index] += ` ${found.logprob.toFixed(1)}`;
  return labels;
}

function showError(error) {
  document.body.classList.add("stale");
  byId("status").textContent = "";
  const title = error.status ? `${error.status} ${error.type ?? ""}`.trim() : "No connection";
  const hint = error.status === 401 ? [el("p", {}, "Give the server's key in the field “API key” above.")] : [];
  const again = el("button", { type: "button", onclick: () => run() }, "Try again");
  byId("error").replaceChildren(el("b", {}, title), el("p", {}, error.message), ...hint, again);
  byId("error").hidden = false;
  byId("key").classList.toggle("wanted", error.status === 401);
  byId("key").placeholder = error.status === 401 ? "this server wants one" : "none needed";
}

function hideError() {
  byId("error").hidden = true;
  byId("key").classList.remove("wanted");
}

// events

let timer = 0;

function changed() {
  showCount();
  document.body.classList.add("stale");
  clearTimeout(timer);
  if (byId("live").checked) timer = setTimeout(run, TYPING);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
byId("form").addEventListener("input", (event) => {
  if (event.target.name === "task") setTask(event.target.value);
  else if (event.target.id !== "live") changed();
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});
byId("example").addEventListener("click", () => {
  if (!task) return;
  fill(EXAMPLES[task]);
  document.body.classList.add("stale");
  run();
});
byId("key").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(run, TYPING);
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
document.querySelector(".zoom").addEventListener("click", (event) => {
  const what = event.target.closest("[data-zoom]")?.dataset.zoom;
  if (what) tree.setZoom(what);
});

connect();
