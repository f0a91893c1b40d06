"""The example that trained the model `small`, on texts made up here: every variant runs, and its folder loads."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from radix_mlp import Engine

pytest.importorskip("snowballstemmer")
EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [
    first + second for first in ("tran", "wave", "mag", "cir", "oscil") for second in ("ta", "ro", "net", "lor", "ki")
]


@pytest.fixture
def data(tmp_path):
    """150 abstracts of three sentences, ten sums, and two judged queries."""
    draw = random.Random(0)
    folder = tmp_path / "data"
    for name in ("vaswani", "gsm8k"):
        (folder / name).mkdir(parents=True)

    def sentence():
        return " ".join(draw.choices(WORDS, k=9))

    documents = [f"<DOC>\n<DOCNO>{n}</DOCNO>\n{'  '.join(sentence() for _ in range(3))}\n</DOC>" for n in range(1, 151)]
    queries = [f"<top><num>{n}</num><title>{sentence()}</title></top>" for n in (1, 2)]
    sums = [
        json.dumps({"question": f"What is {n} and {n}? Say it.", "answer": f"{2 * n}\n#### {2 * n}"}) for n in range(10)
    ]
    (folder / "vaswani" / "doc-text.trec").write_text("\n".join(documents))
    (folder / "vaswani" / "query-text.trec").write_text("\n".join(queries))
    (folder / "vaswani" / "qrels").write_text("1 0 3 1\n1 0 5 1\n2 0 7 1\n")
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(sums))
    return folder


# the second has no pairs for a reranker
@pytest.mark.slow
@pytest.mark.parametrize("judged_documents", [4, 0])
def test_a_few_steps(data, tmp_path, judged_documents):
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--variant", "test", "--steps", "4", "--workers", "0"]
    code = (
        "import sys, train_small as example; from dataclasses import replace; recipe = example.VARIANTS['test']; "
        f"sizes = replace(recipe.sizes, judged_documents={judged_documents}); "
        "example.VARIANTS['test'] = replace(recipe, sizes=sizes); "
        f"sys.argv[1:] = {[*arguments, '--device', 'cpu', '--measure-every', '0']!r}; example.main()"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    entries = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["event"] == "step"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all(("judged" in entry) == bool(judged_documents) for entry in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["computed"] < 1
    training = json.loads((out / "training.json").read_text())
    assert training["read_abstracts"] == 150 - training["recipe"]["held_out"]
    assert training["judged_queries"] == {k: v for k, v in entries[-1].items() if k not in ("seconds", "event")}
    assert Engine(out, device="cpu").embed(["trantaki"], prompt_name="query").shape == (1, 64)
