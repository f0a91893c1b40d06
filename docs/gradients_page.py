"""Write `gradients.md`: folded training beside the unmodified model, for every model type (a minute or two of CPU).

python docs/gradients_page.py

Its numbers are rounding errors, which differ between machines: `make docs` neither writes nor checks this page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from tools.model_types.training import table, trainable_types

PAGE = Path(__file__).with_name("gradients.md")


def page(lines: list[str]) -> str:
    """The page around the lines of the table."""
    types = sum(line.startswith("| ") for line in lines) - 1
    return f"""# Gradients by model type

Written by `python docs/gradients_page.py`; `python -m tools.model_types.training [type ...]` prints the table.
torch {torch.__version__.partition("+")[0]}, transformers {transformers.__version__}, CPU.

One training step of {types} causal-LM types, tiny models with large random weights in float64: a random tree of six
sequences (copies and prefixes of each other among them), its loss a weighted sum of log-probabilities and entropies at
temperature 0.7. Folded, against the unmodified model fed one sequence at a time. Every number is the largest difference
over the largest value of what is compared: logits of all tokens, the loss, and the gradient of the worst parameter
relative to its own largest (or to a millionth of the model's largest, for biases whose gradient is 0). About 1e-7 is
the price of norms, angles or routers that run in float32 whatever the weights are, as they do in many models.

{chr(10).join(lines)}
"""


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    PAGE.write_text(page(list(table(trainable_types()))), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
