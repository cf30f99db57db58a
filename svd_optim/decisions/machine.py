"""The state machine of a layer: its states, its triggers and its transitions. No torch.

One table, :data:`TRANSITIONS`. The training run and the replay of its log both use it (:mod:`.lifecycle`), tests cover
each of its cells, and ``CONTRIBUTING.md`` shows it as formatted by :func:`transition_table`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from ..config import Thresholds
from ..records import Decision, LayerInfo, LayerMetrics, LayerState, PolicyInput

WARMUP, DENSE, DESCENDING, FACTORIZED = LayerState


class Trigger(StrEnum):
    """What can happen to a layer. The values are the first column of the table in the documentation."""

    WARMUP_OVER = "warmup over"
    DESCEND = "policy: DESCEND"
    FACTORIZE = "policy: FACTORIZE"
    DESCENT_EXACT = "descent exact"
    DESCENT_EXTENDED = "descent not exact, up to 3 times"
    DESCENT_FAILED = "descent not exact, the 4th time"
    UNSUPPORTED = "can't go into factors any more"
    PROTECT = "protection begins"
    RELEASE = "protection ends"
    LOSS_ROSE = "loss rises"
    SKEWED = "factors skewed"
    NONFINITE = "steps NaN or Inf again and again"
    MERGE = "policy: MERGE, or GROW past break-even"
    GROW = "policy: GROW"
    SHRINK = "policy: SHRINK"
    IDLE = "no gradients"
    FACTORIZE_MANUALLY = "factorize_"
    MERGE_MANUALLY = "merge_"
    LOAD_FACTORIZED = "factors are loaded"
    LOAD_DENSE = "a dense weight is loaded"


class Cooldown(StrEnum):
    """For how long a layer does not change again afterwards."""

    NONE = "none"
    FLAT = "flat"  # cooldown_steps
    BACKOFF = "back-off"  # cooldown_steps, doubled by each earlier revert: exponential back-off
    UNCOUNTED = "back-off, not counted"  # the same, but it does not count as a revert


class Next(NamedTuple):
    """The effect of a trigger on a layer in one state."""

    state: LayerState
    cooldown: Cooldown = Cooldown.NONE
    restarts: bool = False  # a new decision window starts: earlier analyses say nothing about the layer's new form


def _same(*states: LayerState) -> dict[LayerState, Next]:
    return {state: Next(state) for state in states}


_REVERT = Next(DENSE, Cooldown.BACKOFF, restarts=True)
_INSTALL = Next(FACTORIZED, restarts=True)
_RESIZE = {FACTORIZED: Next(FACTORIZED, Cooldown.FLAT, restarts=True)}

TRANSITIONS: Mapping[Trigger, Mapping[LayerState, Next]] = {  # states that are missing: impossible
    Trigger.WARMUP_OVER: {WARMUP: Next(DENSE)},
    Trigger.DESCEND: {DENSE: Next(DESCENDING)},
    Trigger.FACTORIZE: {DENSE: _INSTALL, DESCENDING: _INSTALL},
    Trigger.DESCENT_EXACT: {DESCENDING: _INSTALL},
    Trigger.DESCENT_EXTENDED: _same(DESCENDING),
    Trigger.DESCENT_FAILED: {DESCENDING: _REVERT},
    Trigger.UNSUPPORTED: {DESCENDING: Next(DENSE, restarts=True)},
    Trigger.PROTECT: {**_same(*LayerState), DESCENDING: Next(DENSE, restarts=True)},
    Trigger.RELEASE: _same(*LayerState),
    Trigger.LOSS_ROSE: {DESCENDING: _REVERT, FACTORIZED: _REVERT},
    Trigger.SKEWED: {FACTORIZED: _REVERT},
    Trigger.NONFINITE: {FACTORIZED: _REVERT},
    Trigger.MERGE: {FACTORIZED: _REVERT},
    Trigger.GROW: _RESIZE,
    Trigger.SHRINK: _RESIZE,
    Trigger.IDLE: _same(*LayerState),
    Trigger.FACTORIZE_MANUALLY: {**dict.fromkeys((WARMUP, DENSE, DESCENDING), _INSTALL), **_same(FACTORIZED)},
    Trigger.MERGE_MANUALLY: {
        **_same(WARMUP, DENSE),
        DESCENDING: Next(DENSE, restarts=True),
        FACTORIZED: Next(DENSE, Cooldown.UNCOUNTED, restarts=True),
    },
    Trigger.LOAD_FACTORIZED: {**dict.fromkeys((WARMUP, DENSE, DESCENDING), _INSTALL), **_same(FACTORIZED)},
    Trigger.LOAD_DENSE: {**_same(WARMUP, DENSE, DESCENDING), FACTORIZED: Next(DENSE, restarts=True)},
}


class Protection(StrEnum):
    """Why a layer's principal block is held fixed."""

    NONE = "none"
    DANGER = "danger"  # until the danger is over
    MANUAL = "manual"  # until `release_`


@dataclass
class LayerStatus:
    """The state of a layer: everything that the state machine changes, saved as one dict."""

    state: LayerState = WARMUP
    rank: int = 0
    """Number of singular directions kept, or to be kept."""
    window_start: int = -1
    """Decisions ignore analyses up to this step: they were of another state or rank."""
    descent_end: int | None = None
    """The optimizer step at which the factors are to be installed, while the layer descends."""
    descent_start: int = 0
    """The step after which its last descent began."""
    extensions: int = 0
    """Number of times that the descent was extended."""
    waited: int = 0
    """Steps that the descent has waited for gradients; 0: it does not wait."""
    cooldown_until: int = 0
    """The layer does not change again before this optimizer step."""
    reverts: int = 0
    """Number of times that it became dense again; each doubles the next cooldown."""
    predicted_share: float = 0.0
    """Share of the loss by which its descent, or its switch, was predicted to raise it; 0 while it is dense."""
    found_share: float | None = None
    """Share of the loss that its descent has added to it so far; ``None``: no descent, or no loss told."""
    in_danger: bool = False
    protection: Protection = Protection.NONE


@dataclass
class LayerLife:
    """One layer as the decisions see it, in a run or in its replay."""

    name: str
    shape: tuple[int, int]
    """(m, n) = (out_features, in_features)."""
    thresholds: Thresholds
    status: LayerStatus = field(default_factory=LayerStatus)
    history: list[LayerMetrics] = field(default_factory=list)
    """Its analyses, oldest first."""
    decision: Decision | None = None
    """The last one; ``None`` before the first, and after an intervention (manual, a guard, loading)."""
    policy_input: PolicyInput | None = None
    """The policy's input for that decision."""

    @property
    def state(self) -> LayerState:
        """Its current state."""
        return self.status.state

    @property
    def factorized(self) -> bool:
        """Whether its weight is stored as factors."""
        return self.status.state == FACTORIZED

    @property
    def rank(self) -> int:
        """Number of singular directions kept, or to be kept."""
        return self.status.rank

    @property
    def protected(self) -> bool:
        """Whether its principal block is held fixed."""
        return self.status.protection != Protection.NONE

    @property
    def window(self) -> tuple[LayerMetrics, ...]:
        """The decision window: the analyses at the present rank and in the present state, oldest first."""
        return tuple(metrics for metrics in self.history if metrics.step > self.status.window_start)

    @property
    def only_nonfinite(self) -> bool:
        """Whether all gradients that were to be measured for the last analysis were NaN or Inf."""
        return bool(self.history) and not self.history[-1].measured and self.history[-1].nonfinite > 0

    def restart_window(self) -> None:
        """Start a new decision window, after a change of rank or state."""
        self.status.window_start = self.history[-1].step if self.history else -1

    def info(self, step: int, **facts: object) -> LayerInfo:
        """The policy's view of the layer at an optimizer step.

        Args:
            facts: fields of :class:`LayerInfo` that only the caller knows.
        """
        cooldown = max(0, self.status.cooldown_until - step)
        known = {"rank": self.rank, "protected": self.protected, "cooldown": cooldown, **facts}
        return LayerInfo(name=self.name, shape=self.shape, **known)  # type: ignore[arg-type]

    def can(self, trigger: Trigger) -> bool:
        """Whether the trigger is possible in its present state."""
        return self.state in TRANSITIONS[trigger]

    def fire(self, trigger: Trigger, step: int = 0, cooldown_steps: int = 0) -> LayerState:
        """Make the transition that the table has for the trigger in the present state.

        Args:
            step: the present optimizer step, from which a cooldown counts.
            cooldown_steps: length of a flat cooldown.

        Returns:
            The state before.

        Raises:
            RuntimeError: the table has no such transition; nothing was changed.
        """
        status, before = self.status, self.state
        if not self.can(trigger):
            raise RuntimeError(f"layer {self.name!r} is {before}: {trigger!r} can't happen to it")
        after = TRANSITIONS[trigger][before]
        status.state = after.state
        if after.state in (WARMUP, DENSE):
            status.predicted_share, status.found_share = 0.0, None
        if after.restarts:
            status.descent_end, status.extensions, status.waited = None, 0, 0
            self.restart_window()
        if after.cooldown == Cooldown.FLAT:
            status.cooldown_until = step + cooldown_steps
        elif after.cooldown != Cooldown.NONE:
            status.cooldown_until = step + cooldown_steps * 2**status.reverts
            status.reverts += after.cooldown == Cooldown.BACKOFF
        return before


def transition_table() -> str:
    """:data:`TRANSITIONS` in Markdown: one row per trigger, one column per state; ``–``: impossible."""
    rows = [("what happens", *(state.upper() for state in LayerState), "cooldown"), ("---",) * (len(LayerState) + 2)]
    for trigger, cells in TRANSITIONS.items():
        targets = [
            "–" if state not in cells else "same" if cells[state].state == state else cells[state].state.upper()
            for state in LayerState
        ]
        cooldowns = {state: cell.cooldown for state, cell in cells.items()}
        differ = len(set(cooldowns.values())) > 1
        labels = [f"{c} ({s.upper()})" if differ else c for s, c in cooldowns.items() if c != Cooldown.NONE]
        rows.append((trigger, *targets, ", ".join(dict.fromkeys(labels)) or Cooldown.NONE))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
