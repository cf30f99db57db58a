"""One thread (bits of an SVD differ between one and two) and property tests that repeat exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("tests")
torch.set_num_threads(1)  # for what test files and the fixtures of a module compute, too


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever a test did to the number of threads."""
    yield
    torch.set_num_threads(1)
