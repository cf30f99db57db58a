"""SubspaceAwareOptimizer: the wrapper, an optimizer in every way a training loop touches."""

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
from .factors.surgery import saved_factors
from .linalg import Basis
from .records import Events, LayerMetrics, LayerReports, Plan, Summary, clean
from .tracking import inventory, loading, manual, protecting
from .tracking.controller import Controller
from .tracking.layer import TrackedLayer
from .tracking.listeners import Listener
from .tracking.selection import select_layers
from .tracking.step import BaseCall, StepInProgress
from .tracking.transactions import transaction

logger = logging.getLogger(__name__)


class _RestoreHook:
    """Before ``model.load_state_dict``: give the model the structure of what is loaded.

    Holds the optimizer weakly, and a copied or pickled model does not take the optimizer along.
    """

    def __init__(self, optimizer: SubspaceAwareOptimizer | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def __call__(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.config.mode != "observe":
            optimizer._restore_structure(state_dict, prefix)

    def __reduce__(self) -> tuple[type[_RestoreHook], tuple[()]]:
        return _RestoreHook, ()


def wrappers_of(model: nn.Module) -> list[SubspaceAwareOptimizer]:
    """The living wrappers that were given ``model`` or a part of it."""
    hooks = [hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values()]
    hooks = [getattr(hook, "hook", hook) for hook in hooks]
    found = [hook.optimizer() for hook in hooks if isinstance(hook, _RestoreHook)]
    return [optimizer for optimizer in found if optimizer is not None]


class SubspaceAwareOptimizer(Optimizer):
    """Wraps an optimizer: the same training loop, with its weights' subspaces watched and shrunk.

        optimizer = SubspaceAwareOptimizer(torch.optim.Muon(matrices, lr=0.02), model)

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own. A factorized layer has
    two parameters, U (m, k) and V (n, k), where its weight (m, n) was; global gradient clipping goes
    on to mean what it meant (see ``layers.py``).

    Args:
        base_optimizer: any ``torch.optim.Optimizer``. One whose state is not understood is measured
            and never factorized, and says so in ``why()``.
        model: the module whose ``nn.Linear`` layers it trains (or a part of which).
        config: see :class:`SubspaceConfig`.
        listeners: see :class:`Listener`; :class:`ConsoleReport` prints tables.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no parameter of the optimizer is in the model, or a rank does not fit a layer.
    """

    # GradScaler would hand over scaled gradients and apply steps with Inf if this were the base's.
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
        # Optimizer.__init__ wants parameters, and its __setstate__ writes into the base's defaults.
        for name in ("step_pre", "step_post", "state_dict_pre", "state_dict_post",
                     "load_state_dict_pre", "load_state_dict_post"):  # fmt: skip
            setattr(self, f"_optimizer_{name}_hooks", OrderedDict())
        self._patch_step_function()

    def _track_layers(self, first: bool) -> None:
        """Find the layers to follow; those already tracked stay as they are."""
        selection = select_layers(self.model, self.param_groups, self.config)
        total = sum(len(group["params"]) for group in self.param_groups)
        if first and selection.unknown:
            listed = "; ".join(selection.unknown[:5]) + ("; ..." if len(selection.unknown) > 5 else "")
            if len(selection.unknown) == total:
                raise ValueError(
                    f"none of the optimizer's parameters is in the model: {listed}. Is it the right model?"
                )
            logger.warning(
                "%d parameters of the optimizer are not in the model: %s", len(selection.unknown), clean(listed)
            )
        self._controller.track(selection)
        unused = [glob for glob in self.config.overrides if not any(fnmatchcase(name, glob) for name in self.layers)]
        if first and self.layers and unused:
            logger.warning("overrides that match no tracked layer: %s", clean(", ".join(unused)))
        if first and not self.layers:
            reasons = "; ".join(f"{x.name}: {x.reason}" for x in selection.skipped[:5]) or "it holds no matrix"
            logger.warning(
                "no layer to follow in the optimizer's parameters (%s); it will only be passed through",
                clean(reasons),
            )

    def _attach(self) -> None:
        """Tie model and optimizer together by what a copy or a pickle must not carry over."""
        hooks = self.model._load_state_dict_pre_hooks
        for key, wrapped in list(hooks.items()):
            hook = getattr(wrapped, "hook", wrapped)
            if isinstance(hook, _RestoreHook) and hook.optimizer() is None:
                del hooks[key]  # came along with a copy, and serves nobody
        self.model.register_load_state_dict_pre_hook(_RestoreHook(self))
        attachment = self._controller.attachment
        for layer in self.layers.values():
            attachment.claim(layer)
            if layer.factorized:
                attachment.attach(layer, self.steps)
        attachment.detach_after(self)

    # ---- being an Optimizer ----------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own list."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's own dict; nothing of ours is in it."""
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
        """As of the base optimizer; layers among the new parameters are tracked."""
        self.base_optimizer.add_param_group(param_group)
        self._track_layers(first=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of the base optimizer; sketches of factorized layers are dropped too."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)
        self._controller.attachment.drop_sketches(list(self.layers.values()))

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with one more key, ``"svd_optim"``: tensors and plain values only."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = dict(self.base_optimizer.state_dict())
        state_dict["svd_optim"] = loading.save_run(self._controller)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, here or of the bare base optimizer.

        Layers that were factorized then are factorized now (from the weights that are there, if the
        model was not loaded yet) and the other way round.

        Raises:
            ValueError: the state is of other layers or of a newer version; nothing was changed.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        base_state = {k: v for k, v in state_dict.items() if k != "svd_optim"}
        own = state_dict.get("svd_optim")
        if own is None:
            self.base_optimizer.load_state_dict(base_state)
        else:
            run = self._controller
            loading.check_saved(run, own, base_state)
            modules = [layer.module for layer in self.layers.values()]
            with transaction(modules, [run.base], run.records(), [run.journal]):
                loading.restore_layers(run, loading.saved_ranks(own))
                run.base.load_state_dict(base_state)
                loading.load_run(run, own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _restore_structure(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Give tracked layers the structure that a model's state dict has."""
        ranks: dict[str, int | None] = {}
        saved: dict[str, Basis] = {}
        dense: dict[str, tuple[torch.Tensor]] = {}
        for name in self.layers:
            key = prefix if self.layers[name].module is self.model else f"{prefix}{name}."
            factors = saved_factors(state_dict, key)
            if factors is not None:
                ranks[name], saved[name] = factors.S.numel(), factors
            elif f"{key}weight" in state_dict:
                ranks[name], dense[name] = None, (state_dict[f"{key}weight"],)
        protecting.release_unless_held(self._controller, {**saved, **dense})
        loading.restore_layers(self._controller, ranks, saved)

    # ---- one step --------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer; before it gradients are measured, after it layers move on.

        A step without gradients, or with every learning rate 0, is the base optimizer's alone.
        """
        controller = self._controller
        with StepInProgress(controller) as step:
            base = BaseCall(step, closure)
            if closure is None:
                step.measure()
            base.run_pre_hooks()
            if closure is None:
                step.enter_factors()
            loss = base.run()  # where there is a closure it measures and enters, as soon as there are gradients
            step.leave_factors()
            if closure is not None:
                controller.guard.observe(loss)
            step.advance()
            base.run_post_hooks()
        controller.journal.raise_deferred()
        return loss

    def observe_loss(self, loss: torch.Tensor | float) -> None:
        """Tell the loss guard this step's training loss; not needed where ``step`` is given a closure.

        Nothing is read from the device here: losses are looked at once an analysis.

        Args:
            loss: a number or a tensor of one element, before or after ``step()``, once a step. Single
                ones that are NaN or Inf are passed over.

        Raises:
            TypeError: it is something else.
        """
        if not self._controller.guard.observe(loss):
            raise TypeError(f"a loss must be a number or a tensor of one element, got {loss!r}")

    # ---- changing layers directly ---------------------------------------------------------------------------

    def factorize_(self, layers: str | Iterable[str] = "all", rank: int | None = None) -> list[str]:
        """Factorize layers now, whatever the policy says: truncates at once, without a descent.

        Args:
            layers: names or globs, or ``"all"``; layers that are factorized already are left as they are.
            rank: instead of the layers' target ranks. The block of a layer that is protected stays
                what it is, and has to fit.

        Returns:
            The names of the layers that were factorized.

        Raises:
            RuntimeError: in observe mode, or the base optimizer's state can't be moved.
            ValueError: no layer matches, a rank is out of range, not below break-even or too low for a
                protected block, or a weight holds NaN or Inf. Nothing was changed.
        """
        names = manual.factorize(self._controller, layers, rank)
        self._controller.journal.raise_deferred()
        return names

    def merge_(self, layers: str | Iterable[str] = "all") -> list[str]:
        """Make factorized layers dense again now, with their moments; a descent under way is called off.

        Args:
            layers: names or globs, or ``"all"``; dense layers are left as they are.

        Returns:
            The names of the layers that were merged.

        Raises:
            RuntimeError: in observe mode.
            ValueError: no layer matches.
        """
        names = manual.merge(self._controller, layers)
        self._controller.journal.raise_deferred()
        return names

    def protect_(self, layers: str | Iterable[str] = "all", rank: int | None = None) -> list[str]:
        """Keep the principal blocks of layers from moving, from now until :meth:`release_`.

        U_k^T W V_k stays what it is at this moment, with U_k, V_k the leading singular vectors of now:
        whatever the base optimizer does, weight decay included, everything else trains. For
        fine-tuning a model that is to keep what it knows. It stays to 1e-5 of its size in float32; a dense
        bfloat16 or float16 weight can hold it to the rounding of its entries only, some 1e-3, factors
        to 1e-5 in their float32 masters. Loading a model with another block ends protection, with an event.

        Args:
            layers: names or globs, or ``"all"``.
            rank: how many directions to protect; default: the layers' target ranks, in factors the
                whole core.

        Returns:
            The names of the layers.

        Raises:
            RuntimeError: in observe mode.
            ValueError: no layer matches, a rank is out of range, or a weight holds NaN or Inf. Nothing
                was changed.
        """
        names = manual.protect(self._controller, layers, rank)
        self._controller.journal.raise_deferred()
        return names

    def release_(self, layers: str | Iterable[str] = "all") -> list[str]:
        """End the protection of layers, whoever began it.

        Where a danger began it, it does not begin again before this danger is over and another one comes.

        Returns:
            The names of the layers that were protected.

        Raises:
            RuntimeError: in observe mode.
            ValueError: no layer matches.
        """
        names = manual.release_layers(self._controller, layers)
        self._controller.journal.raise_deferred()
        return names

    # ---- reading ---------------------------------------------------------------------------

    def add_listener(self, listener: Listener) -> None:
        """Call ``listener`` from now on. Listeners are not copied, pickled or saved with the optimizer."""
        listener.on_start(self)
        self._controller.journal.listeners.append(listener)

    def plan(self) -> Plan:
        """How the parameter budget is allocated as of now: ``rich.print`` and notebooks show it as a table.

        Revised until a layer starts its descent. Before anything was measured it is nearly uniform.
        """
        return self._controller.plan()

    def resident_bytes(self) -> dict[str, int]:
        """Bytes that monitoring each tracked layer keeps resident, besides weight, gradient and optimizer state."""
        return {name: inventory.monitoring_bytes(layer) for name, layer in self.layers.items()}

    def why(self) -> LayerReports:
        """Per layer: state, the condition that blocks, its value, threshold and distance. A list, shown as a table."""
        return LayerReports(inventory.report(layer, self.base_optimizer) for layer in self.layers.values())

    def summary(self) -> Summary:
        """The run as of now, as a plain record; ``rich.print`` and notebooks show it as a table."""
        return self._controller.summary()

    def metrics(self) -> dict[str, float]:
        """What the last analysis found, as one flat dict of numbers: see :meth:`Summary.metrics`.

        Reads nothing from the device.
        """
        return self.summary().metrics()

    def history(self, layer: str) -> dict[str, torch.Tensor]:
        """A layer's last analyses, oldest first: each number of :class:`LayerMetrics` over them, NaN where undefined.

        Returns:
            By the metric's name, (analyses,) in float64, on the CPU. The last 64 are kept.

        Raises:
            KeyError: no such layer is tracked.
        """
        if layer not in self.layers:
            raise KeyError(f"no tracked layer is called {layer!r}; tracked: {', '.join(list(self.layers)[:5])}, ...")
        rows = [vars(metrics) for metrics in self.layers[layer].history]
        names = [field.name for field in fields(LayerMetrics)]
        return {
            name: torch.tensor([math.nan if row[name] is None else row[name] for row in rows], dtype=torch.float64)
            for name in names
        }

    @property
    def layers(self) -> dict[str, TrackedLayer]:
        """The tracked layers by name, with their cached bases."""
        return self._controller.layers

    @property
    def events(self) -> Events:
        """Everything that happened to the layers, oldest first. A list, shown as a table."""
        return self._controller.journal.events

    @property
    def steps(self) -> int:
        """Steps that counted: with gradients and a learning rate above 0."""
        return self._controller.steps
