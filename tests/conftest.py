"""Shared by all tests: few threads, no downloads."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; it reads this when it is first imported, by whichever test that is
    os.environ["TRITON_INTERPRET"] = "1"

# the first draw of a process may wait for the planner to compile
settings.register_profile("tests", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# what is imported stays: looking through it for garbage, again and again, takes seconds
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors run faster, and the same on every machine, on one thread."""
    torch.set_num_threads(1)
