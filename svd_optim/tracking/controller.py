"""Lifecycle: what happens to followed layers, from their first measurement to their factors.

A layer is measured, analysed and decided on; it descends, switches and is trained on in its factors.
Each transition is an :class:`Event` with its reason, each non-transition a decision that says what
blocked. The :class:`SubspaceAwareOptimizer` calls this around the base optimizer's step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import linalg
from ..config import SubspaceConfig
from ..decisions import transitions
from ..decisions.alerts import AlertWatch
from ..decisions.policy import policy_of
from ..factors import moments
from ..factors import tangent_step as factor_step
from ..factors import weight_decay as decay
from ..factors.linear import FactorizedLinear
from ..linalg import fallback as decomposition
from ..linalg.protection import carried, factors_with, holds
from ..records import (
    Action,
    Condition,
    Decision,
    Event,
    LayerReport,
    LayerState,
    LeftAlone,
    Plan,
    Question,
    Summary,
    break_even_rank,
)
from ..tracking import budget, inventory
from .descent import Landed, descend_, ending, exact_bases, too_late
from .journal import Journal
from .layer import FollowedLayer, target_rank
from .loss_guard import LossGuard
from .selection import Selection, first_match
from .switching import replace_parameters_, resize_, to_dense_, to_factors_
from .tracker import SubspaceTracker
from .transactions import undone_on_error

STATE_VERSION = 4
LOOKING = ("measure", "refresh", "decide")  # phases that a run could do without
OTHER_BLOCK = 1e-4  # relative difference from which on a block is not the one that is protected
MAX_SKEW = 1e-2  # ||U^T U - I||_F of factors that nobody has tampered with is 1e-4 at the worst


class Lifecycle:
    """The followed layers of one optimizer, their states, and what happened to them.

    Args:
        base: the optimizer whose parameters the layers' weights are.
        config: see :class:`SubspaceConfig`.
    """

    def __init__(self, base: Optimizer, config: SubspaceConfig) -> None:
        self.base = base
        self.config = config
        self.tracker = SubspaceTracker(config)
        self.policy = policy_of(config)
        self.layers: dict[str, FollowedLayer] = {}
        self.left_alone: list[LeftAlone] = []
        self.decisions: dict[str, Decision] = {}
        self.questions: dict[str, Question] = {}  # that they answer
        self.journal = Journal()
        self.watch = AlertWatch()
        self.guard = LossGuard()
        self.guarded: dict[str, int] = {}  # layer -> first step of its descent, or its switch; the loss is watched
        self.steps = 0
        self.analyses = 0
        self.acted = False
        self.last_analysis = 0
        self.stretch = 1  # by which the intervals are longer than configured, to keep to max_overhead
        self.warned: set[str] = set()  # layers whose decompositions keep failing
        self.reevaluates = isinstance(base, torch.optim.LBFGS)  # its closure, within a step
        self.detach()

    def detach(self) -> None:
        """Forget what ties this object to one process and one model: its clock and the modules it owns."""
        self.looked: tuple[float, float] | None = None  # (seconds spent on looking, the clock) at the last analysis
        self.owner = object()  # by which a module knows whose gradients it delivers
        self.owned: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("looked", "owner", "owned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.detach()

    # ---- following -----------------------------------------------------------------------------------

    def follow(self, selection: Selection) -> None:
        """Follow the selected layers; those already followed stay as they are."""
        known = {id(layer.module) for layer in self.layers.values()}
        for name, module in selection.layers:
            if id(module) in known:
                continue
            override = first_match(name, self.config.overrides)
            shape = (module.out_features, module.in_features)
            energy = override.energy
            if override.rank is None and override.budget is None and energy is None:
                energy = self.config.energy
            if isinstance(module, FactorizedLinear):
                rank = module.rank
            else:
                rank = target_rank(name, shape, self.config, override)
            thresholds = override.thresholds or self.config.thresholds
            layer = FollowedLayer(name, module, len(self.layers), thresholds, rank, energy_target=energy)
            own = override.rank is not None or override.budget is not None or energy is not None
            layer.explicit = own or self.config.rank is not None
            self.layers[name] = layer
            if isinstance(module, FactorizedLinear):
                self._adopt(layer, module)
        budget.follow_plan_(self.layers, self.config, self.steps)
        self.left_alone = selection.left_alone

    def _adopt(self, layer: FollowedLayer, module: FactorizedLinear) -> None:
        """Follow a layer that was factorized before this optimizer came."""
        self.base.state.pop(module.S, None)
        replace_parameters_(self.base, [module.U, module.S, module.V], [module.U, module.V], ["U", "V"])
        layer.factored = factor_step.Factored(layer.name, module)
        layer.state = LayerState.FACTORIZED
        self.own(layer)

    def own(self, layer: FollowedLayer) -> None:
        """From now on the factorized layer delivers the gradients that the tangent step takes."""
        assert layer.factored is not None
        layer.factored.module.track_tangent(self.tracker.draw_sketch(layer, self.steps), self.owner)
        if not any(layer.module is module for module in self.owned):
            self.owned.append(layer.module)

    def _stop_following(self, layer: FollowedLayer, reason: str) -> None:
        del self.layers[layer.name]
        self.guarded.pop(layer.name, None)
        self.left_alone.append(LeftAlone(name=f"{layer.name}.weight", shape=layer.shape, reason=reason))
        self.note(layer.name, "unsupported", reason)

    @torch.no_grad()
    def release_unless_held(self, loading: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Before weights are loaded: end the protection of blocks that are not theirs.

        Args:
            loading: (W,) or (U, S, V) by layer.
        """
        for name, parts in loading.items():
            layer = self.layers[name]
            if layer.anchor is None:
                continue
            present = layer.basis if layer.factored is not None else [layer.weight]
            fits = present is not None and [t.shape for t in parts] == [t.shape for t in present]
            first, *others = (linalg.working(t) for t in parts)
            if fits:
                W = (first * others[0]) @ others[1].mT if others else first
                fits = holds(W, layer.anchor, max(OTHER_BLOCK, torch.finfo(layer.weight.dtype).eps))
            if not fits:
                self.protect(layer, False, transitions.LOADED, by_hand=True)

    @torch.no_grad()
    def restore_layers(self, ranks: Mapping[str, int | None], saved: Mapping[str, linalg.Basis] | None = None) -> None:
        """Factorize (an integer: the rank) or merge (``None``) layers whose structure differs.

        Args:
            saved: their factors, if known; else those of the weights that are there.
        """
        for name, rank in ranks.items():
            layer = self.layers[name]
            if rank != (None if layer.factored is None else layer.rank):
                layer.release()  # what is loaded has another principal block
            if layer.factored is not None and rank != layer.rank:
                to_dense_(layer, self.base)
                layer.state = LayerState.DENSE
                self.guarded.pop(name, None)
            if rank is not None and layer.factored is None:
                layer.set_rank(rank)
                basis = saved[name] if saved and name in saved else self._present_factors(layer)
                to_factors_(layer, self.base, linalg.Basis(*(linalg.working(f).to(layer.weight.device) for f in basis)))
                layer.state, layer.descent_end = LayerState.FACTORIZED, None
                self.own(layer)

    def _present_factors(self, layer: FollowedLayer) -> linalg.Basis:
        W = linalg.working(layer.module.weight).nan_to_num()  # loading is the way out of a run that is lost
        basis = decomposition.attempt(lambda dtype: linalg.exact_basis(W.to(dtype), layer.rank), W.dtype)
        if basis is None:
            raise RuntimeError(f"the weight of layer {layer.name!r} can't be decomposed; load the model first")
        return basis

    # ---- every step ----------------------------------------------------------------------------------

    def has_gradients(self) -> bool:
        """Whether any followed layer has one."""
        return any(layer.weight.grad is not None for layer in self.layers.values())

    def measure(self) -> None:
        """Measure the gradients that are due, before the base optimizer may change them."""
        step = self.steps + 1
        due = step % (self.config.measure_every * self.stretch) == 0 or step % self.interval == 0
        measured = []
        with self.journal.clock("measure"):
            for layer in list(self.layers.values()):
                if layer.weight.grad is None or not (due or (layer.cached is None and layer.factored is None)):
                    continue
                if layer.weight.grad.is_sparse:
                    self._stop_following(layer, "its gradient is sparse")
                elif self._has_basis(layer, step) and due:
                    measured.append(layer)
            self.tracker.measure(measured)

    def _has_basis(self, layer: FollowedLayer, step: int) -> bool:
        known = layer.nonfinite
        usable = self.tracker.ensure_basis(layer, step)
        if layer.nonfinite and not known:
            self.note(layer.name, "nonfinite", "NaN or Inf in the weight from the start: no basis, not measured")
        return usable

    def enter_factors(self) -> list[factor_step.Entered]:
        """Put K and 0 into the factorized layers' parameters for the base optimizer to step on."""
        factored = [layer.factored for layer in self.layers.values() if layer.factored is not None]
        if not factored:
            return []
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        return factor_step.enter_(factored, self.base, groups)

    def leave_factors(self, entered: list[factor_step.Entered]) -> None:
        """After the base optimizer's step: retract. What is done is taken off ``entered``."""
        with self.journal.clock("retract"):
            while entered:
                for factored, ok in factor_step.finish_(entered[-1], self.base.state):
                    self.layers[factored.name].count_decomposition(ok)
                entered.pop()
            self.drop_sketches()

    def advance(self) -> None:
        """Once layers hold their new weights: descend, and each ``interval`` steps analyse."""
        self.steps += 1
        for layer in self.layers.values():
            layer.hold_anchor()
        with self.journal.clock("descend"):
            landed = descend_(list(self.layers.values()), self.steps, self.config.interval)
        self._switch_landed(landed)
        with self.journal.clock("refresh"):
            self.tracker.refresh(self._due_for_refresh(), self.steps)
        if self.steps % self.interval == 0:
            try:
                self.analyse()
            finally:  # also when a policy has raised
                self._next_interval()
        self._warn_of_failures()

    @property
    def interval(self) -> int:
        """Steps between analyses as of now."""
        return self.config.interval * self.stretch

    def _due_for_refresh(self) -> list[FollowedLayer]:
        """An equal share of the layers on the step before each measured one: no step pays for all, nor for both.

        Where there is one share only, or each step is measured, the last share is due with the analysis.
        """
        slots = max(1, self.config.interval // self.config.measure_every)
        early = 1 if 1 < slots < self.interval else 0
        position = (self.steps + early) % self.interval
        due = [slot for slot in range(slots) if (slot + 1) * self.interval // slots % self.interval == position]
        return [layer for layer in self.layers.values() if layer.index % slots in due]

    def _next_interval(self) -> None:
        """Fresh sketches."""
        for layer in self.layers.values():
            module = layer.module
            layer.outside = None
            if isinstance(module, FactorizedLinear) and module.Omega is not None:
                module.Omega.copy_(self.tracker.draw_sketch(layer, self.steps))

    def _warn_of_failures(self) -> None:
        for name, layer in self.layers.items():
            if layer.failures == 0:
                self.warned.discard(name)
            elif layer.failures >= decomposition.IN_A_ROW and name not in self.warned:
                self.warned.add(name)
                reason = f"its decomposition failed {layer.failures} times in a row, also in float64: old basis kept"
                self.note(name, "decomposition_failed", reason, {"basis_step": layer.basis_step})

    def drop_sketches(self) -> None:
        """Sketches go with the gradients they belong to."""
        for layer in self.layers.values():
            if layer.factored is not None and layer.factored.module.sketch is not None:
                layer.factored.module.sketch.grad = None

    def _switch_landed(self, landed: Landed) -> None:
        """Install the factors of layers whose descent is done, and say what became of the others."""
        for layer in (*landed.extended, *landed.failed):
            gives_up = layer in landed.failed
            if gives_up:
                self.end_descent(layer, LayerState.DENSE)
                transitions.rest_(layer, self.steps, self.config.cooldown)
            safe = layer.thresholds.reconstruction_safe
            self.journal.emit(transitions.not_landed(self.steps, layer.name, landed.errors[layer.name], safe, gives_up))
        self.switch(landed.ready, (), landed.errors, "descent done")

    def end_descent(self, layer: FollowedLayer, state: LayerState) -> None:
        """Leave a descent (or any other state) for ``state``, with a new history."""
        layer.state, layer.descent_end, layer.extensions = state, None, 0
        layer.start_line()
        if state == LayerState.DENSE:
            self.guarded.pop(layer.name, None)

    # ---- every interval ------------------------------------------------------------------------------

    def analyse(self) -> None:
        """Refresh bases, close the measurements, decide, act, tell the listeners."""
        boundary = self.steps // self.config.cohort > self.last_analysis // self.config.cohort
        self.last_analysis = self.steps
        with self.journal.clock("refresh"):
            metrics = self.tracker.analyse(self.layers.values(), self.steps)
        with self.journal.clock("decide"):
            self.analyses += 1
            inside = any(layer.factored is not None for layer in self.layers.values())
            now = self.plan() if inside else None  # nobody else asks for room
            for name in metrics:
                self._decide(self.layers[name], now)
            risen = self._check_loss()
        if self.config.mode == "auto":
            self._send_back(risen)
            if boundary:
                self._act()
        if boundary or self.steps < self.config.warmup:
            budget.revise_ranks_(self.layers, self.tracker, self.config, self.steps)
        self._note_stall()
        self._keep_to_time()
        if self.journal.listeners:
            summary = self.summary()
            alerts = self.watch.update(summary)
            if alerts:
                self.journal.tell("on_alerts", alerts)
            self.journal.tell("on_analysis", summary)

    def _keep_to_time(self) -> None:
        """Stretch the intervals when looking takes more than its share of the time, and give it back later."""
        spent, now = sum(self.journal.seconds[phase] for phase in LOOKING), time.perf_counter()
        before, self.looked = self.looked, (spent, now)
        limit = self.config.max_overhead
        if limit is None or before is None:  # the first interval pays for the first bases
            return
        share = (spent - before[0]) / (now - before[1])
        wanted = max(1, math.ceil(self.stretch * share / limit))
        if wanted > self.stretch or 2 * wanted <= self.stretch:
            self.stretch = wanted
            numbers = {"share": share, "max_overhead": limit, "interval": float(self.interval)}
            reason = f"looking took {share:.1%} of the time: next intervals are longer or shorter"
            self.note("*", "interval", reason, numbers)

    def _decide(self, layer: FollowedLayer, now: Plan | None) -> None:
        if layer.state == LayerState.WARMUP and self.steps >= self.config.warmup:
            layer.state = LayerState.DENSE
        decision = self.decisions[layer.name] = self._ask_policy(layer, now)
        last = layer.history[-1]
        if last.nonfinite and not layer.nonfinite:
            reason = "NaN or Inf in gradient, weight or basis: not measured"
            self.note(layer.name, "nonfinite", reason, {"measurements": last.nonfinite})
        layer.nonfinite = bool(last.nonfinite)
        # A line that has just started says nothing about danger, nor does warmup, nor an interval without gradients.
        recent = [m for m in layer.line[-self.config.patience :] if m.principal_excess is not None]
        ready = layer.state != LayerState.WARMUP and len(recent) == self.config.patience
        if ready and decision.danger != layer.danger:
            layer.danger = decision.danger
            threshold = layer.thresholds.principal_danger
            self.journal.emit(transitions.danger(self.steps, layer.name, decision.danger, last, threshold))
            if self.config.on_danger == "protect" and self.config.mode == "auto":
                self.protect(layer, decision.danger, "in danger" if decision.danger else "the danger is over")
                self.decisions[layer.name] = self._ask_policy(layer, now)

    def _ask_policy(self, layer: FollowedLayer, now: Plan | None) -> Decision:
        late = too_late(self.config, self.steps, layer.history)
        info = replace(layer.info(self.base_reason(layer), self.steps), late=late, room=budget.room(now, layer))
        self.questions[layer.name] = Question(info=info, state=layer.state, analyses=len(layer.line))
        decision = self.policy.decide(info, layer.state, layer.line, layer.thresholds)
        if not isinstance(decision, Decision):
            raise TypeError(f"policy.decide must return a Decision, got {decision!r} for layer {layer.name!r}")
        return decision

    def protect(
        self,
        layer: FollowedLayer,
        begin: bool,
        reason: str,
        by_hand: bool = False,
        principal: linalg.Basis | None = None,
    ) -> None:
        """Begin or end the protection of a layer's principal block; what was begun by hand ends by hand."""
        anchor = layer.anchor
        if begin == (anchor is not None) or (layer.protected_by_hand and not by_hand):
            return
        if begin:
            if layer.state == LayerState.DESCENDING:
                self.end_descent(layer, LayerState.DENSE)
                self.journal.emit(
                    transitions.descent_stopped(self.steps, layer.name, "its principal block is protected")
                )
            layer.protect(by_hand, principal)
            anchor = layer.anchor
        else:
            layer.release()
        if anchor is not None:
            self.journal.emit(transitions.protection(self.steps, layer.name, begin, reason, len(anchor.block)))

    def protect_by_hand(self, layer: FollowedLayer, rank: int | None) -> None:
        """Protect a layer on the exact leading directions of its weight, as of now."""
        if rank is None and layer.factored is None and layer.cached is None and layer.energy_target is not None:
            self.tracker.update_energy_rank(layer)
        rank = layer.rank if rank is None else rank
        if layer.factored is None:
            principal = linalg.exact_basis(linalg.working(layer.module.weight), rank)
        else:
            assert layer.basis is not None
            principal = layer.basis.leading(rank)
        layer.release()
        self.protect(layer, True, transitions.BY_HAND, by_hand=True, principal=principal)
        self.forget_decisions([layer.name])

    def keep_blocks_(self, bases: dict[str, linalg.Basis], errors: dict[str, float]) -> list[str]:
        """Before layers are factorized: exchange the bases of protected ones for factors with their blocks.

        Returns:
            The names of those whose ranks are too low for that.
        """
        crowded = []
        for name, layer in ((name, self.layers[name]) for name in bases):
            if layer.dense_anchor is None:
                continue
            found = factors_with(carried(layer.dense_anchor), bases[name].leading(layer.rank))
            if found is None:
                crowded.append(name)
                continue
            W = linalg.working(layer.module.weight)
            lost = linalg.energy(W - (found.U * found.S) @ found.V.mT) / linalg.energy(W)
            bases[name], errors[name] = found, float(lost.sqrt().nan_to_num())
        return crowded

    def base_reason(self, layer: FollowedLayer) -> str:
        """Why this layer can't go into factors under this base optimizer; empty if it can."""
        if self.reevaluates:
            return f"{type(self.base).__name__} re-evaluates its closure within a step"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:  # ranks would switch without each other
            return "factorizing in a distributed run is not supported yet"
        state = self.base.state.get(layer.weight) or {}
        if not state and self.steps == 0 and not isinstance(self.base, moments.UNDERSTOOD):
            return f"what {type(self.base).__name__} keeps for a weight is not known before its first step"
        groups = (group for group in self.base.param_groups if any(p is layer.weight for p in group["params"]))
        return moments.not_understood(state, layer.weight) or decay.not_understood(self.base, next(groups, {}))

    def _act(self) -> None:
        """Carry out the decisions, all in one event: starts of descents, switches, changes of rank, merges.

        A protected layer may be merged, with its block; whatever else a policy decides of it has to wait.
        """
        wanted: dict[Action, list[FollowedLayer]] = {action: [] for action in Action}
        for name, decision in self.decisions.items():
            layer = self.layers.get(name)
            if layer is not None and (layer.anchor is None or decision.action == Action.MERGE):
                wanted[decision.action].append(layer)
        planned = {row.name: row.rank for row in self.plan().layers if not row.fixed}
        for layer in (*wanted[Action.DESCEND], *wanted[Action.FACTORIZE]):
            layer.set_rank(min(layer.rank, planned.get(layer.name) or layer.rank))  # no hysteresis above the budget
        starting = [layer for layer in wanted[Action.DESCEND] if layer.state == LayerState.DENSE]
        for layer in starting:
            layer.state = LayerState.DESCENDING
            layer.descent_end = ending(self.config, self.steps, layer.history)
            self.acted = True
            reason = self.decisions[layer.name].reason
            self.journal.emit(transitions.descend(self.steps, layer.name, reason, layer.rank, layer.descent_end))
        self._watch(layer.name for layer in starting)
        dense = [layer for layer in wanted[Action.FACTORIZE] if layer.factored is None]
        dense = [layer for layer in dense if not self.base_reason(layer) and layer.rank < break_even_rank(*layer.shape)]
        bases, errors = exact_bases(dense)
        bases = {name: basis for name, basis in bases.items() if errors[name] != float("inf")}
        merges = [layer for layer in wanted[Action.MERGE] if layer.factored is not None]
        changing = wanted[Action.SHRINK], wanted[Action.GROW]
        ranks, outgrown = budget.new_ranks(self.plan(), self.decisions, *changing, merges)
        self.switch(bases, [*merges, *outgrown], errors, "decided", ranks)
        self.forget_decisions(layer.name for layer in (*merges, *outgrown))  # they were those of factors

    # ---- the way back --------------------------------------------------------------------------------

    def _check_loss(self) -> Condition | None:
        """Whether the training loss has risen since a change by more than its noise; ``None``: it has not."""
        for name, step in list(self.guarded.items()):
            if self.layers[name].state != LayerState.DESCENDING and self.steps - step > self.config.guard_steps:
                del self.guarded[name]
        verdict = self.guard.verdict()
        if not self.guarded:
            self.guard.end()
        return verdict if verdict is not None and not verdict.holds else None

    def _send_back(self, risen: Condition | None) -> None:
        """Layers that trip a guard become dense again now, whatever the cohort; those that still are stay it."""
        back: dict[str, tuple[str, str, dict[str, float]]] = {}
        latest = max(self.guarded.values(), default=0)
        for name, layer in self.layers.items():
            last = layer.history[-1] if layer.history else None
            if last is None:
                continue
            if risen is not None and self.guarded.get(name) == latest:
                numbers = {} if risen.value is None else {"standard_errors": risen.value, "noise": risen.threshold}
                since = "its switch" if layer.factored is not None else "its descent began"
                back[name] = "loss_rose", f"the training loss rose after {since}", numbers
            elif layer.factored is None:
                continue
            elif last.skew is not None and last.skew > MAX_SKEW:
                back[name] = "skewed", "its factors are no longer orthonormal", {"skew": last.skew}
            elif self._keeps_failing(layer):
                back[name] = "nonfinite", "its steps are NaN or Inf again and again: optimizer state dropped", {}
        if not back:
            return
        for name, (kind, reason, numbers) in back.items():
            self.note(name, kind, reason, numbers)
        layers = [self.layers[name] for name in back]
        for layer in layers:
            if layer.factored is None:
                self.end_descent(layer, LayerState.DENSE)
                transitions.rest_(layer, self.steps, self.config.cooldown)
                self.journal.emit(transitions.descent_stopped(self.steps, layer.name, transitions.GUARD))
        self.switch({}, [layer for layer in layers if layer.factored is not None], {}, transitions.GUARD)
        if risen is not None:
            self.guard.changed()  # earlier changes are not to blame for this level
        self.forget_decisions(back)

    def _watch(self, names: Iterable[str]) -> None:
        """From now on a rise of the training loss is laid to these layers, which have just changed or begun to.

        What a descent has done to the loss is not forgotten when it lands.
        """
        if not self.config.guard_steps:
            return
        changed = dict.fromkeys(names, self.steps)
        if changed.keys() - self.guarded.keys():
            self.guard.changed()
        self.guarded |= changed

    def _keeps_failing(self, layer: FollowedLayer) -> bool:
        recent = layer.line[-self.config.patience :]
        return len(recent) == self.config.patience and all(m.nonfinite and m.skew is not None for m in recent)

    def forget_decisions(self, names: Iterable[str]) -> None:
        """What was decided before somebody stepped in by hand says nothing any more."""
        for name in names:
            self.decisions.pop(name, None)

    def switch(
        self,
        bases: Mapping[str, linalg.Basis],
        merges: Sequence[FollowedLayer],
        errors: Mapping[str, float],
        reason: str,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Install factors, merge layers and change ranks inside factors, all in one event."""
        ranks = ranks or {}
        names = (*bases, *(layer.name for layer in merges), *ranks)
        if not names:
            return
        self.journal.tell("before_switch", self.steps, names)
        layers = [self.layers[name] for name in names]
        records = [self, self.journal, *layers, *(layer.factored for layer in layers if layer.factored is not None)]
        whole = undone_on_error([layer.module for layer in layers], [self.base], records)
        with self.journal.clock("switch"), torch.no_grad(), whole:
            events = [self._install(self.layers[name], basis, errors[name], reason) for name, basis in bases.items()]
            events += [self._merge(layer, reason) for layer in merges]
            events += [self._resize(self.layers[name], rank) for name, rank in ranks.items()]
        self.acted = True
        self._watch(bases)
        for event in events:
            self.journal.emit(event)
        self.journal.tell("after_switch", self.steps, names)

    def _install(self, layer: FollowedLayer, basis: linalg.Basis, error: float, reason: str) -> Event:
        before, anchor = layer.state, layer.dense_anchor
        to_factors_(layer, self.base, basis)
        assert layer.factored is not None
        layer.factored.anchor, layer.dense_anchor = None if anchor is None else carried(anchor), None
        self.end_descent(layer, LayerState.FACTORIZED)
        self.own(layer)
        self.tracker.keep_images(layer, self.steps)
        return transitions.factorize(self.steps, layer.info(), reason, before, error)

    def _merge(self, layer: FollowedLayer, reason: str) -> Event:
        decision = self.decisions.get(layer.name)
        if reason == "decided" and decision is not None:
            reason = decision.reason
        anchor = layer.anchor
        to_dense_(layer, self.base, keep_state=not self._keeps_failing(layer))
        layer.dense_anchor, layer.basis_step = anchor, self.steps
        self.end_descent(layer, LayerState.DENSE)
        transitions.rest_(layer, self.steps, self.config.cooldown, counts=reason != transitions.BY_HAND)
        return transitions.merge(self.steps, layer.name, reason, layer.rank, layer.cooldown_until - self.steps)

    def _resize(self, layer: FollowedLayer, rank: int) -> Event:
        before, factors = layer.rank, layer.basis
        assert factors is not None
        if rank <= before:
            resize_(layer, self.base, linalg.Basis(*(t.clone() for t in factors.leading(rank))))
        else:
            resize_(layer, self.base, self.tracker.grown(layer, rank, self.steps))
        layer.start_line()
        layer.cooldown_until = self.steps + self.config.cooldown
        return transitions.resize(self.steps, layer.name, self.decisions[layer.name].reason, before, layer.rank)

    def plan(self) -> Plan:
        """How the budget is spread as of now."""
        return budget.plan(self.layers, self.config, self.steps)

    def _note_stall(self) -> None:
        """A run that can't act says so, loudly."""
        if self.acted or not self.layers or self.config.mode != "auto" or self.analyses % self.config.stall_after:
            return
        self.journal.emit(transitions.stalled(self.steps, self.analyses, self.decisions, len(self.layers)))

    def note(self, layer: str, kind: str, reason: str, numbers: Mapping[str, float] | None = None) -> None:
        """Something happened that changed no layer's form: emit it."""
        self.journal.emit(Event(step=self.steps, layer=layer, kind=kind, reason=reason, numbers=dict(numbers or {})))

    # ---- looking -------------------------------------------------------------------------------------

    def layer_report(self, layer: FollowedLayer) -> LayerReport:
        """A layer as of now, as a plain record."""
        return inventory.report(layer, self.base, self.decisions.get(layer.name), self.questions.get(layer.name))

    def summary(self) -> Summary:
        """The run as of now, as a plain record."""
        return Summary(
            step=self.steps,
            mode=self.config.mode,
            analyses=self.analyses,
            stall_after=self.config.stall_after,
            layers=tuple(self.layer_report(layer) for layer in self.layers.values()),
            left_alone=tuple(self.left_alone),
            events=tuple(self.journal.events),
            seconds=dict(self.journal.seconds),
            seconds_total=self.journal.total,
        )

    # ---- saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights and the base optimizer's state, as tensors and plain values."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "analyses": self.analyses,
            "acted": self.acted,
            "last_analysis": self.last_analysis,
            "stretch": self.stretch,
            "guard": self.guard.state_dict(),
            "guarded": dict(self.guarded),
            "events": [event.as_plain() for event in self.journal.events],
            "layers": {name: layer.state_dict() for name, layer in self.layers.items()},
        }

    def check_saved(self, saved: Mapping[str, Any], base_state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if loading ``saved`` and the base optimizer's state could not work."""
        if saved["version"] != STATE_VERSION:
            age = "a newer" if saved["version"] > STATE_VERSION else "an older"
            raise ValueError(
                f"saved by {age} svd_optim: state version {saved['version']}, this one reads {STATE_VERSION}"
            )
        differ = sorted(set(saved["layers"]) ^ set(self.layers))
        if differ:
            raise ValueError(f"the saved state follows other layers than this optimizer: {', '.join(differ[:5])}")
        for name, state in saved["layers"].items():
            layer = self.layers[name]
            if tuple(state["shape"]) != layer.shape:
                raise ValueError(f"layer {name!r} has shape {layer.shape}, but {tuple(state['shape'])} was saved")
            if self.config.mode == "observe" and state["factorized"] != (layer.factored is not None):
                raise ValueError(
                    f"mode='observe' replaces nothing, but layer {name!r} was "
                    f"{'factorized' if state['factorized'] else 'dense'} when it was saved"
                )
        group_of = {p: i for i, group in enumerate(self.base.param_groups) for p in group["params"]}
        sizes = [len(group["params"]) for group in self.base.param_groups]
        for name, state in saved["layers"].items():
            layer = self.layers[name]
            sizes[group_of[layer.weight]] += int(state["factorized"]) - int(layer.factored is not None)
        saved_sizes = [len(group["params"]) for group in base_state["param_groups"]]
        if sizes != saved_sizes:
            raise ValueError(
                f"the saved param groups hold {saved_sizes} parameters, this optimizer's would hold {sizes}"
            )

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, once structures fit."""
        self.steps, self.analyses, self.acted = saved["steps"], saved["analyses"], saved["acted"]
        self.last_analysis, self.stretch = saved["last_analysis"], saved["stretch"]
        self.journal.events = [Event.from_plain(values) for values in saved["events"]]
        self.decisions, self.questions = {}, {}
        self.guard.load_state_dict(saved["guard"])
        self.guarded = dict(saved["guarded"])
        failing = (name for name, state in saved["layers"].items() if state["failures"] >= decomposition.IN_A_ROW)
        self.warned = set(failing)
        for name, state in saved["layers"].items():
            layer = self.layers[name]
            layer.load_state_dict(state)
            if layer.factored is not None:
                self.own(layer)
