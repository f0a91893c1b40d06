"""Odd forms of a call: positions without a mask, tracing, transformations, own losses, a model disabled meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tools.model_types.sweep import pad, plan_of, sample_sequences
from tools.model_types.zoo import TOKEN_RANGE, randomize, tiny_config, tiny_model
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import radix_mlp
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf import attention_function
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.train.model import check_trainable

EXACT = {"rtol": 1e-6, "atol": 1e-6}
IDS = torch.tensor([[9, 10, 11], [9, 10, 12]])


def random_positions(rng: np.random.Generator, length: int) -> np.ndarray:
    """One row of a random kind: grouped, constant, falling, jumping, random, or packed as documented."""
    kind = rng.integers(6)
    if kind == 0:
        return np.arange(length) // rng.integers(2, 4)
    if kind == 1:
        return np.full(length, rng.integers(4))
    if kind == 2:
        return np.arange(length)[::-1] * rng.integers(1, 3)
    if kind == 3:
        return rng.integers(0, 3, length).cumsum()
    if kind == 4:
        return rng.integers(0, length, length)
    cuts = [0, *np.sort(rng.choice(np.arange(1, length), rng.integers(1, 4), replace=False)), length]
    return np.concatenate([np.arange(stop - start) for start, stop in pairwise(cuts)])


def packed_starts(row: np.ndarray) -> list[int] | None:
    """Where sequences start in a row that counts up from 0 again and again; None for any other row."""
    starts = [i for i in range(len(row)) if row[i] == 0]
    counts = [i - max([s for s in starts if s <= i], default=-1) for i in range(len(row))]
    return starts if counts == row.tolist() and row.any() else None


def expected_logits(model: PreTrainedModel, ids: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """Each packed sequence alone where all rows are packed; else the call as the unmodified model answers it."""
    starts = [packed_starts(row) for row in positions]
    if any(found is None for found in starts):
        return model(ids, position_ids=torch.from_numpy(positions)).logits
    parts = [part[None] for row, found in zip(ids, starts, strict=True) for part in row.tensor_split(found[1:])]
    return torch.cat([model(part).logits[0] for part in parts]).view(*ids.shape, -1)


@torch.no_grad()
def check_positions(model_type: str, cases: int) -> int:
    rng = np.random.default_rng(0)
    model, enabled, folded = tiny_model(model_type), radix_mlp.enable(tiny_model(model_type)), 0
    for case in range(cases):
        rows, length = rng.integers(1, 3), 12
        ids = torch.from_numpy(rng.integers(*TOKEN_RANGE, (rows, length)))
        ids[-1, :5] = ids[0, :5]
        positions = np.stack([random_positions(rng, length) for _ in range(rows)])
        found = enabled(ids, position_ids=torch.from_numpy(positions)).logits
        torch.testing.assert_close(
            found, expected_logits(model, ids, positions), msg=f"case {case}: {positions.tolist()}", **EXACT
        )
        folded += radix_mlp.last_call(enabled).num_tokens > 0
    return folded


@pytest.mark.filterwarnings("ignore:radix-mlp runs this call unfolded")
def test_random_positions_without_a_mask() -> None:
    # some of them are packed
    assert check_positions("qwen3", 60) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "gpt_oss", "deepseek_v3", "cohere2", "opt"])
@pytest.mark.filterwarnings("ignore:radix-mlp runs this call unfolded")
def test_random_positions_of_other_types(model_type) -> None:
    check_positions(model_type, 60)


@pytest.mark.parametrize(
    "positions", [[0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3], [0] * 6, [5, 4, 3, 2, 1, 0]], ids=["pairs", "3", "0", "fall"]
)
def test_positions_that_repeat_or_fall(model, positions) -> None:
    call = {"input_ids": torch.arange(9, 15)[None], "position_ids": torch.tensor([positions])}
    expected = model(**call).logits
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="repeat or fall"):
        assert torch.equal(model(**call).logits, expected)
    with pytest.raises(UnsupportedCallError, match="repeat or fall"):
        radix_mlp.enable(model, threshold=1.0)(**call)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_the_caller_is_never_a_tree(attention) -> None:
    mask = torch.tensor([[0, -99999], [0, 0]], dtype=torch.int32)[None, None]

    def ask(model: PreTrainedModel) -> Any:
        try:
            return model(IDS[:1, :2], attention_mask=mask, use_cache=False).logits
        except RuntimeError as error:
            return str(error)

    expected = ask(tiny_model("llama", attn_implementation=attention))
    enabled = radix_mlp.enable(tiny_model("llama", attn_implementation=attention))
    with pytest.warns(UserWarning, match=r"not a \[B, T\] tensor"):
        found = ask(enabled)
    assert found == expected if isinstance(expected, str) else torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_disabled_by_another_thread_in_the_middle_of_a_call(monkeypatch, attention) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    # two rows of the tree
    ids = torch.tensor([[9, 10], [9, 10]])
    expected = model(ids).logits
    radix_mlp.enable(model)
    attend = attention_function.tree_attention

    def disable_first(*args: Any, **kwargs: Any) -> torch.Tensor:
        radix_mlp.disable(model)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention_function, "tree_attention", disable_first)
    with pytest.warns(UserWarning, match="was given the tree of a folded call"):
        torch.testing.assert_close(model(ids).logits, expected, **EXACT)
    assert not radix_mlp.is_enabled(model)


def test_the_tree_is_no_mask_for_others() -> None:
    mask = TreeMask.of(plan_of(sample_sequences()[:2]).to("cpu").tree, None)
    heads = torch.randn(1, 2, mask.shape[-1], 8)
    for copied in (mask, mask.to(torch.int64), mask.detach(), mask.clone()):
        with pytest.raises(UnsupportedCallError, match="tree of a folded call"):
            ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), heads, heads, heads, copied)
        with pytest.raises(UnsupportedCallError, match="tree of a folded call"):
            heads @ heads.transpose(2, 3) + copied


def test_an_own_loss_of_a_fixed_signature(sequences) -> None:
    def own(logits, labels, vocab_size, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    ids, _ = pad(sequences, "right")
    for threshold in ("auto", 0):
        model = LlamaForCausalLM(tiny_config("llama")).eval()
        model.loss_function = own
        call = {"input_ids": ids[:1], "labels": ids[:1], "use_cache": True}
        expected = model(**call).loss
        assert torch.equal(radix_mlp.enable(model, threshold=threshold)(**call).loss, expected)


@pytest.mark.parametrize(
    ("model_type", "options"), [("gemma3n_text", {"output_hidden_states": True}), ("moshi", {"logits_to_keep": 2})]
)
def test_outputs_of_a_layout_that_is_not_known_run_unfolded(sequences, model_type, options) -> None:
    if model_type == "moshi" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("returns logits of a known layout in this version")
    model = tiny_model(model_type)
    ids, mask = pad(sequences, "right")
    expected = model(ids, attention_mask=mask, **options)
    radix_mlp.enable(model)
    with pytest.warns(UserWarning, match="cannot be unfolded"):
        found = model(ids, attention_mask=mask, **options)
    assert torch.equal(found.logits, expected.logits)
    for one, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
        assert torch.equal(one, other)


def grad_of(model: PreTrainedModel) -> Any:
    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (IDS,), {"use_cache": False}).logits.square().sum()

    return torch.func.grad(loss)(dict(model.named_parameters()))


def vmap_of(model: PreTrainedModel) -> Any:
    return torch.func.vmap(lambda ids: model(ids[None], use_cache=False).logits)(IDS)


def forward_mode_of(model: PreTrainedModel) -> Any:
    # sdpa has no forward mode
    if radix_mlp.is_enabled(model):
        model.set_attn_implementation(attention_function.register("auto", "eager"))
    else:
        model.set_attn_implementation("eager")
    weight = model.model.norm.weight
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
        logits = torch.func.functional_call(model, {"model.norm.weight": dual}, (IDS,), {"use_cache": False}).logits
        return forward_ad.unpack_dual(logits).tangent


class Logits(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def traced_of(model: PreTrainedModel) -> Any:
    return torch.jit.trace(Logits(model), (IDS,), check_trace=False)(IDS + 3)


def exported_of(model: PreTrainedModel, **options: Any) -> Any:
    return torch.export.export(Logits(model), (IDS,), **options).module()(IDS + 3)


def exported_itself(model: PreTrainedModel) -> Any:
    return torch.export.export(model, (IDS,), {"use_cache": False}).module()(IDS + 3, use_cache=False).logits


def fake_of(model: PreTrainedModel) -> Any:
    traced = make_fx(lambda ids: model(ids, use_cache=False).logits, tracing_mode="fake", _allow_non_fake_inputs=True)(
        IDS
    )
    return traced(IDS + 3)


@pytest.mark.parametrize(
    "run",
    [
        grad_of,
        vmap_of,
        forward_mode_of,
        traced_of,
        exported_of,
        pytest.param(lambda model: exported_of(model, strict=True), marks=pytest.mark.slow),
        exported_itself,
        fake_of,
    ],
    ids=["grad", "vmap", "forward mode", "jit", "export", "strict export", "export itself", "make_fx"],
)
@pytest.mark.filterwarnings("ignore")
def test_transformed_and_traced_calls_are_those_of_the_unmodified_model(run: Callable[..., Any]) -> None:
    expected, found = run(small()), run(radix_mlp.enable(small()))
    torch.testing.assert_close(found, expected, **EXACT)


def small() -> PreTrainedModel:
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    randomize(model, 0)
    return model


def test_an_export_that_must_fold_is_an_error() -> None:
    model = radix_mlp.enable(small(), threshold=1.0)
    with pytest.raises(UnsupportedCallError, match="exported call"):
        torch.export.export(Logits(model), (IDS,))


@pytest.mark.filterwarnings("ignore:radix-mlp runs this call unfolded")
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("masked", [True, False])
def test_calls_without_tokens_are_as_before(shape, masked) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    call = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}

    def ask(model: PreTrainedModel) -> Any:
        try:
            return model(**call).logits.shape
        except RuntimeError as error:
            return str(error)

    assert ask(radix_mlp.enable(small())) == ask(small())


def test_second_derivatives_through_expand_are_refused() -> None:
    model = radix_mlp.enable(small(), impl="expand", threshold=1.0)
    loss = model(IDS).logits.square().sum()
    with pytest.raises(UnsupportedCallError, match="no second derivative"):
        torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight, create_graph=True)


@pytest.mark.filterwarnings("ignore:radix-mlp runs this call unfolded")
@pytest.mark.parametrize("option", ["scale_grad_by_freq", "max_norm", "sparse"])
def test_embeddings_with_options(sequences, option) -> None:
    ids, mask = pad(sequences, "right")
    gradients = []
    for model in (tiny_model("llama"), radix_mlp.enable(tiny_model("llama"))):
        embedding = model.model.embed_tokens
        setattr(embedding, option, 1.0 if option == "max_norm" else True)
        labels = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append(embedding.weight.grad.to_dense())
    # padding has an embedding of its own, and with frequencies a count
    torch.testing.assert_close(*gradients, **EXACT)
    assert radix_mlp.last_call(model).folded == (option != "scale_grad_by_freq")
    if option == "scale_grad_by_freq":
        with pytest.raises(UnsupportedCallError, match=option):
            check_trainable(model)
        with torch.no_grad():
            model(ids, attention_mask=mask)
        assert radix_mlp.last_call(model).folded


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_scales_of_the_whole_call(sequences, dtype, when) -> None:
    ids, mask = pad(sequences, "right")
    model = small()
    if when == "after":
        radix_mlp.enable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=dtype, inplace=True)
    if when == "before":
        with pytest.raises(UnsupportedModelError, match="from all rows of a call"):
            radix_mlp.enable(quantized)
    else:
        with pytest.warns(UserWarning, match="from all rows of a call"):
            quantized(ids, attention_mask=mask)


def test_a_mask_of_which_all_is_kept_is_the_same_mask():
    """Gemma 4 takes the last `logits_to_keep` rows of its masks, and 0 keeps all."""
    mask = TreeMask.of(radix_mlp.build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6]).to("cpu").tree, windows=None)
    assert mask[:, :, slice(-0, None), :] is mask
    for index in (0, (slice(None), slice(None), slice(-1, None)), slice(1, None)):
        with pytest.raises(UnsupportedCallError):
            _ = mask[index]
