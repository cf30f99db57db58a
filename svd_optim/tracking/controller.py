"""Controller: the work on the tracked layers around each step of the base optimizer.

Layers are measured and analyzed, decisions are made and carried out. Each transition is an :class:`Event` with its
reason; where there is none, the decision names the condition that blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .. import linalg
from ..decisions.descent_schedule import due, too_late
from ..decisions.lifecycle import GUARD
from ..decisions.machine import Trigger
from ..distributed import world_size
from ..factors.diagonal import diagonalize_
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorBatch, enter_factors_, leave_factors_, lr_is_zero
from ..linalg.fallback import IN_A_ROW
from ..records import Action, Condition, Decision, LayerState, Plan
from ..records.progress import tracked
from . import budget, loss_metric, measuring, refreshing
from .descent import descend_, keep_bases, moved, truncations
from .guards import check_loss, guard_changes, tripped
from .hindrances import (
    warn_of_cost,
    warn_of_earlier_training,
    warn_of_hindrances,
    warn_of_missing_loss,
    warn_of_missing_samples,
)
from .layer import TrackedLayer
from .protecting import protect, release
from .run import NO_GROUP, TrackedRun
from .selection import Selection, tracked_layer
from .slopes import add_costs, settle_costs
from .switching import Changes, switch


class Controller(TrackedRun):
    """The operations of a run at each step and at each analysis; :class:`TrackedRun` has its state."""

    def track(self, selection: Selection) -> None:
        """Track the selected layers. Those already tracked stay what they are, with what has become of them."""
        selected = {id(found.module) for found in selection.layers}
        for layer in list(self.layers.values()):
            if id(layer.module) not in selection.present:
                self.stop_tracking(layer, "it is no longer in the model")
                del self.given_up[layer.name]  # another one may take its place
            elif id(layer.module) not in selected:
                layer.problem = selection.reasons.get(id(layer.module), NO_GROUP)
            else:
                layer.problem = ""
        known = {id(layer.module): layer for layer in self.layers.values()}
        for found in selection.layers:
            if id(found.module) in known or found.name in self.given_up:
                continue
            index = 1 + max((layer.index for layer in self.layers.values()), default=-1)
            layer = self.layers[found.name] = tracked_layer(found, index, self.config)
            self.attachment.claim(layer)
            if isinstance(found.module, FactorizedLinear):
                self.attachment.adopt(layer, found.module, self.steps)
        budget.follow_plan_(self.layers, self.config, self.steps, self.guard.level)
        self.skipped = [*selection.skipped, *self.given_up.values()]
        if not self.steps:
            warn_of_hindrances(self)
            self.place_taps()

    # ---- every step ----------------------------------------------------------------------------------

    def drop_changed(self) -> None:
        """Stop tracking layers whose weights or factors are no longer parameters of theirs."""
        for layer in [layer for layer in self.layers.values() if not layer.intact]:
            self.stop_tracking(layer, "its weight is no parameter of it any more: pruned, or parametrized")

    def measure(self) -> None:
        """Measure the gradients at the eligible steps, before the base optimizer can modify them."""
        step = self.steps + 1
        with self.journal.clock("measure"):
            layers = self._with_gradients()
            new = [layer for layer in layers if layer.cached is None and not layer.factorized]
            with self.journal.hold_events(), tracked(new, "first bases") as each:
                for layer in each:
                    self._find_basis(layer, step)
            if step == 1:
                warn_of_earlier_training(self, new)
            if self.measures(step):
                measuring.measure(layer for layer in layers if layer.cached is not None or layer.factorized)
            if self.samples(step):
                self._collect(layers)

    def _collect(self, layers: Iterable[TrackedLayer]) -> None:
        for layer in layers:
            tap = self.taps.get(layer)
            if tap is not None:
                loss_metric.collect(layer, tap, self.loss_scale)
            else:
                loss_metric.refresh(layer)

    def _with_gradients(self) -> list[TrackedLayer]:
        for layer in list(self.layers.values()):
            layer.follow_weight()
            if layer.weight.grad is not None and layer.weight.grad.is_sparse:
                self.stop_tracking(layer, "its gradient is sparse")
        return [layer for layer in self.layers.values() if layer.weight.grad is not None]

    def _find_basis(self, layer: TrackedLayer, step: int) -> None:
        reported = layer.nonfinite
        measuring.find_basis(layer, step, self.config)
        if layer.nonfinite and not reported:
            reason = "NaN or Inf in the weight from the start: no basis, not measured"
            self.lifecycle.note(self.steps, layer.name, "nonfinite", reason)

    def enter_factors(self) -> list[FactorBatch]:
        """Put K and 0 into the factorized layers' parameters for the base optimizer to step on."""
        factors = [layer.factors for layer in self.layers.values() if layer.factors is not None]
        if not factors:
            return []
        if world_size() > 1:  # their sketches and guards see one process's data: the processes would part
            raise RuntimeError(
                f"layer {factors[0].name!r} is factorized, and training in factors is not supported in a distributed "
                f"run yet: merge_('all') first, before DistributedDataParallel wraps the model"
            )
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        return enter_factors_(factors, self.base, groups)

    def note_moves(self) -> None:
        """Before the base optimizer's step: which descending layers it is to move, and what fading them costs."""
        self.moves = moved(list(self.layers.values()), self.base.param_groups)
        if self.moves and self.measures(step := self.steps + 1):
            ascending = {p for group in self.base.param_groups if group.get("maximize") for p in group["params"]}
            moved_layers = [self.layers[name] for name in self.moves]
            add_costs(moved_layers, self.slopes, step, self.measured_before(step), ascending, self.loss_scale)

    def leave_factors(self, batches: list[FactorBatch]) -> None:
        """After the base optimizer's step: retract. Finished batches are removed from ``batches``."""
        with self.journal.clock("retract"):
            while batches:
                for factors, succeeded in leave_factors_(batches[-1], self.base.state):
                    self.layers[factors.name].count_decomposition(succeeded)
                batches.pop()
            self.attachment.drop_sketches(list(self.layers.values()))

    def advance(self) -> None:
        """Once the layers have their new weights: descend, refresh, and analyze once per interval."""
        self.steps += 1
        self.remove_taps()
        layers = list(self.layers.values())
        for layer in layers:
            layer.restore_block_()
        self._stop_barred_descents()
        with self.journal.clock("descend"):
            ended = descend_(layers, self.steps, self.config.analyze_every, self.moves)
        for portion in self._portions(ended):
            self._conclude_descents(portion)
        if self.steps == 1:  # what a base optimizer keeps for a weight is known now
            warn_of_hindrances(self)
        with self.journal.clock("refresh"):
            refreshing.refresh(self._eligible_for_refresh(), self.steps, self.config)
        if self.steps % self.interval == 0:
            try:
                self.analyze()
            finally:  # also when a policy has raised
                self.attachment.renew_sketches(list(self.layers.values()), self.steps)
        self._warn_of_failures()
        self.place_taps()

    def _eligible_for_refresh(self) -> list[TrackedLayer]:
        """An equal share of dense layers on the step before each measured one, so that no step does all of the work.

        With a single share, or if each step is measured, the last share is refreshed at the analysis; and always those
        in factors, which have singular triplets then.
        """
        slots = max(1, self.config.analyze_every // self.config.measure_every)
        early = 1 if 1 < slots < self.interval else 0
        position = (self.steps + early) % self.interval
        now = [slot for slot in range(slots) if (slot + 1) * self.interval // slots % self.interval == position]
        dense = (layer for layer in self.layers.values() if not layer.factorized)
        return [layer for layer in dense if layer.index % slots in now]

    def _warn_of_failures(self) -> None:
        for name, layer in self.layers.items():
            if layer.failures == 0:
                layer.warned_of_failures = False
            elif layer.failures >= IN_A_ROW and not layer.warned_of_failures:
                layer.warned_of_failures = True
                reason = f"its decomposition failed {layer.failures} times in a row, also in float64: old basis kept"
                self.lifecycle.note(self.steps, name, "decomposition_failed", reason, {"basis_step": layer.basis_step})

    def _conclude_descents(self, ended: list[TrackedLayer]) -> None:
        """Install the factors of layers whose descent is exact; extend or fail the descents of the others."""
        settle_costs(ended, self.guard)
        with self.journal.clock("descend"):
            bases, errors = truncations(ended)
        outcomes = {layer.name: self.lifecycle.descent_outcome(layer, errors[layer.name]) for layer in ended}
        for layer in ended:
            if outcomes[layer.name] == Trigger.DESCENT_EXTENDED:
                until = self.steps + self.config.analyze_every
                self.lifecycle.extend_descent(layer, self.steps, until, errors[layer.name])
                keep_bases([layer], bases, self.steps)
        for layer in ended:
            if outcomes[layer.name] == Trigger.DESCENT_FAILED:
                self.lifecycle.fail_descent(layer, self.steps, errors[layer.name])
        unsupported = self.unsupported(ended)
        ready = {}
        for layer in ended:
            if outcomes[layer.name] == Trigger.DESCENT_EXACT and not self._stop_if_unsupported(layer, unsupported):
                ready[layer.name] = bases[layer.name]
        switch(self, Changes("descent done", ready, errors, Trigger.DESCENT_EXACT))

    # ---- every interval ------------------------------------------------------------------------------

    def analyze(self) -> None:
        """Compute the metrics, decide, act, notify the listeners."""
        warn_of_hindrances(self)
        self._diagonalize()
        boundary = self.lifecycle.begin_analysis(self.steps)
        with self.journal.clock("refresh"):
            metrics = refreshing.analyze(self.layers.values(), self.steps, self.config, self.guard)
        with self.journal.clock("decide"):
            self._decide([self.layers[name] for name in metrics])
            risen = check_loss(self.guard, list(self.layers.values()), self.steps, self.config)
        if self.config.mode == "auto":
            self._revert(risen)
            if boundary:
                self._act()
            warn_of_missing_loss(self)
            warn_of_missing_samples(self)
            warn_of_cost(self)
        if boundary or self.steps < self.config.warmup:
            budget.revise_ranks_(self.layers, self.config, self.steps, self.guard.level)
        self.lifecycle.note_stall(self.steps)
        self._limit_overhead()
        self._notify()

    def _diagonalize(self) -> None:
        """Factors are singular triplets again; those of which a step was too much are retracted exactly from now on."""
        factors = [layer.factors for layer in self.layers.values() if layer.factors is not None]
        flags = [(x, x.turned_away) for x in factors if x.turned_away is not None]
        values = torch.stack([flag for _, flag in flags]).tolist() if flags else []
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        weights = {x.module.U: x for x in factors if x.module.U in groups and x.module.U.requires_grad}
        trained = [x for U, x in weights.items() if not lr_is_zero(groups[U])]  # others stay as they are, to the bit
        with self.journal.clock("refresh"):
            diagonalize_(trained, self.base.state)
        for x in factors:
            x.exact, x.turned_away = False, None
        for (x, _), away in zip(flags, values, strict=True):
            x.exact = away

    def _decide(self, layers: list[TrackedLayer]) -> None:
        growable = any(layer.factorized for layer in self.layers.values()) and self.config.parameter_budget is not None
        plan = self.plan() if growable else None  # only growing within a budget needs it
        unsupported = self.unsupported(layers)
        for layer in layers:
            if layer.state == LayerState.DESCENDING:
                self.lifecycle.note_waiting(layer, self.steps, layer.idle_known)
                self._stop_if_unsupported(layer, unsupported)
            layer.idle_known = 0
            self._ask(layer, plan, unsupported)
            self._note_nonfinite(layer)
            if self.lifecycle.note_danger(layer, self.steps) and self.lifecycle.protects:
                if layer.status.in_danger:
                    protect(self, layer, "in danger")
                else:
                    release(self, layer, "the danger is over")
                self._ask(layer, plan, unsupported)

    def _ask(self, layer: TrackedLayer, plan: Plan | None, unsupported: dict[str, str]) -> None:
        reason = unsupported.get(layer.name, "")
        info = layer.info(
            self.steps,
            base_supported=not reason,
            unsupported_reason=reason,
            keep_dense=layer.keep_dense,
            room=budget.room(plan, layer),
            late=too_late(self.config, self.steps, layer.history),
            due=due(self.config, self.steps),
        )
        self.lifecycle.ask(layer, self.steps, info)

    def _stop_if_unsupported(self, layer: TrackedLayer, unsupported: dict[str, str]) -> bool:
        """Call a descent off that could not end in factors. One of a frozen layer only waits."""
        reason = unsupported.get(layer.name)
        if reason is None or not layer.weight.requires_grad:
            return False
        self.lifecycle.stop_descent(layer, self.steps, Trigger.UNSUPPORTED, reason)
        return True

    def _stop_barred_descents(self) -> None:
        """Descents of a loaded run end before they fade anything where no layer can be factorized, or none may be."""
        reason = "mode='observe' changes nothing" if self.config.mode == "observe" else self.unsupported_run()
        for layer in self.layers.values() if reason else ():
            if layer.state == LayerState.DESCENDING:
                self.lifecycle.stop_descent(layer, self.steps, Trigger.UNSUPPORTED, reason)
                layer.decision = Decision(action=Action.HOLD, reason=f"descent stopped: {reason}")

    def _note_nonfinite(self, layer: TrackedLayer) -> None:
        last = layer.history[-1]
        if last.nonfinite and not layer.nonfinite:
            reason = "NaN or Inf in gradient, weight or basis: not measured"
            self.lifecycle.note(self.steps, layer.name, "nonfinite", reason, {"measurements": last.nonfinite})
        layer.nonfinite = bool(last.nonfinite)

    def _revert(self, risen: Condition | None) -> None:
        """Layers that trip a guard become dense again at once, not at a cohort boundary; descents are canceled."""
        trips = tripped(list(self.layers.values()), risen, self.config)
        kept = {layer.name: layer.bound for layer, _ in trips if layer.factorized and layer.bound}
        for layer, trip in trips:
            bound = kept.get(layer.name)
            reason = f"{trip.reason}; it stays in factors, which have {bound}" if bound else trip.reason
            self.lifecycle.note(self.steps, layer.name, trip.kind, reason, trip.numbers)
        trips = [(layer, trip) for layer, trip in trips if layer.name not in kept]
        merge = {layer.name: trip.trigger for layer, trip in trips if layer.factorized}
        for layer, trip in trips:
            if not layer.factorized:
                self.lifecycle.stop_descent(layer, self.steps, trip.trigger, GUARD)
        switch(self, Changes(GUARD, merge=merge))
        if trips and risen is not None:
            self.guard.changed()  # the present level of the loss is not attributed to earlier changes
        self._clear_decisions(layer for layer, _ in trips)

    def _clear_decisions(self, layers: Iterable[TrackedLayer]) -> None:
        """Discard the decisions that were made before an intervention."""
        for layer in layers:
            layer.decision = None

    def _act(self) -> None:
        """Carry out the decisions together: starts of descents, switches, changes of rank, merges."""
        requests = {
            action: [layer for layer in layers if not (layer.factorized and layer.bound)]
            for action, layers in self.lifecycle.requests().items()
        }
        self._give_ranks(requests)
        for layer in requests[Action.DESCEND]:
            layer.status.predicted_share = self.predicted_share(layer)
            self.lifecycle.descend(layer, self.steps)
        guard_changes(self.guard, requests[Action.DESCEND], self.steps, self.config)
        unsupported = self.unsupported(requests[Action.FACTORIZE])
        smaller = [x for x in requests[Action.FACTORIZE] if not self.lifecycle.beyond_break_even(x, x.rank)]
        merges = requests[Action.MERGE]
        ranks, outgrown = budget.new_ranks(self.plan(), requests[Action.SHRINK], requests[Action.GROW], merges)
        merge = dict.fromkeys((layer.name for layer in (*merges, *outgrown)), Trigger.MERGE)
        portions = self._portions(layer for layer in smaller if layer.name not in unsupported)
        last = portions.pop() if portions else []
        for portion in portions:
            self._switch(portion, {}, {})
        self._switch(last, merge, ranks)

    def _give_ranks(self, requests: dict[Action, list[TrackedLayer]]) -> None:
        """The planned ranks to those that start now; within a share of the loss some may have to stay dense."""
        planned = {row.name: row.rank for row in self.plan().layers if not row.fixed}
        for action in (Action.DESCEND, Action.FACTORIZE):
            if self.config.tolerance is not None:
                requests[action] = [x for x in requests[action] if planned.get(x.name, x.rank) is not None]
            for layer in requests[action]:
                rank = planned.get(layer.name) or layer.rank
                # The hysteresis of a budget's plan must not exceed it.
                layer.set_rank(rank if self.config.tolerance is not None else min(layer.rank, rank))

    def _portions(self, layers: Iterable[TrackedLayer]) -> list[list[TrackedLayer]]:
        """Layers that go into factors together, as many as fit into memory well: until then they are there twice."""
        return list(linalg.portions(layers, refreshing.basis_bytes))

    def _switch(self, factorize: list[TrackedLayer], merge: Mapping[str, Trigger], ranks: Mapping[str, int]) -> None:
        """What was decided, but for layers that can't be decomposed."""
        bases, errors = truncations(factorize)
        bases = {name: basis for name, basis in bases.items() if errors[name] != float("inf")}
        switch(self, Changes("decided", bases, errors, merge=merge, ranks=ranks))

    def _limit_overhead(self) -> None:
        share = self.overhead.update(self.journal.seconds)
        if share is not None:
            assert self.config.max_overhead is not None
            numbers = {"share": share, "max_overhead": self.config.max_overhead, "interval": float(self.interval)}
            reason = f"monitoring took {share:.1%} of the time: analyses are {self.interval} steps apart from now on"
            self.lifecycle.note(self.steps, "*", "interval", reason, numbers)

    def _notify(self) -> None:
        summary = self.summary()
        alerts = self.alerts.update(summary)  # also without listeners: the saved state must not depend on them
        if alerts:
            self.journal.notify("on_alerts", alerts)
        self.journal.notify("on_analysis", summary)
