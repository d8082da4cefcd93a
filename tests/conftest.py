"""Every test starts from the same seed, on one thread, and Hypothesis draws the same examples on every run.

To fuzz with fresh examples: ``HYPOTHESIS_PROFILE=thorough make test``.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "repeatable", deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", deadline=None, max_examples=500, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(  # for builds that are many times slower
    "few", deadline=None, max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser):
    parser.addoption("--kernel-library", help="run the native backend on this build of its library")


def pytest_configure(config):
    if path := config.getoption("--kernel-library"):
        from fxcompress.backends.native import kernels

        kernels.kernel_library_path = lambda: path


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
