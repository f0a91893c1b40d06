"""The texts: abstracts on radio and electronics (Vaswani) and school maths (GSM8K), read from a folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Judged", "Text", "read_abstracts", "read_judged", "read_maths"]


@dataclass(frozen=True)
class Text:
    """A text as sentences, the first of which is a title or a question."""

    name: str
    sentences: tuple[str, ...]

    @property
    def whole(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True)
class Judged:
    """Queries with the names of the abstracts that people found relevant: for evaluation only."""

    queries: tuple[str, ...]
    relevant: tuple[frozenset[str], ...]


def read_abstracts(data: Path) -> list[Text]:
    """The 11,429 abstracts: lower case, no marks; two spaces stand between sentences."""
    found = re.findall(r"<DOCNO>(\d+)</DOCNO>(.*?)</DOC>", _read(data / "vaswani" / "doc-text.trec"), re.DOTALL)
    texts = []
    for name, body in found:
        sentences = [part.strip() for part in re.split(r"  +", body.strip("\n").replace("\n", " "))]
        texts.append(Text(name, tuple(filter(None, sentences))))
    return texts


def read_judged(data: Path) -> Judged:
    """The 93 queries, in lower case as the abstracts are, and their judgements."""
    folder = data / "vaswani"
    relevant: dict[str, set[str]] = {}
    for line in _read(folder / "qrels").splitlines():
        query, _, document, grade = line.split()
        if int(grade) > 0:
            relevant.setdefault(query, set()).add(document)
    found = re.findall(r"<num>(\d+)</num>\s*<title>(.*?)</title>", _read(folder / "query-text.trec"), re.DOTALL)
    return Judged(
        tuple(" ".join(text.split()).lower() for _, text in found),
        tuple(frozenset(relevant[number]) for number, _ in found),
    )


def read_maths(data: Path) -> list[Text]:
    """GSM8K's questions: the sentences of a question, the lines of its worked answer."""
    texts = []
    for number, line in enumerate(_read(data / "gsm8k" / "test.jsonl").splitlines()):
        item = json.loads(line)
        # <<3*4=12>> are notes for a calculator
        answer = re.sub(r"<<.*?>>", "", item["answer"]).replace("####", "the answer is")
        sentences = [*re.split(r"(?<=[.?!])\s+", item["question"].strip()), *answer.splitlines()]
        texts.append(Text(f"gsm8k-{number}", tuple(part.strip() for part in sentences if part.strip())))
    return texts


def _read(path: Path) -> str:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. --data is the folder that holds vaswani/ and gsm8k/.")
    return path.read_text(encoding="utf-8")
