"""The model on compact rows: one packed row of `M` tokens, attention on the tree."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.errors import InvalidInputError, UnsupportedCallError
from radix_mlp.hf.attention_function import every_layer_sees_the_tree, impl_of
from radix_mlp.hf.dense_types import dense_type_of, reason_of_rows
from radix_mlp.hf.enabled import Examined, enabled_of
from radix_mlp.hf.mixers.forward import tree_for_mixers
from radix_mlp.hf.pictures.read import Pictures
from radix_mlp.hf.spans import has_windowed_spans
from radix_mlp.hf.support import check_settings, decoder_of, takes_positions
from radix_mlp.hf.text_tower import tower_of
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.hf.windows import Chunk, Windows, windows_of
from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree
from radix_mlp.ops.attention.chunks import chunks_of, name_of
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.build import Ids

__all__ = [
    "arguments_on",
    "check_token_ids",
    "compact_arguments",
    "forward_compact",
    "hidden_of_one",
    "padded_hidden",
    "signature_of",
    "takes_any_keyword",
    "why_not_compact",
]


def compact_arguments(model: PreTrainedModel, plan: DevicePlan) -> dict[str, Any]:
    """The keyword arguments with which `model`'s forward runs on the rows of `plan`.

    Raises:
        UnsupportedModelError: the configuration has been changed to one that does not fold.
        UnsupportedCallError: the attention implementation has been changed, so no layer would see the tree; more rows
            than a dense mask may have; or spans that the model does not have.
    """
    trunk = decoder_of(model)
    tower, enabled = tower_of(trunk), enabled_of(trunk)
    has_mixers = enabled is not None and enabled.settings.mixers.any
    check_settings(tower.config, has_mixers=has_mixers)
    attention = tower.config._attn_implementation
    is_dense = dense_type_of(tower) is not None
    if is_dense and (reason := reason_of_rows(tower, plan.plan)):
        raise UnsupportedCallError(f"{reason}. Use smaller batches, or run the call unfolded.")
    if not is_dense and not attention.startswith("radix"):
        raise UnsupportedCallError(
            f"the attention implementation was set to {attention!r} after radix_mlp.enable, so no layer would see the "
            "tree. Enable the model, or its trainer, again."
        )
    tree = _with_chunks(plan.tree_for(impl_of(attention)), windows_of(tower), plan, impl_of(attention))
    return arguments_on(
        model,
        plan.compact_ids,
        plan.compact_positions,
        tree,
        mixers_plan=plan.plan if has_mixers else None,
        windowed_spans=plan.plan.span_end is not None and has_windowed_spans(trunk, plan.plan),
    )


def arguments_on(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor,
    tree: AttentionTree,
    *,
    mixers_plan: RadixPlan | None = None,
    windowed_spans: bool = False,
) -> dict[str, Any]:
    """As `compact_arguments`, without its checks, for rows `ids [M]` and `positions [M]` of `tree`.

    Args:
        mixers_plan: for a model with mixers.
        windowed_spans: see `TreeMask.of`.
    """
    trunk = decoder_of(model)
    mask = TreeMask.of(tree, windows_of(tower_of(trunk)), mixers_plan, windowed_spans=windowed_spans)
    arguments: dict[str, Any] = {
        "input_ids": ids[None],
        "attention_mask": mask,
        "use_cache": False,
        "return_dict": True,
    }
    if takes_positions(trunk):
        arguments["position_ids"] = positions[None]
    if mixers_plan is not None:
        tree = tree_for_mixers(tree, mask)
    if takes_any_keyword(model):
        arguments["radix_tree"] = tree
    return arguments


def _with_chunks(tree: AttentionTree, windows: Windows, plan: DevicePlan, impl: str) -> AttentionTree:
    """The tree with its pieces, if some layers attend within chunks: made once for all of them."""
    sizes = {window.size for window in windows or () if isinstance(window, Chunk)}
    if not sizes:
        return tree
    backward = tree.end.is_cuda and torch.is_grad_enabled()
    host = HostTree(plan.plan.end, plan.plan.depth, tree.end.device, backward)
    return tree._replace(prepared={**tree.prepared, **{name_of(size): chunks_of(host, size, impl) for size in sizes}})


def signature_of(model: PreTrainedModel) -> inspect.Signature:
    """The signature of the forward of the model's class, without `self`."""
    model_class: Any = type(model)
    return _signature(model_class)


def takes_any_keyword(model: PreTrainedModel) -> bool:
    """Whether the forward has `**kwargs`, which transformers hands down to attention."""
    parameters = signature_of(model).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


@functools.cache
def _signature(model_class: Any) -> inspect.Signature:
    signature = inspect.signature(model_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_token_ids(model: PreTrainedModel, plan: RadixPlan) -> None:
    """Raise `InvalidInputError` if the model has no embedding for a token id of the plan, before a device sees it.

    On CUDA such an id is an assertion of the device, after which the process can use the device no more.
    """
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vocabulary is None or not plan.num_compact:
        return
    if plan.compact_ids.min() >= 0 and plan.compact_ids.max() < vocabulary:
        return
    ids = plan.compact_ids[plan.unfold_index]
    place = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
    sequence = int(np.searchsorted(plan.cu_seq_lengths, place, side="right")) - 1
    raise InvalidInputError(
        f"token {place - plan.cu_seq_lengths[sequence]} of sequence {sequence} has the id {ids[place]}; the model has "
        f"embeddings for 0 to {vocabulary - 1}. Use the tokenizer that belongs to the model, or resize its embeddings."
    )


def forward_compact(model: PreTrainedModel, plan: RadixPlan, pictures: Pictures | None = None) -> torch.Tensor:
    """Run the trunk of an enabled model on the compact rows: `[M, hidden]`, after the final norm.

    Pool it with `radix_mlp.ops.last_token(hidden, plan)` or spread it over all tokens with `radix_mlp.unfold`.

    Args:
        model: an enabled model.
        plan: of the batch.
        pictures: those that its placeholders show, if it has any.

    Raises:
        InvalidInputError: the model is not enabled, or has no embedding for a token id of the plan.
        UnsupportedCallError: something was put into the model since (a hook, a forward) that would see compact rows.

    Examples:
        >>> import radix_mlp
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = radix_mlp.enable(tiny_model())
        >>> plan = radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> forward_compact(model, plan).shape[0]
        4
    """
    trunk = decoder_of(model)
    examination = _examination_of(trunk)
    reason = examination.reason_on_compact_rows()
    if reason is not None:
        raise UnsupportedCallError(
            f"the model cannot run on compact rows: {reason}. Undo that, or run the model unfolded "
            "(radix_mlp.disable(model))."
        )
    check_token_ids(trunk, plan)
    device_plan = to_device(plan, trunk.device, tree=False)
    arguments = compact_arguments(trunk, device_plan)
    if pictures is not None:
        arguments |= pictures.compact_arguments(device_plan)
    with every_layer_sees_the_tree(trunk, examination.num_attention_layers):
        hidden: torch.Tensor = trunk(**arguments).last_hidden_state
    return hidden[0]


def padded_hidden(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    more: Callable[[NDArray[np.int64]], dict[str, Tensor]] | None = None,
) -> torch.Tensor:
    """Hidden states `[N, hidden]` of the model fed all sequences in one batch, padded on the right.

    Args:
        model: any.
        sequences: token ids.
        more: padded ids `[B, T]` -> further arguments of the model, as pictures are.

    Examples:
        >>> from radix_mlp.models.tiny import tiny_model
        >>> padded_hidden(tiny_model(), [np.array([5, 6, 7]), np.array([5])]).shape
        torch.Size([4, 64])
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    present = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.zeros(present.shape, np.int64)
    input_ids[present] = np.concatenate(sequences)
    trunk = decoder_of(model)
    device = trunk.device
    output = trunk(
        send(input_ids, device),
        attention_mask=send(present.astype(np.int64), device),
        use_cache=False,
        return_dict=True,
        **(more(input_ids) if more else {}),
    )
    hidden: torch.Tensor = output.last_hidden_state
    # indices computed on the host: indexing with a mask would synchronize with the device
    return hidden.flatten(0, 1).index_select(0, send(np.flatnonzero(present), device))


def hidden_of_one(model: PreTrainedModel, sequence: Ids) -> torch.Tensor:
    """Hidden states `[n, hidden]` of the model fed one sequence alone: the reference of `verify`."""
    trunk = decoder_of(model)
    input_ids = torch.from_numpy(sequence.astype(np.int64))[None].to(trunk.device)
    hidden: torch.Tensor = trunk(input_ids, use_cache=False, return_dict=True).last_hidden_state
    return hidden[0]


def why_not_compact(model: PreTrainedModel) -> str | None:
    """Why the trunk of an enabled model must not run on compact rows now, or None: what `forward_compact` raises for.

    Looks at hooks (those of torch on all modules, too), replaced forwards, exchanged modules and `is_causal`; costs a
    comparison of fingerprints unless something has changed.

    Raises:
        InvalidInputError: the model is not enabled.

    Examples:
        >>> import radix_mlp
        >>> from radix_mlp.models.tiny import tiny_model
        >>> model = radix_mlp.enable(tiny_model())
        >>> why_not_compact(model)
        >>> hook = model.model.layers[0].register_forward_hook(print)
        >>> why_not_compact(model)
        'layers.0 has the hook print, which would see compact rows'
    """
    return _examination_of(decoder_of(model)).reason_on_compact_rows()


def _examination_of(trunk: PreTrainedModel) -> Examined:
    enabled = enabled_of(trunk)
    if enabled is None:
        raise InvalidInputError("model is not enabled: call radix_mlp.enable(model) first.")
    return enabled.examination
