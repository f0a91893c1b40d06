"""Rerank with sentence-transformers' CrossEncoder, stock and enabled: the same scores from fewer tokens.

python examples/rerank_with_sentence_transformers.py                              a tiny random model, offline
python examples/rerank_with_sentence_transformers.py Qwen/Qwen3-Reranker-0.6B
"""

import sys
import tempfile
import time

from sentence_transformers import CrossEncoder

from radix_mlp.integrations.sentence_transformers import enable, stats
from radix_mlp.testing.tiny import tiny_reranker, tiny_reranker_tokenizer

QUERY = "Which part of a plant is a radix, and what does it do for the plant in the course of a year?"
DOCUMENTS = [f"Paragraph {number}: a radix is the root of a plant." for number in range(200)]


def load() -> CrossEncoder:
    if len(sys.argv) > 1:
        return CrossEncoder(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tiny_reranker().save_pretrained(folder)
        tiny_reranker_tokenizer().save_pretrained(folder)
        return CrossEncoder(folder)


def main() -> None:
    model = load()
    pairs = [(QUERY, document) for document in DOCUMENTS]
    began = time.perf_counter()
    stock = model.predict(pairs)
    middle = time.perf_counter()
    enable(model).predict(pairs[:2])
    warm = time.perf_counter()
    ours = model.predict(pairs)
    done = time.perf_counter()
    took = stats(model)
    print(f"stock    {middle - began:6.2f} s")
    print(f"enabled  {done - warm:6.2f} s, {took.num_compact:,} of {took.num_tokens:,} tokens computed")
    print(f"largest difference {abs(ours - stock).max():.0e}")
    print("best:", model.rank(QUERY, DOCUMENTS, top_k=1, return_documents=True)[0]["text"])


if __name__ == "__main__":
    main()
