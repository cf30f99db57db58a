"""What another configuration would have done on a recorded run: a log goes in, events come out.

The rules are asked again, with what was measured then. As long as a layer's life is that of the record
nothing is assumed, and with the run's own configuration the events are those of the run. From where it takes
another turn it is an estimate: what was measured of it then stands for what would have been, descents land at
their first try, and there is room to grow. What happened to the run whatever its configuration (a switch by
hand, a guard that tripped, NaN) happens again where the layer's state allows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..config import SubspaceConfig
from ..decisions.descent_schedule import too_late
from ..decisions.lifecycle import GUARD, LOADED, MANUAL, Lifecycle
from ..decisions.machine import LayerLife, Trigger
from ..records import Action, Event, LayerInfo, LayerMetrics, LayerReport, LayerState
from .log_reader import Run

FROM_OUTSIDE = frozenset({MANUAL, LOADED})  # reasons of what somebody did
# Kinds of events that follow from metrics and thresholds, unless their reason is one of those or GUARD.
DECIDED = frozenset({"danger", "danger_over", "protect", "release", "descend", "descent_stopped", "descent_extended",
                     "descent_failed", "factorize", "merge", "grow", "shrink", "stalled"})  # fmt: skip
TRIPS = {"loss_rose": Trigger.LOSS_ROSE, "skewed": Trigger.SKEWED}  # why a guard tripped


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What would have happened."""

    events: tuple[Event, ...]  # oldest first
    diverged: Mapping[str, int]  # layer -> the step from which on its life is another than the recorded one


def replay(run: Run, config: SubspaceConfig | None = None) -> Replay:
    """Go through a recorded run again.

    Args:
        config: another one than the run's; what counts is mode, rule, thresholds, warmup_steps, patience,
            descent_steps, total_steps, cohort_steps, cooldown_steps, stall_analyses and on_danger. Ranks, budget
            and the steps of the analyses stay those of the record.

    Raises:
        ValueError: the run had a policy of its own, which a log can't ask; or the log contradicts itself.
    """
    policy = run.head.get("config", {}).get("policy")
    if policy is not None:
        raise ValueError(f"the run had a policy of its own, {policy}, which a log can't ask again")
    replayer = _Replayer(run, config or run.config)
    try:
        replayer.run_through()
    except Exception as error:  # a record that is possible alone, and not beside the others
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the log contradicts itself at step {replayer.step} ({reason}): was it edited?") from error

    def place(event: Event) -> tuple[int, int]:
        same_step = replayer.recorded.get(event.step, [])
        return event.step, same_step.index(event) if event in same_step else len(same_step)

    diverged = {x.name: x.diverged for x in replayer.layers.values() if x.diverged is not None}
    return Replay(events=tuple(sorted(replayer.events, key=place)), diverged=diverged)


@dataclass(kw_only=True)
class _Layer(LayerLife):
    """A layer in its replayed life."""

    reports: Mapping[int, LayerReport] = field(default_factory=dict)
    """The recorded ones, by step."""
    diverged: int | None = None
    recorded_window: int = 0
    """How many analyses its window held in the run, at the present one."""

    @property
    def window(self) -> tuple[LayerMetrics, ...]:
        """The analyses that a decision rests on: since the last change, at the rank of the last one."""
        window = super().window
        other = [i for i, metrics in enumerate(window) if metrics.rank != window[-1].rank]
        window = window[other[-1] + 1 :] if other else window
        bounded = self.diverged is None and self.recorded_window  # in a run, histories are of bounded length
        return window[-self.recorded_window :] if bounded else window

    def input(self, recorded: LayerInfo, step: int) -> LayerInfo:
        """What a policy may know of it."""
        if self.diverged is None and self.protected == recorded.protected:
            return recorded
        mine = self.info(step)
        return replace(recorded, protected=mine.protected, cooldown=mine.cooldown)

    waits_done: int = 0
    """Steps that its present descent has waited for gradients already."""

    def recorded(self, step: int) -> LayerReport | None:
        """Its report of a step, while its life is the recorded one."""
        return self.reports.get(step) if self.diverged is None else None


class _Replayer:
    """Recorded metrics in place of measured ones, recorded outcomes in place of tensors."""

    def __init__(self, run: Run, config: SubspaceConfig) -> None:
        self.run, self.config = run, config
        self.events: list[Event] = []
        self.lifecycle: Lifecycle[_Layer] = Lifecycle(config, self.events.append)
        self.layers = self.lifecycle.layers
        for name, reports in run.reports.items():
            if reports:
                by_step = dict(zip(run.steps[name], reports, strict=True))
                shape, thresholds = reports[0].shape, config.thresholds_of(name)
                self.layers[name] = _Layer(name=name, shape=shape, thresholds=thresholds, reports=by_step)
        self.analyses = {record["step"]: record["analyses"] for record in run.analyses}
        self.recorded: dict[int, list[Event]] = {}
        for event in run.events:
            self.recorded.setdefault(event.step, []).append(event)
        self.agenda = [*self.analyses, *self.recorded]  # a heap of the steps at which something may happen
        heapq.heapify(self.agenda)
        self.last = max(self.agenda, default=0)
        self.step = 0

    def run_through(self) -> None:
        """From the first step to the last that is known of."""
        while self.agenda:
            step = heapq.heappop(self.agenda)
            if step == self.step:
                continue
            self.step = step
            self.land(step)
            if step in self.analyses:
                self.analyze(step)
            for event in self.recorded.get(step, []):
                outside = event.kind not in DECIDED and event.kind not in TRIPS
                if outside or event.reason in FROM_OUTSIDE:
                    self.happen(event)

    def recorded_event(self, layer: _Layer, step: int, *kinds: str) -> Event | None:
        """What the run says of a layer at a step, unless somebody did it; ``None`` once its life is another one."""
        events = self.recorded.get(step, []) if layer.diverged is None else []
        return next((e for e in events
                     if e.layer == layer.name and e.kind in kinds and e.reason not in FROM_OUTSIDE), None)  # fmt: skip

    def wait(self, layer: _Layer) -> None:
        """A descent is to end at a step, if the record goes so far."""
        until = layer.status.descent_end
        if until is not None and until <= self.last:
            heapq.heappush(self.agenda, until)

    def after_next_analysis(self, step: int) -> int:
        """When a descent is looked at again that waits for finite gradients: before an analysis nobody knows of any."""
        coming = min((known for known in self.analyses if known > step), default=None)
        if coming is None:
            return self.last + 1
        every = self.config.analyze_every
        return step + every * -(-(coming - step) // every)

    # ---- facts -----------------------------------------------------------------------------------------

    def happen(self, event: Event) -> None:
        """Something that the configuration had no part in: done by somebody, by a guard, or to the weights."""
        layer = self.layers.get(event.layer)
        if layer is None:
            self.lifecycle.emit(event)
            return
        self._happen_to(layer, event)
        if event.reason in FROM_OUTSIDE | {GUARD}:
            layer.decision = None

    def _happen_to(self, layer: _Layer, event: Event) -> None:
        """Where the state of the layer allows it."""
        step, reason, numbers = event.step, event.reason, event.numbers
        back = Trigger.MERGE_MANUALLY if reason == MANUAL else Trigger.LOSS_ROSE
        match event.kind:
            case "factorize":
                if not layer.factorized:
                    layer.status.rank = int(numbers["rank"])
                    error = numbers["reconstruction_error"]
                    self.lifecycle.factorize(layer, step, Trigger.FACTORIZE_MANUALLY, reason, error)
            case "merge":
                if layer.factorized:
                    self.lifecycle.merge(layer, step, back, reason)
            case "descent_stopped":
                if layer.state == LayerState.DESCENDING:
                    self.lifecycle.stop_descent(layer, step, back, reason)
            case "protect":
                if not layer.protected:
                    self.lifecycle.protect(layer, step, reason, int(numbers["rank"]), manual=True)
            case "release":
                if layer.protected:
                    self.lifecycle.release(layer, step, reason, int(numbers["rank"]))
            case _:
                if event.kind not in TRIPS or layer.can(TRIPS[event.kind]):
                    self.lifecycle.emit(event)
                if event.kind == "unsupported":
                    del self.layers[layer.name]

    # ---- every step ------------------------------------------------------------------------------------

    def land(self, step: int) -> None:
        """The ends of descents."""
        for layer in self.layers.values():
            status = layer.status
            if layer.state != LayerState.DESCENDING or status.descent_end is None or status.descent_end > step:
                continue
            if self.waits(layer, step):
                continue
            if layer.only_nonfinite:
                status.descent_end = self.after_next_analysis(step)
                self.wait(layer)
                continue
            event = self.recorded_event(layer, step, "factorize", "descent_extended", "descent_failed")
            error = 0.0 if event is None else event.numbers["reconstruction_error"]
            landing = self.lifecycle.landing(layer, error)
            if landing == Trigger.DESCENT_EXACT:
                error = math.nan if event is None else error
                self.lifecycle.factorize(layer, step, landing, "descent done", error)
            elif landing == Trigger.DESCENT_EXTENDED:
                self.lifecycle.put_off(layer, step, step + self.config.analyze_every, error)
                self.wait(layer)
            else:
                self.lifecycle.give_up(layer, step, error)

    def waits(self, layer: _Layer, step: int) -> bool:
        """Whether a descent that would be over had no gradients in the run for some of its steps: it ends later."""
        if layer.diverged is not None:
            return False
        told = [e for events in self.recorded.values() for e in events if e.layer == layer.name]
        began = max((e.step for e in told if e.kind == "descend" and e.step <= step), default=0)
        waited = sum(e.numbers["waited_steps"] for e in told if e.kind == "descent_resumed" and e.step > began)
        more = int(waited) - layer.waits_done
        open_ended = sum(e.kind == "descent_waits" for e in told if e.step > began) > sum(
            e.kind == "descent_resumed" for e in told if e.step > began
        )
        if not more and not open_ended:
            return False
        assert layer.status.descent_end is not None
        layer.waits_done += more
        layer.status.descent_end = step + more if more else self.last + 1
        self.wait(layer)
        return True

    # ---- every interval --------------------------------------------------------------------------------

    def analyze(self, step: int) -> None:
        """Decide, and act where descents may start."""
        boundary = self.lifecycle.begin_analysis(step)
        self.lifecycle.analyses = self.analyses[step]
        for layer in self.layers.values():
            report = layer.reports.get(step)
            if report is not None and report.metrics is not None and report.metrics.step == step:
                self.decide(layer, report, step)
        for event in self.recorded.get(step, []):
            if event.kind in TRIPS or (event.reason == GUARD and event.kind in DECIDED):
                self.happen(event)
        if boundary and self.config.mode == "auto":
            self.act(step)
        self.lifecycle.note_stall(step)
        for layer in self.layers.values():
            recorded = layer.recorded(step)
            if recorded is not None and (recorded.state, recorded.protected) != (layer.state, layer.protected):
                layer.diverged = step

    def decide(self, layer: _Layer, report: LayerReport, step: int) -> None:
        """Ask the rules about a layer, and see whether danger begins or ends."""
        assert report.metrics is not None and report.policy_input is not None
        metrics, recorded = report.metrics, report.policy_input
        if layer.diverged is not None and layer.state != recorded.state:
            metrics = replace(metrics, reconstruction_error=None, exact_rank=None)  # of a life that it does not lead
        layer.history.append(metrics)
        layer.status.rank, layer.recorded_window = recorded.info.rank, recorded.analyses
        self.ask(layer, recorded.info, step)
        if self.lifecycle.note_danger(layer, step) and self.lifecycle.protects:
            begins = layer.status.in_danger
            if self.lifecycle.may_protect(layer, begins, manual=False):
                if begins:
                    self.lifecycle.protect(layer, step, "in danger", layer.rank, manual=False)
                else:
                    self.lifecycle.release(layer, step, "the danger is over", layer.rank)
            self.ask(layer, recorded.info, step)

    def ask(self, layer: _Layer, recorded: LayerInfo, step: int) -> None:
        """The policy's word."""
        late = too_late(self.config, step, layer.history)
        self.lifecycle.ask(layer, step, replace(layer.input(recorded, step), late=late))

    def act(self, step: int) -> None:
        """Carry out the decisions."""
        wanted = self.lifecycle.wanted()
        for layer in wanted[Action.DESCEND]:
            event = self.recorded_event(layer, step, "descend")
            if event is not None:  # the plan may have lowered the rank at that moment
                layer.status.rank = int(event.numbers["rank"])
            self.lifecycle.descend(layer, step)
            layer.waits_done = 0
            self.wait(layer)
        for layer in wanted[Action.FACTORIZE]:
            if not self.lifecycle.beyond_break_even(layer, layer.rank):
                self.factorize(layer, step)
        for layer in wanted[Action.MERGE]:
            self.merge(layer, step)
        for layer in (*wanted[Action.SHRINK], *wanted[Action.GROW]):
            self.resize(layer, step)

    def factorize(self, layer: _Layer, step: int) -> None:
        """Into factors, as it is exact enough already; not where the weight could not be decomposed then."""
        event = self.recorded_event(layer, step, "factorize")
        if event is not None:
            layer.status.rank = int(event.numbers["rank"])
            error = event.numbers["reconstruction_error"]
            self.lifecycle.factorize(layer, step, Trigger.FACTORIZE, "decided", error)
        elif self.news(layer, step):
            error = layer.history[-1].reconstruction_error or 0.0
            self.lifecycle.factorize(layer, step, Trigger.FACTORIZE, "decided", error)

    def merge(self, layer: _Layer, step: int) -> None:
        """Dense again."""
        assert layer.decision is not None
        self.lifecycle.merge(layer, step, Trigger.MERGE, layer.decision.reason)
        layer.decision = None

    def resize(self, layer: _Layer, step: int) -> None:
        """Another rank, or dense where that would be beyond break-even; not where the run had no room for it."""
        event = self.recorded_event(layer, step, "grow", "shrink", "merge")
        if layer.decision is None or (event is None and not self.news(layer, step)):
            return
        rank = layer.decision.rank if event is None or event.kind == "merge" else int(event.numbers["rank"])
        if rank is None or self.lifecycle.beyond_break_even(layer, rank):
            self.merge(layer, step)
        else:
            self.lifecycle.resize(layer, step, rank, layer.decision.reason)

    def news(self, layer: _Layer, step: int) -> bool:
        """Whether the run itself did not ask for this: then what stood in its way then says nothing of it."""
        report = layer.recorded(step)
        if report is None:
            return True
        decided = self.run.decide(layer.name, report, step)
        return decided is None or layer.decision is None or decided.action != layer.decision.action


def differences(recorded: Iterable[Event], replayed: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """(recorded events that the replay lacks, events of the replay that the record lacks), oldest first."""
    old, new = list(recorded), list(replayed)
    return [event for event in old if event not in new], [event for event in new if event not in old]
