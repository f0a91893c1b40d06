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
sentence-transformers folder with float16 weights, loaded as float32. Vectors are the mean over a text's tokens, of
length one. Questions take the prompt named `query`, which is read but not averaged; passages take none.

## How good it is

The 93 judged queries of the Vaswani collection over all its 11,429 abstracts, means over the queries:

{_judged(judged)}

- **It is worse than BM25** in every column, with stemmed words and without: at this size, with eleven thousand
  abstracts to learn from, exact words are the better guide.
- It is far above the same model with random weights.
- Together with BM25 (reciprocal rank fusion) the first right answer comes earlier than by BM25 alone,
  MRR {both["mrr"]:.3f} against {bm25["mrr"]:.3f}; recall@10 does not gain,
  {both["recall_at_10"]:.3f} against {bm25["recall_at_10"]:.3f}.
- The same weights also learned to say yes or no to a question with a passage. Reranking by that makes every ranking
  worse (MRR {small["mrr"]:.3f} becomes {judged["small, its first 50 reranked"]["mrr"]:.3f}), so there is no reranker
  of this name: rank by the vectors.

On {recipe["held_out"]} abstracts that were kept out of the training, it finds the rest of an abstract by its title
among all others: recall@10 {held_out["small"]["recall_at_10"]:.3f} and MRR {held_out["small"]["mrr"]:.3f}; BM25 has
{held_out["BM25"]["recall_at_10"]:.3f} and {held_out["BM25"]["mrr"]:.3f}.

## How it was trained

`examples/train_small.py`, from nothing, {training["steps"]} steps in {training["minutes"]:.1f} minutes on one
{training["device"]} that another training used at the same time (torch {training["torch"].split("+")[0]}).

- **Texts**: {training["read_abstracts"]:,} of the Vaswani abstracts (physics and electronics of about 1960, in lower
  case without marks) and {training["read_maths"]:,} school maths questions with their answers (GSM8K, its test split:
  do not measure this model on it). The tokenizer was trained on all of these texts, and on those that were held out.
- **Questions** are cut from the texts: a title, a sentence, a stretch of words, rare words, some in another form of the
  word. What answers one is its own text with parts left out (inverse cloze), sometimes all the words asked for.
- **Losses**: InfoNCE over {sizes["documents"]:,} documents a step, clusters of near ones among them; scores of the
  teacher, BM25 with stemmed words, by distillation; yes or no for {sizes["judged_queries"]} questions with
  {sizes["judged_documents"]} documents each; a little of the language model's loss.
- **One step is one tree**: {questions:,} questions under one instruction, the documents, the pairs, and
  {sizes["read_texts"]} whole texts. {saved:.0%} of the {training["tokens"] / 1e6:.0f} million tokens shared their whole
  left context with another and were not computed again.
- **Chosen on the held-out abstracts**: the shape and the step (of averaged weights). Best recall@10 and MRR there:

{_shapes(logs)}

| seconds | step | loss | recall@10 | MRR |
|---|---|---|---|---|
{_course(logs["shallow"])}

**What the judged queries were used for.** The table above, which every run prints at its end; and, before any training,
to measure both ways of BM25, of which the better one became the teacher and the baseline. They were never trained on,
and chose neither shape nor step. The abstracts they are about were trained on (but for the held-out), without queries.

    python examples/train_small.py --data DATA --variant shallow --out small --minutes 4.5
    python examples/train_small.py --data DATA --evaluate small

## Limits

It knows one field, in English, as it was written about in 1960; on other texts its vectors were not measured. As a
language model it is good for nothing but tests: the demo scores options with it to show time and equality, and its
answers there are no better than guesses. For real work take a real embedder: `Engine` loads all of
[these types](models.md).
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
