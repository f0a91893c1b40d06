"""A Ray node for tests: two CPUs, on this machine, for one module."""

import logging
import os

import pytest

# a busy machine takes longer than Ray's 30 seconds to start it
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="module")
def ray_node():
    """`ray`, connected to a node of its own."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    yield ray
    ray.shutdown()
