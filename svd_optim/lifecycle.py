"""Lifecycle: what happens to followed layers, from their first measurement to their factors.

A layer is measured, analysed and decided on; it descends, switches and is trained on in its factors.
Each transition is an :class:`Event` with its reason, each non-transition a decision that says what
blocked. The :class:`SubspaceAwareOptimizer` calls this around the base optimizer's step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import factor_step, linalg, moments
from .config import SubspaceConfig
from .layers import FactorizedLinear
from .listeners import Listener
from .policy import Policy, ThresholdPolicy
from .records import Action, Decision, Event, LayerReport, LayerState, LeftAlone, Summary, break_even_rank
from .selection import Selection, first_match
from .switching import replace_parameters_, to_dense_, to_factors_
from .tracker import FollowedLayer, SubspaceTracker, target_rank

logger = logging.getLogger(__name__)

STATE_VERSION = 1
MAX_EXTENSIONS = 3  # how often the end of a descent is put off before the layer gives up
LOUD = frozenset({"stalled", "nonfinite", "descent_failed", "unsupported"})


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
        self.policy: Policy = config.policy or ThresholdPolicy(
            config.rule, config.patience, descend=config.descent_steps > 0
        )
        self.layers: dict[str, FollowedLayer] = {}
        self.left_alone: list[LeftAlone] = []
        self.decisions: dict[str, Decision] = {}
        self.events: list[Event] = []
        self.steps = 0
        self.analyses = 0
        self.acted = False
        self.reevaluates = isinstance(base, torch.optim.LBFGS)  # its closure, within a step
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by phase
        self.started: float | None = None
        self.detach()

    def detach(self) -> None:
        """Forget what ties this object to one process and one model: listeners and owned modules."""
        self.listeners: list[Listener] = []
        self.owner = object()  # by which a module knows whose gradients it delivers
        self.owned: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("listeners", "owner", "owned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.started, self.seconds = None, defaultdict(float)  # another process has another clock
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
            self.layers[name] = layer
            if isinstance(module, FactorizedLinear):
                self._adopt(layer, module)
        self.left_alone = selection.left_alone

    def _adopt(self, layer: FollowedLayer, module: FactorizedLinear) -> None:
        """Follow a layer that was factorized before this optimizer came."""
        self.base.state.pop(module.S, None)
        replace_parameters_(self.base, [module.U, module.S, module.V], [module.U, module.V], ["U", "V"])
        layer.factored = factor_step.Factored(layer.name, module)
        layer.basis = linalg.Basis(*(t.clone() for t in factor_step.masters(module, None)))
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
        self.left_alone.append(LeftAlone(name=f"{layer.name}.weight", shape=layer.shape, reason=reason))
        self.emit(layer.name, "unsupported", reason)

    @torch.no_grad()
    def restore_layers(self, ranks: Mapping[str, int | None]) -> None:
        """Factorize (an integer: the rank) or merge (``None``) layers whose structure differs."""
        for name, rank in ranks.items():
            layer = self.layers[name]
            if layer.factored is not None and rank != layer.rank:
                to_dense_(layer, self.base)
                layer.state = LayerState.DENSE
            if rank is not None and layer.factored is None:
                layer.rank = rank
                layer.reset_history()
                basis = linalg.exact_basis(linalg.working(layer.module.weight), rank)
                to_factors_(layer, self.base, basis)
                layer.state, layer.descent_end = LayerState.FACTORIZED, None
                self.own(layer)

    # ---- every step ----------------------------------------------------------------------------------

    def has_gradients(self) -> bool:
        """Whether any followed layer has one."""
        return any(layer.weight.grad is not None for layer in self.layers.values())

    def measure(self) -> None:
        """Measure the gradients that are due, before the base optimizer may change them."""
        step = self.steps + 1
        due = step % self.config.measure_every == 0 or step % self.config.interval == 0
        with self.clock("measure"):
            for layer in list(self.layers.values()):
                if layer.weight.grad is None or (layer.basis is not None and not due):
                    continue
                if layer.weight.grad.is_sparse:
                    self._stop_following(layer, "its gradient is sparse")
                elif self._has_basis(layer, step) and due:
                    self.tracker.measure(layer)

    def _has_basis(self, layer: FollowedLayer, step: int) -> bool:
        known = layer.nonfinite
        usable = self.tracker.ensure_basis(layer, step)
        if not usable and not known:
            self.emit(layer.name, "nonfinite", "NaN or Inf in the weight from the start: no basis, not measured")
        return usable

    def enter_factors(self) -> list[factor_step.Entered]:
        """Put K and 0 into the factorized layers' parameters for the base optimizer to step on."""
        factored = [layer.factored for layer in self.layers.values() if layer.factored is not None]
        if not factored:
            return []
        groups = {p: group for group in self.base.param_groups for p in group["params"]}
        return factor_step.enter_(factored, self.base, groups)

    def advance(self, entered: Sequence[factor_step.Entered]) -> None:
        """After the base optimizer's step: retract, descend, and each ``interval`` steps analyse."""
        self.steps += 1
        with self.clock("retract"):
            for batch in entered:
                factor_step.finish_(batch, self.base.state)
            self.drop_sketches()
        with self.clock("descend"):
            self.descend()
        if self.steps % self.config.interval == 0:
            self.analyse()

    def drop_sketches(self) -> None:
        """Sketches go with the gradients they belong to."""
        for layer in self.layers.values():
            if layer.factored is not None and layer.factored.module.sketch is not None:
                layer.factored.module.sketch.grad = None

    def descend(self) -> None:
        """Fade the minor-minor blocks of descending layers; those whose time has come switch."""
        left = {}
        for name, layer in self.layers.items():
            if layer.state == LayerState.DESCENDING and layer.descent_end is not None:
                if layer.descent_end <= self.steps and layer.history and not layer.history[-1].measured:
                    layer.descent_end = self.steps + self.config.interval  # no gradient, no decision
                left[name] = layer.descent_end - self.steps
        # The step before the last: what turned since the last analysis would leave a rank of up to 2k.
        bases, _ = self.exact_bases([self.layers[name] for name, steps in left.items() if steps == 1])
        for name, basis in bases.items():
            self.layers[name].basis, self.layers[name].basis_step = basis, self.steps
        for name, steps in left.items():
            if steps > 0:
                self._fade(self.layers[name], 1.0 if self.layers[name].extensions else 1.0 / steps)
        due = [self.layers[name] for name, steps in left.items() if steps <= 0]
        if due:
            self._finish_descents(due)

    def _fade(self, layer: FollowedLayer, share: float) -> None:
        assert layer.basis is not None
        U, _, V = layer.basis.leading(layer.rank)
        W = layer.module.weight
        faded = W if W.dtype == U.dtype else W.to(U.dtype)
        linalg.fade_minor_(faded, U, V, share)
        if faded is not W:
            W.copy_(faded)

    def _finish_descents(self, due: list[FollowedLayer]) -> None:
        for layer in due:  # this step's own update: no factored step would have followed it
            self._fade(layer, 1.0)
        bases, errors = self.exact_bases(due)
        ready: list[FollowedLayer] = []
        for layer in due:
            error = errors[layer.name]
            if error < layer.thresholds.reconstruction_safe:
                ready.append(layer)
                continue
            numbers = {
                "reconstruction_error": error,
                "reconstruction_safe": layer.thresholds.reconstruction_safe,
            }
            if layer.extensions < MAX_EXTENSIONS:
                layer.extensions += 1
                layer.descent_end = self.steps + self.config.interval
                layer.basis, layer.basis_step = bases[layer.name], self.steps
                self.emit(layer.name, "descent_extended", "not exact enough yet", numbers=numbers)
            else:
                self.end_descent(layer, LayerState.DENSE)
                reason = f"not exact enough after {MAX_EXTENSIONS} extensions"
                self.emit(layer.name, "descent_failed", reason, LayerState.DESCENDING, LayerState.DENSE, numbers)
        self.switch({layer.name: bases[layer.name] for layer in ready}, (), errors, "descent done")

    def end_descent(self, layer: FollowedLayer, state: LayerState) -> None:
        """Leave a descent (or any other state) for ``state``, with a new history."""
        layer.state, layer.descent_end, layer.extensions = state, None, 0
        layer.reset_history()

    def exact_bases(self, layers: Sequence[FollowedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
        """Exact bases of dense layers at their ranks, and the error of keeping only those ranks."""
        bases, errors = {}, []
        for layer in layers:
            W = linalg.working(layer.module.weight)
            finite = torch.isfinite(W).all()
            q = min(layer.rank + linalg.OVERSAMPLING, *layer.shape)
            bases[layer.name] = linalg.exact_basis(torch.where(finite, W, 0.0), q)
            error = linalg.reconstruction_error(bases[layer.name].S[: layer.rank], linalg.energy(W))
            zero = bases[layer.name].S[0] == 0
            errors.append(torch.where(finite, torch.where(zero, 0.0, error), torch.inf))
        values = torch.stack(errors).tolist() if errors else []
        return bases, dict(zip(bases, values, strict=True))

    # ---- every interval ------------------------------------------------------------------------------

    def analyse(self) -> None:
        """Refresh bases, close the measurements, decide, act, tell the listeners."""
        boundary = (self.steps // self.config.interval) % max(1, self.config.cohort // self.config.interval) == 0
        with self.clock("refresh"):
            metrics = self.tracker.analyse(self.layers.values(), self.steps)
        with self.clock("decide"):
            self.analyses += 1
            for name in metrics:
                self._decide(self.layers[name])
        if boundary and self.config.mode == "auto":
            self._act()
        for layer in self.layers.values():
            module = layer.module
            if isinstance(module, FactorizedLinear) and module.Omega is not None:
                module.Omega.copy_(self.tracker.draw_sketch(layer, self.steps))
            elif boundary and layer.energy_target is not None and layer.state in (LayerState.WARMUP, LayerState.DENSE):
                self.tracker.update_energy_rank(layer)
        self._note_stall()
        if self.listeners:
            summary = self.summary()
            for listener in self.listeners:
                listener.on_analysis(summary)

    def _decide(self, layer: FollowedLayer) -> None:
        if layer.state == LayerState.WARMUP and self.steps >= self.config.warmup:
            layer.state = LayerState.DENSE
        info = layer.info(self.base_reason(layer))
        decision = self.policy.decide(info, layer.state, tuple(layer.history), layer.thresholds)
        if not isinstance(decision, Decision):
            raise TypeError(f"policy.decide must return a Decision, got {decision!r} for layer {layer.name!r}")
        self.decisions[layer.name] = decision
        last = layer.history[-1]
        if last.nonfinite and not layer.nonfinite:
            reason = "NaN or Inf in gradient or weight: not measured, basis kept"
            self.emit(layer.name, "nonfinite", reason, numbers={"measurements": last.nonfinite})
        layer.nonfinite = bool(last.nonfinite)
        # A history that has just started anew says nothing about danger.
        if decision.danger != layer.danger and len(layer.history) >= self.config.patience:
            layer.danger = decision.danger
            kind = "danger" if decision.danger else "danger_over"
            reason = "the gradient attacks" if decision.danger else "the gradient leaves alone"
            excess = {} if last.principal_excess is None else {"principal_excess": last.principal_excess}
            numbers = {**excess, "principal_danger": layer.thresholds.principal_danger}
            self.emit(layer.name, kind, f"{reason} what the layer has learned", numbers=numbers)

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
        return moments.not_understood(state, layer.weight)

    def _act(self) -> None:
        """Carry out the decisions, all in one event: starts of descents, switches, merges."""
        wanted: dict[Action, list[FollowedLayer]] = {action: [] for action in Action}
        for name, decision in self.decisions.items():
            if name in self.layers:
                wanted[decision.action].append(self.layers[name])
        for layer in wanted[Action.DESCEND]:
            if layer.state == LayerState.DENSE:
                layer.state = LayerState.DESCENDING
                layer.descent_end = self.steps + max(1, self.config.descent_steps)
                self.acted = True
                reason = self.decisions[layer.name].reason
                numbers = {"rank": layer.rank, "until_step": layer.descent_end}
                self.emit(layer.name, "descend", reason, LayerState.DENSE, LayerState.DESCENDING, numbers)
        dense = [layer for layer in wanted[Action.FACTORIZE] if layer.factored is None]
        dense = [layer for layer in dense if not self.base_reason(layer) and layer.rank < break_even_rank(*layer.shape)]
        bases, errors = self.exact_bases(dense)
        bases = {name: basis for name, basis in bases.items() if errors[name] != float("inf")}
        merges = [layer for layer in wanted[Action.MERGE] if layer.factored is not None]
        self.switch(bases, merges, errors, "decided")

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
    ) -> None:
        """Install factors and merge layers, all in one event."""
        names = (*bases, *(layer.name for layer in merges))
        if not names:
            return
        for listener in self.listeners:
            listener.before_switch(self.steps, names)
        events = []
        with self.clock("switch"), torch.no_grad():
            for name, basis in bases.items():
                layer = self.layers[name]
                before = layer.state
                to_factors_(layer, self.base, basis)
                layer.basis_step = self.steps
                self.end_descent(layer, LayerState.FACTORIZED)
                self.own(layer)
                info = layer.info()
                numbers = {
                    "rank": layer.rank,
                    "reconstruction_error": errors[name],
                    "parameters_before": info.dense_numel,
                    "parameters_after": info.factored_numel,
                }
                events.append((name, "factorize", reason, before, LayerState.FACTORIZED, numbers))
            for layer in merges:
                to_dense_(layer, self.base)
                self.end_descent(layer, LayerState.DENSE)
                events.append((layer.name, "merge", reason, LayerState.FACTORIZED, LayerState.DENSE, {}))
        self.acted = True
        for event in events:
            self.emit(*event)
        for listener in self.listeners:
            listener.after_switch(self.steps, names)

    def _note_stall(self) -> None:
        """A run that can't act says so, loudly, with the numbers."""
        if self.acted or not self.layers or self.config.mode != "auto" or self.analyses % self.config.stall_after:
            return
        blockers = Counter(
            decision.blocker.name if decision.blocker else decision.action.value for decision in self.decisions.values()
        )
        counts = ", ".join(f"{name} blocks {count}" for name, count in blockers.most_common())
        example = "; ".join(f"{name}: {decision.reason}" for name, decision in list(self.decisions.items())[:3])
        self.emit(
            "*",
            "stalled",
            f"{self.analyses} analyses and nothing ever acted: {counts} of {len(self.layers)} layers ({example})",
        )

    def emit(
        self,
        layer: str,
        kind: str,
        reason: str,
        before: LayerState | None = None,
        after: LayerState | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Record an event, log it and tell the listeners."""
        event = Event(step=self.steps, layer=layer, kind=kind, reason=reason, before=before, after=after,
                      numbers=dict(numbers or {}))  # fmt: skip
        self.events.append(event)
        logger.log(logging.WARNING if kind in LOUD else logging.INFO, "%s", event)
        for listener in self.listeners:
            listener.on_event(event)

    # ---- looking -------------------------------------------------------------------------------------

    def layer_report(self, layer: FollowedLayer) -> LayerReport:
        """A layer as of now, as a plain record."""
        m, n = layer.shape
        first = layer.weight
        size = first.element_size()
        dense_state = now_state = 0
        parameters = [first] if layer.factored is None else [layer.factored.module.U, layer.factored.module.V]
        for parameter in parameters:
            for value in self.base.state.get(parameter, {}).values():
                if isinstance(value, Tensor):
                    now_state += value.numel() * value.element_size()
        for value in self.base.state.get(first, {}).values():
            if isinstance(value, Tensor):
                dense_state += (m * n if value.ndim >= 2 else value.numel()) * value.element_size()
        weights = grads = m * n * size
        if layer.factored is not None:
            module = layer.factored.module
            kept = layer.factored.kept or ()
            weights = (module.U.numel() + module.S.numel() + module.V.numel()) * size
            grads = (module.U.numel() + module.V.numel()) * size
            weights += sum(t.numel() * t.element_size() for t in kept)
        return LayerReport(
            name=layer.name, shape=layer.shape, state=layer.state, rank=layer.rank,
            metrics=layer.history[-1] if layer.history else None, decision=self.decisions.get(layer.name),
            weight_bytes=weights, grad_bytes=grads, state_bytes=now_state,
            weight_bytes_dense=m * n * size, grad_bytes_dense=m * n * size, state_bytes_dense=dense_state,
        )  # fmt: skip

    def summary(self) -> Summary:
        """The run as of now, as a plain record."""
        return Summary(
            step=self.steps,
            mode=self.config.mode,
            analyses=self.analyses,
            stall_after=self.config.stall_after,
            layers=tuple(self.layer_report(layer) for layer in self.layers.values()),
            left_alone=tuple(self.left_alone),
            events=tuple(self.events),
            seconds=dict(self.seconds),
            seconds_total=0.0 if self.started is None else time.perf_counter() - self.started,
        )

    def start_clock(self) -> None:
        """The first step starts the total that shares of time are taken of."""
        if self.started is None:
            self.started = time.perf_counter()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Host seconds by phase: for the report only, no decision looks at them."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    # ---- saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights and the base optimizer's state, as tensors and plain values."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "analyses": self.analyses,
            "acted": self.acted,
            "events": [event.as_plain() for event in self.events],
            "layers": {name: self.tracker.layer_state(layer) for name, layer in self.layers.items()},
        }

    def check_saved(self, saved: Mapping[str, Any], base_state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if loading ``saved`` and the base optimizer's state could not work."""
        if saved["version"] > STATE_VERSION:
            raise ValueError(
                f"saved by a newer svd_optim: state version {saved['version']}, this one reads {STATE_VERSION}"
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
        self.events = [Event.from_plain(values) for values in saved["events"]]
        self.decisions = {}
        for name, state in saved["layers"].items():
            layer = self.layers[name]
            self.tracker.load_layer_state(layer, state)
            if layer.factored is not None:
                self.own(layer)
