"""SubspaceAwareOptimizer: the wrapper, with the complete interface of torch.optim.Optimizer."""

from __future__ import annotations

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .config import SubspaceConfig
from .records import Events, LayerMetrics, LayerReports, Plan, Summary, clean
from .tracking import inventory, loading, manual
from .tracking.controller import Controller
from .tracking.layer import TrackedLayer
from .tracking.listeners import Listener
from .tracking.selection import select_layers
from .tracking.step import BaseCall, StepInProgress

logger = logging.getLogger(__name__)


class _RestoreHook:
    """Runs before ``model.load_state_dict``: converts the model's layers to the structure of the state dict.

    Has a weak reference to the optimizer, which is not copied or pickled with the model.
    """

    def __init__(self, optimizer: SubspaceAwareOptimizer | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.config.mode != "observe":
            loading.restore_structure(optimizer._controller, optimizer.model, state_dict, prefix)

    def __reduce__(self) -> tuple[type[_RestoreHook], tuple[()]]:
        return _RestoreHook, ()


def wrappers_of(model: nn.Module) -> list[SubspaceAwareOptimizer]:
    """The existing wrappers of ``model`` or of a part of it."""
    hooks = [hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values()]
    hooks = [getattr(hook, "hook", hook) for hook in hooks]
    found = [hook.optimizer() for hook in hooks if isinstance(hook, _RestoreHook)]
    return [optimizer for optimizer in found if optimizer is not None]


class SubspaceAwareOptimizer(Optimizer):
    """Wraps an optimizer: monitors the singular subspaces of the weights, and factorizes layers during training.

        optimizer = SubspaceAwareOptimizer(torch.optim.Muon(matrices, lr=0.02), model)

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own. A factorized layer has two parameters in
    them, U (m, k) and V (n, k), in place of its weight (m, n); global gradient clipping keeps its meaning
    (:mod:`svd_optim.factors.linear`). While it lives, the step of any other ``torch.optim.Optimizer`` on factors, the
    base optimizer's own ``step()`` included, raises ``RuntimeError``. What is not of that class can't be seen: it would
    get the gradients of K and L, and never move S.

    Args:
        base_optimizer: any ``torch.optim.Optimizer``. If its state can't be moved into factors, layers are measured
            but never factorized, and ``why()`` reports it (:mod:`svd_optim.factors.moments`).
        model: the module whose ``nn.Linear`` layers it trains, all or some of them.
        config: see :class:`SubspaceConfig`.
        listeners: see :class:`Listener`; :class:`ConsoleReport` prints tables.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: no parameter of the optimizer is in the model, or a rank does not fit a layer.
    """

    # With True, as of fused optimizers, GradScaler would pass scaled gradients and not skip steps with Inf.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        config: SubspaceConfig | None = None,
        *,
        listeners: Iterable[Listener] = (),
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        if isinstance(base_optimizer, SubspaceAwareOptimizer):
            raise TypeError("base_optimizer is a SubspaceAwareOptimizer already; wrap the optimizer inside it")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if config is not None and not isinstance(config, SubspaceConfig):
            raise TypeError(f"config must be a SubspaceConfig, got {type(config).__name__}")
        self.base_optimizer = base_optimizer
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
        self.config = config or SubspaceConfig()
        self._controller = Controller(base_optimizer, self.config)
        self._init_hooks()
        self._track_layers(first=True)
        self._attach()
        for listener in listeners:
            self.add_listener(listener)

    def _init_hooks(self) -> None:
        # Optimizer.__init__ requires parameters, and its __setstate__ would modify the base's defaults.
        for name in ("step_pre", "step_post", "state_dict_pre", "state_dict_post",
                     "load_state_dict_pre", "load_state_dict_post"):  # fmt: skip
            setattr(self, f"_optimizer_{name}_hooks", OrderedDict())
        for name in ("train", "eval"):  # of schedule-free optimizers: trainers call them where they find them
            if hasattr(self.base_optimizer, name):
                setattr(self, name, getattr(self.base_optimizer, name))
        self._patch_step_function()

    def _track_layers(self, first: bool) -> None:
        """Select the layers to track; those already tracked stay as they are."""
        selection = select_layers(self.model, self.param_groups, self.config)
        if first and selection.unknown:
            examples = "; ".join(selection.unknown[:5]) + ("; ..." if len(selection.unknown) > 5 else "")
            if len(selection.unknown) == sum(len(group["params"]) for group in self.param_groups):
                message = f"none of the optimizer's parameters is in the model: {examples}. Is it the right model?"
                raise ValueError(message)
            message = "%d parameters of the optimizer are not in the model: %s"
            logger.warning(message, len(selection.unknown), clean(examples))
        self._controller.track(selection)
        unused = [glob for glob in self.config.overrides if not any(fnmatchcase(name, glob) for name in self.layers)]
        if first and self.layers and unused:
            logger.warning("overrides that match no tracked layer: %s", clean(", ".join(unused)))
        if first and not self.layers:
            reasons = "; ".join(f"{x.name}: {x.reason}" for x in selection.skipped[:5]) or "it holds no matrix"
            message = "no layer to track in the optimizer's parameters (%s); the base optimizer runs unchanged"
            logger.warning(message, clean(reasons))

    def _attach(self) -> None:
        """Connect model and optimizer by hooks, which are not copied or pickled."""
        hooks = self.model._load_state_dict_pre_hooks
        for key, hook in [(key, getattr(wrapped, "hook", wrapped)) for key, wrapped in hooks.items()]:
            if isinstance(hook, _RestoreHook) and hook.optimizer() is None:
                del hooks[key]  # from a copied model, without an optimizer
        self.model.register_load_state_dict_pre_hook(_RestoreHook(self))
        attachment = self._controller.attachment
        for layer in self.layers.values():
            attachment.claim(layer)
            if layer.factorized:
                attachment.attach(layer, self.steps)
        attachment.detach_after(self)
        for taps in (self._controller.taps, self._controller.slopes):
            weakref.finalize(self, taps.remove).atexit = False

    # ---- the interface of Optimizer ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's own dict; this wrapper stores nothing in it."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's own dict."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put a bound `step` on the instance: a copy that kept it would step the original.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_hooks()
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base optimizer, and track the layers among its parameters."""
        self.base_optimizer.add_param_group(param_group)
        self._track_layers(first=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and with them the sketches of factorized layers and what was sampled of dense ones."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)
        self._controller.clear_taps()
        self._controller.attachment.drop_sketches(list(self.layers.values()))

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with the additional key ``"svd_optim"``: tensors and plain values only."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = dict(self.base_optimizer.state_dict())
        state_dict["svd_optim"] = loading.save_run(self._controller)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, or a state dict of the bare base optimizer.

        Layers are factorized or made dense as in the saved state; if the model was not loaded before, by truncating
        its present weights. Then :meth:`step` raises until the saved factors are there. A state without the wrapper's
        own part loads into the base optimizer alone; where that loses a run's measurements, a warning says so.

        Raises:
            ValueError: the state has other layers or another version; nothing was changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base_state = {k: v for k, v in state_dict.items() if k != "svd_optim"}
        own = state_dict.get("svd_optim")
        if own is None:
            self.base_optimizer.load_state_dict(base_state)
            loading.warn_of_missing_run(self._controller, base_state)
        else:
            loading.restore_run(self._controller, own, base_state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer. Gradients are measured before it; layers descend, switch etc. after it.

        In a step without gradients, or with every learning rate 0, only the base optimizer acts, and it does not count.

        Returns:
            The loss if there is a closure, else what the base optimizer returns.

        Raises:
            RuntimeError: a state was loaded here, but not the factors that belong to it into the model; nothing moved.
        """
        controller = self._controller
        if controller.looks_for_layers():  # what was frozen, freed, tied or added since is seen then
            self._track_layers(first=False)
        with StepInProgress(controller) as step:
            base = BaseCall(step, closure)
            if closure is None:
                step.measure()
            base.run_pre_hooks()
            if closure is None:
                step.enter_factors()
            loss = base.run()  # with a closure, it measures and enters the factors after the first call
            step.leave_factors()
            if closure is not None and step.batches is not None:
                controller.observe_loss(loss)
            step.advance()
            base.run_post_hooks()
        controller.journal.raise_deferred()
        return loss

    def observe_loss(self, loss: torch.Tensor | float, *, scale: float = 1.0) -> None:
        """Pass this step's training loss to the loss guard; not needed if ``step`` gets a closure.

        Call it once per step, before or after ``step()``. No host-device synchronization: losses are tested once per
        analysis.

        Args:
            loss: a number or a tensor with one element. Isolated NaN or Inf values are ignored.
            scale: what it was multiplied by for ``backward()``, as by ``torch.amp.GradScaler.get_scale()``: what ranks
                cost is predicted by gradients inside the model, which no scaler divides again. Before ``step()``, then.

        Raises:
            TypeError: ``loss`` is something else.
            ValueError: ``scale`` is not above 0, or not finite.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"observe_loss: scale must be above 0 and finite, got {scale!r}")
        if not self._controller.observe_loss(loss):
            raise TypeError(f"a loss must be a number or a tensor of one element, got {loss!r}")
        self._controller.loss_scale = float(scale)

    # ---- changing layers directly --------------------------------------------------------------------

    def _when_told(self, names: list[str]) -> list[str]:
        self._controller.journal.raise_deferred()  # of listeners
        return names

    def factorize_(
        self, layers: str | Iterable[str] = "all", rank: int | None = None, *, max_loss_increase: float | None = None
    ) -> list[str]:
        """Factorize layers now, whatever the policy decides: by truncation, without a descent.

        Args:
            layers: names or globs, or ``"all"``; layers that are already factorized stay as they are.
            rank: replaces the layers' target ranks. It must be large enough for the block of a protected layer, which
                is preserved.
            max_loss_increase: the lowest ranks in all that are predicted to raise the loss by no more than this share
                of it: a last line of a training script. Default: what is left of the configuration's. Layers where no
                rank below break-even does, or whose state can't be moved, stay dense. Predicted as of a likelihood,
                such as cross-entropy, averaged over all positions (:mod:`svd_optim.linalg.loss_metric`).

        Returns:
            The names of the layers that were factorized.

        Raises:
            RuntimeError: in observe mode, or the base optimizer's state can't be moved into factors.
            TypeError: ``rank`` is not an integer, or ``layers`` are not names.
            ValueError: no layer matches, a rank is out of range, not below break-even or too low for a protected
                block, a weight contains NaN or Inf, or ``max_loss_increase`` is given before a loss was told or the
                layers were sampled. Nothing was changed.
        """
        return self._when_told(manual.factorize(self._controller, layers, rank, max_loss_increase))

    def merge_(self, layers: str | Iterable[str] = "all") -> list[str]:
        """Make factorized layers dense again now, with their moments; a descent in progress is canceled.

        Args:
            layers: names or globs, or ``"all"``; dense layers stay as they are.

        Returns:
            The names of the layers that were merged.

        Raises:
            RuntimeError: in observe mode.
            TypeError: ``layers`` are not names.
            ValueError: no layer matches.
        """
        return self._when_told(manual.merge(self._controller, layers))

    def protect_(self, layers: str | Iterable[str] = "all", rank: int | None = None) -> list[str]:
        """Hold the principal blocks of layers fixed, from now until :meth:`release_`.

        U_k^T W V_k is kept, with U_k (m, k), V_k (n, k) the present leading singular vectors; everything else trains,
        whatever the base optimizer does, weight decay included. For fine-tuning a model without forgetting. The
        relative error of the block is at most 1e-5 in float32, and for factors in their float32 masters; a dense
        bfloat16 or float16 weight can represent it only up to the rounding of its entries, some 1e-3. Loading a model
        with another block ends protection, with an event.

        Args:
            layers: names or globs, or ``"all"``.
            rank: number of singular directions to protect; default: the layers' target ranks, or all those of a
                factorized layer.

        Returns:
            The names of the layers.

        Raises:
            RuntimeError: in observe mode.
            TypeError: ``rank`` is not an integer, or ``layers`` are not names.
            ValueError: no layer matches, a rank is out of range, or a weight contains NaN or Inf. Nothing was changed.
        """
        return self._when_told(manual.protect(self._controller, layers, rank))

    def release_(self, layers: str | Iterable[str] = "all") -> list[str]:
        """End the protection of layers, manual or automatic.

        Automatic protection does not begin again before the present danger is over.

        Args:
            layers: names or globs, or ``"all"``.

        Returns:
            The names of the layers that were protected.

        Raises:
            RuntimeError: in observe mode.
            TypeError: ``layers`` are not names.
            ValueError: no layer matches.
        """
        return self._when_told(manual.release_layers(self._controller, layers))

    # ---- reporting -----------------------------------------------------------------------------------

    def add_listener(self, listener: Listener) -> None:
        """Add a listener. Listeners are not copied, pickled or saved with the optimizer."""
        listener.on_start(self)
        self._controller.journal.listeners.append(listener)

    def plan(self, *, budget: float | None = None, max_loss_increase: float | None = None) -> Plan:
        """The ranks that the target allows at present; ``rich.print`` and notebooks show them as a table.

        A rank is revised until its layer starts to descend. Before the first measurement the plan is nearly uniform.

        Args:
            budget, max_loss_increase: what another target would mean (as of :class:`SubspaceConfig`). With the metric
                ``"loss"`` the plan has what it costs.
        """
        return self._controller.plan(budget=budget, max_loss_increase=max_loss_increase)

    def resident_bytes(self) -> dict[str, int]:
        """Resident bytes due to monitoring, besides weight, gradient and optimizer state, by layer name."""
        return {name: inventory.monitoring_bytes(layer) for name, layer in self.layers.items()}

    def why(self) -> LayerReports:
        """The current state of each layer, with the condition that blocks, its value, threshold and distance."""
        return LayerReports(inventory.report(layer, self.base_optimizer) for layer in self.layers.values())

    def summary(self) -> Summary:
        """The current state of the run, as a plain record; ``rich.print`` and notebooks show it as a table."""
        return self._controller.summary()

    def metrics(self) -> dict[str, float]:
        """The last analysis as a flat dict of numbers: see :meth:`Summary.metrics`. No host-device synchronization."""
        return self.summary().metrics()

    def history(self, layer: str) -> dict[str, torch.Tensor]:
        """The last analyses of the layer called ``layer``, oldest first: each field of :class:`LayerMetrics`.

        Returns:
            By field: (analyses,) in float64, on the CPU, NaN where undefined. The last 64 or ``patience`` are kept.

        Raises:
            KeyError: no such layer is tracked.
        """
        if layer not in self.layers:
            raise KeyError(f"no tracked layer is called {layer!r}; tracked: {', '.join(list(self.layers)[:5])}, ...")
        columns = {x.name: [vars(row)[x.name] for row in self.layers[layer].history] for x in fields(LayerMetrics)}
        numbers = {name: [math.nan if x is None else x for x in column] for name, column in columns.items()}
        return {name: torch.tensor(xs, dtype=torch.float64, device="cpu") for name, xs in numbers.items()}

    @property
    def layers(self) -> dict[str, TrackedLayer]:
        """The tracked layers by name, with their cached bases."""
        return self._controller.layers

    @property
    def events(self) -> Events:
        """The events of the run, oldest first; the last 10,000 are kept."""
        return self._controller.journal.events

    @property
    def steps(self) -> int:
        """Number of optimizer steps that counted: with gradients and a learning rate above 0."""
        return self._controller.steps
