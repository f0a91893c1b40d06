"""`LoadedModel`: a model, its tokenizer and its folder's settings, the forward that runs it, and its locks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from radix_mlp.engine.batching.scheduler import GroupOf
from radix_mlp.engine.execution.device_priority import DevicePriority
from radix_mlp.engine.tokenization.control_tokens import check_control_tokens, keep_as_text
from radix_mlp.engine.tokenization.tokenize_messages import MessageReader, PictureKeys
from radix_mlp.errors import InvalidInputError, NonFiniteAnswersError, UnsupportedModelError
from radix_mlp.hf import disable, enable
from radix_mlp.hf.adapters import pretrained_in
from radix_mlp.hf.dense_types import dense_pair_cost, max_dense_rows
from radix_mlp.hf.enabled import Settings, enabled_of
from radix_mlp.hf.fast_forward import FastForward
from radix_mlp.hf.fingerprint import fingerprint
from radix_mlp.hf.forward import why_not_compact
from radix_mlp.hf.length_dependent_rope import rope_of
from radix_mlp.hf.model_lock import lock_of
from radix_mlp.hf.pictures.picture_types import PICTURE_TYPES
from radix_mlp.hf.support import decoder_of
from radix_mlp.models.decision import decision_config_of
from radix_mlp.models.load import check_max_length, load, max_length_of
from radix_mlp.models.load_processor import load_processor
from radix_mlp.models.pooler import Pooler, pooler_of
from radix_mlp.models.sentence_transformers_folder import FolderSettings, read_folder
from radix_mlp.models.tiny import TINY_NAMES
from radix_mlp.ops.device_plan import to_device
from radix_mlp.plan.build import plan_of

__all__ = ["LoadedModel"]


class LoadedModel:
    """What engines on one model share; arguments are those of `Engine`.

    Examples:
        >>> loaded = LoadedModel("tiny")
        >>> loaded.vocabulary, loaded.max_length, loaded.forward.describe()
        (259, 8192, "the model's own modules: the model is on cpu")
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | ProcessorMixin | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        impl: str = "auto",
        kind: Literal["auto", "causal", "classifier", "decision", "trunk"] = "auto",
        compile: bool | Literal["auto"] = "auto",  # noqa: A002
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        control_tokens: Literal["model", "text"] = "model",
    ) -> None:
        check_control_tokens(control_tokens)
        self.folder = FolderSettings()
        """What a sentence-transformers folder says about its model."""
        if isinstance(model, str | Path) and str(model) not in TINY_NAMES:
            self.folder = read_folder(str(model))
            model = self.folder.checkpoint
        self._processor: Any = None
        self._trusts = trust_remote_code
        self._processor_name = str(tokenizer) if isinstance(tokenizer, str | Path) else str(model)
        if isinstance(tokenizer, ProcessorMixin):
            self._processor = tokenizer
            tokenizer = self._processor.tokenizer
        self._given = model if isinstance(model, torch.nn.Module) else None
        before = None if self._given is None else _StateBefore.of(self._given)
        self.forward: FastForward
        """Runs the trunk on a folded batch: `(plan, needed rows or None) -> [M, hidden]`."""
        how: dict[str, Any] = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "kind": kind}
        self.num_processes = tensor_parallel_size
        if tensor_parallel_size > 1:
            from radix_mlp.engine.parallel.tensor_parallel import lead

            how |= {"trust_remote_code": trust_remote_code, "impl": impl, "mode": compile}
            self.model, self.tokenizer, self.forward = lead(model, tensor_parallel_size, **how)
        else:
            self.model, self.tokenizer = load(model, trust_remote_code=trust_remote_code, **how)
            self.forward = FastForward(self.model, impl=impl, mode=compile)
        if control_tokens == "text":
            keep_as_text(self.tokenizer)
        self.max_length = max_length or self.folder.max_length or max_length_of(self.model, self.tokenizer)
        check_max_length(self.model, self.max_length)
        self.impl = impl
        self.rope = rope_of(decoder_of(self.model))
        """Which lengths may share a batch; None: all."""
        self.max_rows = max_dense_rows(decoder_of(self.model))
        """Of a batch, where the model's attention needs a dense mask; None: no limit."""
        self.pair_cost = dense_pair_cost(decoder_of(self.model))
        """As in `folding_pays`."""
        self.device_priority = DevicePriority()
        """Held while a batch is formed, planned or launched; threads that tokenize ahead wait for it."""
        self.why_unfolded: str | None = None
        """Why batches run unfolded although the model is enabled: code was added to it that would see compact rows."""
        self._poolers: dict[str | None, Pooler] = {}
        self._picture_keys = PictureKeys(self.vocabulary)
        self._reads = threading.Lock()
        self._decision_configs: dict[str | Path | None, Any] = {}
        self._enabled_as: list[Any] | None = None
        self._lock = lock_of(decoder_of(self.model))
        self._planner_is_warm = self._has_warned = False
        self._before = before
        if before is not None:
            before.users.add(self)

    @property
    def packs(self) -> bool:
        """Whether the forward runs packed rows in any case, so that folding never costs more than not folding."""
        return self.num_processes > 1 or self.forward.packs

    @property
    def group_of(self) -> GroupOf | None:
        """Length of a text -> its group: texts of one group may share a batch. None: all may."""
        return None if self.rope is None else self.rope.group

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])

    def start(self, *, folds: bool, must_fold: bool = False) -> None:
        """Enable the model and make its forward; without `folds`, disable it. Called at the start of every job.

        A job's time then includes neither the compilation of the planner nor the making of fused layers.

        Raises:
            UnsupportedModelError: `must_fold`, and code was added to the model that would see compact rows.
        """
        # another thread may be in the middle of a batch
        with self._lock, self.launching():
            self._set_enabled(folds)
            if not folds:
                return
            if self.why_unfolded is not None:
                self._report_unfolded(must_fold)
            elif self.num_processes == 1:
                self.forward.make()
            if not self._planner_is_warm:
                to_device(plan_of([np.zeros(1, np.int32)]), self.model.device)
                self._planner_is_warm = True

    @contextmanager
    def turn(self, *, folds: bool) -> Iterator[None]:
        """Exclusive use of the model for one batch, enabled or disabled as `start` leaves it."""
        with self._lock:
            if not self._is_set(folds):
                self._set_enabled(folds)
            yield

    def inside(self) -> AbstractContextManager[None]:
        """Held for a job by the thread that runs it. Raises `EngineDeadError` in a process forked during one."""
        return self._lock.inside()

    def launching(self) -> AbstractContextManager[None]:
        """`device_priority`; on a CPU, where launching a batch computes it, nothing."""
        return nullcontext() if self.model.device.type == "cpu" else self.device_priority

    def close(self, *, at_once: bool = False) -> None:
        """End the processes of a tensor-parallel model, and leave a model that was passed in as it was before.

        From any thread; after the batch that runs, unless `at_once`. Other engines on the same model keep it as they
        need it, until the last of them is closed. A later job enables the model again.
        """
        self.forward.close(at_once=at_once)
        if self._before is None or self._given is None or at_once or self.num_processes > 1:
            return
        with self._lock:
            self._before.users.discard(self)
            if not self._before.users:
                self._before.restore(self._given)
            self._enabled_as = None

    def pooler(self, pooling: str | None) -> Pooler:
        """`pooler_of` this model's folder, made once."""
        if pooling not in self._poolers:
            reads = decoder_of(self.model).config.model_type in PICTURE_TYPES
            self._poolers[pooling] = pooler_of(self.folder, pooling, reads_messages=reads)
        return self._poolers[pooling]

    def decision_config(self, given: Any) -> Any:
        """`decision_config_of` this model; what a folder holds is read once."""
        if given is not None and not isinstance(given, str | Path):
            return decision_config_of(self.model, given)
        if given not in self._decision_configs:
            self._decision_configs[given] = decision_config_of(self.model, given)
        return self._decision_configs[given]

    def message_reader(self) -> MessageReader:
        """Reads messages with images, through the model's processor, which is loaded once.

        Raises:
            InvalidInputError: a loaded model came without a processor, or the folder has none.
            UnsupportedModelError: images of this class of models are not read, or not in several processes.
        """
        if self.num_processes > 1:
            raise UnsupportedModelError("images are read in one process only: leave tensor_parallel_size out.")
        with self._reads:
            if self._processor is None:
                if self._given is not None:
                    raise InvalidInputError(
                        f"a loaded {type(self.model).__name__} does not bring the processor that reads images. Pass "
                        "tokenizer=AutoProcessor.from_pretrained(...)."
                    )
                self._processor = load_processor(self._processor_name, trust_remote_code=self._trusts)
        return MessageReader(self.model, self._processor, self.tokenizer, self._picture_keys, self.vocabulary)

    def check_finite(self, finite: NDArray[np.bool_], what: str) -> None:
        """Raise `NonFiniteAnswersError` with the places of all answers that are not finite; `what` names the items."""
        if not finite.all():
            reason = f"the model's answer is not a number. If {self.model.dtype} overflows, try dtype='float32'"
            raise NonFiniteAnswersError(what, [(int(place), reason) for place in np.flatnonzero(~finite)])

    def _is_set(self, folds: bool) -> bool:
        """Whether the model is as a job wants it; another engine, or its owner, may have changed it."""
        enabled = enabled_of(self.model)
        if self.model.training:
            return False
        if not folds or enabled is None:
            return (enabled is None) == (not folds)
        return enabled.settings.impl == self.impl

    def _set_enabled(self, folds: bool) -> None:
        """Enable or disable the model, unless nothing has changed since the last time."""
        if self.model.training:
            # its owner trains it between jobs, or has it back after `close`
            self.model.eval()
        if not folds:
            disable(self.model)
        elif self._enabled_as is None or self._enabled_as != self._state():
            # a direct call of the model then runs unfolded; folded batches go through forward_compact
            enable(self.model, impl=self.impl, threshold=0)
            self.forward.reconsider()
            self.why_unfolded = why_not_compact(self.model)
            self._has_warned = False
            self._enabled_as = self._state()

    def _state(self) -> list[Any]:
        """All that `enable` reads and sets: while it stays equal, calling `enable` again would change nothing."""
        found: list[Any] = [self.impl, fingerprint(self.model, addresses=True)]
        inner = pretrained_in(self.model) or self.model
        for module in (inner, decoder_of(inner)):
            enabled = enabled_of(module)
            # as text, since lists in it may be changed in place
            found.append(repr(vars(module.config)))
            if enabled is not None:
                # nothing here keeps a model alive
                found += [weakref.ref(enabled), enabled.settings.threshold, enabled.settings.impl]
        return found

    def _report_unfolded(self, must_fold: bool) -> None:
        if must_fold:
            raise UnsupportedModelError(
                f"{self.why_unfolded}. Undo that, or make the engine with threshold='auto' or 0 and"
                " without share=False."
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"radix-mlp runs this model unfolded: {self.why_unfolded}.", UserWarning, stacklevel=2)


class _StateBefore:
    """What engines change of a model that was passed in, as it was before the first of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.users: WeakSet[LoadedModel] = WeakSet()
        self._training = {name for name, module in model.named_modules() if module.training}
        self._settings: list[tuple[str, Settings]] = []
        inner = pretrained_in(model)
        for name, module in [] if inner is None else [("model", inner), ("trunk", decoder_of(inner))]:
            enabled = enabled_of(module)
            if enabled is not None:
                self._settings.append((name, replace(enabled.settings)))

    @classmethod
    def of(cls, model: torch.nn.Module) -> _StateBefore:
        """The one that other engines on the model have, or a new one."""
        found = _BEFORE.get(model)
        if found is None or not found.users:
            found = _BEFORE[model] = cls(model)
        return found

    def restore(self, model: torch.nn.Module) -> None:
        """Modes of all modules, and what the owner had enabled."""
        for name, module in model.named_modules():
            module.training = name in self._training
        disable(model)
        for name, settings in self._settings[:1]:
            inner = pretrained_in(model)
            assert inner is not None
            enable(model if name == "model" else decoder_of(inner), impl=settings.impl, threshold=settings.threshold)


_BEFORE: WeakKeyDictionary[torch.nn.Module, _StateBefore] = WeakKeyDictionary()
