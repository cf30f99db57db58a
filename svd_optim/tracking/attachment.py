"""The connection between factorized modules and the optimizer that trains them: which gradients they compute.

Those are of K and L, and make sense to nobody else: while that optimizer lives, no other ``torch.optim.Optimizer`` may
step on the factors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..config import SubspaceConfig
from ..factors.claims import Owner, claim, disclaim
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorState
from ..linalg import full_precision
from .layer import TrackedLayer
from .replacement import Replacement, replace_parameters_
from .sketches import draw_sketch


def _detach(modules: Mapping[str, nn.Module], owner: object) -> None:
    for module in modules.values():
        if isinstance(module, FactorizedLinear) and module.owner is owner:
            module.track_tangent(None)
            for factor in (module._parameters.get("U"), module._parameters.get("V")):
                if factor is not None:
                    factor.grad = None  # of K or L, which the next optimizer would take for that of U or V


class Attachment:
    """The modules that compute the gradients of K and L for one optimizer, in one process."""

    def __init__(self, config: SubspaceConfig, base: Optimizer) -> None:
        self.config = config
        self.base = base
        self._reset()

    def _reset(self) -> None:
        self._owner = Owner(self.base)  # by which a module knows whose gradients it delivers
        self._modules: dict[str, nn.Module] = {}  # by name; some may be dense again
        self._guarded = False  # whether others are kept from stepping on factors
        self._stepping = False  # inside the base optimizer's own step

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "base": self.base}  # a copy has other modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config, self.base = state["config"], state["base"]
        self._reset()

    def claim(self, layer: TrackedLayer) -> None:
        """The layer's module is trained by this optimizer; nobody else may change its form."""
        claim(layer.module, self._owner)

    def let_go(self, layer: TrackedLayer) -> None:
        """It no longer is, and gives true gradients."""
        disclaim(layer.module, self._owner)
        _detach({layer.name: layer.module}, self._owner)

    @full_precision()
    def attach(self, layer: TrackedLayer, step: int) -> None:
        """Make a factorized layer compute the gradients that the tangent step needs."""
        assert layer.factors is not None
        layer.factors.module.track_tangent(draw_sketch(layer, step, self.config), self._owner)
        self._modules[layer.name] = layer.module
        self._guard()

    def adopt(self, layer: TrackedLayer, module: FactorizedLinear, step: int) -> None:
        """Attach a layer that was factorized before its optimizer was wrapped, and remove S from the optimizer."""
        self.base.state.pop(module.S, None)
        factors = [module.U, module.S, module.V]
        replace_parameters_(self.base, [Replacement(factors, [module.U, module.V], ["U", "V"])])
        layer.factors = FactorState(layer.name, module)
        self.attach(layer, step)

    def detach_after(self, optimizer: Optimizer) -> None:
        """Return the modules to their true gradients once ``optimizer`` is garbage-collected."""
        weakref.finalize(optimizer, _detach, self._modules, self._owner).atexit = False

    def drop_sketches(self, layers: list[TrackedLayer]) -> None:
        """Drop the sketches, together with the gradients that they belong to; see to T, if U was written to."""
        for layer in layers:
            if layer.factors is not None and layer.factors.module.sketch is not None:
                layer.factors.module.sketch.grad = None
                layer.factors.module.orthonormalizer()

    def renew_sketches(self, layers: list[TrackedLayer], step: int) -> None:
        """Draw new sketch vectors, for the next interval."""
        for layer in layers:
            module = layer.module
            layer.outside = None
            if isinstance(module, FactorizedLinear) and module.Omega is not None:
                module.Omega.copy_(draw_sketch(layer, step, self.config))

    # ---- steps of others -----------------------------------------------------------------------------

    def _guard(self) -> None:
        """From the first factorized layer on, and as long as this object lives, look at every optimizer's step."""
        if self._guarded:
            return
        self._guarded = True
        weak = weakref.WeakMethod(self._refuse)

        def before_step(optimizer: Optimizer, *_: object) -> None:
            if (refuse := weak()) is not None:
                refuse(optimizer)

        weakref.finalize(self, register_optimizer_step_pre_hook(before_step).remove).atexit = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, the base optimizer steps on K and L, by itself or by optimizers that it consists of."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _refuse(self, optimizer: Optimizer) -> None:
        """Raise ``RuntimeError`` if the step that ``optimizer`` is about to take would be one on our factors."""
        groups = self.base.param_groups
        leads_to_us = optimizer.param_groups is groups and optimizer is not self.base  # the wrapper, or one around it
        if self._stepping or leads_to_us:
            return
        factors = {
            id(module._parameters.get(factor)): name
            for name, module in self._modules.items()
            if isinstance(module, FactorizedLinear) and module.owner is self._owner
            for factor in ("U", "S", "V")
        }
        for group in optimizer.param_groups:
            if not factors.keys().isdisjoint(map(id, group["params"])):
                name = next(factors[id(p)] for p in group["params"] if id(p) in factors)
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step() would train the factors of layer {name!r}, whose gradients are "
                    f"those of K and L while a SubspaceAwareOptimizer trains it, and would never move S. Call the "
                    f"step() of the SubspaceAwareOptimizer; or merge_({name!r}) there, or delete it, and build another "
                    f"optimizer on the parameters that the model has then"
                )
