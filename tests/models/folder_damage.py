"""Ways to damage a folder: every file, JSON key and tensor out in turn; files cut short; other shapes and values."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DEPTH = 3
"""How deep keys of JSON files are taken out; a vocabulary is no setting."""
VOCABULARIES = ("vocab", "merges", "label2id")


@dataclass(frozen=True)
class Damage:
    """One thing done to one file."""

    file: str
    how: str
    """out, cut, key, tensor, shape, extra or value."""
    what: tuple[str, ...] = ()
    value: object = None

    def __str__(self) -> str:
        value = "" if self.value is None else f"={self.value}"
        return f"{self.file}:{self.how}:{'.'.join(self.what)}{value}"

    @property
    def names(self) -> tuple[str, ...]:
        """An error names one of these."""
        parts = [self.file, self.file.rpartition("/")[2], *self.what[-1:]]
        # transformers writes names without the prefix of the trunk
        return (*parts, *(part.removeprefix("model.") for part in self.what[-1:]))

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        if self.how == "out":
            path.unlink()
        elif self.how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif path.suffix == ".json":
            data = json.loads(path.read_text())
            place = data
            for key in self.what[:-1]:
                place = place[int(key) if isinstance(place, list) else key]
            if self.how == "key":
                del place[self.what[-1]]
            else:
                place[self.what[-1]] = self.value
            path.write_text(json.dumps(data))
        else:
            weights = load_file(path)
            tensor = weights.pop(self.what[0], None)
            if self.how == "shape":
                weights[self.what[0]] = tensor[: len(tensor) // 2].clone()
            elif self.how == "extra":
                weights[self.what[0]] = torch.ones(4)
            save_file(weights, path, metadata={"format": "pt"})


def damages(folder: Path) -> Iterator[Damage]:
    """All of a good folder's."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = str(path.relative_to(folder))
        yield Damage(file, "out")
        yield Damage(file, "cut")
        if path.suffix == ".json":
            yield from (Damage(file, "key", keys) for keys in _keys(json.loads(path.read_text())))
        elif path.suffix == ".safetensors":
            for name in load_file(path):
                yield Damage(file, "tensor", (name,))
                yield Damage(file, "shape", (name,))
                yield Damage(file, "extra", (f"{name.rpartition('.')[0]}.unknown",))
    config = json.loads((folder / "config.json").read_text())
    for key, step in (("num_hidden_layers", 1), ("num_hidden_layers", -1), ("vocab_size", 1), ("vocab_size", -1)):
        yield Damage("config.json", "value", (key,), config[key] + step)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        yield Damage("config.json", "value", (key,), config[key] * 2)


def damaged(good: Path, target: Path, damage: Damage) -> Path:
    """A damaged copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    damage.apply(target)
    return target


def _keys(data: object, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if len(above) == DEPTH:
        return
    if isinstance(data, list):
        for index, entry in enumerate(data):
            if isinstance(entry, dict):
                yield from _keys(entry, (*above, str(index)))
    elif isinstance(data, dict):
        for key, value in data.items():
            yield (*above, key)
            if key not in VOCABULARIES:
                yield from _keys(value, (*above, key))
