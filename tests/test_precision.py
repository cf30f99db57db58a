"""The library's own products are float32, whatever is set around it: autocast, TF32, bfloat16, default types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import BASES, check_factors, everything, loss_of, net, quick, same_bits, slow_except

from svd_optim import SubspaceAwareOptimizer
from svd_optim.linalg import full_precision

Around = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Around] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium": lambda: matmul_precision("medium"),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
}


def run(base: str, around_step: Around) -> tuple[Any, SubspaceAwareOptimizer]:
    """Every step of the optimizer, and what is done directly, inside ``around_step``; the model's passes outside."""
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES[base](model), model, quick())
    for step in range(130):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with around_step():
            optimizer.step()
    with around_step():
        optimizer.protect_("up")
        optimizer.merge_("all")
        optimizer.release_("all")
        optimizer.factorize_("all")
    return model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_step_is_the_same_to_the_last_bit_whatever_the_precision(base: str, setting: str) -> None:
    model, optimizer = run(base, contextlib.nullcontext)
    assert {event.kind for event in optimizer.events} >= {"descend", "factorize", "merge", "protect"}
    other, its = run(base, SETTINGS[setting])
    for state in (*optimizer.state.values(), *its.state.values()):
        state.pop("step", None)  # of AdamW: in the default type, as of the bare one
    same_bits(everything(model, optimizer), everything(other, its))


@pytest.mark.parametrize("setting", slow_except("autocast", of=SETTINGS))
def test_factors_stay_orthonormal_under_muon_whatever_the_precision(setting: str) -> None:
    """Muon's own products are bfloat16, and its step is not ours to change."""
    model, optimizer = run("muon", SETTINGS[setting])
    check_factors(model)
    assert not any(event.kind == "skewed" for event in optimizer.events)


def test_precision_settings_are_what_they_were_afterwards() -> None:
    A = torch.randn(64, 64)
    for value in ("highest", "high", "medium"):
        with matmul_precision(value), torch.autocast("cpu", dtype=torch.bfloat16):
            with full_precision():
                assert (A @ A).dtype == torch.float32
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == value
            assert (A @ A).dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
