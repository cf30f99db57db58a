"""How a base optimizer decays weights: apart from the gradient (AdamW, Muon), or as a part of it (Adam, SGD).

torch's own optimizers are known, and a param group may say it: ``decoupled_weight_decay``. Of any other
optimizer a stand-in takes one step on two small matrices that differ in size only, and shows it.
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

# "other": the step depends on the weight in another way (LAMB, LARS). "unknown": the stand-in could not step.
Decay = Literal["decoupled", "coupled", "other", "unknown"]

_measured: WeakKeyDictionary[Optimizer, dict[tuple[Any, ...], Decay]] = WeakKeyDictionary()


def is_muon(base: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group's updates are orthogonal."""
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
    flags = (_decays(group), *((k, v) for k, v in group.items() if isinstance(v, (bool, str))))
    known = _measured.setdefault(base, {})
    if flags not in known:
        try:
            known[flags] = _measure(base, group)
        except Exception:  # whatever a foreign step raises where it meets something else than its own parameters
            known[flags] = "unknown"
    return known[flags]


def unsupported_reason(base: Optimizer, group: Mapping[str, Any]) -> str:
    """Why a layer can't go into factors for the way its weight decays; empty if it can."""
    decay = decay_of(base, group)
    if decay == "other":
        return f"a step of {type(base).__name__} depends on the weight by more than its decay"
    if decay == "unknown" and _decays(group):
        ask = "say it in the param group: decoupled_weight_decay=True or False"
        return f"how {type(base).__name__} decays weights could not be measured; {ask}"
    return ""


def _decays(group: Mapping[str, Any]) -> bool:
    decay = group.get("weight_decay", 0.0)
    return isinstance(decay, Tensor) or bool(decay)


def _measure(base: Optimizer, group: Mapping[str, Any]) -> Decay:
    lr, decay = 2.0**-3, 2.0**-2 if _decays(group) else 0.0
    device = group["params"][0].device
    small, large = (
        torch.full((2, 2), size, dtype=torch.float32, device=device).requires_grad_() for size in (1.0, 2.0)
    )
    for p in (small, large):
        p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float32, device=device)
    own = {k: v for k, v in group.items() if k != "params"} | {"params": [small, large]}
    own |= {k: v for k, v in (("lr", lr), ("weight_decay", decay)) if k in group}
    # A copy of everything but parameters and their state: nothing that the optimizer holds is touched.
    copies: dict[int, Any] = {id(p): small for g in base.param_groups for p in g["params"]}
    copies |= {id(base.param_groups): [own], id(base.state): defaultdict(dict)}
    stand_in = object.__new__(type(base))
    attributes = {k: v for k, v in vars(base).items() if k != "step" and not k.endswith("_hooks")}
    vars(stand_in).update(deepcopy(attributes, copies))
    step = type(base).step
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        getattr(step, "__wrapped__", step)(stand_in)
    of_small, of_large = (stand_in.state[p] for p in (small, large))
    if any(isinstance(v, Tensor) and not torch.equal(v, of_large[k]) for k, v in of_small.items()):
        return "coupled"
    shares = 1.0 - (large - small)  # the same update of both leaves 1 - lr decay between them
    return "decoupled" if bool((shares - lr * decay).abs().max() < 1e-5) else "other"
