"""Which models train folded: exactly those whose loss and gradients are the same, and the others say why."""

from __future__ import annotations

import pytest
import torch
from tools.model_types.sweep import pad
from tools.model_types.training import compare_training, gradients_of, random_tree, relative_error, trainable_types
from tools.model_types.zoo import tiny_model

import radix_mlp
from radix_mlp.errors import InvalidDtypeError, InvalidInputError, UnsupportedCallError, UnsupportedModelError
from radix_mlp.integrations.edge_forward import install_edge_forward
from radix_mlp.integrations.loss_forward import LossForward
from radix_mlp.models.tiny import tiny_classifier
from radix_mlp.ops import LinearHead
from radix_mlp.train import TreeBatch, language_head, tree_embeddings, tree_hidden, tree_logprobs, tree_scores

# windows and softcaps, sinks and experts, latent attention, a scaled head, learned positions, a bias in the head
REPRESENTATIVE = ["gemma2", "gpt_oss", "deepseek_v3", "cohere2", "gpt2", "phi"]
# what stands between their last hidden state and the logits is more than a linear layer
OTHER_HEADS = {"bert", "electra", "ernie", "modernbert-decoder", "roc_bert"}
PROVEN = trainable_types()


def check(model_type: str, seed: int = 0) -> None:
    errors = compare_training(model_type, seed=seed)
    assert errors.logits < 1e-5
    assert errors.loss < 1e-6
    assert errors.gradient < 3e-5, errors
    assert errors.num_parameters > 10


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_types_train_exactly(model_type) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(PROVEN) - OTHER_HEADS))
def test_the_loss_of_labels_is_the_models_own(model_type) -> None:
    """Whatever a class adds to its loss: with logits and without, against its own forward one sequence at a time."""
    model = tiny_model(model_type).train()
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.0
    sequences = [sequence for sequence in random_tree(3) if len(sequence) > 2]
    count = sum(len(sequence) - 1 for sequence in sequences)
    own = [model(s[None], labels=s[None], use_cache=False).loss.double() * (len(s) - 1) for s in sequences]
    expected = gradients_of(model, torch.stack(own).sum() / count)
    ids, mask = pad(sequences, "right")
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    install_edge_forward(model, LossForward, impl="auto", threshold=1)
    outputs = model(**call)
    assert outputs.logits is None
    assert relative_error(outputs.loss, torch.stack(own).sum() / count) < 1e-6
    found = gradients_of(model, outputs.loss)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient, floor=1e-6 * largest) < 3e-5, name


def test_layers_dropped_at_random_are_dropped_for_the_whole_call() -> None:
    """LayerDrop draws once a layer and call, not a token: from one seed, folded and padded skip the same layers."""
    model = tiny_model("opt").train()
    model.model.decoder.layerdrop = 0.5
    ids = torch.stack([torch.tensor([*range(5, 15), last]) for last in (20, 21)])
    losses = {}
    for seed in range(6):
        torch.manual_seed(seed)
        losses[seed] = model(ids, labels=ids, use_cache=False).loss.detach()
    assert len({float(loss) for loss in losses.values()}) > 1
    radix_mlp.enable(model, threshold=1)
    for seed, expected in losses.items():
        torch.manual_seed(seed)
        torch.testing.assert_close(model(ids, labels=ids).loss.detach(), expected, rtol=1e-6, atol=1e-6)
        assert radix_mlp.last_call(model).num_compact == 12


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVEN)
@pytest.mark.filterwarnings("default")
def test_every_proven_type_trains_exactly_or_is_refused(model_type) -> None:
    if model_type in OTHER_HEADS:
        with pytest.raises(UnsupportedModelError, match="makes its logits in a way"):
            check(model_type)
        return
    for seed in (1, 2):
        check(model_type, seed)


@pytest.mark.slow
def test_there_are_more_than_twenty_five() -> None:
    assert len(set(PROVEN) - OTHER_HEADS) >= 25


def test_a_broken_tree_is_seen(monkeypatch) -> None:
    """With one edge that predicts another row's token, the comparison fails."""
    make = TreeBatch.from_sequences

    def broken(*args, **kwargs):
        batch = make(*args, **kwargs)
        batch.edges.targets[3], batch.edges.targets[5] = batch.edges.targets[5], batch.edges.targets[3]
        return batch

    monkeypatch.setattr(TreeBatch, "from_sequences", broken)
    errors = compare_training("qwen3")
    assert errors.loss > 1e-3
    assert errors.gradient > 1e-3


def test_hooks_that_would_see_compact_rows_are_refused(model, sequences) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)
    batch = TreeBatch.from_sequences(sequences)
    radix_mlp.enable(model)
    with pytest.raises(UnsupportedCallError, match=r"hook .* would see compact rows"):
        tree_logprobs(model, batch)


@pytest.mark.parametrize("place", ["attention", "module", "router"])
def test_what_would_not_be_exact_is_refused(model, sequences, place) -> None:
    batch = TreeBatch.from_sequences(sequences)
    radix_mlp.enable(model).train()
    tree_logprobs(model, batch)
    if place == "attention":
        model.model.layers[1].self_attn.attention_dropout = 0.1
    elif place == "module":
        model.model.layers[0].mlp.drop = torch.nn.Dropout(0.1)
    else:
        model.config.output_router_logits = True
    with pytest.raises(UnsupportedCallError, match="balancing loss" if place == "router" else "one random draw"):
        tree_logprobs(model, batch)
    if place != "router":
        tree_logprobs(model.eval(), batch)


def test_models_that_are_not_enabled_or_have_no_head(sequences) -> None:
    batch = TreeBatch.from_sequences(sequences)
    with pytest.raises(InvalidInputError, match="not enabled"):
        tree_hidden(tiny_model("llama"), batch.plan)
    with pytest.raises(InvalidDtypeError, match="model is a Linear"):
        tree_hidden(torch.nn.Linear(2, 2), batch.plan)
    classifier = radix_mlp.enable(tiny_classifier())
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        tree_logprobs(classifier, batch)
    with pytest.raises(UnsupportedModelError, match="no layer `score`"):
        tree_scores(radix_mlp.enable(tiny_model("llama")), batch)
    for tokens in [(1, 2, 3), (1, -2), (1, 5000)]:
        with pytest.raises(InvalidInputError, match=r"pass the ids of \(yes, no\), each below"):
            tree_scores(radix_mlp.enable(tiny_model("llama")), batch, tokens=tokens)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="pooling is 'max'"):
        tree_embeddings(classifier, batch, pooling="max")  # type: ignore[arg-type]


def test_a_head_that_does_more_is_refused_until_it_is_given(sequences) -> None:
    model = radix_mlp.enable(tiny_model("modernbert-decoder"))
    batch = TreeBatch.from_sequences(sequences)
    with pytest.raises(UnsupportedModelError, match="Pass a function"):
        tree_logprobs(model, batch)
    found = tree_logprobs(model, batch, head=lambda hidden: model.decoder(model.lm_head(hidden))).logprob
    logits = model(sequences[0][None]).logits[0].log_softmax(-1)
    first = batch.edges.token_edge[1 : len(sequences[0])]
    torch.testing.assert_close(found[first], logits[:-1].gather(1, sequences[0][1:, None])[:, 0])


def test_a_forward_put_on_the_head_is_not_left_out(sequences) -> None:
    model = radix_mlp.enable(tiny_model("llama"))
    batch = TreeBatch.from_sequences(sequences)
    tree_logprobs(model, batch)
    own = model.lm_head.forward
    # after the head was looked at
    model.lm_head.forward = lambda hidden: own(hidden).roll(1, -1)
    with pytest.raises(UnsupportedCallError, match="the forward of lm_head was replaced"):
        tree_logprobs(model, batch)


def test_adapters_on_the_head_are_not_left_out(sequences) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama")
    assert isinstance(language_head(plain), LinearHead)
    model = peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    torch.manual_seed(0)
    radix_mlp.enable(model)
    language_head(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    batch = TreeBatch.from_sequences(sequences)
    logprob = tree_logprobs(model, batch).logprob
    with torch.no_grad():
        logits = model(sequences[0][None], use_cache=False).logits[0].log_softmax(-1)
    first = batch.edges.token_edge[1 : len(sequences[0])]
    torch.testing.assert_close(
        logprob[first].detach(), logits[:-1].gather(1, sequences[0][1:, None])[:, 0], rtol=1e-6, atol=1e-6
    )
    logprob.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert any("lm_head" in name for name in trained)
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model, use_reentrant) -> None:
    first, second = (TreeBatch.from_sequences(random_tree(seed)) for seed in (1, 2))
    radix_mlp.enable(model).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        # both graphs are alive when the first recomputes
        (tree_logprobs(model, first).logprob.sum() + tree_logprobs(model, second).logprob.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
