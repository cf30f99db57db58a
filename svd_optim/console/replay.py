"""Replay of a recorded run under another configuration: from a log to the events that would have happened.

The policy is queried again with the recorded metrics. While a layer's states are those of the record, the replay is
exact, and under the run's own configuration the events are those of the run. From the step at which a layer diverges it
is an estimate: the recorded metrics are used although they belong to other states, descents are exact at their first
end, and there is room to grow. What did not depend on the configuration (manual switches, guards, NaN) is repeated
where the layer's state allows it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..config import SubspaceConfig
from ..decisions.descent_schedule import due, too_late
from ..decisions.lifecycle import GUARD, LOADED, MANUAL, PROTECTED, Lifecycle
from ..decisions.machine import LayerLife, Trigger
from ..records import Action, Event, LayerInfo, LayerMetrics, LayerReport, LayerState
from .log_reader import Run

INTERVENTIONS = frozenset({MANUAL, LOADED})  # reasons of events that the user caused
# Kinds of events that follow from metrics and thresholds, unless their reason is an intervention or GUARD.
DECIDED = frozenset({"danger", "danger_over", "protect", "release", "descend", "descent_stopped", "descent_extended",
                     "descent_failed", "factorize", "merge", "grow", "shrink", "stalled"})  # fmt: skip
TRIPS = {"loss_rose": Trigger.LOSS_ROSE, "skewed": Trigger.SKEWED}  # events of tripped guards


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The events of a replay."""

    events: tuple[Event, ...]  # oldest first
    diverged: Mapping[str, int]  # layer -> the step at which its states begin to differ from the record


def replay(run: Run, config: SubspaceConfig | None = None) -> Replay:
    """Replay a recorded run.

    Args:
        config: default: the run's own. Of another one these fields take effect: mode, rule, thresholds, warmup_steps,
            patience, descent_steps, total_steps, cohort_steps, cooldown_steps, stall_analyses and on_danger. Ranks,
            budget, the share of the loss and the steps of the analyses are those of the record.

    Raises:
        ValueError: the run had a policy of its own, which a log can't ask; or the log contradicts itself.
    """
    policy = run.head.get("config", {}).get("policy")
    if policy is not None:
        raise ValueError(f"the run had a user's policy, {policy}, which can't be queried from its log")
    config = config or run.config
    if config.tolerance != run.config.tolerance:  # by default it depends on mode and total_steps
        config = replace(config, budget=run.config.parameter_budget, max_loss_increase=run.config.tolerance,
                         rank=run.config.rank, energy=run.config.energy, metric=None)  # fmt: skip
    replayer = _Replayer(run, config)
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
    """A layer in the replay."""

    reports: Mapping[int, LayerReport] = field(default_factory=dict)
    """The recorded reports, by step."""
    diverged: int | None = None
    """The step at which its states begin to differ from the record."""
    recorded_window: int = 0
    """Length of its decision window in the run, at the present analysis."""

    @property
    def window(self) -> tuple[LayerMetrics, ...]:
        """The decision window, of analyses at the rank of the last one; at most as long as in the run."""
        window = super().window
        other = [i for i, metrics in enumerate(window) if metrics.rank != window[-1].rank]
        window = window[other[-1] + 1 :] if other else window
        bounded = self.diverged is None and self.recorded_window  # a run keeps a bounded history
        return window[-self.recorded_window :] if bounded else window

    def input(self, recorded: LayerInfo, step: int) -> LayerInfo:
        """The policy's view of it: the recorded one, with protection and cooldown of the replay where they differ."""
        if self.diverged is None and self.protected == recorded.protected:
            return recorded
        replayed = self.info(step)
        return replace(recorded, protected=replayed.protected, cooldown=replayed.cooldown)

    waits_done: int = 0
    """Steps that its present descent has waited for gradients already."""

    def recorded(self, step: int) -> LayerReport | None:
        """Its recorded report of a step, before it diverged."""
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
                layer = self.layers[name] = _Layer(name=name, shape=shape, thresholds=thresholds, reports=by_step)
                switched = any(e.layer == name and e.kind == "factorize" for e in run.events)
                if reports[0].state == LayerState.FACTORIZED and not switched:  # it was before it was wrapped
                    layer.fire(Trigger.LOAD_FACTORIZED)
        self.analyses = {record["step"]: record["analyses"] for record in run.analyses}
        self.recorded: dict[int, list[Event]] = {}
        for event in run.events:
            self.recorded.setdefault(event.step, []).append(event)
        self.agenda = [*self.analyses, *self.recorded]  # a heap of the steps to process
        heapq.heapify(self.agenda)
        self.last = max(self.agenda, default=0)
        self.step = 0

    def run_through(self) -> None:
        """Process all steps, from the first to the last recorded one."""
        while self.agenda:
            step = heapq.heappop(self.agenda)
            if step == self.step:
                continue
            self.step = step
            for event in self.recorded.get(step, []):
                if event.kind == "descent_stopped" and event.reason not in INTERVENTIONS | {GUARD, PROTECTED}:
                    self.repeat(event)  # its layer could not go into factors any more
            self.conclude_descents(step)
            if step in self.analyses:
                self.analyze(step)
            for event in self.recorded.get(step, []):
                undecided = event.kind not in DECIDED and event.kind not in TRIPS
                if undecided or event.reason in INTERVENTIONS:
                    self.repeat(event)

    def recorded_event(self, layer: _Layer, step: int, *kinds: str) -> Event | None:
        """The recorded event of a layer at a step, interventions excluded; ``None`` once it diverged."""
        events = self.recorded.get(step, []) if layer.diverged is None else []
        return next((e for e in events
                     if e.layer == layer.name and e.kind in kinds and e.reason not in INTERVENTIONS), None)  # fmt: skip

    def schedule_end(self, layer: _Layer) -> None:
        """Schedule the end of a descent, if the record goes that far."""
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

    # ---- what does not depend on the configuration ---------------------------------------------------

    def repeat(self, event: Event) -> None:
        """Repeat an event that did not depend on the configuration: an intervention, a guard, NaN."""
        layer = self.layers.get(event.layer)
        if layer is None:
            self.lifecycle.emit(event)
            return
        before = len(self.events)
        self._repeat_for(layer, event)
        if event.reason in INTERVENTIONS | {GUARD} and len(self.events) > before:
            layer.decision = None

    def _repeat_for(self, layer: _Layer, event: Event) -> None:
        """Repeat it where the state of the layer allows it."""
        step, reason, numbers = event.step, event.reason, event.numbers
        trigger = {MANUAL: Trigger.MERGE_MANUALLY, GUARD: Trigger.LOSS_ROSE}.get(reason, Trigger.UNSUPPORTED)
        match event.kind:
            case "factorize":
                if not layer.factorized:
                    layer.status.rank = int(numbers["rank"])
                    error = numbers["reconstruction_error"]
                    self.lifecycle.factorize(layer, step, Trigger.FACTORIZE_MANUALLY, reason, error)
            case "merge":
                if layer.factorized:
                    self.lifecycle.merge(layer, step, trigger, reason)
            case "descent_stopped":
                if layer.state == LayerState.DESCENDING:
                    self.lifecycle.stop_descent(layer, step, trigger, reason)
            case "protect":
                self.lifecycle.protect(layer, step, reason, int(numbers["rank"]), manual=True)
            case "release":
                if layer.protected:
                    self.lifecycle.release(layer, step, reason, int(numbers["rank"]))
            case _:
                if event.kind not in TRIPS or layer.can(TRIPS[event.kind]):
                    self.lifecycle.emit(event)
                if event.kind == "unsupported":
                    del self.layers[layer.name]

    # ---- every step ----------------------------------------------------------------------------------

    def conclude_descents(self, step: int) -> None:
        """Install, extend or fail the descents that end at a step."""
        for layer in self.layers.values():
            status = layer.status
            if layer.state != LayerState.DESCENDING or status.descent_end is None or status.descent_end > step:
                continue
            if self.waits(layer, step):
                continue
            if layer.only_nonfinite:
                status.descent_end = self.after_next_analysis(step)
                self.schedule_end(layer)
                continue
            event = self.recorded_event(layer, step, "factorize", "descent_extended", "descent_failed")
            status.found_share = None if event is None else event.numbers.get("found_share")
            error = 0.0 if event is None else event.numbers["reconstruction_error"]
            outcome = self.lifecycle.descent_outcome(layer, error)
            if outcome == Trigger.DESCENT_EXACT:
                error = math.nan if event is None else error
                self.lifecycle.factorize(layer, step, outcome, "descent done", error)
            elif outcome == Trigger.DESCENT_EXTENDED:
                self.lifecycle.extend_descent(layer, step, step + self.config.analyze_every, error)
                self.schedule_end(layer)
            else:
                self.lifecycle.fail_descent(layer, step, error)

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
        self.schedule_end(layer)
        return True

    # ---- every interval ------------------------------------------------------------------------------

    def analyze(self, step: int) -> None:
        """Decide, and act at cohort boundaries."""
        boundary = self.lifecycle.begin_analysis(step)
        self.lifecycle.analyses = self.analyses[step]
        for layer in self.layers.values():
            report = layer.reports.get(step)
            if report is not None and report.metrics is not None and report.metrics.step == step:
                self.decide(layer, report, step)
        for event in self.recorded.get(step, []):
            if event.kind in TRIPS or (event.reason == GUARD and event.kind in DECIDED):
                self.repeat(event)
        if boundary and self.config.mode == "auto":
            self.act(step)
        self.lifecycle.note_stall(step)
        for layer in self.layers.values():
            recorded = layer.recorded(step)
            if recorded is not None and (recorded.state, recorded.protected) != (layer.state, layer.protected):
                layer.diverged = step

    def decide(self, layer: _Layer, report: LayerReport, step: int) -> None:
        """Query the policy about a layer, and update danger and protection."""
        assert report.metrics is not None and report.policy_input is not None
        metrics, recorded = report.metrics, report.policy_input
        if layer.diverged is not None and layer.state != recorded.state:
            metrics = replace(metrics, reconstruction_error=None, exact_rank=None)  # they belong to another state
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
        """Query the policy."""
        asked = replace(
            layer.input(recorded, step), late=too_late(self.config, step, layer.history), due=due(self.config, step)
        )
        self.lifecycle.ask(layer, step, asked)

    def act(self, step: int) -> None:
        """Carry out the decisions."""
        requests = self.lifecycle.requests()
        for layer in requests[Action.DESCEND]:
            event = self.recorded_event(layer, step, "descend")
            if event is not None:  # the plan may have lowered the rank at the start
                layer.status.rank = int(event.numbers["rank"])
                layer.status.predicted_share = event.numbers.get("predicted_share", 0.0)
            self.lifecycle.descend(layer, step)
            layer.waits_done = 0
            self.schedule_end(layer)
        for layer in requests[Action.FACTORIZE]:
            if not self.lifecycle.beyond_break_even(layer, layer.rank):
                self.factorize(layer, step)
        for layer in requests[Action.MERGE]:
            self.merge(layer, step)
        for layer in (*requests[Action.SHRINK], *requests[Action.GROW]):
            self.resize(layer, step)

    def factorize(self, layer: _Layer, step: int) -> None:
        """Factorize a layer that is accurate enough; not if its weight could not be decomposed in the run."""
        event = self.recorded_event(layer, step, "factorize")
        if event is not None:
            layer.status.rank = int(event.numbers["rank"])
            layer.status.predicted_share = event.numbers.get("predicted_share", 0.0)
            error = event.numbers["reconstruction_error"]
            self.lifecycle.factorize(layer, step, Trigger.FACTORIZE, "decided", error)
        elif self.is_new(layer, step):
            error = layer.history[-1].reconstruction_error or 0.0
            self.lifecycle.factorize(layer, step, Trigger.FACTORIZE, "decided", error)

    def merge(self, layer: _Layer, step: int) -> None:
        """Make a factorized layer dense again."""
        assert layer.decision is not None
        self.lifecycle.merge(layer, step, Trigger.MERGE, layer.decision.reason)
        layer.decision = None

    def resize(self, layer: _Layer, step: int) -> None:
        """Change the rank, or make it dense if that is past break-even; not if the run did not, for lack of room."""
        event = self.recorded_event(layer, step, "grow", "shrink", "merge")
        if layer.decision is None or (event is None and not self.is_new(layer, step)):
            return
        rank = layer.decision.rank if event is None or event.kind == "merge" else int(event.numbers["rank"])
        if rank is None or self.lifecycle.beyond_break_even(layer, rank):
            self.merge(layer, step)
        else:
            self.lifecycle.resize(layer, step, rank, layer.decision.reason)

    def is_new(self, layer: _Layer, step: int) -> bool:
        """Whether the run did not request this action: then what prevented actions in the run does not apply."""
        report = layer.recorded(step)
        if report is None:
            return True
        decided = self.run.decide(layer.name, report, step)
        return decided is None or layer.decision is None or decided.action != layer.decision.action


def differences(recorded: Iterable[Event], replayed: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """(recorded events that the replay lacks, events of the replay that the record lacks), oldest first."""
    old, new = list(recorded), list(replayed)
    return [event for event in old if event not in new], [event for event in new if event not in old]
