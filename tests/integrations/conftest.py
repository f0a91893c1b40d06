"""Adapters are tested where the library that they adapt is installed."""

from importlib.util import find_spec

import pytest

NEEDS = {
    "test_sentence_transformers.py": ["sentence_transformers", "peft"],
    "test_lm_eval.py": ["lm_eval"],
    "test_score_against_lm_eval.py": ["lm_eval"],
    "test_trl.py": ["trl", "peft"],
    "test_trl_options.py": ["trl", "peft"],
    "test_trainer.py": ["accelerate", "datasets", "peft"],
    "test_sentence_transformers_training.py": ["sentence_transformers", "accelerate", "datasets"],
    "test_sentence_transformers_losses.py": ["sentence_transformers", "accelerate", "datasets"],
    "test_resumed.py": ["trl", "peft", "sentence_transformers"],
    "test_mteb.py": ["mteb", "sentence_transformers"],
    "test_ray_serve.py": ["ray", "fastapi"],
    "test_ray_serve_cluster.py": ["ray", "fastapi"],
}

collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model and its tokenizer as users have them; reference models are loaded from here."""
    from radix_mlp.models.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
