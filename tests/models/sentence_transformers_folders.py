"""Folders as sentence-transformers writes them, written out by hand."""

import json

import torch
from safetensors.torch import save_file

from radix_mlp.models.tiny import tiny_model, tiny_reranker, tiny_reranker_tokenizer, tiny_tokenizer

LIBRARY = "sentence_transformers"
PATHS = {
    "Pooling": f"{LIBRARY}.models.Pooling",
    "Dense": f"{LIBRARY}.base.modules.dense.Dense",
    "Normalize": f"{LIBRARY}.models.Normalize",
    "LogitScore": f"{LIBRARY}.cross_encoder.modules.logit_score.LogitScore",
}


def dense_config(rows, columns, activation="Tanh", **options):
    return {
        "in_features": columns,
        "out_features": rows,
        "bias": True,
        "activation_function": f"torch.nn.modules.activation.{activation}",
        **options,
    }


def dense_weights(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "linear.weight": torch.randn(rows, columns, generator=generator) / columns**0.5,
        "linear.bias": torch.randn(rows, generator=generator),
    }


def write_folder(
    folder, modules, *, settings=None, transformer=None, model=None, tokenizer=None, below="", weights=None
):
    """A folder with `modules`: (kind, configuration) in their order after the transformer."""
    (folder / below).mkdir(parents=True, exist_ok=True)
    (model or tiny_model().model).save_pretrained(folder / below)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder / below)
    entries = [{"idx": 0, "name": "0", "path": below, "type": f"{LIBRARY}.models.Transformer"}]
    for index, (kind, config) in enumerate(modules, 1):
        path = f"{index}_{kind.rsplit('.', 1)[-1]}"
        entries.append({"idx": index, "name": str(index), "path": path, "type": PATHS.get(kind, kind)})
        (folder / path).mkdir()
        if config is not None:
            (folder / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            size = config["out_features"], config["in_features"]
            save_file(weights or dense_weights(*size), folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(entries))
    if settings is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    config = {"max_seq_length": 512, "do_lower_case": False} if transformer is None else transformer
    (folder / below / "sentence_bert_config.json").write_text(json.dumps(config))
    return str(folder)


def write_reranker(folder, scores, *, tokenizer=None, **options):
    tokenizer = tokenizer or tiny_reranker_tokenizer()
    return write_folder(folder, [("LogitScore", scores)], model=tiny_reranker(), tokenizer=tokenizer, **options)
