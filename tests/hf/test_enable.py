"""Enabled models: the caller's layout in and out, against the unmodified model one sequence at a time."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path

import pytest
import torch
from tools.model_types.sweep import pad, sample_sequences
from tools.model_types.zoo import tiny_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedModelError

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def real_rows(batch: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [batch[row][mask[row].bool()] for row in range(len(mask))]


def assert_all_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("impl", ["auto", "dense", "expand", "reference"])
def test_padded_batches_come_back_as_they_came(model, sequences, expected, side, impl) -> None:
    ids, mask = pad(sequences, side)
    logits = radix_mlp.enable(model, impl=impl)(ids, attention_mask=mask).logits
    report = radix_mlp.last_call(model)
    assert report.folded
    assert report.num_compact < report.num_tokens == mask.sum()
    assert logits.shape == (*ids.shape, expected[0].shape[-1])
    assert_all_close(real_rows(logits, mask), expected)
    assert (logits[mask == 0] == 0).all()


def test_packed_rows_are_split_where_positions_restart(model, sequences, expected) -> None:
    positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
    logits = radix_mlp.enable(model)(torch.cat(sequences)[None], position_ids=positions).logits
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(logits[0], torch.cat(expected), **EXACT)


def test_packed_rows_with_flash_boundaries(model, sequences, expected) -> None:
    lengths = torch.tensor([0, *map(len, sequences)])
    radix_mlp.enable(model)
    logits = model(
        torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences])[None],
        cu_seq_lens_q=lengths.cumsum(0),
        cu_seq_lens_k=lengths.cumsum(0),
    ).logits
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(logits[0], torch.cat(expected), **EXACT)


def test_rectangular_batch_without_mask(model, sequences) -> None:
    ids = torch.stack([s[:10] for s in sequences if len(s) >= 10])
    expected = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(radix_mlp.enable(model)(ids).logits, expected, **EXACT)
    assert radix_mlp.last_call(model).folded


def test_explicit_positions_are_kept(model, sequences) -> None:
    ids = torch.stack([s[:10] for s in sequences if len(s) >= 10])
    positions = torch.arange(10)[None] * 3 + 7
    expected = torch.cat([model(r[None], attention_mask=torch.ones(1, 10), position_ids=positions).logits for r in ids])
    found = radix_mlp.enable(model)(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    assert radix_mlp.last_call(model).folded
    torch.testing.assert_close(found, expected, **EXACT)


def test_equal_ids_at_other_positions_are_not_shared(model) -> None:
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    positions = torch.tensor([[0, 1, 2], [1, 2, 3]])
    radix_mlp.enable(model, threshold=1.0)(ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    assert radix_mlp.last_call(model).num_compact == 6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 2])], ids=["last", "last 3", "index"])
def test_logits_to_keep(model, sequences, side, keep) -> None:
    ids, mask = pad(sequences, side)
    radix_mlp.enable(model)
    full = model(ids, attention_mask=mask).logits
    kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    torch.testing.assert_close(kept, full[:, columns], **EXACT)


def test_hidden_states_and_tuples(model, sequences) -> None:
    ids, mask = pad(sequences, "right")
    alone = [model(s[None], output_hidden_states=True).hidden_states for s in sequences]
    radix_mlp.enable(model)
    outputs = model(ids, attention_mask=mask, output_hidden_states=True)
    assert radix_mlp.last_call(model).folded
    for layer, hidden in enumerate(outputs.hidden_states):
        assert_all_close(real_rows(hidden, mask), [states[layer][0] for states in alone])
    as_tuple = model(ids, attention_mask=mask, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], outputs.logits)


def test_base_model_alone(model, sequences) -> None:
    trunk = model.model
    ids, mask = pad(sequences, "left")
    expected = [trunk(s[None]).last_hidden_state[0] for s in sequences]
    found = radix_mlp.enable(trunk)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert radix_mlp.last_call(trunk).folded
    assert_all_close(real_rows(found, mask), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(sequences, side) -> None:
    from tools.model_types.zoo import randomize, tiny_config
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("qwen3")
    config.num_labels, config.pad_token_id = 3, 1
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    randomize(model, 0)
    expected = torch.cat([model(s[None]).logits for s in sequences])
    ids, mask = pad(sequences, side)
    labels = torch.arange(len(sequences)) % 3
    expected_loss = torch.nn.functional.cross_entropy(expected, labels)
    outputs = radix_mlp.enable(model)(ids, attention_mask=mask, labels=labels)
    assert radix_mlp.last_call(model.model if not radix_mlp.is_enabled(model) else model).folded
    torch.testing.assert_close(outputs.logits, expected, **EXACT)
    torch.testing.assert_close(outputs.loss, expected_loss, **EXACT)


def test_token_classification_and_other_heads_on_the_trunk(sequences) -> None:
    from tools.model_types.zoo import randomize, tiny_config
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_config(tiny_config("llama")).double().eval()
    randomize(model, 0)
    expected = [model(s[None]).logits[0] for s in sequences]
    ids, mask = pad(sequences, "right")
    logits = radix_mlp.enable(model)(ids, attention_mask=mask).logits
    assert radix_mlp.last_call(model).folded
    assert_all_close(real_rows(logits, mask), expected)


def test_forward_compact_gives_the_rows_of_the_plan(model, sequences) -> None:
    expected = torch.cat([model.model(s[None]).last_hidden_state[0] for s in sequences])
    lengths = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    plan = radix_mlp.build_plan(torch.cat(sequences).numpy(), lengths.numpy())
    with pytest.raises(InvalidInputError, match="enable"):
        radix_mlp.forward_compact(model, plan)
    hidden = radix_mlp.forward_compact(radix_mlp.enable(model), plan)
    assert len(hidden) == plan.num_compact
    torch.testing.assert_close(radix_mlp.unfold(hidden, plan), expected, **EXACT)


def test_disable_gives_the_model_back(model, sequences, tmp_path: Path) -> None:
    before = {"class": type(model), "attention": model.config._attn_implementation, "config": model.config.to_dict()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    radix_mlp.enable(model)
    assert type(model) is before["class"]
    assert list(model.state_dict()) == list(state)
    assert str(inspect.signature(model.forward)) == str(inspect.signature(before["class"].forward)).replace(
        "self, ", ""
    )
    model.save_pretrained(tmp_path / "enabled")
    radix_mlp.disable(model)
    model.save_pretrained(tmp_path / "disabled")
    assert model.config._attn_implementation == before["attention"]
    assert "forward" not in model.__dict__
    assert not radix_mlp.is_enabled(model)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "enabled" / file).read_bytes() == (tmp_path / "disabled" / file).read_bytes()
    radix_mlp.disable(model)


def test_saved_while_enabled_loads_as_an_ordinary_model(model, sequences, expected, tmp_path: Path) -> None:
    radix_mlp.enable(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not radix_mlp.is_enabled(loaded)
    torch.testing.assert_close(loaded(sequences[0][None]).logits[0], expected[0], **EXACT)


def test_enabling_twice_changes_the_settings(model, sequences) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(radix_mlp.enable(model, threshold=0.0), threshold=1.0)
    model(ids, attention_mask=mask)
    assert radix_mlp.last_call(model).folded
    assert radix_mlp.disable(model).config._attn_implementation == "sdpa"


def test_enabling_a_trunk_and_then_its_head(model, sequences, expected) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model.model, threshold=0.0)
    radix_mlp.enable(model)
    assert_all_close(real_rows(model(ids, attention_mask=mask).logits, mask), expected)
    assert radix_mlp.last_call(model).folded
    radix_mlp.disable(model)
    assert not radix_mlp.is_enabled(model.model)
    assert "forward" not in model.model.__dict__


def test_attention_changed_behind_our_back(model, sequences) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedCallError, match=r"after radix_mlp\.enable"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_calls_that_are_not_folded_stay_as_they_were(sequences, attention) -> None:
    model = tiny_model("qwen3", attn_implementation=attention)
    # transformers' own eager attention gives NaN to real tokens after left padding under a sliding window
    ids, mask = pad(sequences, "left" if attention == "sdpa" else "right")
    before = model(ids, attention_mask=mask)
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    generated = model.generate(**prompt)

    def is_as_before(**options: bool) -> bool:
        return torch.equal(model(ids, attention_mask=mask, **options).logits[mask == 1], before.logits[mask == 1])

    radix_mlp.enable(model, threshold=0.0)
    assert is_as_before()
    assert not radix_mlp.last_call(model).folded
    radix_mlp.enable(model)
    assert is_as_before(use_cache=True)
    assert torch.equal(model.generate(**prompt), generated)
    radix_mlp.disable(model)
    assert is_as_before()


@pytest.mark.parametrize(
    ("threshold", "folds"), [(0, False), (0.3, False), (0.9, True), (1, True), (2.0, True), ("auto", True)]
)
def test_threshold(model, sequences, threshold, folds) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model, threshold=threshold)(ids, attention_mask=mask)
    assert radix_mlp.last_call(model).folded is folds


def test_auto_does_not_fold_where_nothing_is_saved(model) -> None:
    radix_mlp.enable(model)(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert not radix_mlp.last_call(model).folded
    assert "save less" in radix_mlp.last_call(model).reason


def test_a_copy_of_an_enabled_model_runs_its_own_weights(model, sequences, expected) -> None:
    ids, mask = pad(sequences, "right")
    copied = copy.deepcopy(radix_mlp.enable(model))
    with torch.no_grad():
        copied.get_output_embeddings().weight.mul_(2)
    assert_all_close(real_rows(copied(ids, attention_mask=mask).logits, mask), [2 * e for e in expected])
    assert_all_close(real_rows(model(ids, attention_mask=mask).logits, mask), expected)


def test_two_models_in_two_threads() -> None:
    jobs = []
    for model_type, seed in (("qwen3", 0), ("gemma2", 5)):
        model, sequences = tiny_model(model_type), sample_sequences(seed=seed)
        expected = [model(s[None]).logits[0].detach() for s in sequences]
        jobs.append((radix_mlp.enable(model, threshold=1.0), *pad(sequences, "right"), expected))
    failures: list[str] = []

    def work(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, expected: list[torch.Tensor]) -> None:
        for _ in range(10):
            with torch.no_grad():
                found = real_rows(model(ids, attention_mask=mask).logits, mask)
            error = max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))
            if error > 1e-4:
                failures.append(f"{model.config.model_type}: {error}")

    threads = [threading.Thread(target=work, args=job) for job in jobs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_wrong_arguments_of_enable(model) -> None:
    with pytest.raises(InvalidInputError, match=r"threshold is -0\.5"):
        radix_mlp.enable(model, threshold=-0.5)
    with pytest.raises(InvalidInputError, match="threshold is 'always'"):
        radix_mlp.enable(model, threshold="always")
    with pytest.raises(InvalidInputError, match="impl is 'magic'"):
        radix_mlp.enable(model, impl="magic")
    with pytest.raises(InvalidDtypeError, match="Linear"):
        radix_mlp.enable(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match="not enabled"):
        radix_mlp.last_call(model)
    assert not radix_mlp.is_enabled(model)


def test_other_attention_must_be_switched_first(model) -> None:
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        radix_mlp.enable(model)


def test_a_folded_call_has_no_cache_and_says_so(model, sequences) -> None:
    ids, mask = pad(sequences, "right")
    radix_mlp.enable(model)
    outputs = model(ids, attention_mask=mask)
    with pytest.raises(UnsupportedCallError, match="use_cache=True"):
        outputs.past_key_values.get_seq_length()
    with pytest.raises(UnsupportedCallError, match="use_cache=True"):
        model(ids[:, -1:], past_key_values=outputs.past_key_values)
    assert model(ids, attention_mask=mask, use_cache=False).past_key_values is None


def test_auto_model_class(tmp_path: Path, sequences) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path).eval()
    expected = [trunk(s[None]).last_hidden_state[0] for s in sequences]
    ids, mask = pad(sequences, "right")
    found = radix_mlp.enable(trunk)(ids, mask)
    assert radix_mlp.last_call(trunk).folded
    for f, e in zip(real_rows(found.last_hidden_state, mask), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
