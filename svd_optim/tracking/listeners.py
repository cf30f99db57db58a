"""Callbacks during a run: subclass :class:`Listener` and override what you need.

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
    """What a listener may use of the :class:`~svd_optim.SubspaceAwareOptimizer` that it is added to."""

    base_optimizer: Optimizer
    config: SubspaceConfig

    def summary(self) -> Summary:
        """The current state of the run."""
        ...

    def why(self) -> list[LayerReport]:
        """The current state of the layers."""
        ...

    def plan(self) -> Plan:
        """The current allocation of the parameter budget."""
        ...


class Listener:
    """Its methods are called by the optimizer, in the training thread; here they all do nothing.

    An exception that one raises is re-raised at the end of the optimizer step.
    """

    def on_start(self, optimizer: Monitored) -> None:
        """Called once, when it is added to an optimizer."""

    def on_analysis(self, summary: Summary) -> None:
        """Called after each analysis of the tracked layers, with the state of the run."""

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """Called at an analysis, before :meth:`on_analysis`, if there are new alerts."""

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """Called before ``layers`` change together between dense and factorized, or their rank."""

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        """Called after ``layers`` changed.

        Their parameters are new objects: whoever keeps a list of the old ones (an average of weights, a cached list
        for clipping) has to ask the model again now.
        """

    def on_event(self, event: Event) -> None:
        """Called for each event when it happens; for those of a switch, once all of it is done."""
