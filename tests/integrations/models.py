"""Objects of sentence-transformers around the tiny models, loaded from a local folder as users load theirs."""

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from radix_mlp.models.tiny import tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

# shared and equal texts, a prefix of another, one of one token; more than one batch of the library's
TEXTS = [
    "a radix is a root",
    "a radix",
    "something else entirely, and long",
    "a radix is a root",
    "z",
    *(f"a radix is number {number}" for number in range(40)),
]
PAIRS = [
    ("what is it?", "a root"),
    ("what is it?", "a fruit, or a vegetable"),
    ("why?", "because"),
    ("why?", "no"),
    *(("what is it?", f"thing {number}") for number in range(40)),
]
CHAT = (
    "{% set query = messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first %}"
    "{% set document = messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first %}"
    "{% set system = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first %}"
    "<|im_start|>{{ system | default('the default') }}: {{ query }} | {{ document }}<|im_end|>answer:"
)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def embedder(folder, mode="lasttoken", *, include_prompt=True, dense=True, model=None, padding_side="right", **options):
    """A SentenceTransformer; its dense layer has weights of its own."""
    transformer = Transformer(save(model or tiny_model().model, tiny_tokenizer(), folder))
    transformer.tokenizer.padding_side = padding_side
    width = 64 * (1 if isinstance(mode, str) else len(mode))
    torch.manual_seed(0)
    modules = [transformer, Pooling(64, mode, include_prompt=include_prompt)]
    modules += [Dense(width, 24), Normalize()] if dense else []
    prompts = {"query": "query: ", "document": "document: ", "say": "Say: "}
    return SentenceTransformer(modules=modules, prompts=prompts, device="cpu", **options)


def reranker(folder, *, chat=False, **options):
    """A CrossEncoder that scores by the logits of yes and no."""
    tokenizer = tiny_reranker_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    return CrossEncoder(save(tiny_reranker(), tokenizer, folder), device="cpu", **options)
