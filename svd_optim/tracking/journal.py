"""Journal: what has happened in a run, who is told of it, and where the time went."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..decisions.lifecycle import WARNINGS
from ..records import Event, Events
from .listeners import Listener

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000  # the oldest are forgotten: memory, summaries and checkpoints must not grow with the run


class Journal:
    """Events, oldest first; listeners; host seconds by phase, which are for the report only."""

    def __init__(self) -> None:
        self.events = Events()
        self._held: list[Event] | None = None  # inside a transaction: not told yet
        self._forget_process()

    def _forget_process(self) -> None:
        """Listeners and clocks are those of one process."""
        self.listeners: list[Listener] = []
        self.deferred: Exception | None = None  # what a listener raised
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase
        self.started: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"events": self.events}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.events, self._held = state["events"], None
        self._forget_process()

    def emit(self, event: Event) -> None:
        """Record an event, log it and notify the listeners."""
        if self._held is not None:
            self._held.append(event)
            return
        self.events.append(event)
        del self.events[:-MAX_EVENTS]
        logger.log(logging.WARNING if event.kind in WARNINGS else logging.INFO, "%s", event)
        self.notify("on_event", event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Events inside the block are told when it is done; if it raises, they never happened."""
        outer = self._held
        held = self._held = [] if outer is None else outer
        before = len(held)
        try:
            yield
        except BaseException:
            del held[before:]
            raise
        finally:
            self._held = outer
        if outer is None:
            for event in held:
                self.emit(event)

    def replace(self, events: list[Event]) -> None:
        """The events of another run, which is resumed here; what led here is no part of it."""
        self.events = Events(events)
        if self._held is not None:
            self._held.clear()

    def notify(self, method: str, *arguments: Any) -> None:
        """Call the listeners. What one raises waits until the step is whole."""
        for listener in self.listeners:
            try:
                getattr(listener, method)(*arguments)
            except Exception as error:
                self.deferred = self.deferred or error

    def raise_deferred(self) -> None:
        """Raise what a listener has raised, if any did."""
        error, self.deferred = self.deferred, None
        if error is not None:
            raise error

    def start_clock(self) -> None:
        """The first step starts the total that shares of time are taken of."""
        if self.started is None:
            self.started = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the first step."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Count the time that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
