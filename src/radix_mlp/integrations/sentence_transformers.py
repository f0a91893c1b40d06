"""A loaded `SentenceTransformer` or `CrossEncoder` that computes shared tokens once.

    from radix_mlp.integrations.sentence_transformers import enable

    model = enable(SentenceTransformer("Qwen/Qwen3-Embedding-0.6B"))
    model.encode(texts)                                   # same arguments, same answers

The library pads its batches and sorts texts by length, which tears prefixes apart.  Here its own code tokenises all
texts of a call, the engine forms batches by prefix and runs the transformer on unique tokens, and the library's own
pooling, dense and other modules and its own last steps (truncation, precision, activation, …) do the rest.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, SentenceTransformer
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from radix_mlp.arguments import items_of, refuse_tables
from radix_mlp.engine.batching.scheduler import Ids
from radix_mlp.engine.engine import Engine, JobStats
from radix_mlp.engine.execution.tokenize_ahead import cut_into_chunks, requests_of
from radix_mlp.engine.task import Item, Request
from radix_mlp.engine.tokenization.tokenize import unknown_id
from radix_mlp.errors import InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf import disable as disable_transformer
from radix_mlp.integrations.sentence_transformers_modules import Features, Tail, Work, gathered, passed_on, tail_of

__all__ = ["disable", "enable", "is_enabled", "stats"]

AnyModel = TypeVar("AnyModel", bound=torch.nn.Module)

TEXTS_A_CALL = 32
"""Texts tokenised at a time, some milliseconds of Python: so long may planning and launching have to wait."""
NAMED = 5
"""Inputs that a warning names."""
ALL = sys.maxsize
"""As `batch_size`: the library hands over all texts at once, and the engine cuts batches by tokens."""


def enable(model: AnyModel, **options: Any) -> AnyModel:
    """Make `encode` (and `encode_query`, …) or `predict` and `rank` of a loaded model compute shared tokens once.

    The object keeps its class, its modules and all its arguments.  `batch_size` has no effect: batches are cut by
    tokens.  Training, and calls of the model or of its modules, run as before.

    Args:
        model: a `SentenceTransformer` or `CrossEncoder` around a causal transformer; changed in place.
        options: of the engine: `max_batch_tokens`, `threshold`, `impl`, …, as `radix_mlp.Engine` has them.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: another kind of model or module, or a transformer that cannot be folded; says why.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        >>> from radix_mlp.models.tiny import tiny_model, tiny_tokenizer
        >>> with TemporaryDirectory() as folder:
        ...     tiny_model().model.save_pretrained(folder)
        ...     files = tiny_tokenizer().save_pretrained(folder)
        ...     model = SentenceTransformer(modules=[Transformer(folder), Pooling(64, "lasttoken")], device="cpu")
        >>> enable(model).encode(["a query", "a question"]).shape
        (2, 64)
        >>> stats(model).num_tokens, stats(model).num_compact
        (17, 12)
    """
    method = _method_of(model)
    disable(model)
    folding = FoldingMethod(model, method, tail_of(model), options)
    # whatever cannot be folded is refused now and not by the first call
    _ = folding.engine
    # in the instance's dictionary: class and modules stay as they are
    model.__dict__[method] = folding
    return model


def disable(model: AnyModel) -> AnyModel:
    """Undo `enable`. Does nothing to a model that is not enabled."""
    folding = _folding(model)
    if folding is not None:
        del model.__dict__[folding.method]
        disable_transformer(folding.tail.transformer)
    return model


def is_enabled(model: torch.nn.Module) -> bool:
    """Whether `enable` is in force on this model."""
    return _folding(model) is not None


def stats(model: torch.nn.Module) -> JobStats:
    """What the last call of an enabled model took: tokens, tokens computed, batches, seconds."""
    folding = _folding(model)
    if folding is None:
        raise InvalidInputError(
            "model is not enabled: call radix_mlp.integrations.sentence_transformers.enable(model) first."
        )
    return folding.stats


class FoldingMethod:
    """Stands in for `encode` or `predict` of one model."""

    def __init__(self, model: Any, method: str, tail: Tail, options: dict[str, Any]) -> None:
        self.model = model
        self.method = method
        self.tail = tail
        self.options = options
        self.stats = JobStats()
        """Output heads that gave the transformer's own logits."""
        self.__name__ = method
        self.__doc__ = getattr(type(model), method).__doc__

    @cached_property
    def engine(self) -> Engine:
        """Runs the texts of all calls; a copied or pickled model makes one of its own."""
        return Engine(self.tail.transformer, tokenizer=self.model.tokenizer, **self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "engine"}

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the library's own method."""
        signature = inspect.signature(getattr(type(self.model), self.method))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the library's own method on a copy of the model whose tokenisation and forward pass are ours."""
        stock = getattr(type(self.model), self.method)
        # a shallow copy shares all modules, and several calls may run at once
        call = copy(self.model)
        del call.__dict__[self.method]
        bound = inspect.signature(stock).bind_partial(call, *args, **kwargs)
        arguments = bound.arguments
        # the library looks the items of a column up by label, and their number before it reads them
        for name in list(arguments)[1:2]:
            arguments[name] = _as_list(arguments[name], name)
        for inputs in list(arguments.values())[1:2]:
            reason = self.tail.reason_of_inputs(inputs)
            if reason is not None:
                return self._unfolded(reason, stock, bound)
        self._check(arguments)
        run = _Call(
            self, wants_tokens=arguments.get("output_value") == "token_embeddings", progress=self._shows(arguments)
        )
        # a compiled forward of the library's would pass by ours
        call.__dict__.update(preprocess=run.preprocess, forward=run.forward, _compiled_call_impl=None)
        arguments.update(batch_size=ALL, show_progress_bar=False)
        answer = stock(*bound.args, **bound.kwargs)
        self.model.training = call.training
        return answer

    def _unfolded(self, reason: str, stock: Any, bound: inspect.BoundArguments) -> Any:
        """The library's own call; an error under `threshold=1`."""
        threshold = self.options.get("threshold", "auto")
        if threshold != "auto" and threshold >= 1:
            raise UnsupportedCallError(
                f"this call cannot be folded: {reason}. Leave such inputs out, or enable the model with "
                "threshold='auto' to run such calls unfolded."
            )
        warnings.warn(f"radix-mlp runs this call unfolded: {reason}.", UserWarning, stacklevel=3)
        return stock(*bound.args, **bound.kwargs)

    def _check(self, arguments: dict[str, Any]) -> None:
        batch_size = arguments.get("batch_size", 1)
        if batch_size < 1:
            raise InvalidInputError(f"batch_size={batch_size}: must be at least 1.")
        advice = "Call radix_mlp.integrations.sentence_transformers.disable(model) for this call."
        if arguments.get("pool") is not None or isinstance(arguments.get("device"), list | tuple):
            raise UnsupportedCallError(
                "a pool or a list of devices was given: worker processes would not fold. Start one process a device, "
                "load the model and enable it in each. " + advice
            )
        if getattr(self.model, "_distributed_inference", None) is not None:
            raise UnsupportedCallError("the library spreads this call over several ranks itself. " + advice)
        if arguments.get("output_value", "") is None:
            raise UnsupportedCallError(
                "output_value=None asks for the features of padded batches, which a folded call does not make. "
                + advice
            )

    def _shows(self, arguments: dict[str, Any]) -> bool:
        shows = arguments.get("show_progress_bar")
        if shows is None:
            # as the library decides
            logger = logging.getLogger(type(self.model).__module__)
            return logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        return bool(shows)


class _Call:
    """One call: what the library's method sees in place of the model's own tokenisation and forward pass."""

    def __init__(self, folding: FoldingMethod, *, wants_tokens: bool, progress: bool) -> None:
        self.folding = folding
        self.wants_tokens = wants_tokens
        self.progress = progress

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Nothing yet: texts are tokenised while the model runs those before them."""
        return {"inputs": inputs, "prompt": prompt, "options": kwargs}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The features that the model's last module leaves, for all inputs."""
        inputs: Sequence[Any] = features["inputs"]
        order = text_order(inputs)
        folding = self.folding
        engine = folding.engine
        make_work = folding.tail.work(kwargs, wants_tokens=self.wants_tokens)
        works: list[Work] = []

        def encode(part: Sequence[int]) -> Request[None]:
            items: list[Item] = []
            for start in range(0, len(part), TEXTS_A_CALL):
                engine.loaded.device_priority.wait()
                texts = [inputs[place] for place in part[start : start + TEXTS_A_CALL]]
                sequences, shared = self._tokenize(texts, features["prompt"], features["options"])
                if not works or works[-1].shared != shared:
                    works.append(make_work(shared))
                items += [Item(ids, works[-1]) for ids in sequences]
            return Request(items, _nothing)

        places: list[NDArray[np.int64]] = []
        nan_places: list[int] = []
        batches: list[Features] = []
        # one job, so that batches span chunks
        with (
            ThreadPoolExecutor(1, "radix-tokenize-ahead") as worker,
            tqdm(total=len(inputs), desc="Texts", disable=not self.progress) as bar,
        ):
            futures = [
                worker.submit(encode, part) for part in cut_into_chunks(order.tolist(), sizes=engine.chunk_sizes)
            ]
            try:
                requests = requests_of(futures, engine.loaded.device_priority)
                for launched in engine.run(requests, len(inputs)):
                    for part, found in launched.parts:
                        if isinstance(found, Exception):
                            raise found
                        places.append(order[np.asarray(launched.batch.places)[part.places]])
                        batches.append(found.value)
                        # the engine runs a text alone before it believes this
                        nan_places += places[-1].tolist() if bool(found.has_nan) else []
                    bar.update(len(launched.batch.places))
            finally:
                for future in futures:
                    future.cancel()
        folding.stats = engine.stats
        warn_of_nan([inputs[place] for place in sorted(nan_places)], engine.model.dtype)
        return gathered(places, batches)

    def _tokenize(self, texts: list[Any], prompt: str | None, options: dict[str, Any]) -> tuple[list[Ids], Features]:
        """Token ids by the library's own tokenisation, which pads nothing, and the features that the texts share."""
        options = dict(options)
        given: dict[str, dict[str, Any]] = options.pop("processing_kwargs", None) or {}
        unpadded = {**given.get("text", {}), "padding": False}
        ragged = {**given, "text": unpadded, "common": {**given.get("common", {}), "return_tensors": None}}
        features = dict(self.folding.model.preprocess(texts, prompt=prompt, processing_kwargs=ragged, **options))
        sequences = [np.asarray(row, np.int32) for row in features.pop("input_ids")]
        empty = [text for text, row in zip(texts, sequences, strict=True) if not len(row)]
        if empty:
            raise InvalidInputError(f"the input {empty[0]!r:.60} has no tokens: leave it out.")
        for text, row in zip(texts, sequences, strict=True):
            reason = unknown_id(text, row, self.folding.engine.loaded.vocabulary)
            if reason is not None:
                raise InvalidInputError(f"the input {reason}. Leave it out.")
        self.folding.tail.check_features(features)
        return sequences, passed_on(features)


def _nothing(answers: list[Any]) -> None:
    """The value of requests whose batches are read one by one."""


def warn_of_nan(inputs: Sequence[Any], dtype: torch.dtype) -> None:
    """Name the inputs whose answers are not numbers; the library returns them without a word."""
    if inputs:
        named = ", ".join(f"{value!r:.60}" for value in inputs[:NAMED])
        more = f" and {len(inputs) - NAMED} more" if len(inputs) > NAMED else ""
        warnings.warn(
            f"the model's answer to the input {named}{more} is not a number. If {dtype} overflows, load the "
            "model in float32.",
            UserWarning,
            stacklevel=2,
        )


def text_order(inputs: Sequence[Any]) -> NDArray[np.int64]:
    """Places of the inputs such that texts with a common beginning stand together, where inputs are texts.

    Examples:
        >>> text_order([("b", "x"), ("a", "y"), ("b", "w")]).tolist()
        [1, 2, 0]
    """
    keys = [(text,) if isinstance(text, str) else text for text in inputs]
    if not all(isinstance(key, tuple | list) and all(isinstance(part, str) for part in key) for key in keys):
        return np.arange(len(inputs))
    return np.asarray(sorted(range(len(keys)), key=lambda place: tuple(keys[place])), np.int64)


def _as_list(inputs: Any, name: str) -> Any:
    """A column or an iterator as a list; one input, and the lists that the library reads itself, as they are."""
    is_objects = isinstance(inputs, np.ndarray) and inputs.dtype == object
    if isinstance(inputs, str | bytes | list | tuple | dict | np.ndarray | torch.Tensor) and not is_objects:
        return inputs
    refuse_tables(inputs, name)
    return items_of(inputs, name) if isinstance(inputs, Iterable) else inputs


def _method_of(model: torch.nn.Module) -> str:
    if isinstance(model, SentenceTransformer):
        return "encode"
    if isinstance(model, CrossEncoder):
        return "predict"
    raise UnsupportedModelError(
        f"model is a {type(model).__name__}; only SentenceTransformer and CrossEncoder can be enabled here. For a "
        "transformers model, use radix_mlp.enable."
    )


def _folding(model: torch.nn.Module) -> FoldingMethod | None:
    for method in ("encode", "predict"):
        found = model.__dict__.get(method)
        if isinstance(found, FoldingMethod):
            return found
    return None
