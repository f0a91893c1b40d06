"""Properties of each type of the zoo, found by running it: is it causal, how does it use positions, which arguments
reach its attention function."""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tools.model_types import zoo

__all__ = ["describe", "main"]

NUM_TOKENS = 20
PROBE = "zoo_probe"
# arguments that the attention interface names; all others are reported
USUAL_KEYWORDS = {"dropout", "scaling", "zoo_marker"}


def describe(model_type: str) -> dict[str, Any]:
    """One row of the report, JSON values only; `problem` is the reason or the error where the type does not build."""
    row: dict[str, Any] = {"type": model_type, "problem": zoo.build_problem(model_type)}
    started = time.perf_counter()
    try:
        model = zoo.tiny_model(model_type)
        row |= architecture(model)
        row |= behaviour(model)
        row |= positions(model)
        row["sdpa_difference"] = implementation_difference(model_type)
        row |= attention_calls(model)
    except Exception as error:
        row["problem"] = row["problem"] or f"{type(error).__name__}: {error}"[:200]
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    with zoo.quiet():
        return cast(torch.Tensor, model(input_ids=input_ids, **keywords).logits)


def architecture(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    names = [name for name, _ in model.named_parameters()]
    parameters = inspect.signature(model.forward).parameters
    return {
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "implementation": model.config._attn_implementation,
        "supports_backend": bool(model._supports_attention_backend),
        "can_set_implementation": bool(model._can_set_attn_implementation()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layer_types": list(setting(config, "layer_types") or []),
        "window": window_of(config),
        "softcap": setting(config, "attn_logit_softcapping"),
        "sinks": any("sink" in name and "shared_expert" not in name for name in names),
        "mla": setting(config, "qk_nope_head_dim") is not None,
        "moe": any("expert" in name for name in names),
        "accepts_position_ids": "position_ids" in parameters,
        "accepts_logits_to_keep": "logits_to_keep" in parameters,
        "accepts_keywords": any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()),
    }


def window_of(config: Any) -> int | None:
    for name in ("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size"):
        value = setting(config, name)
        if isinstance(value, int):
            return value
    return None


def setting(config: Any, name: str) -> Any:
    """A field of the configuration; "varies" where layers differ in it, None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return "varies"


def behaviour(model: PreTrainedModel) -> dict[str, Any]:
    """Finite? Causal? How far does the first token reach? Another token changed, which logits move?"""
    input_ids = zoo.tiny_input(NUM_TOKENS)
    logits = logits_of(model, input_ids)
    first = (logits_of(model, changed(input_ids, 0)) - logits).abs().amax(-1)[0]
    later = (logits_of(model, changed(input_ids, 12)) - logits).abs().amax(-1)[0, :12]
    moved = (first > 1e-3).nonzero()
    return {
        "shape": list(logits.shape),
        "finite": bool(torch.isfinite(logits).all()),
        "spread": round(float(logits.std()), 3),
        "causal": bool(later.max() < 1e-4),
        "later_moves_earlier_by": float(later.max()),
        "reach": int(moved.max()) if len(moved) else -1,
        "first_moves_last_by": round(float(first[-1]), 4),
    }


def changed(input_ids: torch.Tensor, index: int) -> torch.Tensor:
    """The ids with one token changed."""
    low, high = zoo.TOKEN_RANGE
    other = input_ids.clone()
    other[0, index] = low + (other[0, index] - low + 7) % (high - low)
    return other


def positions(model: PreTrainedModel) -> dict[str, Any]:
    """`positions`: "arange", "offset k" (where the model starts counting by default), "ignored", "refused", "other"."""
    input_ids = zoo.tiny_input(NUM_TOKENS)
    default = logits_of(model, input_ids)
    arange = torch.arange(NUM_TOKENS)[None]

    def difference(position_ids: torch.Tensor) -> float:
        return float((logits_of(model, input_ids, position_ids=position_ids) - default).abs().max())

    try:
        offset = next((offset for offset in range(4) if difference(arange + offset) < 1e-5), None)
        if offset is None:
            return {"positions": "other"}
        if offset == 0 and difference(arange.flip(1)) < 1e-6:
            return {"positions": "ignored"}
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return {"positions": "refused", "positions_error": f"{type(error).__name__}: {error}"[:120]}
    return {"positions": "arange" if offset == 0 else f"offset {offset}"}


def implementation_difference(model_type: str) -> float | None:
    """Largest difference of the logits between eager and sdpa attention; None if one of them is refused."""
    input_ids = zoo.tiny_input(NUM_TOKENS)
    try:
        eager, sdpa = (
            logits_of(zoo.tiny_model(model_type, attn_implementation=name), input_ids) for name in ("eager", "sdpa")
        )
    except (ValueError, RuntimeError, ImportError):
        return None
    return float((eager - sdpa).abs().max())


def attention_calls(model: PreTrainedModel) -> dict[str, Any]:
    """What a registered attention function sees and controls, from three runs with one installed.

    `probe_calls`, `probe_marked`: how often it is called, and how often an unknown keyword of `forward` reaches it.
    `mixes_elsewhere`: with attention of each token to itself alone, tokens still see each other (convolutions,
    recurrences, in queries and keys too).
    `keywords_suffice`: causal attention that reads the keywords and not the mask gives the model's own logits.
    """
    input_ids = zoo.tiny_input(NUM_TOKENS)
    own = logits_of(model, input_ids)
    calls: list[dict[str, Any]] = []

    def plain(
        module: torch.nn.Module, q: Any, k: Any, v: Any, attention_mask: Any = None, **keywords: Any
    ) -> tuple[Any, None]:
        calls.append(keywords)
        return causal_attention(q, k, v, **keywords), None

    def alone(
        module: torch.nn.Module, q: Any, k: Any, v: Any, attention_mask: Any = None, **keywords: Any
    ) -> tuple[Any, None]:
        weight = torch.tanh(q.mean((1, 3)) + k.mean((1, 3)))[:, :, None, None]
        return (v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2) * weight).contiguous(), None

    try:
        with registered(model, plain):
            difference = float((logits_of(model, input_ids, zoo_marker=1) - own).abs().max())
        with registered(model, alone):
            moved = logits_of(model, changed(input_ids, 0)) - logits_of(model, input_ids)
    except Exception as error:
        return {"probe_calls": len(calls), "probe_error": f"{type(error).__name__}: {error}"[:160]}
    keywords = {name for call in calls for name, value in call.items() if value is not None}
    return {
        "probe_calls": len(calls),
        "probe_marked": sum("zoo_marker" in call for call in calls),
        "probe_keywords": sorted(keywords - USUAL_KEYWORDS),
        "probe_windows": sorted({str(call.get("sliding_window")) for call in calls}),
        "keywords_suffice": difference < 1e-3,
        "keywords_suffice_by": difference,
        "mixes_elsewhere": bool(moved[0, 1:].abs().max() > 1e-6),
    }


def causal_attention(q: Any, k: Any, v: Any, *, scaling: float | None = None, **keywords: Any) -> torch.Tensor:
    """Causal attention of one sequence, `[1, H, T, D] -> [1, T, H, D]`, that knows window, softcap and sinks."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if keywords.get("softcap") is not None:
        scores = torch.tanh(scores / keywords["softcap"]) * keywords["softcap"]
    index = torch.arange(q.shape[2])
    distance = index[:, None] - index[None]
    window = keywords.get("sliding_window") or q.shape[2]
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    sinks = keywords.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : v.shape[2]] @ v).transpose(1, 2).contiguous()


@contextmanager
def registered(model: PreTrainedModel, attention: Any) -> Iterator[None]:
    """The model with this attention function and masks made as for sdpa; restored afterwards."""
    before = model.config._attn_implementation
    AttentionInterface.register(PROBE, attention)
    AttentionMaskInterface.register(PROBE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        with zoo.quiet():
            model.set_attn_implementation(PROBE)
        yield
    finally:
        with zoo.quiet():
            model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


COLUMNS = {
    "type": 24,
    "class": 30,
    "dtype": 8,
    "implementation": 6,
    "supports_backend": 6,
    "causal": 6,
    "reach": 5,
    "first_moves_last_by": 8,
    "spread": 6,
    "positions": 9,
    "accepts_logits_to_keep": 6,
    "accepts_keywords": 6,
    "probe_calls": 5,
    "probe_marked": 5,
    "keywords_suffice": 5,
    "mixes_elsewhere": 5,
    "window": 5,
    "softcap": 5,
    "sinks": 5,
    "mla": 5,
    "moe": 5,
    "seconds": 6,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What each tiny model of the zoo is and does.")
    parser.add_argument("types", nargs="*", help="model types; all if none is named")
    parser.add_argument("--json", type=Path, help="also write every field of every type to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    write("  ".join(name[:width].ljust(width) for name, width in COLUMNS.items()) + "  layers")
    rows = []
    for model_type in arguments.types or zoo.causal_lm_types():
        row = describe(model_type)
        rows.append(row)
        cells = [str(row.get(name, "-"))[:width].ljust(width) for name, width in COLUMNS.items()]
        layers = ",".join(dict.fromkeys(row.get("layer_types", [])))
        write("  ".join([*cells, f"PROBLEM {row['problem']}" if row["problem"] else layers]))
    write(f"{sum(row['problem'] is None for row in rows)} of {len(rows)} built")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
