from tools.trace_path import trace

import radix_mlp
from radix_mlp import Engine


def test_a_plan_stays_in_one_package():
    radix_mlp.build_plan([1, 2], [0, 2])
    found = trace(lambda: radix_mlp.build_plan([1, 2], [0, 2]))
    assert "plan/build.py" in found.files
    assert all(file.startswith("plan/") for file in found.files)
    assert ("plan/build.py", "build_plan") in found.functions
    assert ("plan/build.py", "plan/validate.py") in found.arrows
    assert found.both_ways == set()
    assert found.deepest >= 2


def test_the_way_of_two_texts_stays_straight():
    engine = Engine("tiny")
    texts = ["Query: what is a radix? Text: a root.", "Query: what is a radix? Text: a leaf."]
    engine.embed(texts)
    found = trace(lambda: engine.embed(texts))
    assert len(found.files) <= 54, sorted(found.files)
    assert found.deepest <= 23
    assert not any("tokenize_ahead" in file for file in found.files)
