"""Fused layers against the unmodified model fed one sequence at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tools.model_types.sweep import plan_of, sample_sequences
from tools.model_types.zoo import tiny_model
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import radix_mlp
from radix_mlp.errors import UnsupportedModelError
from radix_mlp.hf.fused import FusedDecoder
from radix_mlp.hf.fused.kernels import rotary_tables
from radix_mlp.hf.fused.layers import FAMILIES, join_layers, why_not_fused
from radix_mlp.hf.graphs import GraphedDecoder
from radix_mlp.hf.graphs.graph_inputs import GraphAttention, GraphInputs, pack
from radix_mlp.ops import AttentionTree
from radix_mlp.ops.attention.impl import fa4
from radix_mlp.ops.attention.impl.triton import MAX_WIDTH
from radix_mlp.ops.attention.impl.triton_tables import places, range_tree, size_of_forward_tables
from radix_mlp.plan import RadixPlan

SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
BUILDERS = {
    "qwen3": lambda: Qwen3Model(Qwen3Config(head_dim=24, **SMALL)),
    "qwen3-windows": lambda: Qwen3Model(
        Qwen3Config(head_dim=16, use_sliding_window=True, sliding_window=3, max_window_layers=1, **SMALL)
    ),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SMALL)),
    "llama": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "llama-biases": lambda: LlamaModel(LlamaConfig(attention_bias=True, mlp_bias=True, **SMALL)),
    "mistral": lambda: MistralModel(MistralConfig(sliding_window=4, **SMALL)),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # biases and norms that do something
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def alone(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states `[N, h]` of every sequence through the model as it is."""
    with torch.no_grad():
        return torch.cat([model(s[None], use_cache=False).last_hidden_state[0] for s in sequences])


def unfolded(hidden: torch.Tensor, plan: RadixPlan) -> torch.Tensor:
    return radix_mlp.unfold(hidden, plan)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", BUILDERS)
def test_same_as_the_model_alone(name: str) -> None:
    model, sequences = build(name), sample_sequences()
    expected = alone(model, sequences)
    plan = plan_of(sequences)
    found = FusedDecoder(radix_mlp.enable(model), impl="dense")(plan)
    assert plan.num_compact < plan.num_tokens
    assert difference(unfolded(found, plan), expected) < 1e-5


def test_every_part_of_a_layer_shows() -> None:
    """Zeroing or swapping any tensor that a layer holds moves the output by far more than the tolerance."""
    model = radix_mlp.enable(build("llama-biases"))
    # the interpreter takes its time for every row
    plan = plan_of([sequence[:4] for sequence in sample_sequences()[:2]])
    fused = FusedDecoder(model, impl="dense")
    expected = fused(plan).clone()
    layer = fused.layers[1]
    names = ("qkv", "out", "gate_up", "down")
    parts = {f"{name} {part}": getattr(getattr(layer, name), part) for name in names for part in ("weight", "bias")}
    for name, tensor in {**parts, "input_norm": layer.input_norm, "mlp_norm": layer.mlp_norm}.items():
        kept = tensor.clone()
        tensor.copy_(kept.flip(0))
        assert difference(fused(plan), expected) > 1e-3, name
        tensor.copy_(kept)
    assert difference(fused(plan), expected) == 0


def test_only_needed_rows_go_past_the_last_attention() -> None:
    model, sequences = build("qwen3"), sample_sequences()
    plan = plan_of(sequences)
    fused = FusedDecoder(radix_mlp.enable(model), impl="dense")
    rows = np.unique(plan.last_rows.astype(np.int64))
    every, some = fused(plan), fused(plan, rows)
    torch.testing.assert_close(some[rows], every[rows], rtol=0, atol=1e-6)
    assert some.isnan().all(1).sum() == plan.num_rows - len(rows)


def test_the_model_keeps_its_parameters_and_shares_their_memory() -> None:
    model, sequences = build("llama-biases"), sample_sequences()
    names, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    expected = alone(model, sequences)
    radix_mlp.enable(model)
    fused = FusedDecoder(model, impl="dense")
    assert list(model.state_dict()) == names
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    radix_mlp.disable(model)
    assert difference(alone(model, sequences), expected) < 1e-6

    with torch.no_grad():
        model.layers[1].self_attn.k_proj.weight.mul_(-1)
    expected = alone(model, sequences)
    plan = plan_of(sequences)
    radix_mlp.enable(model)
    assert fused.is_current()
    assert difference(unfolded(fused(plan), plan), expected) < 1e-5
    assert FusedDecoder(copy.deepcopy(model)).layers[0].qkv.weight.data_ptr() != fused.layers[0].qkv.weight.data_ptr()


def test_the_model_can_be_trained_and_saved_afterwards(tmp_path) -> None:
    model, sequences = build("qwen2"), sample_sequences()
    expected = alone(model, sequences)
    with torch.inference_mode():
        join_layers(model)
    model(sequences[0][None]).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert difference(alone(Qwen2Model.from_pretrained(tmp_path).eval(), sequences), expected) == 0


def adapt(name: str):
    """Adds an adapter to one projection of every layer."""

    def change(model: PreTrainedModel) -> None:
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[name]), model)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float64),
        adapt("v_proj"),
        adapt("o_proj"),
        adapt("up_proj"),
        adapt("down_proj"),
        lambda model: setattr(model.layers[2].self_attn.k_norm, "weight", torch.nn.Parameter(torch.ones(24))),
        lambda model: setattr(model.layers[2].self_attn.v_proj, "weight", torch.nn.Parameter(torch.ones(48, 48))),
        lambda model: setattr(model.layers[2].mlp.act_fn, "forward", torch.relu),
        lambda model: model.layers[2].register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "norm", torch.nn.Identity()),
    ],
)
def test_changes_of_the_model_are_noticed(change) -> None:
    model = radix_mlp.enable(build("qwen3"))
    fused = FusedDecoder(model, impl="dense")
    assert fused.is_current()
    change(model)
    assert not fused.is_current()


def test_hidden_states_asked_for_once_leave_the_layers_fused() -> None:
    """transformers keeps hooks on the layers from then on, which record nothing until they are asked for again."""
    model = radix_mlp.enable(build("qwen3"))
    fused = FusedDecoder(model, impl="dense")
    assert len(model(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states) == 4
    assert model.layers[0]._forward_hooks
    assert fused.is_current()
    assert why_not_fused(model) is None


def test_decoders_of_one_model_share_its_joined_weights() -> None:
    model = radix_mlp.enable(build("llama-biases"))
    first, second = FusedDecoder(model, impl="dense"), FusedDecoder(model, impl="dense")
    assert first.is_current()
    assert second.is_current()
    for x, y in zip(first.layers, second.layers, strict=True):
        assert (x.qkv.weight.data_ptr(), x.qkv.bias.data_ptr()) == (y.qkv.weight.data_ptr(), y.qkv.bias.data_ptr())
    moved = build("llama-biases")
    joined = join_layers(moved)[0].qkv.weight
    moved.to(torch.float64).to(torch.float32)
    assert join_layers(moved)[0].qkv.weight.data_ptr() != joined.data_ptr()


def test_a_checkpoint_written_by_accelerate_has_all_weights(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("qwen2")
    join_layers(model)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_autocast_and_empty_batches() -> None:
    model = radix_mlp.enable(build("llama-biases"))
    fused = FusedDecoder(model, impl="dense")
    plan = plan_of([sequence[:4] for sequence in sample_sequences()[:2]])
    expected = fused(plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(plan), expected)
    assert fused(radix_mlp.build_plan([], [0])).shape == (0, 48)
    assert fused(plan, np.zeros(0, np.int64)).isnan().all()


def test_heads_that_no_kernel_takes_have_no_graphs() -> None:
    config = LlamaConfig(head_dim=MAX_WIDTH + 8, **SMALL | {"num_hidden_layers": 1})
    assert GraphedDecoder(FusedDecoder(LlamaModel(config))).max_rows == 0


class HalvedMLP(Qwen3MLP):
    def forward(self, x):
        return 0.5 * super().forward(x)


class OwnTensor(torch.Tensor):
    """As sharded or quantized weights are."""


def wrapped(model: PreTrainedModel) -> PreTrainedModel:
    """With a forward of its own, as a user or a library may set."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.config.update({"hidden_act": "gelu"}), "gelu"),
        (lambda model: model.to(torch.float64), "float64"),
        (lambda model: model.layers[0].mlp.register_forward_hook(lambda *_: None), "hooks"),
        (lambda model: setattr(model.layers[1].self_attn, "q_proj", torch.nn.Identity()), "q_proj is a Identity"),
        (lambda model: setattr(model.layers[1].mlp, "up_proj", torch.nn.Linear(48, 80)), "bias"),
        (lambda model: model.config.rope_parameters.update(rope_type="dynamic"), "rotary"),
        (lambda model: model.norm.half(), "several"),
        (lambda model: model.layers.__delitem__(slice(None)), "no layers"),
        (lambda model: setattr(model, "norm", torch.nn.LayerNorm(48)), "LayerNorm"),
        (lambda model: setattr(model.layers[1].input_layernorm, "variance_epsilon", 0.5), "RMSNorm"),
        (lambda model: setattr(model.layers[1].mlp, "act_fn", torch.nn.GELU()), "GELU"),
        (lambda model: setattr(model.layers[1].mlp, "__class__", HalvedMLP), "HalvedMLP"),
        (lambda model: radix_mlp.enable(wrapped(model)), "forward of its own"),
        (lambda model: setattr(model.norm, "weight", torch.nn.Parameter(OwnTensor(48))), "no plain tensors"),
    ],
)
def test_what_is_not_known_is_refused(change, reason: str) -> None:
    model = build("qwen3")
    change(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        FusedDecoder(model)


def test_other_families_are_refused() -> None:
    for model_type in ("gemma2", "gpt2", "mixtral", "phi3"):
        assert model_type not in FAMILIES
        with pytest.raises(UnsupportedModelError, match="not known"):
            FusedDecoder(tiny_model(model_type))


def test_what_a_graph_reads_is_the_plan_and_valid_padding() -> None:
    plan = plan_of(sample_sequences())
    padded, needed = 64, plan.last_rows.astype(np.int64)
    assert plan.num_rows < padded
    sizes = (2 * padded, 2 * padded, 2 * 8, padded, padded, size_of_forward_tables(padded))
    packed = np.full(sum(sizes), 77, np.int32)
    pack(packed, plan, needed, sizes, "triton")
    ids, positions, rows, end, depth, tables = np.split(packed, np.cumsum(sizes)[:-1])
    at = places(padded, padded)
    range_of_row, ranges, order = tables[: at.ranges], tables[at.ranges : at.order], tables[at.order :]
    assert (ids.view(np.int64)[: plan.num_rows] == plan.compact_ids).all()
    assert (positions.view(np.int64)[: plan.num_rows] == plan.compact_positions).all()
    assert (rows.view(np.int64)[: len(needed)] == needed).all()
    assert (end[: plan.num_rows] == plan.end).all()
    assert (depth[: plan.num_rows] == plan.depth).all()
    # a padding row sees itself alone, and no row sees it
    assert (end[plan.num_rows :] == np.arange(plan.num_rows, padded) + 1).all()
    tree = range_tree(end, depth)
    assert (range_of_row == tree.range_of_row).all()
    assert (ranges[: tree.ranges.size] == tree.ranges.ravel()).all()
    assert (order == tree.order).all()


def test_a_graph_for_flash_attention_4_reads_the_lists_of_the_batch() -> None:
    stem = torch.arange(300)
    sequences = [torch.cat([stem, torch.arange(length) + 400 + 50 * i]) for i, length in enumerate((7, 150, 2, 90))]
    plan = plan_of(sequences)
    inputs = GraphInputs(640, 64, GraphAttention("fa4"), torch.device("cpu"))
    # what was there before is gone
    inputs.fill(plan_of([torch.arange(620)]), np.arange(3))
    inputs.fill(plan, plan.last_rows.astype(np.int64))
    assert (inputs.tree.end[: plan.num_rows].numpy() == plan.end).all()
    found = fa4.block_lists(inputs.tree)
    made = fa4.block_lists(AttentionTree.from_end(inputs.tree.end, inputs.tree.depth))
    assert torch.equal(found.end, made.end)
    for counts, numbers in ((0, 1), (2, 3)):
        assert torch.equal(found.forward[counts], made.forward[counts])
        assert made.forward[counts].any()
        for line, count in enumerate(made.forward[counts][0, 0].tolist()):
            assert torch.equal(found.forward[numbers][0, 0, line, :count], made.forward[numbers][0, 0, line, :count])


# the largest angles of a long context; float32 has seven digits of them
@pytest.mark.parametrize("name", ["qwen3", "yarn"])
def test_angles_are_those_of_the_model(name: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = build("qwen3") if name == "qwen3" else LlamaModel(LlamaConfig(rope_parameters=yarn, **SMALL))
    positions = torch.cat([torch.arange(70), torch.tensor([4095, 131_071])])
    expected = model.rotary_emb(torch.empty(0), positions[None])
    found = rotary_tables(positions, model.rotary_emb.inv_freq, model.rotary_emb.attention_scaling)
    assert (model.rotary_emb.attention_scaling == 1) == (name == "qwen3")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (72, model.layers[0].self_attn.head_dim // 2)
        assert (torch.cat([ours, ours], 1) - theirs[0]).abs().max() < 1e-6


# on a device


def bfloat16_cases() -> tuple[PreTrainedModel, list[list[torch.Tensor]]]:
    """A model and batches of several sizes, among them one above the largest graph."""
    torch.manual_seed(0)
    config = SMALL | {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 1000, "initializer_range": 0.1}
    model = Qwen3Model(Qwen3Config(head_dim=64, **config)).eval().cuda()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for prefix, suffix, count in [(30, 5, 4), (130, 40, 12), (0, 50, 3), (300, 100, 30), (7, 1, 1)]:
        stem = torch.randint(0, 1000, (prefix,), generator=generator)
        batches.append(
            [torch.cat([stem, torch.randint(0, 1000, (suffix + i,), generator=generator)]) for i in range(count)]
        )
    return model, batches


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_the_unmodified_model(dtype: torch.dtype) -> None:
    model, batches = bfloat16_cases()
    truth = [alone(model, [s.cuda() for s in batch]) for batch in batches]
    model.to(dtype)
    usual = [alone(model, [s.cuda() for s in batch]).float() for batch in batches]
    radix_mlp.enable(model)
    fused = FusedDecoder(model)
    graphed = GraphedDecoder(fused, max_rows=2048)
    for forward in (fused, graphed):
        # the third time a size comes, its graph has been captured and replayed
        for _ in range(3):
            for batch, expected, unmodified in zip(batches, truth, usual, strict=True):
                plan = plan_of(batch)
                found = unfolded(forward(plan), plan).float()
                limit = 2 * (unmodified - expected).norm() / expected.norm()
                assert (found - expected).norm() / expected.norm() < limit < 0.2


@pytest.mark.gpu
def test_graphs_and_needed_rows() -> None:
    model, batches = bfloat16_cases()
    model.bfloat16()
    radix_mlp.enable(model)
    fused = FusedDecoder(model)
    graphed = GraphedDecoder(fused, max_rows=2048)
    kept = []
    for _ in range(3):
        for batch in batches:
            plan = plan_of(batch)
            rows = np.unique(plan.last_rows.astype(np.int64))
            every, some = fused(plan), graphed(plan, rows)
            assert difference(some[rows].float(), every[rows].float()) < 2e-2
            assert some.isnan().all(1).sum() == plan.num_rows - len(rows)
            kept.append((some[rows], some[rows].clone()))
    # what was returned is not overwritten by later replays
    assert all(torch.equal(x, y) for x, y in kept)


@pytest.mark.gpu
def test_graphs_of_one_size_for_short_and_long_paths() -> None:
    """Tiles are chosen with the graph, so a graph is found by them too."""
    torch.manual_seed(0)
    config = SMALL | {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 1000, "initializer_range": 0.1}
    model = Qwen3Model(Qwen3Config(head_dim=128, **config)).eval().cuda()
    rng = np.random.default_rng(0)

    def sequences(prefix: int, suffix: int, count: int) -> list[torch.Tensor]:
        stem = rng.integers(0, 1000, prefix)
        # suffixes differ from their first token on
        rows = [np.concatenate([stem, [number], rng.integers(0, 1000, suffix - 1)]) for number in range(count)]
        return [torch.from_numpy(row) for row in rows]

    batches = [sequences(0, 64, 96), sequences(3072, 96, 32), sequences(4096, 2048, 1), sequences(1024, 40, 128)]
    truth = [alone(model, [s.cuda() for s in batch]) for batch in batches]
    model.bfloat16()
    usual = [alone(model, [s.cuda() for s in batch]).float() for batch in batches]
    graphed = GraphedDecoder(FusedDecoder(radix_mlp.enable(model)), max_rows=8192)
    for _ in range(3):
        for batch, expected, unmodified in zip(batches, truth, usual, strict=True):
            plan = plan_of(batch)
            assert plan.num_rows == 6144
            found = unfolded(graphed(plan), plan).float()
            limit = 2 * (unmodified - expected).norm() / expected.norm()
            assert (found - expected).norm() / expected.norm() < limit < 0.2
    assert len(graphed._graphs) > 1


@pytest.mark.gpu
def test_joining_keeps_no_second_copy_of_the_weights() -> None:
    torch.manual_seed(0)
    model = Qwen3Model(Qwen3Config(head_dim=64, **SMALL | {"hidden_size": 2048, "intermediate_size": 8192})).cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    join_layers(model)
    assert torch.cuda.memory_allocated() <= before * 1.01


def test_a_reason_is_given_for_every_refusal() -> None:
    assert why_not_fused(build("qwen3")) is None


def test_a_graph_that_cannot_be_captured_is_done_without(monkeypatch) -> None:
    plan = plan_of([sequence[:4] for sequence in sample_sequences()[:2]])
    graphed = GraphedDecoder(FusedDecoder(radix_mlp.enable(build("llama"))), max_rows=2048)

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(graphed, "_captured", no_memory)
    monkeypatch.setattr(FusedDecoder, "__call__", lambda *_: "run without")
    assert graphed(plan) == "run without"
    with pytest.warns(UserWarning, match="64 rows and more run without CUDA graphs: injected"):
        assert graphed(plan) == "run without"
    assert graphed.max_rows == 63
