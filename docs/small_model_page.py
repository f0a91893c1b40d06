"""`small-model.md`: the page about the model that comes with the package, with the numbers of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRAINING = ROOT / "src" / "radix_mlp" / "models" / "small" / "training.json"
LOGS = ROOT / "examples" / "small_model" / "logs"
SHAPES = {"shallow": "2 layers, MLP 768 wide", "joint": "3 layers, MLP 384 wide"}
"""The variants whose logs are kept."""


def small_model_page() -> str:
    training = json.loads(TRAINING.read_text(encoding="utf-8"))
    logs = {variant: _steps(LOGS / f"{variant}.jsonl") for variant in SHAPES}
    recipe, sizes = training["recipe"], training["recipe"]["sizes"]
    judged, held_out = training["judged_queries"], training["held_out_abstracts"]
    small, bm25, both = judged["small"], judged["BM25"], judged["small and BM25"]
    saved = 1 - training["computed_tokens"] / training["tokens"]
    questions = sizes["documents"] * sizes["queries_each"] + sizes["others"]
    return f"""# The model `small`

This page is written by `make docs` from `src/radix_mlp/models/small/training.json` and the logs in
`examples/small_model/logs`.

`small` comes with the package, so that the demo, the server and your first script have a model that answers, offline:

```python
from radix_mlp import Engine

engine = Engine("small")
questions = engine.embed(["How is the noise of a transistor amplifier kept low?"], prompt_name="query")
passages = engine.embed(["Cooling lowers the noise of an amplifier.", "Punched cards feed the program in."])
print(questions @ passages.T)
```

    radix-mlp demo
    radix-mlp embed passages.txt -m small -o vectors.npy
    radix-mlp serve --model-id small --default-prompt-name query

It is an embedder for short English texts on radio and electronics, of {training["parameters"] / 1e6:.1f} million
parameters: Qwen3's architecture with {recipe["layers"]} layers, {recipe["hidden"]} wide, a byte-pair vocabulary of
{recipe["vocabulary"]:,} tokens that reads lower case, and texts of up to 1,024 tokens. In `radix_mlp/models` it is a
sentence-transformers folder with float16 weights, loaded as float32. A vector is the mean over a text's tokens,
scaled to length one. Questions use the prompt named `query`, whose tokens are not averaged; passages use no prompt.

## How good it is

The 93 judged queries of the Vaswani collection against all its 11,429 abstracts, averaged over the queries:

{_judged(judged)}

- **It is worse than BM25** in every column, with and without stemming: at this size, with eleven thousand abstracts
  to learn from, exact words are the better guide.
- It is far better than the same model with random weights.
- Combined with BM25 (reciprocal rank fusion), the first right answer ranks higher than with BM25 alone,
  MRR {both["mrr"]:.3f} against {bm25["mrr"]:.3f}; recall@10 does not improve,
  {both["recall_at_10"]:.3f} against {bm25["recall_at_10"]:.3f}.
- The same weights also learned to answer yes or no to a question with a passage. Reranking by that answer makes the
  ranking worse (MRR {small["mrr"]:.3f} becomes {judged["small, its first 50 reranked"]["mrr"]:.3f}), so the package
  has no reranker of this name: rank by the vectors.

On {recipe["held_out"]} abstracts held out of the training, the model looks for the rest of an abstract by its title
among all others: recall@10 {held_out["small"]["recall_at_10"]:.3f} and MRR {held_out["small"]["mrr"]:.3f}; BM25 has
{held_out["BM25"]["recall_at_10"]:.3f} and {held_out["BM25"]["mrr"]:.3f}.

## How it was trained

`examples/train_small.py` trained it from random weights, in {training["steps"]} steps and {training["minutes"]:.1f}
minutes on one {training["device"]} that was also running another training (torch {training["torch"].split("+")[0]}).

- **Texts**: {training["read_abstracts"]:,} of the Vaswani abstracts (physics and electronics of about 1960, in lower
  case without punctuation) and {training["read_maths"]:,} school maths questions with their answers (GSM8K, its test
  split: do not measure this model on it). The tokenizer was trained on all of these texts, and on the held-out ones.
- **Questions** are cut from the texts: a title, a sentence, a few words, rare words, some of them inflected
  differently. The answer to a question is its own text with parts left out (inverse cloze), sometimes with all words
  of the question removed.
- **Losses**: InfoNCE over {sizes["documents"]:,} documents per step, including clusters of similar ones; distillation
  of the scores of the teacher, BM25 with stemmed words; yes or no for {sizes["judged_queries"]} questions with
  {sizes["judged_documents"]} documents each; a small share of the language model's loss.
- **One step is one tree**: {questions:,} questions under one instruction, the documents, the pairs, and
  {sizes["read_texts"]} whole texts. {saved:.0%} of the {training["tokens"] / 1e6:.0f} million tokens shared their whole
  left context with another and were not computed again.
- **Chosen on the held-out abstracts**: the shape and the step (of averaged weights). The best recall@10 and MRR there:

{_shapes(logs)}

| seconds | step | loss | recall@10 | MRR |
|---|---|---|---|---|
{_course(logs["shallow"])}

**Use of the judged queries.** They give the table above, which every run prints at its end. Before any training they
also compared the two variants of BM25; the better one became the teacher and the baseline. They were never trained on,
and chose neither shape nor step. Their abstracts were trained on (except the held-out ones), without the queries.

    python examples/train_small.py --data DATA --variant shallow --out small --minutes 4.5
    python examples/train_small.py --data DATA --evaluate small

## Limits

The model knows one field, in the English of about 1960; its vectors were not measured on other texts. As a language
model it is useful only for tests: the demo scores options with it to show speed and equality, and its answers there
are no better than guesses. For real work use a real embedder: `Engine` loads all of [these types](models.md).
"""


def _steps(log: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["event"] == "step"]


def _judged(judged: dict[str, dict[str, float]]) -> str:
    rows = [
        f"| {name} | {found['recall_at_10']:.3f} | {found['mrr']:.3f} | {found['ndcg_at_10']:.3f} |"
        for name, found in judged.items()
    ]
    return "\n".join(["| | recall@10 | MRR | nDCG@10 |", "|---|---|---|---|", *rows])


def _shapes(logs: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| shape | recall@10 | MRR | at step |", "|---|---|---|---|"]
    for variant, steps in logs.items():
        best = max(steps, key=lambda step: step["held_out"]["recall_at_10"] + step["held_out"]["mrr"])
        found = best["held_out"]
        rows.append(f"| {SHAPES[variant]} | {found['recall_at_10']:.3f} | {found['mrr']:.3f} | {best['step']} |")
    return "\n".join(rows)


def _course(steps: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"| {step['seconds']:.0f} | {step['step']} | {step['loss']:.2f} | {step['held_out']['recall_at_10']:.3f} "
        f"| {step['held_out']['mrr']:.3f} |"
        for step in steps[::2]
    )
