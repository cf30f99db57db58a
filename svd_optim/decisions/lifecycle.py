"""The layers of a run and their decisions: asks the policy, drives the state machine, says what happened. No torch.

The run that trains and the replay of its log share it. What happens to tensors is the caller's matter: it asks here
what may be done, does it, and reports it here, which changes the layer's status and makes the :class:`Event`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ..config import SubspaceConfig
from ..records import Action, Decision, Event, LayerInfo, LayerState, PolicyInput, break_even_rank
from .descent_schedule import ending
from .machine import LayerLife, Protection, Trigger
from .policy import policy_of

MAX_EXTENSIONS = 3  # how often the end of a descent is put off before the layer gives up
MANUAL, GUARD, LOADED = "manual", "a guard tripped", "other weights were loaded"  # reasons that no decision has given
PROTECTED = "its principal block is protected"

# What can be said of a run: kinds of events.
EVENTS: Mapping[str, str] = {
    "descend": "a dense layer starts its descent",
    "descent_extended": "the factors would not be exact enough yet: the descent goes on",
    "descent_waits": "a layer without gradients, frozen or at a learning rate of 0: its descent waits",
    "descent_resumed": "it goes on",
    "descent_failed": "they were not after several extensions: the layer stays dense",
    "descent_stopped": "a descent is called off; what it has faded stays faded",
    "factorize": "a layer goes into factors",
    "merge": "a factorized layer becomes dense again",
    "grow": "a factorized layer gets new directions",
    "shrink": "a factorized layer gives up directions",
    "danger": "the gradient attacks what a layer has learned",
    "danger_over": "it no longer does",
    "protect": "a layer's principal block is kept from moving",
    "release": "it may move again",
    "loss_rose": "the training loss rose by more than its noise after layers had changed",
    "skewed": "factors are no longer orthonormal",
    "nonfinite": "NaN or Inf in a gradient, a weight or a step",
    "decomposition_failed": "a decomposition keeps failing: the old basis is kept",
    "unsupported": "a layer is no longer tracked",
    "interval": "intervals are stretched, or given back, to keep to max_overhead",
    "stalled": "many analyses, and nothing ever acted",
}
WARNINGS = frozenset(
    {"stalled", "nonfinite", "descent_failed", "unsupported", "loss_rose", "skewed", "decomposition_failed"}
)  # of these somebody should know
ACTS = frozenset({"descend", "factorize", "merge", "grow", "shrink"})
TRIGGERS = {
    Action.DESCEND: Trigger.DESCEND,
    Action.FACTORIZE: Trigger.FACTORIZE,
    Action.MERGE: Trigger.MERGE,
    Action.GROW: Trigger.GROW,
    Action.SHRINK: Trigger.SHRINK,
}  # that a policy may ask for

L = TypeVar("L", bound=LayerLife)


class Lifecycle(Generic[L]):
    """The tracked layers of one run, live or replayed.

    Args:
        config: the rules.
        emit: takes each event as it happens.
    """

    def __init__(self, config: SubspaceConfig, emit: Callable[[Event], None]) -> None:
        self.config = config
        self.policy = policy_of(config)
        self.layers: dict[str, L] = {}
        self.analyses = 0
        self.last_analysis = 0
        self.acted = False
        self._emit = emit

    def emit(self, event: Event) -> None:
        """Something has happened."""
        self.acted |= event.kind in ACTS
        self._emit(event)

    def note(self, step: int, layer: str, kind: str, reason: str, numbers: Mapping[str, float] | None = None) -> None:
        """Something has happened that changed no layer's state."""
        self.emit(Event(step=step, layer=layer, kind=kind, reason=reason, numbers=dict(numbers or {})))

    def _fire(
        self, layer: L, trigger: Trigger, step: int, kind: str, reason: str, numbers: Callable[[], dict[str, float]],
        **status: object,
    ) -> None:  # fmt: skip
        before = layer.fire(trigger, step, self.config.cooldown_steps)
        vars(layer.status).update(status)  # before anybody is told: a listener may save the run
        self.emit(Event(step=step, layer=layer.name, kind=kind, reason=reason,
                        before=before, after=layer.state, numbers=numbers()))  # fmt: skip

    # ---- decisions -------------------------------------------------------------------------------------

    def begin_analysis(self, step: int) -> bool:
        """Count an analysis. Returns whether layers may act at it: they do so together, in cohorts."""
        cohort = self.config.cohort_steps
        boundary = step // cohort > self.last_analysis // cohort
        self.last_analysis = step
        self.analyses += 1
        return boundary

    def ask(self, layer: L, step: int, info: LayerInfo) -> Decision:
        """Ask the policy about a layer, and remember what it was asked and what it said."""
        if layer.state == LayerState.WARMUP and step >= self.config.warmup_steps:
            layer.fire(Trigger.WARMUP_OVER)
        window = layer.window
        layer.policy_input = PolicyInput(info=info, state=layer.state, analyses=len(window))
        decision = self.policy.decide(info, layer.state, window, layer.thresholds)
        if not isinstance(decision, Decision):
            raise TypeError(f"policy.decide must return a Decision, got {decision!r} for layer {layer.name!r}")
        layer.decision = decision
        return decision

    def note_danger(self, layer: L, step: int) -> bool:
        """After a decision: whether danger began or ended.

        A window that has just started says nothing about it, nor does warmup, nor an interval without gradients.
        """
        assert layer.decision is not None
        begins, metrics = layer.decision.danger, layer.history[-1]
        recent = [m for m in layer.window[-self.config.patience :] if m.principal_excess is not None]
        ready = layer.state != LayerState.WARMUP and len(recent) == self.config.patience
        if not ready or begins == layer.status.in_danger:
            return False
        layer.status.in_danger = begins
        excess = {} if metrics.principal_excess is None else {"principal_excess": metrics.principal_excess}
        reason = f"the gradient {'attacks' if begins else 'leaves alone'} what the layer has learned"
        numbers = {**excess, "principal_danger": layer.thresholds.principal_danger}
        self.note(step, layer.name, "danger" if begins else "danger_over", reason, numbers)
        return True

    @property
    def protects(self) -> bool:
        """Whether danger makes layers protected by itself."""
        return self.config.on_danger == "protect" and self.config.mode == "auto"

    def wanted(self) -> dict[Action, list[L]]:
        """The layers by what their policy asks for, where the table allows it; of a protected one only to merge."""
        wanted: dict[Action, list[L]] = {action: [] for action in Action}
        for layer in self.layers.values():
            action = Action.HOLD if layer.decision is None else layer.decision.action
            if action == Action.HOLD or not layer.can(TRIGGERS[action]):
                continue
            if not layer.protected or action == Action.MERGE:
                wanted[action].append(layer)
        return wanted

    def note_stall(self, step: int) -> None:
        """A run in which nothing ever acted says so, with the numbers."""
        every = self.config.stall_analyses
        if self.acted or not self.layers or self.config.mode != "auto" or self.analyses % every:
            return
        decided = {name: layer.decision for name, layer in self.layers.items() if layer.decision is not None}
        blockers = Counter(d.blocker.name if d.blocker else d.action.value for d in decided.values())
        counts = ", ".join(f"{name} blocks {count}" for name, count in blockers.most_common())
        examples = "; ".join(f"{name}: {decision.reason}" for name, decision in list(decided.items())[:3])
        reason = f"{self.analyses} analyses and nothing ever acted: {counts} of {len(self.layers)} layers ({examples})"
        self.note(step, "*", "stalled", reason)

    # ---- descents --------------------------------------------------------------------------------------

    def descend(self, layer: L, step: int) -> None:
        """A dense layer starts its descent, for as long as its captures say."""
        assert layer.decision is not None
        until = ending(self.config, step, layer.history)
        numbers: dict[str, float] = {"rank": layer.rank, "until_step": until}
        self._fire(layer, Trigger.DESCEND, step, "descend", layer.decision.reason, lambda: numbers, descent_end=until)

    def landing(self, layer: L, error: float) -> Trigger:
        """What a descent that is due comes to.

        Args:
            error: relative, of keeping only the rank.
        """
        if error < layer.thresholds.reconstruction_safe:
            return Trigger.DESCENT_EXACT
        return Trigger.DESCENT_EXTENDED if layer.status.extensions < MAX_EXTENSIONS else Trigger.DESCENT_FAILED

    def put_off(self, layer: L, step: int, until: int, error: float) -> None:
        """A descent whose factors would not be exact enough yet goes on."""
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

    def give_up(self, layer: L, step: int, error: float) -> None:
        """It is given up."""
        numbers = {"reconstruction_error": error, "reconstruction_safe": layer.thresholds.reconstruction_safe}
        reason = f"not exact enough after {MAX_EXTENSIONS} extensions"
        self._fire(layer, Trigger.DESCENT_FAILED, step, "descent_failed", reason, lambda: numbers)

    def stop_descent(self, layer: L, step: int, trigger: Trigger, reason: str) -> None:
        """It is called off."""
        self._fire(layer, trigger, step, "descent_stopped", reason, dict)

    # ---- factors ---------------------------------------------------------------------------------------

    def factorize(self, layer: L, step: int, trigger: Trigger, reason: str, error: float) -> None:
        """A layer has gone into factors of its present rank."""
        info = layer.info(step)
        numbers = {"rank": info.rank, "reconstruction_error": error, "parameters_before": info.dense_numel,
                   "parameters_after": info.factored_numel}  # fmt: skip
        self._fire(layer, trigger, step, "factorize", reason, lambda: numbers)

    def merge(self, layer: L, step: int, trigger: Trigger, reason: str) -> None:
        """A factorized layer has become dense again."""
        rank, status = layer.rank, layer.status
        self._fire(layer, trigger, step, "merge", reason,
                   lambda: {"rank": rank, "cooldown": status.cooldown_until - step})  # fmt: skip

    def resize(self, layer: L, step: int, rank: int, reason: str) -> None:
        """A factorized layer has got new directions or given up some: it has this rank now."""
        before = layer.rank
        trigger, kind = (Trigger.GROW, "grow") if rank > before else (Trigger.SHRINK, "shrink")
        self._fire(layer, trigger, step, kind, reason, lambda: {"rank_before": before, "rank": rank}, rank=rank)

    def beyond_break_even(self, layer: L, rank: int) -> bool:
        """Whether factors of this rank would be no smaller than the dense weight."""
        return rank >= break_even_rank(*layer.shape)

    # ---- protection ------------------------------------------------------------------------------------

    def may_protect(self, layer: L, begin: bool, manual: bool) -> bool:
        """Whether protection can begin or end now; what was begun manually ends manually."""
        return begin != layer.protected and (manual or layer.status.protection != Protection.MANUAL)

    def protect(self, layer: L, step: int, reason: str, rank: int, manual: bool) -> None:
        """The principal block of a layer is kept from moving; a descent would move it."""
        layer.status.protection = Protection.MANUAL if manual else Protection.DANGER
        if layer.state == LayerState.DESCENDING:
            self.stop_descent(layer, step, Trigger.PROTECT, PROTECTED)
        else:
            layer.fire(Trigger.PROTECT)
        self.note(step, layer.name, "protect", reason, {"rank": rank})

    def release(self, layer: L, step: int, reason: str, rank: int) -> None:
        """It may move again."""
        layer.fire(Trigger.RELEASE)
        layer.status.protection = Protection.NONE
        self.note(step, layer.name, "release", reason, {"rank": rank})
