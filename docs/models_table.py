"""The results of the sweep over model types, as `docs/models.md` and as `hf/proven_types.py`."""

from __future__ import annotations

import re
import warnings
from functools import cache

import torch
import transformers
from tools.model_types.sweep import MAX_ERROR, Verdict, examine
from tools.model_types.zoo import causal_lm_types


@cache
def verdicts() -> tuple[Verdict, ...]:
    """Every causal-LM type of the installed transformers, examined."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(examine(model_type) for model_type in causal_lm_types())


def models_page() -> str:
    """`models.md`"""
    found = {kind: [v for v in verdicts() if v.kind == kind] for kind in ("exact", "refused", "not built")}
    counts = {kind: len(verdicts_of_kind) for kind, verdicts_of_kind in found.items()}
    tables = [
        section
        for kind, title in (("refused", "Refused"), ("not built", "Not built"))
        for section in (
            f"## {title}",
            "| type | why |\n|---|---|\n"
            + "\n".join(f"| `{v.model_type}` | {_in_general(v.reason)} |" for v in found[kind]),
        )
    ]
    sections = [
        "# Models",
        f"""This page is written by `make docs`, which builds a tiny model (large random weights) of every causal-LM
type that transformers {transformers.__version__} knows, folds a batch through it and compares the logits of every
token with the unmodified model fed one sequence at a time.""",
        f"""- **{counts["exact"]} exact**: within {MAX_ERROR:.0e} of the largest logit (most norms run in float32).
- **{counts["refused"]} refused**: `radix_mlp.enable` raises `UnsupportedModelError` with the reason.
- {counts["not built"]} not built: they cannot run as a causal LM on text alone.""",
        """`enable` tries a type that is not on this page (newer, or your own) on its own weights, and refuses it if
the trial differs. Sequence classifiers, token classifiers and reward models on these types fold as well: they
have the same trunk.""",
        "## Exact",
        ", ".join(f"`{v.model_type}`" for v in found["exact"]),
        *tables,
    ]
    return "\n\n".join(sections) + "\n"


def proven_module() -> str:
    """`src/radix_mlp/hf/proven_types.py`: the exact types, by the name in their own configuration."""
    names = sorted({v.config_type for v in verdicts() if v.kind == "exact"})
    return "\n".join(
        [
            '"""Model types that the sweep has shown to fold exactly. Written by `make docs`; `probe` tries others."""',
            "",
            '__all__ = ["PROVEN_TYPES"]',
            "",
            "PROVEN_TYPES = frozenset(",
            "    [",
            *(f'        "{name}",' for name in names),
            "    ]",
            ")",
            "",
        ]
    )


def _in_general(reason: str) -> str:
    """A reason without the advice that is the same for all."""
    return re.sub(r"\s*Run it unfolded.*$", "", reason)
