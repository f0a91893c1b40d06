import math

import numpy as np
import pytest
import torch
from tests.engine import oracle
from tests.engine.faults import without_expiry
from torch.overrides import TorchFunctionMode

from radix_mlp import Engine, disable
from radix_mlp.engine.tasks import rerank_template as template
from radix_mlp.errors import InvalidInputError, RadixError, RejectedItemsError, UnsupportedModelError
from radix_mlp.models.heads import language_head
from radix_mlp.models.tiny import tiny_classifier, tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

QUERY = "what is a radix?"
DOCUMENTS = [
    "the root of a number",
    "a vegetable, yes or no",
    "the root of a number",
    "naïve readers 🦜 and what they read",
    "the root",
]
PAIRS = [("who reads?", DOCUMENTS[3]), *((QUERY, document) for document in DOCUMENTS), ("who reads?", DOCUMENTS[0])]
TOKENIZER = tiny_reranker_tokenizer()
YES, NO = 261, 262
# written out once more, as the model card of Qwen3-Reranker has it
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
DEFAULT = "Given a web search query, retrieve relevant passages that answer the query"


def prompt_ids(query, document, instruction=DEFAULT):
    """Prefix, body and suffix encoded each for itself."""
    body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    return [id_ for text in (PREFIX, body, SUFFIX) for id_ in TOKENIZER(text)["input_ids"]]


def expected_scores(model, pairs, **options):
    disable(model)
    return [oracle.relevance(model, prompt_ids(*pair, **options), YES, NO) for pair in pairs]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def model(request):
    return tiny_reranker(dtype=request.param)


@pytest.fixture
def tolerance(model):
    return 1e-10 if model.dtype == torch.float64 else 1e-5


@pytest.mark.parametrize("threshold", [1.0, "auto", 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 400])
def test_pairs_are_the_unmodified_model_one_at_a_time(model, tolerance, threshold, max_batch_tokens):
    engine = Engine(model, tokenizer=TOKENIZER, threshold=threshold, max_batch_tokens=max_batch_tokens)
    scores = engine.rerank_pairs(PAIRS)
    expected = expected_scores(model, PAIRS)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(expected, rel=0, abs=tolerance)
    assert np.ptp(scores) > 0.05
    assert (engine.stats.num_batches > 1) == (max_batch_tokens == 400)
    if threshold != 0:
        assert engine.stats.compression < 0.7


def test_raw_scores_are_log_odds(model, tolerance):
    engine = Engine(model, tokenizer=TOKENIZER)
    raw, scores = engine.rerank_pairs(PAIRS, raw_scores=True), engine.rerank_pairs(PAIRS)
    assert [1 / (1 + math.exp(-score)) for score in raw] == pytest.approx(scores.tolist(), abs=tolerance)
    assert not np.allclose(raw, scores, atol=0.1)


def test_rerank_sorts_by_score_and_ties_by_index(model, tolerance):
    engine = Engine(model, tokenizer=TOKENIZER)
    ranked = engine.rerank(QUERY, DOCUMENTS)
    expected = expected_scores(model, [(QUERY, document) for document in DOCUMENTS])
    order = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))
    assert [place.index for place in ranked] == order
    assert [place.document for place in ranked] == [DOCUMENTS[index] for index in order]
    assert [place.score for place in ranked] == pytest.approx([expected[index] for index in order], abs=tolerance)
    assert [index for index, _, _ in engine.rerank(QUERY, DOCUMENTS, top_n=2)] == order[:2]
    assert len(engine.rerank(QUERY, DOCUMENTS, top_n=99)) == len(DOCUMENTS)
    assert engine.rerank(QUERY, []) == []
    assert engine.stats.num_requests == 0


@pytest.mark.parametrize("threshold", [1.0, 0])
@pytest.mark.parametrize("max_batch_tokens", [16384, 400])
def test_copies_tie_to_the_last_bit(threshold, max_batch_tokens):
    engine = Engine("tiny-reranker", threshold=threshold, max_batch_tokens=max_batch_tokens)
    for count in range(2, 9):
        documents = [*DOCUMENTS[:count], *["the root"] * count]
        ranked = engine.rerank(QUERY, documents)
        copies = [place for place in ranked if place.document == "the root"]
        assert len({place.score for place in copies}) == 1
        assert [place.index for place in copies] == sorted(place.index for place in copies)


def test_the_instruction_replaces_the_default(model, tolerance):
    engine = Engine(model, tokenizer=TOKENIZER)
    scores = engine.rerank_pairs(PAIRS, instruction="Find the opposite")
    expected = expected_scores(model, PAIRS, instruction="Find the opposite")
    assert scores == pytest.approx(expected, rel=0, abs=tolerance)
    assert not np.allclose(scores, engine.rerank_pairs(PAIRS), atol=1e-3)


def test_untied_and_biased_heads(tolerance, model):
    config = model.config.__class__(**{**model.config.to_dict(), "tie_word_embeddings": False})
    torch.manual_seed(0)
    untied = type(model)(config).to(model.dtype).eval()
    untied.lm_head = torch.nn.Linear(64, config.vocab_size, bias=True, dtype=model.dtype)
    torch.nn.init.normal_(untied.lm_head.bias)
    for parameter in untied.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    scores = Engine(untied, tokenizer=TOKENIZER).rerank_pairs(PAIRS)
    assert scores == pytest.approx(expected_scores(untied, PAIRS), rel=0, abs=tolerance)


class RowsOfHead(TorchFunctionMode):
    """Counts the rows that a linear layer with as many outputs as the vocabulary runs on."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and len(args[1]) == self.vocabulary:
            self.count += args[0].shape[:-1].numel()
        return func(*args, **kwargs or {})


def test_the_head_is_never_run_on_the_whole_vocabulary(model):
    engine = Engine(model, tokenizer=TOKENIZER)
    with RowsOfHead(model.lm_head.out_features) as rows:
        engine.rerank_pairs(PAIRS)
    # the comparison of the head with the model's own logits: each computes a few tokens
    assert rows.count <= 16


@pytest.mark.parametrize("kept", [1, 5, 12])
def test_truncation_cuts_the_document_and_nothing_else(model, tolerance, kept):
    document = "the root of a number"
    limit = len(prompt_ids(QUERY, document[:kept]))
    engine = Engine(model, tokenizer=TOKENIZER, max_length=limit)
    found = engine.rerank(QUERY, [document, "a"], truncate=True)
    cut = [document[:kept], "a"]
    expected = expected_scores(model, [(QUERY, document) for document in cut])
    assert {place.index: place.score for place in found} == pytest.approx(dict(enumerate(expected)), abs=tolerance)
    assert {place.document for place in found} == {document, "a"}


def test_truncated_pairs_keep_the_query_however_long_it_is():
    model = tiny_classifier(["relevant"], dtype=torch.float64)
    query, document = "a query longer than its document", "the root of it"
    engine = Engine(model, tokenizer=tiny_tokenizer(), max_length=len(query) + 4)
    found = engine.rerank_pairs([(query, document), ("q", "d")], template="pair", truncate=True)
    disable(model)
    expected = [oracle.label_scores(model, list(text.encode())) for text in (query + document[:4], "qd")]
    assert found == pytest.approx([float(logits.sigmoid()[0]) for logits in expected], abs=1e-10)
    engine.loaded.max_length = len(query)
    with pytest.raises(RejectedItemsError, match=r"pairs\[0\]: the query .* leaves no place"):
        engine.rerank_pairs([(query, document), ("q", "d")], template="pair", truncate=True)


def test_a_query_that_leaves_no_place_is_refused_also_when_cutting(model):
    limit = len(prompt_ids(QUERY, ""))
    engine = Engine(model, tokenizer=TOKENIZER, max_length=limit)
    with pytest.raises(RejectedItemsError, match=r"documents\[0\].*more than the limit of .*--truncate") as caught:
        engine.rerank(QUERY, ["a", "b" * 100])
    assert [index for index, _ in caught.value.rejected] == [0, 1]
    with pytest.raises(RejectedItemsError, match=r"pairs\[1\]: the query .* leaves no place") as caught:
        Engine(model, tokenizer=TOKENIZER, max_length=limit).rerank_pairs([("", "a"), (QUERY, "b")], truncate=True)
    assert [index for index, _ in caught.value.rejected] == [1]


@pytest.mark.parametrize("name", ["QWEN3_HEAD", "QWEN3_TAIL"])
def test_a_broken_template_is_found(monkeypatch, name):
    model = tiny_reranker()
    monkeypatch.setattr(template, name, getattr(template, name).replace("\n", " ", 1))
    scores = Engine(model, tokenizer=TOKENIZER).rerank_pairs(PAIRS)
    assert np.abs(scores - expected_scores(model, PAIRS)).max() > 1e-3


def test_a_broken_mask_is_found():
    model = tiny_reranker()
    engine = Engine(model, tokenizer=TOKENIZER, impl="reference", threshold=1.0)
    engine.loaded.forward = without_expiry(engine)
    scores = engine.rerank_pairs(PAIRS)
    assert np.abs(scores - expected_scores(model, PAIRS)).max() > 1e-3


@pytest.mark.parametrize("labels", [["relevant"], ["no", "yes"], ["yes", "no"], ["LABEL_0", "LABEL_1"]])
@pytest.mark.parametrize("name", ["qwen3", "pair"])
def test_classifiers_rerank(labels, name):
    model = tiny_classifier(labels, dtype=torch.float64)
    scores = Engine(model, tokenizer=tiny_tokenizer()).rerank_pairs(PAIRS, template=name)
    disable(model)
    for (query, document), score in zip(PAIRS, scores, strict=True):
        body = f"{PREFIX}<Instruct>: {DEFAULT}\n<Query>: {query}\n<Document>: {document}{SUFFIX}"
        logits = oracle.label_scores(model, list((body if name == "qwen3" else query + document).encode()))
        place = labels.index("yes") if "yes" in labels else len(labels) - 1
        expected = logits.softmax(-1)[place] if len(labels) == 2 else logits.sigmoid()[0]
        assert score == pytest.approx(float(expected), abs=1e-10)


def test_the_configuration_can_ask_for_scores_as_they_are():
    model = tiny_classifier(["relevant"], dtype=torch.float64)
    probabilities = Engine(model, tokenizer=tiny_tokenizer()).rerank_pairs(PAIRS, template="pair")
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    raw = Engine(model, tokenizer=tiny_tokenizer()).rerank_pairs(PAIRS)
    assert 1 / (1 + np.exp(-raw)) == pytest.approx(probabilities, abs=1e-10)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Tanh"}
    engine = Engine(model, tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match=r"activation torch.*Tanh.*raw_scores=True"):
        engine.rerank_pairs(PAIRS)
    assert engine.rerank_pairs(PAIRS, raw_scores=True) == pytest.approx(raw)


@pytest.mark.parametrize("labels", [["relevant"], ["no", "yes"]])
@pytest.mark.parametrize("name", ["someone/Qwen3-Reranker-0.6B-seq-cls", "someone/model"])
def test_a_template_is_not_guessed_from_a_name(labels, name):
    model = tiny_classifier(labels)
    model.config.name_or_path = name
    engine = Engine(model, tokenizer=tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match=r"wants query and document is not known.*--template.*qwen3.*pair"):
        engine.rerank_pairs(PAIRS)
    # what sentence-transformers' CrossEncoder writes into config.json says how it was trained
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.0.0"}
    assert np.array_equal(engine.rerank_pairs(PAIRS), engine.rerank_pairs(PAIRS, template="pair"))
    assert not np.allclose(engine.rerank_pairs(PAIRS), engine.rerank_pairs(PAIRS, template="qwen3"), atol=1e-3)


def test_chat_templates_with_roles_of_their_own(model, tolerance):
    tokenizer = tiny_reranker_tokenizer()
    tokenizer.chat_template = (
        "{% set query = messages | selectattr('role', 'eq', 'query') | first %}"
        "{% set document = messages | selectattr('role', 'eq', 'document') | first %}"
        "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
        "{{ query.content }}|{{ document.content }}<|im_end|>answer:"
    )
    engine = Engine(model, tokenizer=tokenizer)
    for instruction, head in ((None, ""), ("say", "[say]")):
        scores = engine.rerank_pairs(PAIRS, instruction=instruction)
        disable(model)
        texts = [f"{head}{query}|{document}<|im_end|>answer:" for query, document in PAIRS]
        expected = [oracle.relevance(model, TOKENIZER(text)["input_ids"], YES, NO) for text in texts]
        assert scores == pytest.approx(expected, rel=0, abs=tolerance)
    engine.loaded.max_length = 30
    cut = engine.rerank_pairs([("q", "d" * 100)], truncate=True)
    disable(model)
    kept = "q|" + "d" * (30 - 2 - len("answer:") - 1)
    assert cut[0] == pytest.approx(
        oracle.relevance(model, TOKENIZER(f"{kept}<|im_end|>answer:")["input_ids"], YES, NO), abs=tolerance
    )
    engine.tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(InvalidInputError, match="does not show the content"):
        engine.rerank_pairs(PAIRS, template="chat")


def test_models_that_do_not_rerank():
    with pytest.raises(UnsupportedModelError, match=r"no single token for 'yes'.*tiny-reranker"):
        Engine("tiny").rerank("q", ["d"])
    with pytest.raises(UnsupportedModelError, match=r"3 labels \(negative, neutral, positive\)"):
        Engine("tiny-classifier").rerank("q", ["d"])
    with pytest.raises(UnsupportedModelError, match="Qwen3Model cannot rerank"):
        Engine(tiny_model().model, tokenizer=tiny_tokenizer()).rerank("q", ["d"])
    other = tiny_reranker()
    other.config.model_type = "llama"
    with pytest.raises(UnsupportedModelError, match=r"wants query and document is not known.*--template"):
        Engine(other, tokenizer=TOKENIZER, threshold=0).rerank("q", ["d"])


def test_wrong_arguments():
    engine = Engine("tiny-reranker")
    with pytest.raises(InvalidInputError, match="top_n=0"):
        engine.rerank("q", ["d"], top_n=0)
    with pytest.raises(InvalidInputError, match="template='magic'"):
        engine.rerank("q", ["d"], template="magic")
    with pytest.raises(InvalidInputError, match=r"template='chat'.*no chat template"):
        engine.rerank("q", ["d"], template="chat")
    with pytest.raises(InvalidInputError, match="prompt_name='x'"):
        engine.rerank("q", ["d"], prompt_name="x")
    with pytest.raises(InvalidInputError, match="instruction and prompt_name='x'"):
        engine.rerank("q", ["d"], instruction="i", prompt_name="x")
    with pytest.raises(TypeError, match="query must be a string, not None"):
        engine.rerank(None, ["d"])
    with pytest.raises(TypeError, match="documents must be a list"):
        engine.rerank("q", "d")
    with pytest.raises(TypeError, match=r"documents\[1\] must be a string, not 3"):
        engine.rerank("q", ["d", 3])
    with pytest.raises(TypeError, match=r"pairs\[0\] must be \(query, document\)"):
        engine.rerank_pairs(["ab"])
    with pytest.raises(InvalidInputError, match="kind='other'"):
        Engine("tiny-reranker", kind="other")
    with pytest.raises(InvalidInputError, match=r"kind='classifier'.*Qwen3ForCausalLM is of the kind 'causal'"):
        Engine("tiny-reranker", kind="classifier")


def test_answers_that_are_no_numbers_are_errors():
    model = tiny_reranker()
    engine = Engine(model, tokenizer=TOKENIZER)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RadixError):
        engine.rerank(QUERY, DOCUMENTS)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tokens", [(5, 7), None])
def test_a_head_with_an_adapter_is_the_models_own_after_every_change(tokens):
    """Training moves the adapter, while the layer and its weight stay the same."""
    peft = pytest.importorskip("peft")
    model, probe = tiny_model(), np.arange(1, 9, dtype=np.int32)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)
    found = []
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(probe).long()[None]).last_hidden_state[0]
        for value in (0.0, 1.0):
            model.lm_head.lora_B["default"].weight.fill_(value)
            own = model.lm_head(hidden)[:, list(tokens or range(259))]
            found.append(language_head(model, tokens, probe=probe)(hidden))
            torch.testing.assert_close(found[-1], own)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_answers_in_any_order_are_read_from_their_own_rows():
    """Also where they are the whole vocabulary."""
    model, probe = tiny_model(), np.arange(1, 9, dtype=np.int32)
    tokens = list(reversed(range(model.lm_head.out_features)))
    with torch.inference_mode():
        hidden = model.model(torch.from_numpy(probe).long()[None]).last_hidden_state[0]
        found = language_head(model, tokens, probe=probe)(hidden)
        torch.testing.assert_close(found, model.lm_head(hidden)[:, tokens])


@pytest.mark.parametrize(
    ("instruction", "reason"), [("half \ud800", "not valid Unicode"), (b"bytes", "must be a string")]
)
def test_an_instruction_that_is_no_text_is_refused(instruction, reason):
    engine = Engine("tiny-reranker")
    with pytest.raises(InvalidInputError, match=reason):
        engine.rerank("query", ["document"], instruction=instruction)
    with pytest.raises(InvalidInputError, match=reason):
        engine.embed(["text"], prompt=instruction)
