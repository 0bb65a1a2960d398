"""Settings and fixtures of the whole suite: threads, hypothesis, no network, GPU tests, the shared data folder."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import: the suite is green without a network

from pathlib import Path

import hypothesis
import pytest
import torch

if importlib.util.find_spec("beartype") is not None:  # where it is missing, tests/test_shape_checks.py fails
    importlib.import_module("shape_checks").install()  # before the package is imported

REPO_ROOT = Path(__file__).resolve().parents[1]
SHARED_VARIABLE = "MICROSCALE_SHARED"
REQUIRE_GPU_VARIABLE = "MICROSCALE_REQUIRE_GPU"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """Load the hypothesis profile and divide the cores: one torch thread per xdist worker, two without workers."""
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where there is no GPU, unless `make test-gpu` asked for one: then it fails."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get(REQUIRE_GPU_VARIABLE):
        pytest.fail("this test needs a CUDA device and torch sees none", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with models and texts that lies beside the repository, or the one that MICROSCALE_SHARED names."""
    path = Path(os.environ.get(SHARED_VARIABLE) or REPO_ROOT.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set {SHARED_VARIABLE} to a folder that has it")
    return path
