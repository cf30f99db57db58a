"""Which optimizer trains a layer: changing such a layer behind its optimizer's back would break both."""

from __future__ import annotations

import weakref

from torch import nn
from torch.optim import Optimizer

from ..linalg import Basis
from .moments import transport_, transport_first


class Owner:
    """An optimizer, as a module knows it; gone when the optimizer is.

    Args:
        base: the optimizer that steps on the modules' parameters.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = weakref.ref(base)

    def transport_(self, U: nn.Parameter, V: nn.Parameter, old: Basis, new: Basis) -> None:
        """Carry moments and a pending gradient of the factors U and V from the orthonormal bases ``old`` to ``new``."""
        base = self._base()
        if U.grad is not None and V.grad is not None:
            U.grad, V.grad = transport_first(U.grad, V.grad, old.U, old.V, new.U, new.V)
        if base is not None and U in base.state and V in base.state:
            bases = ((x.U.unsqueeze(0), x.V.unsqueeze(0)) for x in (old, new))
            transport_([base.state[U]], [base.state[V]], *bases)


_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def claim(module: nn.Module, owner: Owner) -> None:
    """From now on ``owner`` trains the module. A copy of the module belongs to nobody."""
    _owners[module] = weakref.ref(owner)


def disclaim(module: nn.Module, owner: Owner) -> None:
    """It does no longer."""
    if module in _owners and _owners[module]() is owner:
        del _owners[module]


def owner_of(module: nn.Module) -> Owner | None:
    """The living optimizer that trains the module."""
    reference = _owners.get(module)
    return None if reference is None else reference()


def refuse_claimed(module: nn.Module, function: str) -> None:
    """Raise ``RuntimeError`` if a living optimizer trains the module."""
    if owner_of(module) is not None:
        raise RuntimeError(
            f"{function}: a SubspaceAwareOptimizer trains this {type(module).__name__}, and would go on with "
            f"parameters that are no longer the model's; use optimizer.{function} with the layer's name"
        )
