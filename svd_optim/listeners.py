"""What can be told of a run while it goes on: subclass :class:`Listener`, override what you need."""

from __future__ import annotations

from .records import Event, Summary


class Listener:
    """Called by the optimizer, in the thread that trains. Every method does nothing here."""

    def on_analysis(self, summary: Summary) -> None:
        """After each analysis of the followed layers, with the run as of then."""

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """Before ``layers`` change between dense and factorized, all in one event."""

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """After ``layers`` changed between dense and factorized."""

    def on_event(self, event: Event) -> None:
        """For each event, as it happens."""
