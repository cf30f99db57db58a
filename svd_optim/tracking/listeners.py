"""What can be told of a run while it goes on: subclass :class:`Listener`, override what you need."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..decisions.alerts import Alert
from ..records import Event, Summary

if TYPE_CHECKING:
    from ..optimizer import SubspaceAwareOptimizer


def is_main_process() -> bool:
    """Whether this process is the one of a distributed run that prints and logs: ``RANK`` is 0, or not set."""
    return os.environ.get("RANK", "0") in ("", "0")


class Listener:
    """Called by the optimizer, in the thread that trains. Every method does nothing here."""

    def on_start(self, optimizer: SubspaceAwareOptimizer) -> None:
        """Once, when it is added to an optimizer."""

    def on_analysis(self, summary: Summary) -> None:
        """After each analysis of the followed layers, with the run as of then."""

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """At an analysis, before :meth:`on_analysis`: what somebody should look at now and was not told yet."""

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """Before ``layers`` change between dense and factorized, all in one event."""

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """After ``layers`` changed between dense and factorized."""

    def on_event(self, event: Event) -> None:
        """For each event, as it happens."""
