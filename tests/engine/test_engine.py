import numpy as np
import pytest
import torch
from tests.engine import oracle
from transformers import GemmaConfig, GemmaModel, Qwen3Config, Qwen3Model

from radix_mlp import Engine, disable, is_enabled
from radix_mlp.errors import InvalidInputError, RadixError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

PREFIX = "Instruct: find the passage that answers. Query: "
TEXTS = [
    PREFIX + "what is a radix? Passage: the root of a number.",
    "something else",
    PREFIX + "what is a radix? Passage: a vegetable.",
    PREFIX,
    PREFIX + "who reads? Passage: naïve readers 🦜.",
    "something else",
    "z",
    PREFIX + "what is a radix? Passage: the root of",
]
PAIRS = [
    ("Q: 2 + 2?\nA:", " 4"),
    ("Q: 1 + 1?\nA:", " 2"),
    ("Q: 2 + 2?\nA:", " four"),
    ("Q: 2 + 2?\nA: ", "4"),
    ("", "no context"),
    ("Q: 2 + 2?\nA:", " 4 and more"),
]
ONE_TEXT = ["a short text"]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request):
    return tiny_model(dtype=request.param)


def ids_of(text):
    return list(text.encode())


@pytest.mark.parametrize("threshold", [1.0, 0.5, "auto", 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 140])
def test_embed_is_the_unmodified_model_one_text_at_a_time(model, threshold, max_batch_tokens):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    vectors = engine.embed(TEXTS, normalize=False)
    disable(model)
    expected = torch.stack([oracle.embedding(model, ids_of(text)) for text in TEXTS]).float()
    assert vectors.dtype == np.float32
    # embeddings are float32 whatever the model computes in
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=0, atol=2e-5)
    assert engine.stats.num_tokens == sum(len(ids_of(text)) for text in TEXTS)
    if threshold == 0:
        assert engine.stats.num_compact == engine.stats.num_tokens
    else:
        assert engine.stats.num_compact < 0.8 * engine.stats.num_tokens
    assert (engine.stats.num_batches > 1) == (max_batch_tokens == 140)


@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean", "cls"])
def test_poolings_dimensions_and_length_one(model, pooling):
    engine = Engine(model, tokenizer=tiny_tokenizer())
    vectors = engine.embed(TEXTS, pooling=pooling, dimensions=10)
    disable(model)
    expected = torch.stack([oracle.embedding(model, ids_of(text), pooling)[:10] for text in TEXTS]).float()
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(torch.from_numpy(vectors), expected, rtol=0, atol=2e-5)


def test_prompt_is_put_before_every_text(model):
    engine = Engine(model, tokenizer=tiny_tokenizer())
    a = engine.embed(["one", "two"], prompt="say: ")
    assert np.allclose(a, engine.embed(["say: one", "say: two"]), atol=1e-6)
    assert not np.allclose(a, engine.embed(["one", "two"]), atol=1e-2)


@pytest.mark.parametrize("threshold", [1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 20])
def test_score_is_the_unmodified_model_one_pair_at_a_time(model, threshold, max_batch_tokens):
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    scores = engine.score(PAIRS)
    disable(model)
    for (context, continuation), found in zip(PAIRS, scores, strict=True):
        spaces = context[len(context.rstrip()) :]
        head, tail = ids_of(context.rstrip()) or [257], ids_of(spaces + continuation)
        logprobs, is_greedy = oracle.score(model, head, tail)
        # log-probabilities are taken in float32
        assert found.token_logprobs == pytest.approx(logprobs.tolist(), rel=0, abs=3e-5)
        assert found.logprob == pytest.approx(sum(found.token_logprobs))
        assert found.is_greedy == is_greedy
    assert scores[0].token_logprobs == scores[3].token_logprobs


def test_greedy_continuations_are_found(model):
    disable(model)
    likeliest = {}
    for context in "abcdefghijklmnopqrstuvwxyz":
        with torch.no_grad():
            likeliest[context] = int(model(torch.tensor([ids_of(context)])).logits[0, -1].argmax())
    greedy = [(context, chr(token)) for context, token in likeliest.items() if token < 128]
    assert greedy
    engine = Engine(model, tokenizer=tiny_tokenizer())
    assert all(score.is_greedy for score in engine.score(greedy))
    assert not any(score.is_greedy for score in engine.score([(c, t + "€") for c, t in greedy]))
    other = [(context, "!" if token != "!" else "?") for context, token in greedy]
    assert not any(score.is_greedy for score in engine.score(other))
    disable(model)


def test_begin_token_before_every_context(model):
    engine = Engine(model, tokenizer=tiny_tokenizer())
    found = engine.score([("ab", "cd")], add_bos=True)[0]
    disable(model)
    assert found.token_logprobs == pytest.approx(
        oracle.score(model, [257, *ids_of("ab")], ids_of("cd"))[0].tolist(), abs=3e-5
    )


def test_unfolded_engine_takes_turns_with_its_own(model):
    engine = Engine(model, tokenizer=tiny_tokenizer())
    other = engine.with_folding(threshold=0)
    a, b, c = engine.embed(TEXTS), other.embed(TEXTS), engine.embed(TEXTS)
    assert np.array_equal(a, c)
    assert np.allclose(a, b, atol=1e-5)
    assert other.stats.compression == 1.0
    assert engine.stats.compression < 0.8
    assert is_enabled(model)
    disable(model)


def test_rejected_items_are_all_named():
    engine = Engine("tiny", max_length=10)
    with pytest.raises(RejectedItemsError, match=r"texts\[1\].*12 tokens, more than the limit of 10") as caught:
        engine.embed(["short", "a long text.", "", "ok"])
    assert [index for index, _ in caught.value.rejected] == [1, 2]
    with pytest.raises(RejectedItemsError) as caught:
        engine.score([("a", "b"), ("a", ""), ("a", "far too long, this")])
    assert [index for index, _ in caught.value.rejected] == [1, 2]


def test_truncation_keeps_the_begin_of_texts_and_the_end_of_pairs():
    engine = Engine("tiny", max_length=6)
    assert np.allclose(engine.embed(["abcdefgh"], truncate=True), engine.embed(["abcdef"]), atol=1e-6)
    cut = engine.score([("xyabcd", "ef")], truncate=True)[0]
    assert cut.token_logprobs == pytest.approx(engine.score([("abcd", "ef")])[0].token_logprobs, abs=1e-5)
    with pytest.raises(RejectedItemsError):
        engine.score([("a", "bcdefgh")], truncate=True)


def test_nothing_to_do():
    engine = Engine("tiny")
    assert engine.embed([]).shape == (0, 64)
    assert engine.score([]) == []


def test_progress_counts_up_to_all():
    seen = []
    Engine("tiny", max_batch_tokens=30).embed(TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert seen == sorted(seen)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_tokens": 0}, "max_batch_tokens=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"max_batch_tokens": "9"}, "max_batch_tokens='9'"),
        ({"threshold": -1}, "threshold"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"impl": "magic"}, "magic"),
    ],
)
def test_wrong_arguments_of_the_engine(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        Engine("tiny", **arguments)


def test_wrong_arguments_of_jobs():
    engine = Engine("tiny")
    with pytest.raises(InvalidInputError, match="pooling='max'"):
        engine.embed(ONE_TEXT, pooling="max")
    with pytest.raises(InvalidInputError, match="dimensions=65"):
        engine.embed(ONE_TEXT, dimensions=65)
    with pytest.raises(InvalidInputError, match=r"dimensions=2\.5"):
        engine.embed(ONE_TEXT, dimensions=2.5)
    with pytest.raises(TypeError, match="texts must be a list, not one string"):
        engine.embed("a text")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, not None"):
        engine.embed(["a", None])
    with pytest.raises(TypeError, match=r"pairs\[0\]"):
        engine.score(["ab"])
    with pytest.raises(RejectedItemsError, match="not valid Unicode"):
        engine.embed(["\ud800"])


def test_models_without_a_head_embed_and_do_not_score():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Qwen3Model(config).eval()
    engine = Engine(model, tokenizer=tiny_tokenizer())
    assert engine.embed(TEXTS).shape == (8, 32)
    with pytest.raises(UnsupportedModelError, match="no language-model head"):
        engine.score(PAIRS)


def test_models_that_cannot_be_folded_are_refused_unless_threshold_is_0():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = GemmaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, use_bidirectional_attention=True, **sizes
    )
    model = GemmaModel(config).eval()
    with pytest.raises(UnsupportedModelError, match="both directions"):
        Engine(model, tokenizer=tiny_tokenizer())
    assert Engine(model, tokenizer=tiny_tokenizer(), threshold=0).embed(ONE_TEXT).shape == (1, 32)


def test_answers_that_are_no_numbers_are_errors():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine = Engine(model, tokenizer=tiny_tokenizer())
    with pytest.raises(RadixError, match="not a number"):
        engine.embed(ONE_TEXT)


def test_logits_made_in_an_unknown_way_are_refused():
    model = tiny_model()
    engine = Engine(model, tokenizer=tiny_tokenizer())
    model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    assert engine.score(PAIRS[:1])
    own = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = own(self, *args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    disable(model)
    model.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match="makes its logits in a way"):
        engine.score(PAIRS[:1])


def test_the_forward_for_folded_rows_is_made_of_an_enabled_model() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    unfolded = Engine(model, tokenizer=tokenizer, threshold=0)
    assert unfolded.embed(["Query: roots"]).shape == (1, 64)
    assert not unfolded.forward.is_made
    assert not is_enabled(model)
    assert Engine(model, tokenizer=tokenizer).forward.is_made
    assert is_enabled(model)
