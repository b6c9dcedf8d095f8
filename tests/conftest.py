"""Settings that all tests share: two CPU threads, one where processes share the work, the demo pair, and property tests that draw the
same examples in every run."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the tests for a GPU do without
    settings = None

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = tempfile.TemporaryDirectory(prefix="vsd-serve-tests-")  # where servers keep what they measured
os.environ["XDG_CACHE_HOME"] = CACHE.name
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
if settings is not None:
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
    settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    demo = Path(__file__).resolve().parents[1] / "drafts" / "demo"
    parser.addoption("--demo", type=Path, default=demo, help="directory with the demo pair, target/ and eagle3/ (default: %(default)s)")
    parser.addoption(
        "--every-prompt", action="store_true", help="compare all hundred prompts at every tree size, not a part (a quarter of an hour)"
    )


@pytest.fixture(scope="session")
def demo(request: pytest.FixtureRequest) -> Path:
    """Directory of the demo pair: target/ and eagle3/."""
    return request.config.getoption("--demo")
