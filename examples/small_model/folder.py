"""The model folder: a transformers checkpoint that is a sentence-transformers folder, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from small_model.evaluate import TRANSFORMER, table
from small_model.vocabulary import QUERY_PROMPT

__all__ = ["model_card", "save_folder"]


def save_folder(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    """Weights as float16, to be loaded as float32; texts are pooled by the mean, a query's without its prompt."""
    transformer = folder / TRANSFORMER
    transformer.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(transformer)
    halves = Qwen3ForCausalLM(model.config)
    halves.load_state_dict(model.state_dict())
    halves.half().save_pretrained(transformer)
    config = json.loads((transformer / "config.json").read_text())
    config["dtype"] = "float32"
    for unneeded in ("transformers_version", "_name_or_path"):
        config.pop(unneeded, None)
    _write(transformer / "config.json", config)
    kinds = ("models.Transformer", "models.Pooling", "models.Normalize")
    paths = (TRANSFORMER, "1_Pooling", "2_Normalize")
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
            for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ],
    )
    _write(transformer / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": QUERY_PROMPT, "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": model.config.hidden_size,
            "pooling_mode_mean_tokens": True,
            "include_prompt": False,
        },
    )
    (folder / "2_Normalize").mkdir(exist_ok=True)
    (transformer / "generation_config.json").unlink(missing_ok=True)
    assert all(bool(torch.isfinite(p).all()) for p in halves.parameters())


def model_card(summary: dict[str, Any]) -> str:
    """README.md of the folder."""
    recipe, held_out = summary["recipe"], summary["held_out_abstracts"]
    parameters, tokens = summary["parameters"] / 1e6, summary["tokens"] / 1e6
    saved = 1 - summary["computed_tokens"] / summary["tokens"]
    of_small, of_bm25 = (
        f"recall@10 {of['recall_at_10']:.3f}, MRR {of['mrr']:.3f}" for of in (held_out["small"], held_out["BM25"])
    )
    trained = f"{summary['steps']:,} steps in {summary['minutes']:.1f} minutes on {summary['device']}"
    return f"""---
language: en
license: mit
---
# small

A Qwen3-shaped embedder of {parameters:.1f} million parameters for short English texts on radio and electronics. It was
trained from nothing with radix-mlp's `examples/train_small.py` ({trained}) on
{summary["read_abstracts"]:,} of the 11,429 Vaswani abstracts (of about 1960; lower case, without digits and marks) and
{summary["read_maths"]:,} school maths questions (GSM8K, test split).
{saved:.0%} of the {tokens:,.0f} million tokens had their whole left context in common with another sequence of their
batch and were not computed again.

## The 93 judged queries of the collection, against all 11,429 abstracts

{table(summary["judged_queries"])}

Nothing was trained or chosen by these queries and judgements, except that of two ways to run BM25 the better one, with
stemmed words, became the teacher. The abstracts are those that were trained on, without any query.
On {recipe["held_out"]} abstracts that were held out, it finds the rest of an abstract by its title among all others:
{of_small} (BM25: {of_bm25}).

## Use

Queries take the prompt named `query`, documents none. The same weights also learned to answer yes or no to the chat
template's messages of the roles query and document; the last two lines of the table say how well: rank by the vectors.
It knows no other field and no other language, and as a language model it is good for nothing but tests.
"""


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
