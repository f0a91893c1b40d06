"""The code in README.md runs from the first block to the last, on a small model in place of the one from the hub."""

import re
from pathlib import Path

from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

README = Path(__file__).parents[2] / "README.md"


def test_the_code_runs(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n([\s\S]*?)```", README.read_text())
    assert len(blocks) == 3
    found = {}
    for block in blocks:
        exec(compile(block.replace("Qwen/Qwen3-0.6B", str(tmp_path)), str(README), "exec"), found)
    assert "folded=True" in capsys.readouterr().out
    assert found["logits"].shape[:2] == (2, 16)
    assert found["vectors"].shape == (2, 64)
    assert all(score.logprob < 0 for score in found["scores"])
    assert found["best"].index in (0, 1)
    assert 0 < found["label"].score < 1
    assert found["plan"].num_compact == len(found["hidden"]) == len(found["out"]) == 4
