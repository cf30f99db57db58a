"""What can be told of a run while it goes on: subclass :class:`Listener`, override what you need.

class WeightsAndBiases(Listener):
    def on_analysis(self, summary):
        wandb.log({**summary.metrics(), "svd/step": summary.step})
"""

from __future__ import annotations

from typing import Protocol

from torch.optim import Optimizer

from ..config import SubspaceConfig
from ..decisions.alerts import Alert
from ..records import Event, LayerReport, Plan, Summary


class Monitored(Protocol):
    """What a listener may ask of the optimizer that it is added to: a :class:`SubspaceAwareOptimizer`."""

    base_optimizer: Optimizer
    config: SubspaceConfig

    def summary(self) -> Summary:
        """The run as of now."""
        ...

    def why(self) -> list[LayerReport]:
        """The layers as of now."""
        ...

    def plan(self) -> Plan:
        """How the budget is spread as of now."""
        ...


class Listener:
    """Called by the optimizer, in the thread that trains. Every method does nothing here."""

    def on_start(self, optimizer: Monitored) -> None:
        """Once, when it is added to an optimizer."""

    def on_analysis(self, summary: Summary) -> None:
        """After each analysis of the tracked layers, with the run as of then."""

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """At an analysis, before :meth:`on_analysis`: what somebody should look at now and was not told yet."""

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """Before ``layers`` change between dense and factorized, all in one event."""

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """After ``layers`` changed between dense and factorized.

        Their parameters are new objects: whoever keeps a list of the old ones (an average of weights, a cached list
        for clipping) has to ask the model again now.
        """

    def on_event(self, event: Event) -> None:
        """For each event, as it happens."""
