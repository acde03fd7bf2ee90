"""What all tests share: an offline process of one thread, fixed seeds, and where the repository is."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

# read when numpy and torch are first imported: tensors of tests are tiny, and workers of pytest-xdist would compete for
# every core. `OMP_NUM_THREADS=2 pytest` runs with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

SEED = 20240607

# the same examples in every run, and no verdict by the clock of a busy machine
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it in this worker."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  libraries under test draw from the global state
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def noise() -> np.random.Generator:
    """Random numbers of this test alone."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the clone, wherever pytest was started."""
    return Path(__file__).resolve().parents[1]
