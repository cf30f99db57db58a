"""The precision of this library's own products, whatever the user has set for the model's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that autocast knows


class _Kernels:
    """Those of products in full float32, while any thread is inside."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.before: list[tuple[Any, str]] = []  # backends that were changed, and what they had

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                backends = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul
                self.before = [(b, b.fp32_precision) for b in backends if b.fp32_precision not in ("ieee", "none")]
                for backend, _ in self.before:
                    backend.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for backend, precision in self.before:
                    backend.fp32_precision = precision


_kernels = _Kernels()


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, products of float32 matrices are float32: no autocast, no TF32, no bfloat16 kernels; no inference mode.

    Steps are often taken inside of autocast, and trainers switch TF32 on: it has 10 bits where retractions need 23.
    Weights and moments that were made in inference mode could not be trained. The precision of kernels is that of all
    threads: the first one that comes in sets it, the last one that goes out puts it back.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for kind in _DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_kernels)
        yield
