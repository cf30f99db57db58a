"""The connection between factorized modules and the optimizer that trains them: which gradients they compute."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..config import SubspaceConfig
from ..factors.claims import Owner, claim, disclaim
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorState
from ..linalg import full_precision
from .layer import TrackedLayer
from .replacement import Replacement, replace_parameters_
from .sketches import draw_sketch


def _detach(modules: Mapping[int, nn.Module], owner: object) -> None:
    for module in modules.values():
        if isinstance(module, FactorizedLinear) and module.owner is owner:
            module.track_tangent(None)


class Attachment:
    """The modules that compute the gradients of K and L for one optimizer, in one process."""

    def __init__(self, config: SubspaceConfig, base: Optimizer) -> None:
        self.config = config
        self.base = base
        self._reset()

    def _reset(self) -> None:
        self._owner = Owner(self.base)  # by which a module knows whose gradients it delivers
        self._modules: dict[int, nn.Module] = {}  # by identity

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
        _detach({id(layer.module): layer.module}, self._owner)

    @full_precision()
    def attach(self, layer: TrackedLayer, step: int) -> None:
        """Make a factorized layer compute the gradients that the tangent step needs."""
        assert layer.factors is not None
        layer.factors.module.track_tangent(draw_sketch(layer, step, self.config), self._owner)
        self._modules[id(layer.module)] = layer.module

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
        """Drop the sketches, together with the gradients that they belong to."""
        for layer in layers:
            if layer.factors is not None and layer.factors.module.sketch is not None:
                layer.factors.module.sketch.grad = None

    def renew_sketches(self, layers: list[TrackedLayer], step: int) -> None:
        """Draw new sketch vectors, for the next interval."""
        for layer in layers:
            module = layer.module
            layer.outside = None
            if isinstance(module, FactorizedLinear) and module.Omega is not None:
                module.Omega.copy_(draw_sketch(layer, step, self.config))
