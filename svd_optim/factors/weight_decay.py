"""How a base optimizer decays weights: decoupled from the gradient (AdamW, Muon), or as an L2 penalty (Adam, SGD).

torch.optim's own optimizers are known, and a param group can declare it: ``decoupled_weight_decay``. For any other
optimizer it is measured: a copy of it takes one step on two small matrices that differ only in scale. (Decoupled
weight decay: Loshchilov and Hutter, ICLR 2019.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from .moments import SUPPORTED

# "other": the step depends on the weight in another way (LAMB, LARS). "unknown": the copy could not step.
Decay = Literal["decoupled", "coupled", "other", "unknown"]

_measured: WeakKeyDictionary[Optimizer, dict[tuple[Any, ...], Decay]] = WeakKeyDictionary()


def is_muon(base: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the optimizer orthogonalizes the updates of a param group."""
    return bool(group.get("use_muon", "muon" in type(base).__name__.lower()))


def decay_of(base: Optimizer, group: Mapping[str, Any]) -> Decay:
    """How the weights of a param group decay, if they do."""
    decoupled = group.get("decoupled_weight_decay")
    if decoupled is None and is_muon(base, group):
        decoupled = True
    if decoupled is None and isinstance(base, SUPPORTED):
        decoupled = False
    if decoupled is not None:
        return "decoupled" if decoupled else "coupled"
    key = (_decays(group), *((k, v) for k, v in group.items() if isinstance(v, (bool, str))))
    known = _measured.setdefault(base, {})
    if key not in known:
        try:
            known[key] = _measure(base, group)
        except Exception:  # a third-party step may raise anything when it gets other parameters than its own
            known[key] = "unknown"
    return known[key]


def unsupported_reason(base: Optimizer, group: Mapping[str, Any]) -> str:
    """Why the kind of weight decay prevents factorizing the layers of a param group; empty if it does not."""
    decay = decay_of(base, group)
    if decay == "other":
        return f"a step of {type(base).__name__} depends on the weight by more than its decay; wrap another optimizer"
    if decay == "unknown" and _decays(group):
        remedy = "say it in the param group: decoupled_weight_decay=True or False"
        return f"how {type(base).__name__} decays weights could not be measured; {remedy}"
    return ""


def _decays(group: Mapping[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    return isinstance(decay, Tensor) or bool(decay)


def _measure(base: Optimizer, group: Mapping[str, Any]) -> Decay:
    """The kind of decay, from one step of a copy of ``base``.

    A coupled decay enters the optimizer's state; a decoupled one changes the weight by lr * weight_decay of it.
    """
    lr, decay = 2.0**-3, 2.0**-2 if _decays(group) else 0.0
    device = group["params"][0].device
    small, large = (
        torch.full((2, 2), size, dtype=torch.float32, device=device).requires_grad_() for size in (1.0, 2.0)
    )
    for p in (small, large):
        p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float32, device=device)
    test_group = {k: v for k, v in group.items() if k != "params"} | {"params": [small, large]}
    test_group |= {k: v for k, v in (("lr", lr), ("weight_decay", decay)) if k in group}
    # A copy of everything but parameters and their state: the optimizer itself is not modified.
    copies: dict[int, Any] = {id(p): small for g in base.param_groups for p in g["params"]}
    copies |= {id(base.param_groups): [test_group], id(base.state): defaultdict(dict)}
    clone = object.__new__(type(base))
    attributes = {k: v for k, v in vars(base).items() if k != "step" and not k.endswith("_hooks")}
    vars(clone).update(deepcopy(attributes, copies))
    step = type(base).step
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        getattr(step, "__wrapped__", step)(clone)
    of_small, of_large = (clone.state[p] for p in (small, large))
    if any(isinstance(v, Tensor) and not torch.equal(v, of_large[k]) for k, v in of_small.items()):
        return "coupled"
    shrinkage = 1.0 - (large - small)  # they differed by 1; equal updates leave a difference of 1 - lr decay
    return "decoupled" if bool((shrinkage - lr * decay).abs().max() < 1e-5) else "other"
