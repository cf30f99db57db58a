"""One thread (bits of an SVD differ between one and two) and property tests that repeat exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
