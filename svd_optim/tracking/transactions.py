"""Protection against partial changes: work that is undone on an error, and work during which signals are deferred."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .journal import Journal

_SIGNALS = sorted(signal.valid_signals())  # listed once: the list takes longer than the rest of a step's deferral


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that have Python handlers are handled when the block is done.

    Such a handler may raise (Ctrl-C), or save the model (SIGUSR1 and SIGHUP of job schedulers), whose parameters
    are not its own inside.

    No effect in threads other than the main one, as Python runs signal handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: dict[int, Any] = {}  # number -> frame of its first arrival
    handlers: dict[int, Any] = {n: handler for n in _SIGNALS if callable(handler := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, received.setdefault)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        with ExitStack() as stack:  # each once, in the order of arrival, also where one raises
            for arrived, frame in reversed(received.items()):
                stack.callback(handlers[arrived], arrived, frame)


Undo = Callable[[], None]


def _undo_contents(container: Any) -> Undo:
    """Restores the present contents of a list, dict or deque, which stays the same object."""
    if isinstance(container, dict):
        items = dict(container)

        def undo() -> None:
            container.clear()
            container.update(items)

    else:
        elements = list(container)

        def undo() -> None:
            container.clear()
            container.extend(elements)

    return undo


def _undo_record(record: object) -> list[Undo]:
    values = vars(record)
    return [_undo_contents(values), *(_undo_contents(v) for v in values.values() if isinstance(v, (list, dict, deque)))]


def _undo_module(module: nn.Module) -> list[Undo]:
    kind = module.__class__

    def undo() -> None:
        module.__class__ = kind

    return [undo, _undo_contents(module.__dict__), _undo_contents(module._parameters), _undo_contents(module._buffers)]


def _undo_optimizer(optimizer: Optimizer) -> list[Undo]:
    groups = [*_undo_record(optimizer), *(_undo_contents(group) for group in optimizer.param_groups)]
    lists = [_undo_contents(v) for group in optimizer.param_groups for v in group.values() if isinstance(v, list)]
    return [*groups, *lists, *(_undo_contents(state) for state in optimizer.state.values())]


def _undo_values(modules: Iterable[nn.Module]) -> Undo:
    tensors = {t for module in modules for t in (*module._parameters.values(), *module._buffers.values())}
    copies = [(t, t.detach().clone()) for t in tensors if t is not None]

    def undo() -> None:
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)

    return undo


@contextmanager
def undone_on_error(
    modules: Iterable[nn.Module], optimizers: Iterable[Optimizer], records: Iterable[object], values: bool = False
) -> Iterator[None]:
    """If the block raises, restore modules, optimizers and records to what they were, object for object.

    Args:
        modules: their classes, parameters and attributes are restored, not those of their children.
        optimizers: their param groups are restored, and which state each parameter has.
        records: plain objects, whose attributes are restored, and the contents of lists, dicts and deques among them.
        values: whether to restore the values of the modules' parameters and buffers too (from copies).
    """
    modules = list(modules)
    undos = [undo for module in modules for undo in _undo_module(module)]
    undos += [undo for optimizer in optimizers for undo in _undo_optimizer(optimizer)]
    undos += [undo for record in records for undo in _undo_record(record)]
    if values:
        undos.append(_undo_values(modules))
    try:
        yield
    except BaseException:
        for undo in undos:
            undo()
        raise


@contextmanager
def transaction(
    modules: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    records: Iterable[object],
    journals: Iterable[Journal],
    values: bool = False,
) -> Iterator[None]:
    """:func:`undone_on_error`, with events deferred until all of the block is done."""
    with ExitStack() as stack:
        for journal in journals:
            stack.enter_context(journal.hold_events())
        stack.enter_context(undone_on_error(modules, optimizers, records, values))
        yield
