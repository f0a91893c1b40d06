from tools.trace_path import trace, trace_embed, trace_post_embed

import radix_mlp


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
    found = trace_embed()
    assert len(found.files) <= 53, sorted(found.files)
    assert found.deepest <= 18
    assert found.both_ways == set()
    assert not any("tokenize_ahead" in file for file in found.files)


def test_the_way_of_a_request_stays_straight():
    found = trace_post_embed()
    assert "serve/service.py" in found.files
    assert "engine/online/serving_loop.py" in found.files
    # one of them only where another test has switched on the log
    assert len(found.files) <= 68, sorted(found.files)
    assert found.deepest <= 15
    # what answers a request, or runs one on an engine that was replaced, is called back
    called_back = {"engine/online/accepted_request.py", "serve/service.py"}
    assert all(pair[0] in called_back for pair in found.both_ways)
