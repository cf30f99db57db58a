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

from ..config import SubspaceConfig, Thresholds
from ..decisions import transitions
from ..decisions.policy import policy_of
from ..decisions.transitions import BY_HAND, GUARD, LOADED
from ..records import Action, Decision, Event, LayerInfo, LayerMetrics, LayerReport, LayerState, break_even_rank
from ..tracking.descent import ending, too_late
from ..tracking.selection import first_match
from .run_log import Run

FROM_OUTSIDE = frozenset({BY_HAND, LOADED})  # reasons of what somebody did
# Kinds of events that follow from metrics and thresholds, unless their reason is one of those or GUARD.
DECIDED = frozenset({"danger", "danger_over", "protect", "release", "descend", "descent_stopped", "descent_extended",
                     "descent_failed", "factorize", "merge", "grow", "shrink", "stalled"})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What would have happened."""

    events: tuple[Event, ...]  # oldest first
    diverged: Mapping[str, int]  # layer -> the step from which on its life is another than the recorded one


def replay(run: Run, config: SubspaceConfig | None = None) -> Replay:
    """Go through a recorded run again.

    Args:
        config: another one than the run's; what counts is mode, rule, thresholds, warmup, patience,
            descent_steps, total_steps, cohort, cooldown, stall_after and on_danger. Ranks, budget and the moments of
            the analyses stay those of the record.

    Raises:
        ValueError: the run had a policy of its own, which a log can't ask.
    """
    policy = run.head.get("config", {}).get("policy")
    if policy is not None:
        raise ValueError(f"the run had a policy of its own, {policy}, which a log can't ask again")
    replayer = _Replayer(run, config or run.config)
    replayer.run_through()

    def place(event: Event) -> tuple[int, int]:
        same_step = replayer.recorded.get(event.step, [])
        return event.step, same_step.index(event) if event in same_step else len(same_step)

    diverged = {x.name: x.diverged for x in replayer.layers.values() if x.diverged is not None}
    return Replay(events=tuple(sorted(replayer.events, key=place)), diverged=diverged)


@dataclass
class _Layer:
    """A layer in its replayed life."""

    name: str
    shape: tuple[int, int]
    thresholds: Thresholds
    reports: Mapping[int, LayerReport]  # the recorded ones, by step
    state: LayerState = LayerState.WARMUP
    rank: int = 0
    history: list[LayerMetrics] = field(default_factory=list)
    line_start: int = -1
    danger: bool = False
    protected: bool = False
    by_hand: bool = False  # and so protected by hand
    descent_end: int = 0
    extensions: int = 0
    cooldown_until: int = 0
    returns: int = 0
    diverged: int | None = None

    def line(self, recorded: int) -> list[LayerMetrics]:
        """The analyses that a decision rests on: since the last change, at the rank of the last one.

        Args:
            recorded: how many they were in the run.
        """
        line = [metrics for metrics in self.history if metrics.step > self.line_start]
        other = [i for i, metrics in enumerate(line) if metrics.rank != line[-1].rank]
        line = line[other[-1] + 1 :] if other else line
        return line[-recorded:] if self.diverged is None and recorded else line  # histories are of bounded length

    def info(self, asked: LayerInfo, step: int) -> LayerInfo:
        """What a policy may know of it."""
        if self.diverged is None and self.protected == asked.protected:
            return asked
        return replace(asked, protected=self.protected, cooldown=max(0, self.cooldown_until - step))

    def enter(self, state: LayerState) -> None:
        """Another state, and a new line."""
        self.state, self.extensions = state, 0
        self.line_start = self.history[-1].step if self.history else -1

    def recorded(self, step: int) -> LayerReport | None:
        """Its report of a step, while its life is the recorded one."""
        return self.reports.get(step) if self.diverged is None else None


class _Replayer:
    """The lifecycle once more, on recorded metrics; the methods' names are those of :mod:`.lifecycle`."""

    def __init__(self, run: Run, config: SubspaceConfig) -> None:
        self.run, self.config, self.policy = run, config, policy_of(config)
        self.layers = {
            name: _Layer(
                name,
                reports[0].shape,
                first_match(name, config.overrides).thresholds or config.thresholds,
                dict(zip(run.steps[name], reports, strict=True)),
            )
            for name, reports in run.reports.items()
            if reports
        }
        self.analyses = {record["step"]: record["analyses"] for record in run.analyses}
        self.recorded: dict[int, list[Event]] = {}
        for event in run.events:
            self.recorded.setdefault(event.step, []).append(event)
        self.events: list[Event] = []
        self.decisions: dict[str, Decision] = {}
        self.agenda = [*self.analyses, *self.recorded]  # a heap of the steps at which something may happen
        heapq.heapify(self.agenda)
        self.last = max(self.agenda, default=0)
        self.last_analysis = 0
        self.acted = False

    def run_through(self) -> None:
        """From the first step to the last that is known of."""
        step = 0
        while self.agenda:
            now = heapq.heappop(self.agenda)
            if now == step:
                continue
            step = now
            self.land(step)
            if step in self.analyses:
                self.analyse(step)
            for event in self.recorded.get(step, []):
                if event.kind not in DECIDED or event.reason in FROM_OUTSIDE:
                    self.happen(event)

    def emit(self, event: Event) -> None:
        """Something that would have happened."""
        self.events.append(event)
        self.acted |= event.kind in ("descend", "factorize", "merge", "grow", "shrink")

    def recorded_event(self, step: int, layer: str, *kinds: str) -> Event | None:
        """What the run says of a layer at a step, unless it was done by hand."""
        return next((e for e in self.recorded.get(step, [])
                     if e.layer == layer and e.kind in kinds and e.reason not in FROM_OUTSIDE), None)  # fmt: skip

    def wait(self, layer: _Layer, until: int) -> None:
        """A descent is to end at a step, if the record goes so far."""
        layer.descent_end = until
        if until <= self.last:
            heapq.heappush(self.agenda, until)

    # ---- facts -----------------------------------------------------------------------------------------

    def happen(self, event: Event) -> None:
        """Something that the configuration had no part in: by hand, by a guard, or to the weights."""
        layer = self.layers.get(event.layer)
        possible = {
            "factorize": lambda x: x.state != LayerState.FACTORIZED,
            "merge": lambda x: x.state == LayerState.FACTORIZED,
            "loss_rose": lambda x: x.state in (LayerState.DESCENDING, LayerState.FACTORIZED),
            "skewed": lambda x: x.state == LayerState.FACTORIZED,
            "descent_stopped": lambda x: x.state == LayerState.DESCENDING,
            "protect": lambda x: not x.protected,
            "release": lambda x: x.protected,
        }.get(event.kind, lambda x: True)
        if layer is not None and not possible(layer):
            return
        self.emit(event)
        if layer is None:
            return
        if event.kind == "unsupported":
            del self.layers[layer.name]
        elif event.kind in ("protect", "release"):
            layer.protected = layer.by_hand = event.kind == "protect"
        elif event.after is not None:
            layer.enter(event.after)
            if event.kind == "merge" or event.reason == GUARD:
                transitions.rest_(layer, event.step, self.config.cooldown, counts=event.reason != BY_HAND)
        if event.reason in FROM_OUTSIDE | {GUARD}:
            self.decisions.pop(layer.name, None)

    # ---- every step ------------------------------------------------------------------------------------

    def land(self, step: int) -> None:
        """The ends of descents."""
        for layer in self.layers.values():
            if layer.state != LayerState.DESCENDING or layer.descent_end > step:
                continue
            if layer.history and not layer.history[-1].measured:
                self.wait(layer, step + self.config.interval)
                continue
            event = self.recorded_event(step, layer.name, "factorize", "descent_extended", "descent_failed")
            error, safe = 0.0, layer.thresholds.reconstruction_safe
            if event is not None and layer.diverged is None:
                error = event.numbers["reconstruction_error"]
            if error < safe:
                self.install(layer, step, "descent done", math.nan if event is None else error)
                continue
            gives_up = layer.extensions >= transitions.MAX_EXTENSIONS
            self.emit(transitions.not_landed(step, layer.name, error, safe, gives_up))
            if gives_up:
                layer.enter(LayerState.DENSE)
                transitions.rest_(layer, step, self.config.cooldown)
            else:
                layer.extensions += 1
                self.wait(layer, step + self.config.interval)

    def install(self, layer: _Layer, step: int, reason: str, error: float) -> None:
        """Into factors."""
        info = LayerInfo(name=layer.name, shape=layer.shape, rank=layer.rank)
        self.emit(transitions.factorize(step, info, reason, layer.state, error))
        layer.enter(LayerState.FACTORIZED)

    # ---- every interval --------------------------------------------------------------------------------

    def analyse(self, step: int) -> None:
        """Decide, and act where descents may start."""
        cohort = self.config.cohort
        boundary = step // cohort > self.last_analysis // cohort
        self.last_analysis = step
        for layer in self.layers.values():
            report = layer.reports.get(step)
            if report is not None and report.metrics is not None and report.metrics.step == step:
                self.decide(layer, report, step)
        for event in self.recorded.get(step, []):
            if event.reason == GUARD and event.kind in DECIDED:
                self.happen(event)
        if boundary and self.config.mode == "auto":
            self.act(step)
        stall = not self.acted and self.layers and self.config.mode == "auto"
        if stall and self.analyses[step] % self.config.stall_after == 0:
            self.emit(transitions.stalled(step, self.analyses[step], self.decisions, len(self.layers)))
        for layer in self.layers.values():
            recorded = layer.recorded(step)
            if recorded is not None and (recorded.state, recorded.protected) != (layer.state, layer.protected):
                layer.diverged = step

    def decide(self, layer: _Layer, report: LayerReport, step: int) -> None:
        """Ask the rules about a layer, and see whether danger begins or ends."""
        assert report.metrics is not None and report.question is not None
        metrics = report.metrics
        if layer.diverged is not None and layer.state != report.question.state:
            metrics = replace(metrics, reconstruction_error=None, exact_rank=None)  # of a life that it does not lead
        layer.history.append(metrics)
        layer.rank = report.question.info.rank
        if layer.state == LayerState.WARMUP and step >= self.config.warmup:
            layer.state = LayerState.DENSE
        line = layer.line(report.question.analyses)
        decision = self.ask(layer, report, line, step)
        recent = [m for m in line[-self.config.patience :] if m.principal_excess is not None]
        ready = layer.state != LayerState.WARMUP and len(recent) == self.config.patience
        if not ready or decision.danger == layer.danger:
            return
        layer.danger = decision.danger
        threshold = layer.thresholds.principal_danger
        self.emit(transitions.danger(step, layer.name, layer.danger, report.metrics, threshold))
        if self.config.on_danger == "protect" and self.config.mode == "auto":
            self.protect(layer, layer.danger, step)
            self.ask(layer, report, layer.line(report.question.analyses), step)

    def ask(self, layer: _Layer, report: LayerReport, line: list[LayerMetrics], step: int) -> Decision:
        """The policy's word."""
        assert report.question is not None
        late = too_late(self.config, step, layer.history)
        info = replace(layer.info(report.question.info, step), late=late)
        decision = self.decisions[layer.name] = self.policy.decide(info, layer.state, line, layer.thresholds)
        return decision

    def protect(self, layer: _Layer, begin: bool, step: int) -> None:
        """Begin or end a protection that was not begun by hand."""
        if begin == layer.protected or layer.by_hand:
            return
        if begin and layer.state == LayerState.DESCENDING:
            layer.enter(LayerState.DENSE)
            self.emit(transitions.descent_stopped(step, layer.name, "its principal block is protected"))
        layer.protected = begin
        reason = "in danger" if begin else "the danger is over"
        self.emit(transitions.protection(step, layer.name, begin, reason, layer.rank))

    def act(self, step: int) -> None:
        """Carry out the decisions."""
        wanted: dict[Action, list[_Layer]] = {action: [] for action in Action}
        for name, decision in self.decisions.items():
            layer = self.layers.get(name)
            if layer is not None and (not layer.protected or decision.action == Action.MERGE):
                wanted[decision.action].append(layer)
        for layer in wanted[Action.DESCEND]:
            if layer.state == LayerState.DENSE:
                self.descend(layer, step)
        for layer in wanted[Action.FACTORIZE]:
            if layer.state != LayerState.FACTORIZED and layer.rank < break_even_rank(*layer.shape):
                self.factorize(layer, step)
        for layer in wanted[Action.MERGE]:
            if layer.state == LayerState.FACTORIZED:
                self.merge(layer, step)
        for layer in (*wanted[Action.SHRINK], *wanted[Action.GROW]):
            if layer.state == LayerState.FACTORIZED:
                self.resize(layer, step)

    def descend(self, layer: _Layer, step: int) -> None:
        """A descent starts; the plan may have lowered the rank at that moment."""
        event = self.recorded_event(step, layer.name, "descend") if layer.diverged is None else None
        if event is not None:
            layer.rank = int(event.numbers["rank"])
        until = ending(self.config, step, layer.history)
        layer.state = LayerState.DESCENDING
        self.emit(transitions.descend(step, layer.name, self.decisions[layer.name].reason, layer.rank, until))
        self.wait(layer, until)

    def factorize(self, layer: _Layer, step: int) -> None:
        """Into factors, as it is exact enough already; not where the weight could not be decomposed then."""
        event = self.recorded_event(step, layer.name, "factorize") if layer.diverged is None else None
        if event is not None:
            layer.rank = int(event.numbers["rank"])
            self.install(layer, step, "decided", event.numbers["reconstruction_error"])
        elif self.news(layer, step):
            self.install(layer, step, "decided", layer.history[-1].reconstruction_error or 0.0)

    def merge(self, layer: _Layer, step: int) -> None:
        """Dense again."""
        transitions.rest_(layer, step, self.config.cooldown)
        self.emit(transitions.merge(step, layer.name, self.decisions[layer.name].reason, layer.rank,
                                    layer.cooldown_until - step))  # fmt: skip
        layer.enter(LayerState.DENSE)

    def resize(self, layer: _Layer, step: int) -> None:
        """Another rank, or dense where that would be beyond break-even; not where the run had no room for it."""
        decision = self.decisions[layer.name]
        event = self.recorded_event(step, layer.name, "grow", "shrink", "merge") if layer.diverged is None else None
        if event is None and not self.news(layer, step):
            return
        rank = decision.rank if event is None or event.kind == "merge" else int(event.numbers["rank"])
        if rank is None or rank >= break_even_rank(*layer.shape):
            self.merge(layer, step)
            return
        self.emit(transitions.resize(step, layer.name, decision.reason, layer.rank, rank))
        layer.rank = rank
        layer.enter(LayerState.FACTORIZED)
        layer.cooldown_until = step + self.config.cooldown

    def news(self, layer: _Layer, step: int) -> bool:
        """Whether the run itself did not ask for this: then what stood in its way then says nothing of it."""
        report = layer.recorded(step)
        if report is None:
            return True
        decided = self.run.decide(layer.name, report, step)
        return decided is None or decided.action != self.decisions[layer.name].action


def differences(recorded: Iterable[Event], replayed: Iterable[Event]) -> tuple[list[Event], list[Event]]:
    """(recorded events that the replay lacks, events of the replay that the record lacks), oldest first."""
    old, new = list(recorded), list(replayed)
    return [event for event in old if event not in new], [event for event in new if event not in old]
