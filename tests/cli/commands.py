"""What the tests of the commands share."""

import json

from typer.testing import CliRunner

from radix_mlp.cli.main import app
from radix_mlp.cli.sample import few_shot_pairs, rerank_texts

TEXTS = rerank_texts()[::40] + rerank_texts()[:4]
PAIRS = few_shot_pairs()[:6]
LIMIT = str(max(len(text.encode()) for text in TEXTS))


def run(*arguments, stdin=None, columns=120):
    return CliRunner().invoke(app, list(arguments), input=stdin, env={"COLUMNS": str(columns), "TERM": "dumb"})


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
