"""lm-evaluation-harness: its Hugging Face model, with log-likelihoods and generation from batches that share prompts.

    python -m radix_mlp.integrations.lm_eval --model radix-mlp --model_args pretrained=Qwen/Qwen3-0.6B --tasks ...

is `lm_eval` with one more model. The harness finds models of other packages only when they have been imported, hence
the module; from Python, importing this one is enough for `simple_evaluate(model="radix-mlp", ...)`.

Tokenisation, truncation, chat templates, generation and arguments are those of the harness's own `hf` model, which
`RadixLM` extends; what differs is how log-likelihoods are computed, and which prompts of a generation run together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, _add_special_kwargs, has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoConfig

from radix_mlp.engine import task as engine_task
from radix_mlp.engine.engine import Engine, JobStats
from radix_mlp.engine.execution.batch import fill
from radix_mlp.engine.tasks.score import scored_vocabulary
from radix_mlp.engine.tokenization.tokenize import unknown_id
from radix_mlp.errors import InvalidInputError, UnsupportedModelError
from radix_mlp.hf import enable
from radix_mlp.integrations.continuations import Answer, Continuation, Continuations
from radix_mlp.integrations.prompt_order import prompt_order
from radix_mlp.models.model_kind import auto_class_of

__all__ = ["RadixLM", "main"]

NAME = "radix-mlp"

TEXTS_A_CALL = 1000
"""Texts tokenised at a time."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as text, their tokens)."""


class RadixLM(HFLM):
    """The harness's `hf` model with log-likelihoods and prompts of generation computed on unique tokens.

    Log-probabilities are computed in float32, or in float64 for a float64 model. `batch_size` affects generation only,
    and `logits_cache` has no effect.

    Args:
        pretrained: a hub id, a folder or a loaded causal model.
        max_batch_tokens: budget of a batch, in tokens computed.
        threshold: whether to fold, as in `radix_mlp.Engine`.
        impl: the way to run attention.
        engine_options: more options of `radix_mlp.Engine`, as a dictionary.
        options: those of lm-eval's `HFLM`.

    Raises:
        UnsupportedModelError: the model cannot be folded exactly; says why.
        InvalidInputError: options of `HFLM` that have no meaning here.

    Examples:
        >>> from lm_eval.api.instance import Instance
        >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
        >>> model = RadixLM(tiny_model(), tokenizer=tiny_tokenizer())
        >>> pairs = [("Roots grow", " down"), ("Roots grow", " up")]
        >>> requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        >>> [is_greedy for logprob, is_greedy in model.loglikelihood(requests, disable_tqdm=True)]
        [False, False]
        >>> model.stats.num_tokens, model.stats.num_compact
        (26, 15)
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        max_batch_tokens: int = 16384,
        threshold: float | Literal["auto"] = "auto",
        impl: str = "auto",
        engine_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        refused = [name for name in ("parallelize", "tp_plan", "mixed_precision_dtype") if options.get(name)]
        if options.get("softmax_dtype") not in (None, "float32", torch.float32):
            refused.append("softmax_dtype")
        if refused:
            shown = ", ".join(f"{name}={options[name]!r}" for name in refused)
            raise InvalidInputError(
                f"{shown}: the model runs on one device, in its own dtype (dtype=...), log-probabilities in float32. "
                "Leave it out, or use --model hf."
            )
        if isinstance(pretrained, str):
            # the harness knows causal classes only, and some multimodal models have none
            config = AutoConfig.from_pretrained(
                pretrained,
                revision=options.get("revision", "main"),
                trust_remote_code=options.get("trust_remote_code", False),
            )
            self.AUTO_MODEL_CLASS = auto_class_of(config, "causal")
        super().__init__(pretrained, **options)
        if self.backend != "causal":
            raise UnsupportedModelError(
                "this is an encoder-decoder: its decoder also attends to an encoder. Use --model hf."
            )
        self._encoded: dict[str, list[int]] = {}
        self._folding: dict[str, Any] = {"impl": impl, "threshold": threshold}
        self._engine = Engine(
            self.model,
            tokenizer=self.tokenizer,
            max_batch_tokens=max_batch_tokens,
            threshold=threshold,
            impl=impl,
            **(engine_options or {}),
        )

    @property
    def stats(self) -> JobStats:
        """What the last log-likelihoods took: tokens, tokens computed, batches, seconds."""
        return self._engine.stats

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """`(log-probability, is_greedy)` of every (context, continuation)."""
        texts: dict[str, None] = {}
        for context, continuation in (request.args for request in requests):
            if context:
                # where the harness cuts, spaces at the end of the context belong to the continuation
                texts[context.rstrip()] = texts[context + continuation] = None
        with self._encoded_ahead(list(texts)):
            answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every text, in windows of the model's length as the harness cuts them."""
        texts = [request.args[0] for request in requests]
        windows: list[Request] = []
        counts = []
        with self._encoded_ahead(texts):
            for text in texts:
                rolling = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                cut = [(None, *make_disjoint_window(window)) for window in rolling]
                windows.extend(cut)
                counts.append(len(cut))
        logprobs = iter(logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(logprobs) for _ in range(count)) for count in counts]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows every (context, options), from batches of contexts that share their beginnings."""
        # engines leave direct calls of the model unfolded
        enable(self.model, **self._folding)
        answers = [""] * len(requests)
        contexts = [request.args[0] for request in requests]
        size = self.batch_size
        if size == "auto":
            size = self._detect_batch_size()
        with (
            self._encoded_ahead(list(dict.fromkeys(contexts))),
            self._batches_of(size),
            tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Generation") as bar,
        ):
            # options in a batch are the same
            places = list(enumerate(request.args[1] for request in requests))
            for group in Collator.group(places, fn=lambda pair: pair[1]).values():
                members = [place for place, _ in group]
                order = prompt_order([self.tok_encode(contexts[place]) for place in members])
                for start in range(0, len(order), size):
                    batch = [members[index] for index in order[start : start + size]]
                    found = super().generate_until([requests[place] for place in batch], disable_tqdm=True)
                    for place, answer in zip(batch, found, strict=True):
                        answers[place] = answer
                    bar.update(len(batch))
        return answers

    @contextmanager
    def _batches_of(self, size: int) -> Iterator[None]:
        """Let the harness's own code take `size` requests as one batch."""
        given: Any = self.batch_size
        self.batch_size_per_gpu = size
        try:
            yield
        finally:
            self.batch_size_per_gpu = given

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, *args: Any, **kwargs: Any) -> list[int]:
        """Token ids of a text, as the harness's `hf` model has them."""
        if add_special_tokens is None and not args and not kwargs and string in self._encoded:
            return self._encoded[string]
        ids: list[int] = super().tok_encode(string, add_special_tokens, *args, **kwargs)
        return ids

    @contextmanager
    def _encoded_ahead(self, texts: list[str]) -> Iterator[None]:
        """Encode many texts at once, which `tok_encode` does one by one, and more slowly than the model runs."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        has_begin = [text for text in texts if has_bos_prefix(text, begin)]
        others = [text for text in texts if not has_bos_prefix(text, begin)]
        for part, options in (
            (has_begin, {"add_special_tokens": False}),
            (others, _add_special_kwargs(None, self.add_bos_token)),
        ):
            for start in range(0, len(part), TEXTS_A_CALL):
                batch = part[start : start + TEXTS_A_CALL]
                rows = self.tokenizer(batch, return_attention_mask=False, verbose=False, **options)["input_ids"]
                self._encoded.update(zip(batch, rows, strict=True))
        try:
            yield
        finally:
            self._encoded = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        # the last token predicts nothing and is left out; what is too long loses tokens on its left
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        sequences = [np.asarray(tokens[:-1], np.int32) for tokens in whole]
        targets = [np.asarray(continuation, np.int64) for _, _, continuation in requests]
        for (texts, context, _), sequence, target in zip(requests, sequences, targets, strict=True):
            if not context or not len(target) or len(target) > len(sequence):
                raise InvalidInputError(
                    f"{texts!r:.80}: {len(context)} tokens of context and {len(target)} of continuation; there must be "
                    f"some of both, and at most {self.max_length} of the continuation (max_length)."
                )
            ids = np.append(sequence, target[-1:]).astype(np.int32)
            if (reason := unknown_id(texts or "a text", ids, scored_vocabulary(self._engine.loaded))) is not None:
                raise InvalidInputError(f"{reason}. Leave the request out.")
        if not sequences:
            return []
        task = Continuations(self._engine)
        items = [
            Continuation(sequence, task, len(sequence) - len(target), target=target)
            for sequence, target in zip(sequences, targets, strict=True)
        ]
        answers: list[Answer] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods") as bar:
            for launched in self._engine.run([engine_task.Request(items, list)], len(items)):
                fill(answers, launched)
                for index in launched.batch.places:
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                bar.update(len(launched.batch.places))
        _warn_of_nan(requests, answers, self._engine.model.dtype)
        return answers


def _warn_of_nan(requests: Sequence[Request], answers: Sequence[Answer], dtype: torch.dtype) -> None:
    """Name the requests whose log-likelihoods are not numbers; the harness passes them on without a word."""
    places = [place for place, (logprob, _) in enumerate(answers) if np.isnan(logprob)]
    if places:
        text, _, continuation = requests[places[0]]
        more = f" ({len(places) - 1} more like it)" if len(places) > 1 else ""
        warnings.warn(
            f"the log-likelihood of {text or continuation!r:.80} is not a number{more}. If {dtype} overflows, load the "
            "model in float32 (dtype=float32).",
            UserWarning,
            stacklevel=3,
        )


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if NAME not in model_registry:
    model_registry.register(NAME, target=f"{__spec__.name if __spec__ else __name__}:RadixLM")

if __name__ == "__main__":
    main()
