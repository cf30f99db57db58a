"""Processes that train and save until they are killed, and what they tell: shared by the tests of saving."""

from __future__ import annotations

import logging
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from helpers_runs import Run, digest


def quiet() -> None:
    """One thread, no log."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)


def save_for_ever(folder: str, kind: str, sender: Any) -> None:
    """Train on from the latest checkpoint and save after every step, until killed."""
    quiet()
    run = Run.new(kind, seed=7)
    if any(Path(folder).glob("checkpoint-*")):
        run.load(Path(folder))
    else:
        run = Run.new(kind)
    while True:
        run.train(run.step + 1).save(Path(folder), keep=3)
        sender.send(run.step)


def save_some(folder: str, count: int, sender: Any) -> None:
    """Save so many checkpoints of a run from its start, and tell their names."""
    quiet()
    run = Run.new("adamw")
    sender.send([run.train(run.step + 1).save(Path(folder)).name for _ in range(count)])


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """(process, what it sends); killed at the end if it still runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "svd_optim"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def received(receiver: Any) -> list[Any]:
    """All that was sent before the end."""
    messages = []
    with suppress(EOFError, OSError):
        while True:
            messages.append(receiver.recv())
    return messages


def straight(kind: str, until: int) -> str:
    """The digest of an undisturbed run's state at a step."""
    with tempfile.TemporaryDirectory() as folder:
        return digest(Run.new(kind).train(until).save(Path(folder)))
