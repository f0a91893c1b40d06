import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.faults import without_expiry

from radix_mlp import Engine, disable
from radix_mlp.errors import InvalidInputError, RadixError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_tokenizer

PREFIX = "Is this a friendly message? "
INPUTS = [
    PREFIX + "good morning",
    PREFIX + "go away",
    "something else",
    (PREFIX, "good evening"),
    PREFIX + "good morning",
    PREFIX,
    ("a", "pair"),
]
LABELS = ["negative", "neutral", "positive"]


def ids_of(value):
    return list((value if isinstance(value, str) else "".join(value)).encode())


def expected_rows(model, inputs, activation):
    disable(model)
    return [activation(oracle.label_scores(model, ids_of(value))).tolist() for value in inputs]


def softmax(logits):
    return logits.softmax(-1)


def by_label(answers, labels):
    return [[dict(answer)[label] for label in labels] for answer in answers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("threshold", [1.0, "auto", 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 50])
def test_classify_is_the_unmodified_model_one_at_a_time(dtype, threshold, max_batch_tokens):
    model = tiny_classifier(dtype=dtype)
    engine = Engine(model, tokenizer=tiny_tokenizer(), threshold=threshold, max_batch_tokens=max_batch_tokens)
    answers = engine.classify(INPUTS)
    expected = expected_rows(model, INPUTS, softmax)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(by_label(answers, LABELS), expected, rtol=0, atol=tolerance)
    for answer, row in zip(answers, expected, strict=True):
        assert [label for label, _ in answer] == [LABELS[place] for place in np.argsort(-np.asarray(row))]
    assert len({answer[0].label for answer in answers}) > 1
    assert (engine.stats.num_batches > 1) == (max_batch_tokens == 50)


@pytest.mark.parametrize(
    ("labels", "problem_type", "activation"),
    [
        (LABELS, None, softmax),
        (LABELS, "single_label_classification", softmax),
        (LABELS, "multi_label_classification", torch.sigmoid),
        (LABELS, "regression", lambda logits: logits),
        (["reward"], None, lambda logits: logits),
        (["reward"], "regression", lambda logits: logits),
        (["spam"], "multi_label_classification", torch.sigmoid),
    ],
)
def test_scores_follow_the_problem_type(labels, problem_type, activation):
    model = tiny_classifier(labels, dtype=torch.float64, problem_type=problem_type)
    engine = Engine(model, tokenizer=tiny_tokenizer())
    answers, raw = engine.classify(INPUTS), engine.classify(INPUTS, raw_scores=True)
    np.testing.assert_allclose(by_label(answers, labels), expected_rows(model, INPUTS, activation), atol=1e-10)
    np.testing.assert_allclose(by_label(raw, labels), expected_rows(model, INPUTS, lambda x: x), atol=1e-10)


@pytest.mark.parametrize("text", ["ends in padding<|pad|><|pad|>", "<|pad|> in <|pad|> it", "<|pad|>"])
def test_padding_tokens_inside_texts_are_passed_over_as_transformers_does(text):
    model = tiny_classifier(dtype=torch.float64)
    texts = ["ends in padding", text, "other"]
    answers = Engine(model, tokenizer=tiny_tokenizer()).classify(texts)
    disable(model)
    ids = [tiny_tokenizer()(value)["input_ids"] for value in texts]
    expected = [oracle.label_scores(model, row).softmax(-1).tolist() for row in ids]
    np.testing.assert_allclose(by_label(answers, LABELS), expected, rtol=0, atol=1e-10)


def test_half_precision_stays_close():
    model = tiny_classifier(dtype=torch.bfloat16)
    answers = Engine(model, tokenizer=tiny_tokenizer()).classify(INPUTS)
    exact = expected_rows(tiny_classifier(dtype=torch.float64), INPUTS, softmax)
    np.testing.assert_allclose(by_label(answers, LABELS), exact, atol=0.15)


def test_a_broken_mask_is_found():
    model = tiny_classifier()
    engine = Engine(model, tokenizer=tiny_tokenizer(), impl="reference", threshold=1.0)
    engine.loaded.forward = without_expiry(engine)
    answers = engine.classify(INPUTS)
    assert np.abs(np.subtract(by_label(answers, LABELS), expected_rows(model, INPUTS, softmax))).max() > 0.01


def test_lengths():
    engine = Engine("tiny-classifier", max_length=10)
    with pytest.raises(RejectedItemsError, match=r"inputs\[1\].*12 tokens, more than the limit of 10") as caught:
        engine.classify(["short", "a long text.", "", ("not so", "short")])
    assert [index for index, _ in caught.value.rejected] == [1, 2, 3]
    answers = engine.classify(["a long text.", ("not so", "short"), "ok"], truncate=True)
    # the longer text of the pair loses its end
    assert answers == engine.classify(["a long tex", ("not s", "short"), "ok"])


def test_nothing_to_do():
    engine = Engine("tiny-classifier")
    engine.classify(["a"])
    assert engine.classify([]) == []
    assert engine.stats.num_requests == 0


def test_wrong_arguments():
    engine = Engine("tiny-classifier")
    with pytest.raises(TypeError, match="inputs must be a list, not one string"):
        engine.classify("a text")
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a string or a pair of strings, not None"):
        engine.classify(["a", None])
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a string or a pair"):
        engine.classify([("a", "b", "c")])
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a string, not 1"):
        engine.classify([("a", 1)])
    with pytest.raises(UnsupportedModelError, match=r"Qwen3ForCausalLM cannot classify.*kind='classifier'"):
        Engine("tiny").classify(["a"])


def test_heads_of_another_make_are_called_or_refused():
    model = tiny_classifier()
    model.score = torch.nn.Sequential(model.score, torch.nn.Tanh())
    found = by_label(Engine(model, tokenizer=tiny_tokenizer()).classify(["a", "b"]), LABELS)
    np.testing.assert_allclose(found, expected_rows(model, ["a", "b"], softmax), rtol=0, atol=1e-5)
    model.answer, model.score = model.score, None
    with pytest.raises(UnsupportedModelError, match="no layer `score`"):
        Engine(model, tokenizer=tiny_tokenizer()).classify(["a"])
    model = tiny_classifier()
    own = type(model).forward

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = own(self, *args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    model.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match="makes its logits in a way"):
        Engine(model, tokenizer=tiny_tokenizer()).classify(["a"])


def test_checkpoints_say_what_they_hold_and_kind_overrules_them(tmp_path):
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    tiny_model().save_pretrained(tmp_path / "causal")
    for folder in ("classifier", "causal"):
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    saved = str(tmp_path / "classifier")
    assert Engine(saved).classify(INPUTS) == Engine("tiny-classifier").classify(INPUTS)
    assert np.array_equal(Engine(saved, kind="trunk").embed(["a"]), Engine(saved).embed(["a"]))
    # transformers would make up the missing head
    with pytest.raises(InvalidInputError, match=r"lacks score\.weight, which a Qwen3ForSequenceClassification needs"):
        Engine(str(tmp_path / "causal"), kind="classifier")


def test_answers_that_are_no_numbers_are_errors():
    model = tiny_classifier()
    engine = Engine(model, tokenizer=tiny_tokenizer())
    engine.classify(["a"])
    # of one token alone, not among those of the check of the head
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("z")] = float("inf")
    with pytest.raises(RadixError, match=r"inputs\[1\]: the model's answer is not a number"):
        engine.classify(["a", "z"])
