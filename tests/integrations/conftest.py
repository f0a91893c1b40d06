"""Adapters are tested where the library that they adapt is installed."""

from importlib.util import find_spec

NEEDS = {
    "test_sentence_transformers.py": ["sentence_transformers", "peft"],
    "test_lm_eval.py": ["lm_eval"],
    "test_trl.py": ["trl", "peft"],
    "test_trainer.py": ["accelerate", "datasets", "peft"],
    "test_sentence_transformers_training.py": ["sentence_transformers", "accelerate", "datasets"],
    "test_mteb.py": ["mteb", "sentence_transformers"],
    "test_ray_serve.py": ["ray", "fastapi"],
    "test_ray_serve_cluster.py": ["ray", "fastapi"],
}

collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]
