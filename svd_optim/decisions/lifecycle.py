"""The layers of a run and their decisions: queries the policy, drives the state machine, emits events. No torch.

Shared by the training run and the replay of its log. Tensors are the caller's responsibility: the caller asks here what
is allowed, does it, and reports it here, which updates the layer's status and emits the :class:`Event`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ..config import SubspaceConfig
from ..records import Action, Decision, Event, LayerInfo, LayerState, PolicyInput, break_even_rank
from .descent_schedule import ending, out_of_time, too_short
from .machine import LayerLife, Protection, Trigger
from .policy import policy_of

MAX_EXTENSIONS = 3  # extensions of a descent before it fails
MANUAL, GUARD, LOADED = "manual", "a guard tripped", "other weights were loaded"  # reasons of events without decision
PROTECTED = "its principal block is protected"

# The kinds of events.
EVENTS: Mapping[str, str] = {
    "descend": "a dense layer starts its descent",
    "descent_extended": "the factors would not be accurate enough yet: the descent continues",
    "descent_waits": "a layer without gradients, frozen or at a learning rate of 0: its descent waits",
    "descent_resumed": "it continues",
    "descent_failed": "they still were not after several extensions: the layer stays dense",
    "descent_stopped": "a descent is canceled; what it has faded stays faded",
    "factorize": "a layer is factorized",
    "merge": "a factorized layer becomes dense again",
    "grow": "a factorized layer gains singular directions",
    "shrink": "a factorized layer drops singular directions",
    "danger": "the gradient attacks what a layer has learned",
    "danger_over": "the danger is over",
    "protect": "a layer's principal block is held fixed",
    "release": "the principal block may change again",
    "loss_rose": "the training loss rose by more than its noise after layers had changed",
    "skewed": "factors are no longer orthonormal",
    "nonfinite": "NaN or Inf in a gradient, a weight or a step",
    "decomposition_failed": "a decomposition fails repeatedly: the old basis is kept",
    "unsupported": "a layer is no longer tracked",
    "interval": "intervals are stretched or shortened to stay within max_overhead",
    "stalled": "many analyses, and no layer ever acted",
}
WARNINGS = frozenset(
    {"stalled", "nonfinite", "descent_failed", "unsupported", "loss_rose", "skewed", "decomposition_failed"}
)  # logged as warnings
ACTS = frozenset({"descend", "factorize", "merge", "grow", "shrink"})
TRIGGERS = {
    Action.DESCEND: Trigger.DESCEND,
    Action.FACTORIZE: Trigger.FACTORIZE,
    Action.MERGE: Trigger.MERGE,
    Action.GROW: Trigger.GROW,
    Action.SHRINK: Trigger.SHRINK,
}  # that a policy may request

L = TypeVar("L", bound=LayerLife)


class Lifecycle(Generic[L]):
    """The tracked layers of one run, live or replayed.

    Args:
        config: see :class:`SubspaceConfig`.
        emit: called with each event as it happens.
    """

    def __init__(self, config: SubspaceConfig, emit: Callable[[Event], None]) -> None:
        self.config = config
        self.policy = policy_of(config)
        self.layers: dict[str, L] = {}
        self.analyses = 0
        self.waited = 0  # analyses after warmup
        self.too_late = False  # after this analysis, for any descent
        self.last_analysis = 0
        self.acted = False
        self._emit = emit

    def emit(self, event: Event) -> None:
        """Pass an event on, and remember whether any layer ever acted."""
        self.acted |= event.kind in ACTS
        self._emit(event)

    def note(self, step: int, layer: str, kind: str, reason: str, numbers: Mapping[str, float] | None = None) -> None:
        """Emit an event that changed no layer's state."""
        self.emit(Event(step=step, layer=layer, kind=kind, reason=reason, numbers=dict(numbers or {})))

    def _fire(
        self, layer: L, trigger: Trigger, step: int, kind: str, reason: str, numbers: Callable[[], dict[str, float]],
        **status: object,
    ) -> None:  # fmt: skip
        before = layer.fire(trigger, step, self.config.cooldown_steps)
        vars(layer.status).update(status)  # before anybody is told: a listener may save the run
        self.emit(Event(step=step, layer=layer.name, kind=kind, reason=reason,
                        before=before, after=layer.state, numbers=numbers()))  # fmt: skip

    # ---- decisions -----------------------------------------------------------------------------------

    def begin_analysis(self, step: int) -> bool:
        """Count an analysis. Returns whether it is the first of a cohort: only then layers act, together."""
        cohort = self.config.cohort_steps
        boundary = step // cohort > self.last_analysis // cohort
        following = 2 * step - self.last_analysis
        self.too_late = not out_of_time(self.config, step) and out_of_time(self.config, following)
        self.last_analysis = step
        self.analyses += 1
        self.waited += step > self.config.warmup
        return boundary

    def ask(self, layer: L, step: int, info: LayerInfo) -> Decision:
        """Query the policy about a layer, and record its input and its decision.

        Raises:
            TypeError: the policy returned something else than a :class:`Decision`.
        """
        if layer.state == LayerState.WARMUP and step >= self.config.warmup:
            layer.fire(Trigger.WARMUP_OVER)
        window = layer.window
        layer.policy_input = PolicyInput(info=info, state=layer.state, analyses=len(window))
        decision = self.policy.decide(info, layer.state, window, layer.thresholds)
        if not isinstance(decision, Decision):
            raise TypeError(f"policy.decide must return a Decision, got {decision!r} for layer {layer.name!r}")
        layer.decision = decision
        return decision

    def note_danger(self, layer: L, step: int) -> bool:
        """After a decision: whether danger began or ended; if so, the event is emitted.

        It stays as it was in warmup, and while the window has fewer than ``patience`` analyses with gradients.
        """
        assert layer.decision is not None
        danger, metrics = layer.decision.danger, layer.history[-1]
        recent = [m for m in layer.window[-self.config.patience :] if m.principal_excess is not None]
        ready = layer.state != LayerState.WARMUP and len(recent) == self.config.patience
        if not ready or danger == layer.status.in_danger:
            return False
        layer.status.in_danger = danger
        excess = {} if metrics.principal_excess is None else {"principal_excess": metrics.principal_excess}
        reason = f"the gradient {'attacks' if danger else 'no longer attacks'} what the layer has learned"
        numbers = {**excess, "principal_danger": layer.thresholds.principal_danger}
        self.note(step, layer.name, "danger" if danger else "danger_over", reason, numbers)
        return True

    @property
    def protects(self) -> bool:
        """Whether layers in danger are protected automatically."""
        return self.config.on_danger == "protect" and self.config.mode == "auto"

    def requests(self) -> dict[Action, list[L]]:
        """The layers by requested action, where their state allows it; protected ones may only merge."""
        requests: dict[Action, list[L]] = {action: [] for action in Action}
        for layer in self.layers.values():
            action = Action.HOLD if layer.decision is None else layer.decision.action
            if action == Action.HOLD or not layer.can(TRIGGERS[action]):
                continue
            if not layer.protected or action == Action.MERGE:
                requests[action].append(layer)
        return requests

    def note_stall(self, step: int) -> None:
        """Emit "stalled", with the blocking conditions, every ``stall_analyses`` analyses until a layer acts.

        They count from the end of warmup. Also when it is about to be too late. Not where a warning at the start
        has said why none can (:mod:`svd_optim.tracking.hindrances`).
        """
        due = self.waited and (self.waited % self.config.stall_analyses == 0 or self.too_late)
        if self.acted or not self.layers or self.config.mode != "auto" or not due:
            return
        decided = {name: layer.decision for name, layer in self.layers.items() if layer.decision is not None}
        blockers = Counter(d.blocker.name if d.blocker else d.action.value for d in decided.values())
        if blockers.keys() == {"base_supported"} or too_short(self.config):
            return
        counts = ", ".join(f"{name} blocks {count}" for name, count in blockers.most_common())
        examples = "; ".join(f"{name}: {decision.reason}" for name, decision in list(decided.items())[:3])
        blocked = f"{counts} of {len(self.layers)} layers ({examples})"
        reason = f"{self.waited} analyses after warmup and nothing ever acted: {blocked}"
        self.note(step, "*", "stalled", reason)

    # ---- descents ------------------------------------------------------------------------------------

    def descend(self, layer: L, step: int) -> None:
        """A dense layer starts its descent; its length follows from the measured capture."""
        assert layer.decision is not None
        until = ending(self.config, step, layer.history)
        numbers: dict[str, float] = {"rank": layer.rank, "until_step": until, **self._predicted(layer)}
        self._fire(layer, Trigger.DESCEND, step, "descend", layer.decision.reason, lambda: numbers,
                   descent_start=step, descent_end=until)  # fmt: skip

    def descent_outcome(self, layer: L, error: float) -> Trigger:
        """How a descent that has reached its end is concluded: exact, extended or failed.

        Args:
            error: relative Frobenius error of the truncation to the layer's rank.
        """
        if error < layer.thresholds.reconstruction_safe:
            return Trigger.DESCENT_EXACT
        return Trigger.DESCENT_EXTENDED if layer.status.extensions < MAX_EXTENSIONS else Trigger.DESCENT_FAILED

    def extend_descent(self, layer: L, step: int, until: int, error: float) -> None:
        """A descent whose factors would not be accurate enough yet continues until step ``until``."""
        layer.fire(Trigger.DESCENT_EXTENDED)
        layer.status.extensions += 1
        layer.status.descent_end = until
        numbers = {"reconstruction_error": error, "reconstruction_safe": layer.thresholds.reconstruction_safe}
        self.note(step, layer.name, "descent_extended", "not exact enough yet", numbers)

    def note_waiting(self, layer: L, step: int, waited: int) -> None:
        """At an analysis: whether a descent has begun to wait for gradients, or goes on.

        Args:
            waited: steps since the last analysis at which the base optimizer did not move the layer; its end was
                put off by as many.
        """
        status = layer.status
        numbers = {"until_step": float(status.descent_end or step)}
        if waited:
            layer.fire(Trigger.IDLE)
            if not status.waited:
                reason = "the base optimizer does not move it (no gradient, a zero one, or a learning rate of 0)"
                self.note(step, layer.name, "descent_waits", reason, numbers)
            status.waited += waited
        elif status.waited:
            numbers["waited_steps"] = status.waited
            self.note(step, layer.name, "descent_resumed", "the base optimizer moves it again", numbers)
            status.waited = 0

    def fail_descent(self, layer: L, step: int, error: float) -> None:
        """A descent that needed too many extensions ends, and the layer stays dense."""
        numbers = {"reconstruction_error": error, "reconstruction_safe": layer.thresholds.reconstruction_safe}
        reason = f"not exact enough after {MAX_EXTENSIONS} extensions"
        self._fire(layer, Trigger.DESCENT_FAILED, step, "descent_failed", reason, lambda: numbers)

    def stop_descent(self, layer: L, step: int, trigger: Trigger, reason: str) -> None:
        """A descent is canceled, and the layer stays dense."""
        self._fire(layer, trigger, step, "descent_stopped", reason, dict)

    # ---- factors -------------------------------------------------------------------------------------

    def factorize(self, layer: L, step: int, trigger: Trigger, reason: str, error: float) -> None:
        """A layer was factorized at its present rank.

        Args:
            error: relative Frobenius error of the truncation.
        """
        info = layer.info(step)
        numbers = {"rank": info.rank, "reconstruction_error": error, "parameters_before": info.dense_numel,
                   "parameters_after": info.factored_numel, **self._predicted(layer)}  # fmt: skip
        self._fire(layer, trigger, step, "factorize", reason, lambda: numbers)

    def _predicted(self, layer: L) -> dict[str, float]:
        """And found, where there was a descent."""
        numbers = {"predicted_share": layer.status.predicted_share, "found_share": layer.status.found_share}
        return {name: share for name, share in numbers.items() if share}

    def merge(self, layer: L, step: int, trigger: Trigger, reason: str) -> None:
        """A factorized layer became dense again."""
        rank, status = layer.rank, layer.status
        self._fire(layer, trigger, step, "merge", reason,
                   lambda: {"rank": rank, "cooldown": status.cooldown_until - step})  # fmt: skip

    def resize(self, layer: L, step: int, rank: int, reason: str) -> None:
        """A factorized layer has got new directions or given up some: it has this rank now."""
        before = layer.rank
        trigger, kind = (Trigger.GROW, "grow") if rank > before else (Trigger.SHRINK, "shrink")
        self._fire(layer, trigger, step, kind, reason, lambda: {"rank_before": before, "rank": rank}, rank=rank)

    def beyond_break_even(self, layer: L, rank: int) -> bool:
        """Whether factors of this rank would have at least as many parameters as the dense weight."""
        return rank >= break_even_rank(*layer.shape)

    # ---- protection ----------------------------------------------------------------------------------

    def may_protect(self, layer: L, begin: bool, manual: bool) -> bool:
        """Whether protection can begin or end now; manual protection ends only manually."""
        return begin != layer.protected and (manual or layer.status.protection != Protection.MANUAL)

    def protect(self, layer: L, step: int, reason: str, rank: int, manual: bool) -> None:
        """The principal block of a layer is held fixed from now on; a descent, which would change it, is canceled."""
        layer.status.protection = Protection.MANUAL if manual else Protection.DANGER
        if layer.state == LayerState.DESCENDING:
            self.stop_descent(layer, step, Trigger.PROTECT, PROTECTED)
        else:
            layer.fire(Trigger.PROTECT)
        self.note(step, layer.name, "protect", reason, {"rank": rank})

    def release(self, layer: L, step: int, reason: str, rank: int) -> None:
        """The principal block of a layer may change again."""
        layer.fire(Trigger.RELEASE)
        layer.status.protection = Protection.NONE
        self.note(step, layer.name, "release", reason, {"rank": rank})
