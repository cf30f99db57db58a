"""Which optimizer trains a layer: changing such a layer behind its optimizer's back would break both."""

from __future__ import annotations

import weakref

from torch import nn


class Owner:
    """An optimizer, as a module knows it; gone when the optimizer is."""


_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Owner]] = weakref.WeakKeyDictionary()


def claim(module: nn.Module, owner: Owner) -> None:
    """From now on ``owner`` trains the module. A copy of the module belongs to nobody."""
    _owners[module] = weakref.ref(owner)


def disclaim(module: nn.Module, owner: Owner) -> None:
    """It does no longer."""
    if module in _owners and _owners[module]() is owner:
        del _owners[module]


def refuse_claimed(module: nn.Module, function: str) -> None:
    """Raise ``RuntimeError`` if a living optimizer trains the module."""
    reference = _owners.get(module)
    if reference is not None and reference() is not None:
        raise RuntimeError(
            f"{function}: a SubspaceAwareOptimizer trains this {type(module).__name__}, and would go on with "
            f"parameters that are no longer the model's; use optimizer.{function} with the layer's name"
        )
