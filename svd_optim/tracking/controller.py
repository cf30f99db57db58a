"""Controller: what happens to the tracked layers around each step of the base optimizer.

A layer is measured, analyzed and decided on; it descends, switches and is trained on in its factors.
Each transition is an :class:`Event` with its reason, each non-transition a decision that says what
blocked.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..decisions.descent_schedule import too_late
from ..decisions.lifecycle import GUARD
from ..decisions.machine import Trigger
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorBatch, enter_factors_, leave_factors_
from ..linalg.fallback import IN_A_ROW
from ..records import Action, Condition, LayerState, Plan
from . import budget, measuring, refreshing
from .descent import DescentOutcome, descend_, exact_bases, keep_bases, moved
from .guards import check_loss, tripped, watch
from .layer import TrackedLayer
from .protecting import protect, release
from .run import TrackedRun
from .selection import Selection, tracked_layer
from .switching import Changes, switch


class Controller(TrackedRun):
    """See :class:`TrackedRun` for what it holds; here is what it does at each step and at each analysis."""

    def track(self, selection: Selection) -> None:
        """Track the selected layers; those already tracked stay as they are."""
        known = {id(layer.module) for layer in self.layers.values()}
        for found in selection.layers:
            if id(found.module) in known:
                continue
            layer = self.layers[found.name] = tracked_layer(found, len(self.layers), self.config)
            self.attachment.claim(layer)
            if isinstance(found.module, FactorizedLinear):
                self.attachment.adopt(layer, found.module, self.steps)
        budget.follow_plan_(self.layers, self.config, self.steps)
        self.skipped = selection.skipped

    # ---- every step ----------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure the gradients that are eligible, before the base optimizer may change them."""
        step = self.steps + 1
        eligible = step % (self.config.measure_every * self.overhead.stretch) == 0 or step % self.interval == 0
        measured = []
        with self.journal.clock("measure"):
            for layer in list(self.layers.values()):
                if layer.weight.grad is None or not (eligible or (layer.cached is None and not layer.factorized)):
                    continue
                if layer.weight.grad.is_sparse:
                    self.stop_tracking(layer, "its gradient is sparse")
                elif self._has_basis(layer, step) and eligible:
                    measured.append(layer)
            measuring.measure(measured)

    def _has_basis(self, layer: TrackedLayer, step: int) -> bool:
        known = layer.nonfinite
        usable = measuring.ensure_basis(layer, step, self.config)
        if layer.nonfinite and not known:
            reason = "NaN or Inf in the weight from the start: no basis, not measured"
            self.lifecycle.note(self.steps, layer.name, "nonfinite", reason)
        return usable

    def enter_factors(self) -> list[FactorBatch]:
        """Put K and 0 into the factorized layers' parameters for the base optimizer to step on."""
        factors = [layer.factors for layer in self.layers.values() if layer.factors is not None]
        if not factors:
            return []
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        return enter_factors_(factors, self.base, groups)

    def note_moves(self) -> None:
        """Before the base optimizer's step: which descending layers it is to move."""
        self.moves = moved(list(self.layers.values()), self.base.param_groups)

    def leave_factors(self, batches: list[FactorBatch]) -> None:
        """After the base optimizer's step: retract. What is done is taken off ``batches``."""
        with self.journal.clock("retract"):
            while batches:
                for factors, ok in leave_factors_(batches[-1], self.base.state):
                    self.layers[factors.name].count_decomposition(ok)
                batches.pop()
            self.attachment.drop_sketches(list(self.layers.values()))

    def advance(self) -> None:
        """Once layers hold their new weights: descend, and each interval analyze."""
        self.steps += 1
        layers = list(self.layers.values())
        for layer in layers:
            layer.restore_block_()
        with self.journal.clock("descend"):
            outcome = descend_(layers, self.steps, self.config.analyze_every, self.moves)
        self._land(outcome)
        with self.journal.clock("refresh"):
            refreshing.refresh(self._eligible_for_refresh(), self.steps, self.config)
        if self.steps % self.interval == 0:
            try:
                self.analyze()
            finally:  # also when a policy has raised
                self.attachment.renew_sketches(list(self.layers.values()), self.steps)
        self._warn_of_failures()

    def _eligible_for_refresh(self) -> list[TrackedLayer]:
        """An equal share of the layers on the step before each measured one: no step pays for all, nor for both.

        Where there is one share only, or each step is measured, the last share comes with the analysis.
        """
        slots = max(1, self.config.analyze_every // self.config.measure_every)
        early = 1 if 1 < slots < self.interval else 0
        position = (self.steps + early) % self.interval
        now = [slot for slot in range(slots) if (slot + 1) * self.interval // slots % self.interval == position]
        return [layer for layer in self.layers.values() if layer.index % slots in now]

    def _warn_of_failures(self) -> None:
        for name, layer in self.layers.items():
            if layer.failures == 0:
                layer.warned_of_failures = False
            elif layer.failures >= IN_A_ROW and not layer.warned_of_failures:
                layer.warned_of_failures = True
                reason = f"its decomposition failed {layer.failures} times in a row, also in float64: old basis kept"
                self.lifecycle.note(self.steps, name, "decomposition_failed", reason, {"basis_step": layer.basis_step})

    def _land(self, outcome: DescentOutcome) -> None:
        """Install the factors of layers whose descent is done, and say what became of the others."""
        if not outcome.layers:
            return
        landings = {layer.name: self.lifecycle.landing(layer, outcome.errors[layer.name]) for layer in outcome.layers}
        for layer in outcome.layers:
            if landings[layer.name] == Trigger.DESCENT_EXTENDED:
                until = self.steps + self.config.analyze_every
                self.lifecycle.put_off(layer, self.steps, until, outcome.errors[layer.name])
                keep_bases([layer], outcome.bases, self.steps)
        for layer in outcome.layers:
            if landings[layer.name] == Trigger.DESCENT_FAILED:
                self.lifecycle.give_up(layer, self.steps, outcome.errors[layer.name])
        ready = {n: outcome.bases[n] for n, landing in landings.items() if landing == Trigger.DESCENT_EXACT}
        switch(self, Changes("descent done", ready, outcome.errors, Trigger.DESCENT_EXACT))

    # ---- every interval ------------------------------------------------------------------------------

    def analyze(self) -> None:
        """Refresh bases, close the measurements, decide, act, notify the listeners."""
        boundary = self.lifecycle.begin_analysis(self.steps)
        with self.journal.clock("refresh"):
            metrics = refreshing.analyze(self.layers.values(), self.steps, self.config)
        with self.journal.clock("decide"):
            self._decide([self.layers[name] for name in metrics])
            risen = check_loss(self.guard, list(self.layers.values()), self.steps, self.config)
        if self.config.mode == "auto":
            self._revert(risen)
            if boundary:
                self._act()
        if boundary or self.steps < self.config.warmup_steps:
            budget.revise_ranks_(self.layers, self.config, self.steps)
        self.lifecycle.note_stall(self.steps)
        self._keep_to_time()
        self._notify()

    def _decide(self, layers: list[TrackedLayer]) -> None:
        plan = self.plan() if any(layer.factorized for layer in self.layers.values()) else None  # else nobody asks
        unsupported = self.unsupported(layers)
        for layer in layers:
            if layer.state == LayerState.DESCENDING:
                self.lifecycle.note_waiting(layer, self.steps, layer.idle_known)
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
        )
        self.lifecycle.ask(layer, self.steps, info)

    def _note_nonfinite(self, layer: TrackedLayer) -> None:
        last = layer.history[-1]
        if last.nonfinite and not layer.nonfinite:
            reason = "NaN or Inf in gradient, weight or basis: not measured"
            self.lifecycle.note(self.steps, layer.name, "nonfinite", reason, {"measurements": last.nonfinite})
        layer.nonfinite = bool(last.nonfinite)

    def _revert(self, risen: Condition | None) -> None:
        """Layers that trip a guard become dense again now, whatever the cohort; those that still are stay it."""
        trips = tripped(list(self.layers.values()), risen, self.config)
        for layer, trip in trips:
            self.lifecycle.note(self.steps, layer.name, trip.kind, trip.reason, trip.numbers)
        merge = {layer.name: trip.trigger for layer, trip in trips if layer.factorized}
        for layer, trip in trips:
            if not layer.factorized:
                self.lifecycle.stop_descent(layer, self.steps, trip.trigger, GUARD)
        switch(self, Changes(GUARD, merge=merge))
        if trips and risen is not None:
            self.guard.changed()  # earlier changes are not to blame for this level
        self._forget_decisions(layer for layer, _ in trips)

    def _forget_decisions(self, layers: Iterable[TrackedLayer]) -> None:
        """What was decided before somebody stepped in says nothing any more."""
        for layer in layers:
            layer.decision = None

    def _act(self) -> None:
        """Carry out the decisions, all in one event: starts of descents, switches, changes of rank, merges."""
        wanted = self.lifecycle.wanted()
        planned = {row.name: row.rank for row in self.plan().layers if not row.fixed}
        for layer in (*wanted[Action.DESCEND], *wanted[Action.FACTORIZE]):
            layer.set_rank(min(layer.rank, planned.get(layer.name) or layer.rank))  # no hysteresis above the budget
        for layer in wanted[Action.DESCEND]:
            self.lifecycle.descend(layer, self.steps)
        watch(self.guard, wanted[Action.DESCEND], self.steps, self.config)
        unsupported = self.unsupported(wanted[Action.FACTORIZE])
        smaller = [x for x in wanted[Action.FACTORIZE] if not self.lifecycle.beyond_break_even(x, x.rank)]
        bases, errors = exact_bases([layer for layer in smaller if layer.name not in unsupported])
        bases = {name: basis for name, basis in bases.items() if errors[name] != float("inf")}
        merges = wanted[Action.MERGE]
        ranks, outgrown = budget.new_ranks(self.plan(), wanted[Action.SHRINK], wanted[Action.GROW], merges)
        merge = dict.fromkeys((layer.name for layer in (*merges, *outgrown)), Trigger.MERGE)
        switch(self, Changes("decided", bases, errors, merge=merge, ranks=ranks))

    def _keep_to_time(self) -> None:
        share = self.overhead.update(self.journal.seconds)
        if share is not None:
            assert self.config.max_overhead is not None
            numbers = {"share": share, "max_overhead": self.config.max_overhead, "interval": float(self.interval)}
            reason = f"monitoring took {share:.1%} of the time: next intervals are longer or shorter"
            self.lifecycle.note(self.steps, "*", "interval", reason, numbers)

    def _notify(self) -> None:
        summary = self.summary()
        alerts = self.alerts.update(summary)  # also where nobody listens: what is saved must not depend on that
        if alerts:
            self.journal.notify("on_alerts", alerts)
        self.journal.notify("on_analysis", summary)
