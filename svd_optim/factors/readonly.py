"""What readers of a factorized layer's ``weight`` get: a product that refuses writes, as these would be lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]

NOT_WRITABLE = (
    "does not reach the layer: its weight is the product of its parameters U, S and V, formed anew at each access. "
    "Use set_weight_(W) or reset_parameters() of the layer, or make it dense first: svd_optim.factors.merge_(layer), "
    "or optimizer.merge_(name) where a SubspaceAwareOptimizer trains it. weight.clone() is a tensor of your own"
)
# In-place functions end in "_"; these are the others that write to their first argument.
WRITES = frozenset({"__setitem__", "__set__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"})


class ReadOnlyWeight(Tensor):
    """A tensor that can be computed with and not be written to, and neither can what shares its memory.

    Everything else that is computed with it is an ordinary tensor; so are its copies and pickles.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # Dynamo can't trace the rest
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tried = _write(func, args, kwargs)
        if tried:
            raise RuntimeError(f"{tried} {NOT_WRITABLE}")
        with torch._C.DisableTorchFunctionSubclass():
            return _guarded(func(*args, **kwargs), [x for x in (*args, *kwargs.values()) if isinstance(x, cls)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _write(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What a call would write to, in words; empty if it only reads."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else next(iter(kwargs.values()), None)
    in_place = name in WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    if in_place and _is_read_only(first):
        if name == "__set__":
            return f"setting weight.{getattr(func.__self__, '__name__', '')}"  # type: ignore[attr-defined]
        return f"{name}(weight, inplace=True)" if kwargs.get("inplace") else f"{name}() on weight"
    return f"{name}(..., out=weight)" if _is_read_only(kwargs.get("out")) else ""


def _is_read_only(x: object) -> bool:
    return isinstance(x, ReadOnlyWeight) or (isinstance(x, (list, tuple)) and any(map(_is_read_only, x)))


def _guarded(result: Any, of: Sequence[Tensor]) -> Any:
    """A result of ordinary functions; what of it is a view of ``of`` can't be written to either."""
    if isinstance(result, Tensor):
        return result.as_subclass(ReadOnlyWeight) if any(_is_alias_of(result, x) for x in of) else result
    if type(result) in (list, tuple):
        return type(result)(_guarded(x, of) for x in result)
    if hasattr(result, "setflags"):  # a NumPy array
        result.setflags(write=False)
    return result
