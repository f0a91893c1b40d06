"""Models that compute attention themselves: exact on a dense mask, refused or unfolded where it does not reach."""

from __future__ import annotations

import copy

import pytest
import torch
from tools.model_types.sweep import broken_mask_error, gradient_error, one_at_a_time, pad, plan_of
from tools.model_types.wide import wide
from tools.model_types.zoo import proven_types, tiny_config, tiny_input, tiny_model
from transformers import PreTrainedModel

import radix_mlp
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.dense_types import MAX_DENSE_ROWS
from radix_mlp.hf.forward import compact_arguments
from radix_mlp.hf.tree_mask import TreeMask
from radix_mlp.ops import AttentionTree

TYPES = sorted(
    {
        "big_bird",
        "bloom",
        "codegen",
        "falcon",
        "gpt_neo",
        "gpt_neox_japanese",
        "gptj",
        "megatron-bert",
        "mpt",
        "openai-gpt",
        "rembert",
        "xglm",
    }
    & set(proven_types())
)


ALIBI = ["falcon-alibi-sdpa", "falcon-alibi-eager"]


def small(model_type: str) -> PreTrainedModel:
    """Of the zoo; Falcon has biases in place of rotations, too, and attention in two ways."""
    if model_type not in ALIBI:
        return tiny_model(model_type)
    config = tiny_config("falcon")
    config.alibi = True
    model = tiny_model("falcon", config=config, attn_implementation=model_type.split("-")[-1])
    assert model.transformer.use_alibi
    return model


def scaled(model_type: str) -> PreTrainedModel:
    """With matrices of standard deviation 0.3."""
    model = small(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.5)
    return model


def bound_of(model: PreTrainedModel) -> float:
    """Of errors relative to the largest number: XGLM runs in float32 alone."""
    return 1e-11 if model.dtype == torch.float64 else 1e-5


def deep_sequences() -> list[torch.Tensor]:
    """Two roots, branches at five depths, a sequence twice and one that is a part of another."""
    roots = [tiny_input(12, seed=1).flatten(), tiny_input(9, seed=2).flatten()]
    found = []
    for seed, root in enumerate(roots):
        stem = root
        for depth in range(5):
            own = tiny_input(4, seed=10 + 7 * seed + depth).flatten()
            found.append(torch.cat([stem, own]))
            stem = found[-1][: len(stem) + 2]
    return [*found, found[3], found[1][:7]]


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    off = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
    return off / max(float(e.abs().max()) for e in expected)


@torch.no_grad()
def folded(model: PreTrainedModel, sequences: list[torch.Tensor], side: str = "right") -> list[torch.Tensor]:
    ids, mask = pad(sequences, side)
    logits = model(ids, attention_mask=mask).logits
    return [logits[row][mask[row].bool()] for row in range(len(sequences))]


@pytest.mark.parametrize("model_type", [*TYPES, *ALIBI])
def test_logits_are_those_of_one_sequence_at_a_time(model_type) -> None:
    model, sequences = scaled(model_type), deep_sequences()
    with wide(model):
        expected = one_at_a_time(model, sequences)
        radix_mlp.enable(model, threshold=1)
        for side in ("left", "right"):
            assert relative(folded(model, sequences, side), expected) < bound_of(model)
    report = radix_mlp.last_call(model)
    assert report.folded
    assert report.num_compact < report.num_tokens / 2
    assert f"dense mask of {report.num_compact} x {report.num_compact}" in report.reason


@pytest.mark.parametrize("model_type", [*TYPES, *ALIBI])
def test_gradients_are_those_of_one_sequence_at_a_time(model_type) -> None:
    model = scaled(model_type)
    with wide(model):
        assert gradient_error(model) < bound_of(model)


@pytest.mark.parametrize("model_type", [*TYPES, *ALIBI])
def test_a_plain_causal_mask_is_seen(model_type) -> None:
    """Every row sees all rows before it."""
    assert broken_mask_error(small(model_type)) > 0.1


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "gpt_neo", *ALIBI])
def test_distances_by_row_number_are_seen(model_type) -> None:
    """Alibi and local windows go by depth: with the numbers of rows in its place the logits differ."""
    model, sequences = small(model_type), deep_sequences()
    if model_type == "gpt_neo":
        assert "local" in model.config.attention_layers
        assert model.config.window_size == 5
    expected = one_at_a_time(model, sequences)
    plan = plan_of(sequences).to("cpu")
    radix_mlp.enable(model, threshold=1)
    arguments = compact_arguments(model, plan)
    rows = torch.arange(plan.plan.num_rows, dtype=plan.tree.depth.dtype)
    errors = []
    for depth in (plan.tree.depth, rows):
        arguments["attention_mask"] = TreeMask.of(AttentionTree.from_end(plan.tree.end, depth), None)
        with torch.no_grad():
            logits = model(**arguments).logits[0][plan.unfold_index]
        errors.append(relative(list(logits.split([len(s) for s in sequences])), expected))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["bloom", "gptj", "gpt_neo", "falcon-alibi-sdpa"])
def test_checkpointing_recomputes_with_the_tree(model_type, use_reentrant) -> None:
    model, sequences = small(model_type).train(), deep_sequences()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def gradients(logits: list[torch.Tensor]) -> list[torch.Tensor]:
        torch.cat(logits).sin().sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return found

    expected = gradients([model(s[None], use_cache=False).logits[0] for s in sequences])
    radix_mlp.enable(model, threshold=1)
    ids, mask = pad(sequences, "right")
    logits = model(ids, attention_mask=mask).logits
    found = gradients([logits[row, : len(s)] for row, s in enumerate(sequences)])
    scale = max(float(e.abs().max()) for e in expected)
    assert max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) < 1e-5 * scale


@pytest.mark.parametrize("model_type", [*sorted({*TYPES} - {"big_bird"}), *ALIBI])
def test_more_rows_than_positions_fold(model_type) -> None:
    """Buffers that end at the longest sequence a model takes do not end the rows of a call."""
    model = small(model_type)
    stem = tiny_input(10).flatten()
    sequences = [torch.cat([stem, tiny_input(60, seed=seed).flatten()]) for seed in range(1, 5)]
    expected = one_at_a_time(model, sequences)
    radix_mlp.enable(model, threshold=1)
    assert relative(folded(model, sequences), expected) < 1e-5
    assert radix_mlp.last_call(model).num_compact == 250 > getattr(model.config, "max_position_embeddings", 128)


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gptj", "openai-gpt"])
def test_a_compiled_trunk_folds(model_type) -> None:
    model, sequences = tiny_model(model_type), deep_sequences()
    expected = one_at_a_time(model, sequences)
    radix_mlp.enable(model, threshold=1)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert relative(folded(compiled, sequences), expected) < 1e-5
    assert radix_mlp.last_call(model).folded
    # torch has left functions in the modeling file, which is no code of others
    another = radix_mlp.enable(tiny_model(model_type), threshold=1)
    assert relative(folded(another, sequences), expected) < 1e-5


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "gptj", "falcon-alibi-sdpa"])
def test_a_trunk_alone_folds(model_type) -> None:
    trunk, sequences = small(model_type).base_model, deep_sequences()
    ids, mask = pad(sequences, "right")
    with torch.no_grad():
        expected = [trunk(s[None]).last_hidden_state[0] for s in sequences]
        hidden = radix_mlp.enable(trunk, threshold=1)(ids, attention_mask=mask).last_hidden_state
    assert relative([hidden[row, : len(s)] for row, s in enumerate(sequences)], expected) < 1e-5
    assert radix_mlp.last_call(trunk).folded


@pytest.mark.skipif("big_bird" not in TYPES, reason="attends in both directions")
def test_rows_above_the_models_buffer_run_unfolded() -> None:
    model = tiny_model("big_bird")
    assert model.config.max_position_embeddings == 128
    sequences = [tiny_input(50, seed=seed).flatten() for seed in range(3)]
    expected = one_at_a_time(model, sequences)
    radix_mlp.enable(model, threshold=0.99999)
    doubled = sequences + sequences
    with pytest.warns(UserWarning, match="150 x 150"):
        found = folded(model, doubled)
    assert not radix_mlp.last_call(model).folded
    assert relative(found[:3], expected) < 1e-5
    radix_mlp.enable(model, threshold=1)
    with pytest.raises(UnsupportedCallError, match=r"150 x 150 rows, and config.max_position_embeddings is 128"):
        folded(model, doubled)


def test_more_rows_than_the_limit_are_an_error_where_folding_is_demanded() -> None:
    model = tiny_model("gptj")
    radix_mlp.enable(model, threshold=1)
    ids = torch.cat([tiny_input(100, seed=seed) for seed in range(MAX_DENSE_ROWS // 100 + 2)])
    with pytest.raises(UnsupportedCallError, match=rf"limit for this kind of model is {MAX_DENSE_ROWS}"):
        model(ids)


def test_a_sequence_that_mpt_itself_refuses_does_not_fold() -> None:
    model = tiny_model("mpt")
    radix_mlp.enable(model, threshold=1)
    with pytest.raises(UnsupportedCallError, match=r"a sequence has 129 tokens, and config.max_seq_len is 128"):
        model(tiny_input(129))


@pytest.mark.parametrize("model_type", ["big_bird", "megatron-bert", "rembert"])
def test_encoders_are_refused(model_type) -> None:
    config = tiny_config(model_type)
    config.is_decoder = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        radix_mlp.enable(tiny_model(model_type, config=config))


def test_block_sparse_attention_is_refused() -> None:
    config = tiny_config("big_bird")
    config.attention_type = "block_sparse"
    with pytest.raises(UnsupportedModelError, match=r"original_full|both directions"):
        radix_mlp.enable(tiny_model("big_bird", config=config))


def test_code_of_others_inside_is_refused() -> None:
    class Window(torch.nn.Module):
        def __init__(self, attention: torch.nn.Module) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, *args, **kwargs):
            return self.attention(*args, **kwargs)

    model = tiny_model("gptj")
    model.transformer.h[1].attn = Window(model.transformer.h[1].attn)
    with pytest.raises(UnsupportedModelError, match=r"h.1.attn \(Window\) is not transformers' own code"):
        radix_mlp.enable(model)


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo", "falcon-alibi-sdpa"])
def test_a_copy_folds_by_itself_and_disable_takes_everything_away(model_type) -> None:
    model, sequences = small(model_type), deep_sequences()
    expected = one_at_a_time(model, sequences)
    before = [set(vars(module)) for module in model.modules()]
    copied = copy.deepcopy(radix_mlp.enable(model, threshold=1))
    radix_mlp.disable(model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert relative(one_at_a_time(model, sequences), expected) == 0
    assert relative(folded(copied, sequences), expected) < 1e-5
    assert radix_mlp.last_call(copied).folded


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_packed_rows_fold_or_do_not_leak(model_type) -> None:
    """Bloom takes no positions, so its own code would take a packed row for one sequence."""
    model, sequences = tiny_model(model_type), deep_sequences()
    expected = one_at_a_time(model, sequences)
    packed = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
        "use_cache": False,
    }
    radix_mlp.enable(model, threshold=1)
    with torch.no_grad():
        found = model(**packed).logits[0].split([len(s) for s in sequences])
    assert relative(list(found), expected) < 1e-5
    radix_mlp.enable(model, threshold=0)
    if model_type == "bloom":
        with pytest.raises(UnsupportedCallError, match="would take the row for one sequence"):
            model(**packed)
    else:
        with torch.no_grad():
            found = model(**packed).logits[0].split([len(s) for s in sequences])
        assert relative(list(found), expected) < 1e-5
