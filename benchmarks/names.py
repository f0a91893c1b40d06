"""How rows are called in documents."""

from __future__ import annotations

__all__ = ["ATTENTION_METHODS", "CASES", "CASE_NAMES", "CPU_BATCHES"]

CASES = (
    *("2048/256/32", "512/256/32", "512/32/32", "128/96/64", "128/96/10", "4096/1024/16", "1000/20/1000"),
    *("deep", "random", "0/2048/16", "0/256/64"),
)
CASE_NAMES = {
    "deep": "deep: 16 turns, 4 alternatives each",
    "random": "random tree of 64",
    "0/2048/16": "no sharing, 16 of 2048",
    "0/256/64": "no sharing, 64 of 256",
}
ATTENTION_METHODS = {"expand": "the paper's way", "compact": "gathered", "triton": "triton", "fa4": "fa4"}
CPU_BATCHES = {
    "bbh 0": "BIG-Bench-Hard, boolean expressions, 3-shot",
    "bbh 1": "BIG-Bench-Hard, causal judgement, 3-shot",
    "vaswani 0": "Vaswani, query 1, reranker template",
    "vaswani 1": "Vaswani, query 2, reranker template",
}
