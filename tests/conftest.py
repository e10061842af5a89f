"""What every test stands on: one thread, no screen, a cache of its own."""

import os

# Before torch and numpy load their runtimes; child processes inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["MPLBACKEND"] = "Agg"

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples every time, and no time limit on a busy machine.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The person's cache is neither read nor written."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("O2CAP_CACHE", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Equal sums need equal threads; a test that seeds nothing is still repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
