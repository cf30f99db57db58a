"""Journal: the events of a run, its listeners, and the time spent by phase."""

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

MAX_EVENTS = 10_000  # the oldest are dropped: memory, summaries and checkpoints must not grow with the run


class Journal:
    """Events, oldest first; listeners; host seconds by phase."""

    def __init__(self) -> None:
        self.events = Events()
        self._held: list[Event] | None = None  # within a transaction: not emitted yet
        self._reset_process_state()

    def _reset_process_state(self) -> None:
        """Listeners and clocks belong to one process: they are not copied or pickled."""
        self.listeners: list[Listener] = []
        self.deferred: Exception | None = None  # the first exception of a listener
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase
        self.started: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"events": self.events}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.events, self._held = state["events"], None
        self._reset_process_state()

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
    def hold_events(self) -> Iterator[None]:
        """Emit the events of the block when it is done; discard them if it raises."""
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
        """Replace the events by those of a loaded run, and discard the events of loading it."""
        self.events = Events(events)
        if self._held is not None:
            self._held.clear()

    def notify(self, method: str, *arguments: Any) -> None:
        """Call the listeners. The first exception is stored, so that the step can be completed."""
        for listener in self.listeners:
            try:
                getattr(listener, method)(*arguments)
            except Exception as error:
                self.deferred = self.deferred or error

    def raise_deferred(self) -> None:
        """Raise the stored exception of a listener, if there is one."""
        error, self.deferred = self.deferred, None
        if error is not None:
            raise error

    def start_clock(self) -> None:
        """Start the total time, at the first step."""
        if self.started is None:
            self.started = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the first step."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the host time of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
