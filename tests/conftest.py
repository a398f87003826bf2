"""What all tests share: no Hub, threads that do not fight, and no generator state carried from test to test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

import pytest
import torch
from hypothesis import HealthCheck, settings

# a slow or shared machine is no failure, and the same examples are tried every time
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:  # workers of `pytest -n` share the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in each test, whichever tests ran before."""
    torch.manual_seed(0)
