"""TrackedRun: the state of one optimizer's run. What happens to it is in the files beside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..config import SubspaceConfig
from ..decisions.alerts import AlertWatch
from ..decisions.lifecycle import Lifecycle
from ..distributed import world_size
from ..factors import moments, weight_decay
from ..records import Plan, Skipped, Summary
from . import budget, inventory
from .attachment import Attachment
from .journal import Journal
from .layer import TrackedLayer
from .loss_guard import LossGuard
from .overhead import Overhead


class TrackedRun:
    """The tracked layers of one optimizer, and what has happened to them.

    Args:
        base: the optimizer whose parameters the layers' weights are.
        config: see :class:`SubspaceConfig`.
    """

    def __init__(self, base: Optimizer, config: SubspaceConfig) -> None:
        self.base = base
        self.config = config
        self.steps = 0
        self.moves: dict[str, Tensor] = {}  # descending layers that the present step moves
        self.skipped: list[Skipped] = []
        self.journal = Journal()
        self.lifecycle: Lifecycle[TrackedLayer] = Lifecycle(config, self.journal.emit)
        self.attachment = Attachment(config, base)
        self.guard = LossGuard()
        self.alerts = AlertWatch()
        self.overhead = Overhead(config.max_overhead)
        self.reevaluates = isinstance(base, torch.optim.LBFGS)  # its closure, within a step

    @property
    def layers(self) -> dict[str, TrackedLayer]:
        """The tracked layers by name."""
        return self.lifecycle.layers

    @property
    def interval(self) -> int:
        """Steps between analyses as of now."""
        return self.config.analyze_every * self.overhead.stretch

    def has_gradients(self) -> bool:
        """Whether any tracked layer has one."""
        return any(layer.weight.grad is not None for layer in self.layers.values())

    def records(self, layers: Iterable[TrackedLayer] | None = None) -> list[object]:
        """All objects that hold the state of the run and of ``layers`` (default: all), for a transaction."""
        chosen = self.layers.values() if layers is None else layers
        parts = [part for x in chosen for part in (x, x.status, x.factors) if part is not None]
        return [self, self.lifecycle, self.journal, self.guard, self.alerts, self.overhead, *parts]

    def stop_tracking(self, layer: TrackedLayer, reason: str) -> None:
        """A layer that can't be measured is left alone from now on."""
        del self.layers[layer.name]
        self.attachment.disclaim(layer)
        self.skipped.append(Skipped(name=f"{layer.name}.weight", shape=layer.shape, reason=reason))
        self.lifecycle.note(self.steps, layer.name, "unsupported", reason)

    def unsupported(self, layers: Iterable[TrackedLayer]) -> dict[str, str]:
        """Why layers can't go into factors under this base optimizer, by name; those that can are not in it."""
        everywhere = self._unsupported_run()
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        reasons = {x.name: everywhere or self._unsupported_layer(x, groups.get(x.weight, {})) for x in layers}
        return {name: reason for name, reason in reasons.items() if reason}

    def _unsupported_run(self) -> str:
        if self.reevaluates:
            return f"{type(self.base).__name__} re-evaluates its closure within a step"
        if world_size() > 1:  # ranks would switch without each other
            return "factorizing in a distributed run is not supported yet"
        return ""

    def _unsupported_layer(self, layer: TrackedLayer, group: dict[str, Any]) -> str:
        state = self.base.state.get(layer.weight) or {}
        if not state and self.steps == 0 and not isinstance(self.base, moments.SUPPORTED):
            return f"what {type(self.base).__name__} keeps for a weight is not known before its first step"
        return moments.unsupported_reason(state, layer.weight) or weight_decay.unsupported_reason(self.base, group)

    def plan(self) -> Plan:
        """How the budget is spread as of now."""
        return budget.plan(self.layers, self.config, self.steps)

    def summary(self) -> Summary:
        """The run as of now, as a plain record."""
        return Summary(
            step=self.steps,
            mode=self.config.mode,
            analyses=self.lifecycle.analyses,
            stall_analyses=self.config.stall_analyses,
            layers=tuple(inventory.report(layer, self.base) for layer in self.layers.values()),
            skipped=tuple(self.skipped),
            events=tuple(self.journal.events),
            seconds=dict(self.journal.seconds),
            seconds_total=self.journal.total,
        )
