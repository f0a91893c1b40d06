"""Hybrid models (convolutions, linear attention, state spaces) fold exactly, and wrong states would be seen."""

from __future__ import annotations

import copy
import pickle
import threading

import peft
import pytest
import torch
from accelerate import cpu_offload
from tools.model_types.hybrids import (
    FAMILIES,
    HYBRIDS,
    broken_kernel_error,
    broken_plan_error,
    compare_hybrid,
    cut_everywhere,
    deep_batch,
    folded_logits,
    gradients_error,
    logits_error,
    one_wrong_parent,
    reach_error,
    relative,
)
from tools.model_types.multimodal_zoo import tiny_multimodal
from tools.model_types.sweep import one_at_a_time, pad, sample_sequences
from tools.model_types.wide import wide
from tools.model_types.zoo import causal_lm_types, tiny_model

import radix_mlp
from radix_mlp.errors import UnsupportedCallError, UnsupportedModelError
from radix_mlp.hf.mixers.discovery import kernels_of, mixers_of
from radix_mlp.hf.mixers.lightning import is_lightning

SMALL = [types[0] for types in FAMILIES.values()]
# a convolution, recurrences and whole sequences; the other families with the slow tests
FAST = ["lfm2", "falcon_h1", "minimax", "recurrent_gemma"]
ON_TREE = [types[0] for family, types in FAMILIES.items() if family != "whole sequences"]
OTHERS = [model_type for model_type in HYBRIDS if model_type not in SMALL and model_type in causal_lm_types()]
# transformers' own float32 inside of float64 weights
AS_LOADED, WIDE, WIDE_GRADIENT = 2e-4, 1e-10, 1e-9


def by_family(types: list[str] = SMALL) -> pytest.MarkDecorator:
    marks = {name: [] if name in FAST else [pytest.mark.slow] for name in types}
    return pytest.mark.parametrize("model_type", [pytest.param(name, marks=mark) for name, mark in marks.items()])


pytestmark = pytest.mark.filterwarnings("ignore")


def gradient_limit(model_type: str) -> float:
    # RG-LRU keeps its state in the float32 of a default argument
    return 1e-5 if model_type == "recurrent_gemma" else WIDE_GRADIENT


def check(model_type: str, **batch: int) -> None:
    errors = compare_hybrid(model_type, **batch)
    assert errors.as_loaded < AS_LOADED
    assert errors.wide < WIDE
    assert errors.gradient < gradient_limit(model_type)
    assert errors.wrong_parent > 1e-3


@by_family()
def test_logits_and_gradients_are_those_of_one_sequence_at_a_time(model_type) -> None:
    check(model_type, most=14)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_logits_and_gradients_of_all_hybrids(model_type) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SMALL)
def test_trees_eight_runs_deep(model_type) -> None:
    check(model_type, depth=8)


@by_family(ON_TREE)
def test_states_and_windows_that_end_with_their_run_are_seen(model_type) -> None:
    assert broken_plan_error(tiny_model(model_type), deep_batch(0), cut_everywhere) > 1e-2


# MiniMax calls no kernel by name: `check` breaks its whole plan
@by_family([t for t in ON_TREE if t != "minimax"])
def test_one_wrong_parent_of_one_kernel_is_seen(model_type) -> None:
    model = tiny_model(model_type)
    sequences = deep_batch(0, most=14)
    kernels = set().union(*(kernels_of(type(mixer)) for mixer in mixers_of(model).values()))
    assert kernels
    for kernel in kernels:
        assert broken_kernel_error(model, sequences, kernel, cut_everywhere) > 1e-3, kernel
        assert broken_kernel_error(model, sequences, kernel, one_wrong_parent) > 1e-3, kernel
    assert logits_error(model, sequences) < AS_LOADED


@by_family([t for t in ON_TREE if t != "lfm2"])
def test_a_state_matters_for_hundreds_of_tokens(model_type) -> None:
    assert reach_error(tiny_model(model_type)) > 1e-3


@by_family([*SMALL, "zamba2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_follows_the_tree(model_type, reentrant) -> None:
    model = tiny_model(model_type).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with wide(model):
        assert gradients_error(model, deep_batch(1, most=8)) < gradient_limit(model_type)


@by_family()
def test_generation_with_a_cache_is_token_for_token_the_same(model_type) -> None:
    model = tiny_model(model_type)
    ids, mask = pad(sample_sequences(), "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    radix_mlp.enable(model)
    assert torch.equal(model.generate(ids, **options), expected)
    # MiniMax has a cache of its own
    assert radix_mlp.last_call(model).folded == (model_type in ON_TREE and model_type != "minimax")


def packed(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `position_ids`, both `[1, N]`."""
    return torch.cat(sequences)[None], torch.cat([torch.arange(len(s)) for s in sequences])[None]


@pytest.mark.parametrize("shared", [2, 0])
@by_family()
def test_packed_rows_fold_whatever_they_share(model_type, shared) -> None:
    sequences = [torch.tensor([*[8, 9][:shared], 20 + i, 50 + i, 30, 31]) for i in range(4)]
    model = tiny_model(model_type)
    expected = one_at_a_time(model, sequences)
    radix_mlp.enable(model)
    ids, positions = packed(sequences)
    with torch.no_grad():
        logits = model(ids, position_ids=positions).logits[0].split([len(s) for s in sequences])
    assert radix_mlp.last_call(model).folded
    assert relative(list(logits), expected) < AS_LOADED


@pytest.mark.parametrize(("threshold", "also"), [(0, {}), ("auto", {"output_attentions": True})])
def test_packed_rows_that_would_not_fold_are_refused(threshold, also) -> None:
    """transformers' own mixers pass the state of one sequence on to the next in the row."""
    model = radix_mlp.enable(tiny_model("lfm2", attn_implementation="eager"), threshold=threshold)
    ids, positions = packed(sample_sequences())
    with pytest.raises(UnsupportedCallError, match="pass from one sequence into the next"):
        model(ids, position_ids=positions, **also)
    model(ids)


@pytest.mark.parametrize("also", [{}, {"attention_mask": torch.ones(1, 10, dtype=torch.long)}])
@pytest.mark.parametrize(
    ("name", "value"),
    [("cu_seq_lens_q", torch.tensor([0, 6, 10], dtype=torch.int32)), ("seq_idx", torch.tensor([[0] * 6 + [1] * 4]))],
)
@pytest.mark.parametrize("threshold", [0, "auto", 1.0])
def test_boundaries_that_would_not_be_kept_are_refused(name, value, also, threshold) -> None:
    """The state of jamba passes from one sequence to the next, whatever says where they start."""
    model = radix_mlp.enable(tiny_model("jamba"), threshold=threshold)
    ids = torch.arange(10, 20)[None]
    with pytest.raises(UnsupportedCallError, match=r"share a row|cu_seq_lens_q|seq_idx"):
        model(ids, **{name: value}, **also)
    one_row = {name: torch.tensor([0, 10]) if name == "cu_seq_lens_q" else torch.zeros_like(value)}
    if name == "cu_seq_lens_q" or threshold != 1.0:
        model(ids, **one_row, **also)


def test_positions_of_an_image_pack_nothing() -> None:
    """Its tokens share a time; a text that starts again, or repeats on all axes, is another sequence."""
    image = torch.tensor([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])[:, None]
    model = tiny_multimodal("qwen3_5")
    embeddings = model.get_input_embeddings()(torch.arange(8, 15)[None]).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, position_ids=image).logits
        radix_mlp.enable(model)
        found = model(inputs_embeds=embeddings, position_ids=image).logits
        counted = torch.cat([torch.arange(7)[None, None], image])
        model(inputs_embeds=embeddings, position_ids=counted)
    assert torch.equal(found, expected)
    for packed_positions in ([0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]):
        for axes in (3, 4):
            positions = torch.tensor(packed_positions).expand(axes, 1, -1)
            with pytest.raises(UnsupportedCallError, match="pass from one sequence into the next"):
                model(inputs_embeds=embeddings, position_ids=positions)


@by_family()
def test_copies_and_pickles_fold_by_themselves_and_disable_leaves_nothing(model_type) -> None:
    model = radix_mlp.enable(tiny_model(model_type), threshold=1.0)
    sequences = sample_sequences()
    expected = one_at_a_time(tiny_model(model_type), sequences)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for folding in copies:
        assert relative(folded_logits(folding, sequences, "left"), expected) < AS_LOADED
        mixers = mixers_of(folding).values()
        assert all(vars(mixer)["forward"].module is mixer for mixer in mixers)
    radix_mlp.disable(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(one_at_a_time(model, sequences), expected, strict=True))
    assert list(model.state_dict()) == list(tiny_model(model_type).state_dict())
    assert relative(folded_logits(copies[0], sequences, "left"), expected) < AS_LOADED


@by_family([*SMALL, "recurrent_gemma"])
def test_threads_that_call_at_once_follow_their_own_trees(model_type) -> None:
    model = tiny_model(model_type)
    batches = [deep_batch(seed, most=6) for seed in range(4)]
    expected = [one_at_a_time(model, batch) for batch in batches]
    radix_mlp.enable(model, threshold=1.0)
    errors = [1.0] * len(batches)

    def run(place: int) -> None:
        # gradient mode belongs to a thread
        with torch.no_grad():
            for side in ("left", "right", "left"):
                errors[place] = relative(folded_logits(model, batches[place], side), expected[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(errors) < AS_LOADED


@by_family()
def test_autocast_rounds_no_more_than_it_does_unfolded(model_type) -> None:
    model = tiny_model(model_type, dtype=torch.float32)
    sequences = sample_sequences()
    exact = torch.cat(one_at_a_time(tiny_model(model_type), sequences))
    radix_mlp.enable(model, threshold=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = torch.cat(one_at_a_time(tiny_model(model_type, dtype=torch.float32), sequences))
        with torch.no_grad():
            folded = torch.cat(folded_logits(model, sequences, "right"))
    assert folded.dtype == stock.dtype == torch.bfloat16
    # a token that rounding sends to another expert is far off, either way
    assert (folded - exact).norm(dim=1).median() < 2 * (stock - exact).norm(dim=1).median()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text"])
def test_a_compiled_model_folds(model_type) -> None:
    model = tiny_model(model_type, dtype=torch.float32)
    batches = [sample_sequences(seed=seed) for seed in range(2)]
    expected = [one_at_a_time(model, batch) for batch in batches]
    compiled = torch.compile(radix_mlp.enable(model, threshold=1.0))
    for batch, logits in zip(batches, expected, strict=True):
        ids, mask = pad(batch, "right")
        with torch.no_grad():
            found = compiled(ids, attention_mask=mask).logits
        assert radix_mlp.last_call(model).folded
        assert relative([found[row][mask[row].bool()] for row in range(len(batch))], logits) < 1e-3


def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
    raise NotImplementedError


def torch_chunk_gated_delta_rule(query, key, value, g, beta, allow_negative_eigenvalues=True, **kwargs):
    raise NotImplementedError


class KnownMixer(torch.nn.Module):
    def forward(self, hidden_states):
        return causal_conv1d_fn(hidden_states, self.weight)


class OtherMixer(torch.nn.Module):
    def forward(self, hidden_states):
        return torch_chunk_gated_delta_rule(causal_conv1d_fn(hidden_states, self.weight), *self.rest)


def test_a_kernel_with_a_parameter_that_the_tree_does_not_know_makes_no_mixer() -> None:
    assert kernels_of(KnownMixer) == {"causal_conv1d_fn"}
    assert not kernels_of(OtherMixer)


def test_a_mixer_with_a_forward_of_its_own_is_refused() -> None:
    model = tiny_model("lfm2")
    mixer = next(iter(mixers_of(model.model).values()))
    mixer.forward = lambda *args, **kwargs: type(mixer).forward(mixer, *args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        radix_mlp.enable(model)
    del mixer.forward
    radix_mlp.enable(model)


@by_family()
def test_an_adapter_of_the_mixers_layers_folds(model_type) -> None:
    model = tiny_model(model_type, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    sequences = sample_sequences()
    plain = one_at_a_time(tiny_model(model_type, dtype=torch.float32), sequences)
    expected = one_at_a_time(adapted, sequences)
    assert relative(expected, plain) > 0.1
    radix_mlp.enable(adapted, threshold=1.0)
    with torch.no_grad():
        assert relative(folded_logits(adapted, sequences, "left"), expected) < 1e-3


def test_weights_that_accelerate_offloads_are_loaded_for_the_mixers() -> None:
    """A convolution's weight is read without a call of the layer, and the decorator that loads it stays around."""
    sequences = sample_sequences()
    expected = one_at_a_time(tiny_model("lfm2"), sequences)
    model = cpu_offload(tiny_model("lfm2"), execution_device=torch.device("cpu"))
    mixer = next(iter(mixers_of(model).values()))
    assert mixer.conv.weight.is_meta
    radix_mlp.enable(model, threshold=1.0)
    for _ in range(2):
        with torch.no_grad():
            assert relative(folded_logits(model, sequences, "right"), expected) < 1e-9
        assert mixer.conv.weight.is_meta
    radix_mlp.disable(model)
    assert relative(one_at_a_time(model, sequences), expected) < 1e-9


def test_what_ran_on_whole_sequences_is_reported() -> None:
    model = radix_mlp.enable(tiny_model("recurrent_gemma"), threshold=1.0)
    folded_logits(model, sample_sequences(), "right")
    assert radix_mlp.last_call(model).expanded == ("RecurrentGemmaRecurrentBlock",)
    model = radix_mlp.enable(tiny_model("lfm2"), threshold=1.0)
    folded_logits(model, sample_sequences(), "right")
    assert radix_mlp.last_call(model).expanded == ()


def test_lightning_attention_with_another_forward_is_refused() -> None:
    """Its lines around the recurrence are run from here, so they must be those that are known."""
    model = tiny_model("minimax")
    mixer = next(iter(mixers_of(model).values()))
    kind = type(mixer)
    assert is_lightning(kind)

    class Changed(kind):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(self.shift(hidden_states), *args, **kwargs)

        def shift(self, hidden_states):
            return hidden_states.roll(1, 1)

    assert not is_lightning(Changed)
    mixer.__class__ = Changed
    with pytest.raises(UnsupportedModelError, match="Run it unfolded"):
        radix_mlp.enable(model)


def test_a_mixer_that_lost_its_forward_since_is_an_error() -> None:
    model = radix_mlp.enable(tiny_model("lfm2"), threshold=1.0)
    del vars(next(iter(mixers_of(model.model).values())))["forward"]
    with pytest.raises((UnsupportedModelError, UnsupportedCallError)):
        folded_logits(model, sample_sequences(), "right")
