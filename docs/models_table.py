"""The results of the sweep over model types, as `docs/models.md` and as `hf/proven_types.py`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import transformers
from tools.model_types.multimodal_zoo import multimodal_types, tiny_multimodal
from tools.model_types.pictures import examine_pictures
from tools.model_types.sweep import MAX_ERROR, Verdict, examine
from tools.model_types.zoo import causal_lm_types

from radix_mlp.hf.dense_types import MAX_DENSE_ROWS
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES


@cache
def verdicts() -> tuple[Verdict, ...]:
    """Every causal-LM type of the installed transformers, examined."""
    with _quiet():
        return tuple(examine(model_type) for model_type in causal_lm_types())


@cache
def multimodal_verdicts() -> tuple[Verdict, ...]:
    """Every multimodal type of the installed transformers, examined on text alone."""
    with _quiet():
        return tuple(examine(model_type, tiny_multimodal) for model_type in multimodal_types())


@cache
def picture_verdicts() -> dict[str, Verdict]:
    """Every type whose images fold, examined on prompts about pictures; raises AssertionError if one is not exact."""
    with _quiet():
        return {model_type: examine_pictures(model_type)[0] for model_type in sorted(PICTURE_TYPES)}


@contextmanager
def _quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def models_page() -> str:
    """`models.md`"""
    found, counts = _by_kind(verdicts())
    multimodal, multimodal_counts = _by_kind(multimodal_verdicts())
    tables = [
        section
        for kind, title in (("refused", "Refused"), ("not built", "Not built"))
        for section in (f"## {title}", _reasons(found[kind]))
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
have the same trunk. Hybrid types (convolutions, linear attention, state spaces) are compared with the float32 in
their files made float64, since a state in float32 rounds more than the bound; `docs/exactness.md` says how much.""",
        "## Exact",
        ", ".join(f"`{v.model_type}`" for v in found["exact"]),
        f"""Some older types compute attention in their own code: BigBird (with full attention), Bloom, CodeGen, Falcon,
GPT, GPT-J, GPT-Neo, GPT-NeoX Japanese, Megatron-BERT, MPT, RemBERT and XGLM. A folded call of M rows hands them a dense
mask of M x M, so attention spares nothing and memory grows with M². `threshold="auto"` counts what the mask costs.
The limit is {MAX_DENSE_ROWS} rows (for BigBird, `max_position_embeddings`): a call of several sequences with
more runs unfolded, which `last_call` says, and is an error under `threshold=1`. `Engine` cuts its batches to fit.""",
        *tables,
        """Attention that selects its keys by content (DeepSeek V3.2, V4 and their kin) needs the selection to run on
the tree: an indexer that scores only a row's ancestors and, for compressed keys,
blocks that are cut where the tree branches.""",
        "## Multimodal classes",
        f"""Classes that read images, videos or sounds beside text, as `AutoModelForMultimodalLM` builds them. Here they
are fed text alone, which is what `enable`, `Engine` and training fold: {multimodal_counts["exact"]} exact,
{multimodal_counts["refused"]} refused. With {len(picture_verdicts())} of them, calls with images fold as well:
prompts about pictures, some shared, some of one size or with one pixel changed, are compared in the same way. Other
calls with images, and all with videos, sounds or placeholder tokens without them, run unfolded, and
`radix_mlp.last_call(model)` says so; under `threshold=1` they are an error.""",
        _multimodal_table(multimodal["exact"]),
        "Refused with text alone:",
        _reasons(multimodal["refused"]),
        f"""Not built small here, so tried by `enable` on their own weights: {multimodal_counts["not built"]}.""",
        _reasons(multimodal["not built"]),
    ]
    return "\n\n".join(sections) + "\n"


def proven_module() -> str:
    """`src/radix_mlp/hf/proven_types.py`: the exact types, by the name in their own configuration."""
    found = [*verdicts(), *multimodal_verdicts()]
    # one configuration may belong to two classes
    others = {v.config_type for v in found if v.kind == "refused"}
    names = sorted({v.config_type for v in found if v.kind == "exact"} - others)
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


def _by_kind(found: tuple[Verdict, ...]) -> tuple[dict[str, list[Verdict]], dict[str, int]]:
    by_kind = {kind: [v for v in found if v.kind == kind] for kind in ("exact", "refused", "not built")}
    return by_kind, {kind: len(verdicts_of_kind) for kind, verdicts_of_kind in by_kind.items()}


def _multimodal_table(found: list[Verdict]) -> str:
    """The types that are exact with text alone, and which of them are so with images."""
    exact = {name for name, verdict in picture_verdicts().items() if verdict.kind == "exact"}
    rows = [f"| `{v.model_type}` | exact | {'exact' if v.model_type in exact else 'unfolded'} |" for v in found]
    return "| type | text | images |\n|---|---|---|\n" + "\n".join(rows)


def _reasons(found: list[Verdict]) -> str:
    return "| type | why |\n|---|---|\n" + "\n".join(f"| `{v.model_type}` | {_in_general(v.reason)} |" for v in found)


def _in_general(reason: str) -> str:
    """A reason without the advice that is the same for all."""
    return re.sub(r"\s*Run it unfolded.*$", "", reason)
