"""What ties factorized modules to the optimizer that trains them: the gradients that they deliver."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..config import SubspaceConfig
from ..factors.claims import Owner, claim, disclaim
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorState
from .layer import TrackedLayer
from .replacement import replace_parameters_
from .sketches import draw_sketch


def _detach(modules: list[nn.Module], owner: object) -> None:
    for module in modules:
        if isinstance(module, FactorizedLinear) and module.owner is owner:
            module.track_tangent(None)


class Attachment:
    """The modules that deliver the gradients of K and L to one optimizer, in one process."""

    def __init__(self, config: SubspaceConfig, base: Optimizer) -> None:
        self.config = config
        self.base = base
        self._forget()

    def _forget(self) -> None:
        self._owner = Owner(self.base)  # by which a module knows whose gradients it delivers
        self._modules: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "base": self.base}  # a copy's modules are other ones

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config, self.base = state["config"], state["base"]
        self._forget()

    def claim(self, layer: TrackedLayer) -> None:
        """The layer's module is trained by this optimizer; nobody else may change its form."""
        claim(layer.module, self._owner)

    def disclaim(self, layer: TrackedLayer) -> None:
        """It no longer is."""
        disclaim(layer.module, self._owner)

    def attach(self, layer: TrackedLayer, step: int) -> None:
        """From now on the factorized layer delivers the gradients that the tangent step takes."""
        assert layer.factors is not None
        layer.factors.module.track_tangent(draw_sketch(layer, step, self.config), self._owner)
        if not any(layer.module is module for module in self._modules):
            self._modules.append(layer.module)

    def adopt(self, layer: TrackedLayer, module: FactorizedLinear, step: int) -> None:
        """Attach a layer that was factorized before its optimizer came; S is no longer a parameter of this one."""
        self.base.state.pop(module.S, None)
        replace_parameters_(self.base, [module.U, module.S, module.V], [module.U, module.V], ["U", "V"])
        layer.factors = FactorState(layer.name, module)
        self.attach(layer, step)

    def detach_after(self, optimizer: Optimizer) -> None:
        """Give the modules back their true gradients once ``optimizer`` is gone."""
        weakref.finalize(optimizer, _detach, self._modules, self._owner).atexit = False

    def drop_sketches(self, layers: list[TrackedLayer]) -> None:
        """Sketches go with the gradients they belong to."""
        for layer in layers:
            if layer.factors is not None and layer.factors.module.sketch is not None:
                layer.factors.module.sketch.grad = None

    def renew_sketches(self, layers: list[TrackedLayer], step: int) -> None:
        """Another sketch for each interval."""
        for layer in layers:
            module = layer.module
            layer.outside = None
            if isinstance(module, FactorizedLinear) and module.Omega is not None:
                module.Omega.copy_(draw_sketch(layer, step, self.config))
