"""The precision of this library's own products, whatever the user has set for the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that autocast knows


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of float32 matrices are float32: no autocast, no TF32, no bfloat16 kernels.

    Steps are often taken inside of autocast, and trainers switch TF32 on: it has 10 bits where retractions need 23.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for kind in _DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        changed = [b for b, precision in zip(backends, before, strict=True) if precision not in ("ieee", "none")]
        for backend in changed:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                if backend in changed:
                    backend.fp32_precision = precision
