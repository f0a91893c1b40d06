// What the model found: ranking, similarities, labels, log-probabilities; and what folding saved.

import { count, duration, el, many, oneLine, percent, score } from "./dom.js";
import { heatMap } from "./heat_map.js";

/** The answer's elements. `link` gets a document and gives the properties that tie an element to the tree. */
export function answerView(answer, documents, link) {
  if (answer.task === "embed") return ["How close the texts are", heatMap(answer.similarity, documents)];
  if (answer.task === "classify") return ["Labels", classes(answer, documents, link)];
  if (answer.task === "decide") return ["Answers", decisions(answer, documents, link)];
  if (answer.task === "score") return ["Continuations, the likeliest first", continuations(answer, documents, link)];
  return ["Ranking", ranking(answer, documents, link)];
}

const across = (share) => `${100 * Math.max(0, Math.min(1, share))}%`;

function bars(rows, link) {
  return el("ol", { class: "bars" }, ...rows.map(({ index, width, value, note, text, long }, place) =>
    el("li", {},
      el("button", { type: "button", class: "bar", ...link(index) },
        el("span", { class: "place", "aria-hidden": "true" }, String(place + 1)),
        el("span", { class: "value" }, value),
        el("span", { class: "track", "aria-hidden": "true" },
          el("span", { class: "fill", css: { width: across(width) } })),
        el("span", { class: "text" }, oneLine(text)),
        el("span", { class: long ? "note long" : "note" }, note)))));
}

function ranking(answer, documents, link) {
  const scores = answer.ranking.map((found) => found.score);
  const least = Math.min(...scores), most = Math.max(...scores);
  // raw scores have no zero and no one
  const width = least >= 0 && most <= 1 ? (value) => value : (value) => (value - least) / (most - least || 1);
  return bars(answer.ranking.map((found) => ({
    index: found.index, width: width(found.score), value: score(found.score), note: `#${found.index + 1}`,
    text: documents[found.index],
  })), link);
}

function continuations(answer, documents, link) {
  return bars(answer.continuations.map((found) => ({
    index: found.index, width: found.share, value: found.logprob.toFixed(2), long: true,
    note: `#${found.index + 1} · ${percent(found.share)} of these · ${many(found.num_tokens, "token")}`
      + (found.is_greedy ? " · what the model would say" : ""),
    text: documents[found.index],
  })), link);
}

function classes(answer, documents, link) {
  const rows = answer.classes.map(({ index, scores }) => {
    const best = scores.indexOf(Math.max(...scores));
    const cells = scores.map((value, place) =>
      el("td", { class: place === best ? "best" : "" },
        el("span", { class: "track", "aria-hidden": "true" },
          el("span", { class: "fill", css: { width: across(value) } })),
        el("span", { class: "value" }, score(value))));
    const name = el("button", { type: "button", class: "plain", ...link(index) }, oneLine(documents[index]));
    return el("tr", {}, el("th", { scope: "row" }, name), ...cells);
  });
  const head = el("tr", {}, el("th", { scope: "col" }, "text"),
    ...answer.labels.map((label) => el("th", { scope: "col" }, label)));
  const table = el("table", { class: "classes" }, el("thead", {}, head), el("tbody", {}, ...rows));
  return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Labels of every text" }, table);
}

function decisions(answer, documents, link) {
  return el("ol", { class: "decisions" }, ...answer.decisions.map(({ index, options, expected, row }) => {
    const best = Math.max(...options.map((option) => option.probability));
    const rows = options.map(({ name, probability }) => el("li", { class: probability === best ? "best" : "" },
      el("span", { class: "option" }, name),
      el("span", { class: "track", "aria-hidden": "true" },
        el("span", { class: "fill", css: { width: across(probability) } })),
      el("span", { class: "value" }, percent(probability))));
    const note = expected === null ? [] : [el("small", {}, `expected level ${expected.toFixed(2)}, counted from 0`)];
    const question = documents[index].split("|")[0].trim();
    return el("li", {}, el("button", { type: "button", class: "plain", ...link(row) }, question),
      el("ul", {}, ...rows), ...note);
  }));
}

/** What was computed once and what it saved. */
export function savedView({ tree, ran, seconds }) {
  const saved = tree.num_tokens - tree.num_compact;
  const share = saved / Math.max(1, tree.num_tokens);
  const number = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value), el("small", {}, note));
  const total = seconds.tokenization + seconds.queue + seconds.inference;
  const parts = `tokenizer ${duration(seconds.tokenization)}, queue ${duration(seconds.queue)}, `
    + `model ${duration(seconds.inference)}`;
  return [
    el("div", { class: "meter", role: "img",
      "aria-label": `${count(tree.num_compact)} of ${count(tree.num_tokens)} tokens had to be computed` },
      el("span", { class: "computed", css: { width: `${100 * (1 - share)}%` } }, `${count(tree.num_compact)} computed`),
      el("span", { class: "spared" }, saved ? `${count(saved)} saved` : "")),
    el("dl", {},
      number("Saved", percent(share), `${count(saved)} tokens`),
      number("Compact tokens", count(tree.num_compact), `of ${count(tree.num_tokens)}`),
      number("Compression", tree.compression.toFixed(3), "compact / tokens"),
      number("Time", duration(total), parts)),
    ...notes(tree, ran).map((text) => el("p", { class: "notice" }, text)),
  ];
}

function notes(tree, ran) {
  const found = [];
  if (ran.num_compact === ran.num_tokens && tree.num_compact < tree.num_tokens) {
    found.push("This time the server did not fold the batch, so nothing was saved: by its threshold, folding does not "
      + `pay here. The tree shows what is shared; the model ran on all ${count(ran.num_tokens)} tokens.`);
  }
  if (ran.num_tokens !== tree.num_tokens) {
    found.push(`Other requests were in the same ${ran.num_batches === 1 ? "batch" : "batches"}: the model ran on `
      + `${count(ran.num_compact)} of ${count(ran.num_tokens)} tokens for all of them. The tree shows this request alone.`);
  } else if (ran.num_batches > 1) {
    found.push(`It ran in ${ran.num_batches} batches, which together computed ${count(ran.num_compact)} tokens; the tree `
      + "shows all of it as one.");
  }
  return found;
}
