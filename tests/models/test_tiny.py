import torch
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp.models.tiny import (
    SPECIAL_TOKENS,
    tiny_classifier,
    tiny_model,
    tiny_reranker,
    tiny_reranker_tokenizer,
    tiny_tokenizer,
)

tokenizer = tiny_tokenizer()


# the strings that a file holds are among those that hypothesis tries
@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_tokenizer_gives_every_text_back(text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens():
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == 259


def test_model_is_the_same_every_time_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert tiny_model(dtype=torch.float64).dtype == torch.float64


def test_attention_matters():
    ids = torch.tensor([list(b"a text of some length")])
    changed = ids.clone()
    changed[0, 0] = 120
    with torch.no_grad():
        before, after = (tiny_model()(x).logits[0, -1] for x in (ids, changed))
    assert (before - after).abs().max() > 0.1 * before.abs().max()


def test_reranker_answers_with_one_token():
    words = tiny_reranker_tokenizer()
    assert [words(text)["input_ids"] for text in ("yes", "no", "<|im_end|>")] == [[261], [262], [260]]
    assert words("nobody")["input_ids"] == list(b"nobody")
    text = "yes <|im_start|> no, nobody"
    assert words.decode(words(text)["input_ids"]) == text
    assert tiny_reranker().config.vocab_size == len(words)


def test_classifier_has_its_labels():
    model = tiny_classifier(["a", "b"], problem_type="multi_label_classification")
    assert model.config.id2label == {0: "a", 1: "b"}
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)
