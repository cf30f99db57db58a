"""TrackedRun: the state of one optimizer's run. The other files of this package operate on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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
from . import budget as planning
from . import inventory
from .attachment import Attachment
from .journal import Journal
from .layer import TrackedLayer
from .loss_guard import LossGuard
from .loss_metric import WINDOW, Taps
from .overhead import Overhead
from .slopes import Slopes

NO_GROUP = "its weight is in none of the optimizer's param groups any more"


class TrackedRun:
    """The tracked layers of one optimizer, with the journal, the guards and the counters of the run.

    Args:
        base: the optimizer that holds the layers' weights.
        config: see :class:`SubspaceConfig`.
    """

    def __init__(self, base: Optimizer, config: SubspaceConfig) -> None:
        self.base = base
        self.config = config
        self.steps = 0
        self.steps_without_layers = 0
        self.moves: dict[str, Tensor] = {}  # descending layers that the present step moves
        self.skipped: list[Skipped] = []
        self.given_up: dict[str, Skipped] = {}  # of these, the layers that were tracked before, by name
        self.journal = Journal()
        self.lifecycle: Lifecycle[TrackedLayer] = Lifecycle(config, self.journal.emit)
        self.attachment = Attachment(config, base)
        self.taps = Taps()
        self.slopes = Slopes()
        self.guard = LossGuard()
        self.alerts = AlertWatch()
        self.overhead = Overhead(config.max_overhead)
        self.warned = False  # of what keeps it from acting, in this process
        self.loss_scale = 1.0  # what the loss is multiplied by for its gradients
        self.cost_told = 0.0  # predicted share of the loss that was warned of, in this process
        self.unguarded = 0  # analyses in this process at which the loss guard had changes to judge, and no loss ever
        self.reevaluates = isinstance(base, torch.optim.LBFGS)  # calls its closure repeatedly within a step

    @property
    def layers(self) -> dict[str, TrackedLayer]:
        """The tracked layers by name."""
        return self.lifecycle.layers

    @property
    def interval(self) -> int:
        """Optimizer steps between analyses at present."""
        return self.config.analyze_every * self.overhead.stretch

    @property
    def analyzes_next(self) -> bool:
        """Whether the next step that counts ends with an analysis."""
        return (self.steps + 1) % self.interval == 0

    def measures(self, step: int) -> bool:
        """Whether gradients are measured in that step."""
        return step % (self.config.measure_every * self.overhead.stretch) == 0 or step % self.interval == 0

    def measured_before(self, step: int) -> int:
        """The last step before that one in which gradients were measured; 0: there was none."""
        return next((earlier for earlier in range(step - 1, 0, -1) if self.measures(earlier)), 0)

    def samples(self, step: int) -> bool:
        """Whether what the loss metric needs is sampled in that step: in each interval once, at first more often."""
        late = self.config.mode == "auto" and self.config.tolerance is not None
        since = step - max(0, self.config.warmup - 2 * WINDOW * self.interval if late else 0)
        often = since <= WINDOW * self.config.measure_every
        over = self.config.total_steps is not None and step > self.config.total_steps
        return since > 0 and not over and self.measures(step) and (step % self.interval == 0 or often)

    def place_taps(self) -> None:
        """Before the passes of the next step: have it sampled, and what descents cost measured, if it is time."""
        if self.config.samples_loss and self.samples(self.steps + 1) and not self.unsupported_run():
            self.taps.place(self.layers.values())
        if self.measures(self.steps + 1):
            self.slopes.place(self.layers.values())

    def clear_taps(self) -> None:
        """Forget the passes so far: their gradients are dropped too."""
        self.taps.clear()
        self.slopes.clear()

    def remove_taps(self) -> None:
        """After the passes of a step."""
        self.taps.remove()
        self.slopes.remove()

    def looks_for_layers(self) -> bool:
        """Whether the next step begins with a look at the model; where nothing is tracked, no step counts."""
        if self.layers:
            return self.analyzes_next
        self.steps_without_layers += 1
        return self.steps_without_layers % self.interval == 0

    def observe_loss(self, loss: Any) -> bool:
        """Tell the loss guard; whether it is a loss. What is maximized rises where training goes well.

        Where some tracked layers maximize it and others minimize it, nobody can say which way is worse: then it is
        not guarded.
        """
        if not self.guard.is_loss(loss):
            return False
        self.guard.told = True
        tracked = {layer.weight for layer in self.layers.values()}
        ways = {bool(g.get("maximize")) for g in self.base.param_groups if any(p in tracked for p in g["params"])}
        if len(ways) == 1:
            self.guard.observe(loss, maximize=True in ways)
        return True

    def has_gradients(self) -> bool:
        """Whether any tracked layer has a gradient."""
        return any(layer.weight.grad is not None for layer in self.layers.values())

    def records(self, layers: Iterable[TrackedLayer] | None = None) -> list[object]:
        """All objects with state of the run and of ``layers`` (default: all), for a transaction."""
        selected = self.layers.values() if layers is None else layers
        parts = [part for x in selected for part in (x, x.status, x.factors) if part is not None]
        return [self, self.lifecycle, self.journal, self.guard, self.alerts, self.overhead, *parts]

    def stop_tracking(self, layer: TrackedLayer, reason: str) -> None:
        """Stop tracking a layer that can't be measured, for good."""
        del self.layers[layer.name]
        self.attachment.let_go(layer)
        self.given_up[layer.name] = Skipped(name=f"{layer.name}.weight", shape=layer.shape, reason=reason)
        self.skipped.append(self.given_up[layer.name])
        self.lifecycle.note(self.steps, layer.name, "unsupported", reason)

    def unsupported(self, layers: Iterable[TrackedLayer]) -> dict[str, str]:
        """Why layers can't be factorized under this base optimizer, by name; those that can are left out."""
        run_reason = self.unsupported_run()
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        reasons = {x.name: run_reason or x.problem or self._unsupported_layer(x, groups.get(x.weight)) for x in layers}
        return {name: reason for name, reason in reasons.items() if reason}

    def unsupported_run(self) -> str:
        """Why no layer can be factorized in this run, whatever it is; empty if one may be."""
        if self.reevaluates:
            return f"{type(self.base).__name__} re-evaluates its closure within a step; wrap another optimizer"
        if world_size() > 1:  # ranks would not switch at the same step
            return "factorizing in a distributed run is not supported yet; train in one process"
        return moments.hidden_state(self.base)

    def _unsupported_layer(self, layer: TrackedLayer, group: dict[str, Any] | None) -> str:
        if group is None:
            return NO_GROUP
        if layer.bound and not layer.factorized:
            if layer.bound == "hooks":
                return "its weight has hooks, which factors would not have; remove them"
            return "its weight is in memory shared with other processes, which would go on with it"
        state = self.base.state.get(layer.weight) or {}
        if not state and self.steps == 0 and not isinstance(self.base, moments.SUPPORTED):
            return f"what {type(self.base).__name__} keeps for a weight is not known before its first step"
        return moments.unsupported_reason(state, layer.weight) or weight_decay.unsupported_reason(self.base, group)

    def plan(self, budget: float | None = None, max_loss_increase: float | None = None) -> Plan:
        """The ranks that the target allows at present, or that another one would."""
        if budget is None and max_loss_increase is None:
            return planning.plan(self.layers, self.config, self.steps, self.guard.level)
        metric = self.config.metric if max_loss_increase is None else None
        other = replace(self.config, rank=None, energy=None, budget=budget, max_loss_increase=max_loss_increase,
                        metric=metric, mode=self.config.mode if max_loss_increase is None else "manual")  # fmt: skip
        return planning.plan(self.layers, other, self.steps, self.guard.level, hysteresis=0.0)

    def predicted_share(self, layer: TrackedLayer) -> float:
        """Of the loss, by which truncating a layer now to its rank raises it; 0 where that is not known."""
        return self.guard.share(layer.predicted_increase(layer.rank)) or 0.0

    def summary(self) -> Summary:
        """The current state of the run, as a plain record."""
        return Summary(
            step=self.steps,
            mode=self.config.mode,
            analyses=self.lifecycle.analyses,
            layers=tuple(inventory.report(layer, self.base) for layer in self.layers.values()),
            skipped=tuple(self.skipped),
            events=tuple(self.journal.events),
            seconds=dict(self.journal.seconds),
            seconds_total=self.journal.total,
        )
