"""The tangent step: any base optimizer's ordinary step, taken inside U diag(S) V^T.

While the base optimizer steps, the parameters of a factorized layer hold K = U diag(S) instead of U
and 0 (called L) instead of V; their gradients are G V and (I - V V^T) G^T U (see :mod:`.linear`). Both
live in the units of W, so learning rate, momentum and weight decay mean what they meant. Then
K V^T + U L^T is brought back to rank k (``linalg.retract``) and the optimizer's moments turn with
the bases. For plain SGD this is Riemannian gradient descent on the rank-k matrices (Vandereycken,
SIAM J. Optim. 23 (2013)), up to the O(lr^2) between two retractions.

Bringing K V^T + U L^T back to rank k costs the same whatever the number of tokens in a step: with few of them it can
take longer than the dense step would have.

Under bfloat16 or float16 parameters float32 masters of the factors stay beside them. So at half the parameters a
layer's weights, gradients and optimizer state take three quarters of dense with AdamW, and five sixths with Muon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..linalg import Basis, project_off, quick_retract, retract
from ..linalg.fallback import LinAlgError, with_float64_fallback
from ..linalg.protection import Anchor, restored_factors
from .linear import FactorizedLinear
from .moments import SUPPORTED, transport_
from .weight_decay import decay_of, is_muon

# What is left over of a derived scale: the best of a small grid (``benchmarks/quality.py``, "step x ...").
MUON_SCALE = 0.5
ENTRYWISE_SCALE = 1.0
MAX_AMPLIFICATION = 30.0  # of rounding errors, 1e-7, in retractions without QR


def float32_factors(module: FactorizedLinear, masters: Basis | None) -> Basis:
    """U, S, V in float32 (float64 for a float64 layer), without the rounding of low-precision parameters.

    Args:
        masters: the float32 factors that the parameters were rounded from. Where a parameter is no
            longer their rounding (somebody loaded or edited it), the parameter counts.
    """
    current = Basis(module.U.detach(), module.S.detach(), module.V.detach())
    if current.U.dtype in (torch.float32, torch.float64):
        return current
    if masters is None or masters.U.shape != current.U.shape:
        return Basis(*(p.float() for p in current))
    return Basis(*(torch.where(m.to(p.dtype) == p, m, p.float()) for m, p in zip(masters, current, strict=True)))


@dataclass
class FactorState:
    """A factorized layer as the tangent step sees it."""

    name: str
    module: FactorizedLinear
    masters: Basis | None = None  # float32, only under lower-precision parameters
    nonfinite: Tensor | None = None  # steps that were not taken because of NaN or Inf; 0-d, on the device
    anchor: Anchor | None = None  # while the principal block is protected


class Scales(NamedTuple):
    """What the base optimizer's updates of K and L are multiplied by, and its decoupled decay."""

    K: float
    L: float
    decay: float | Tensor  # share of K that the base optimizer's step takes away whatever the gradient


def _muon_ratio(adjust: str | None, rows: int, cols: int) -> float:
    """torch.optim.Muon's learning-rate factor for a matrix of this shape."""
    if adjust is None or adjust == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols)) if adjust == "match_rms_adamw" else 1.0


def _is_entrywise(base: torch.optim.Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether the base optimizer brings each entry's update to the size of the learning rate (Adam and its kin)."""
    if not state:
        return isinstance(base, SUPPORTED) and not isinstance(base, (torch.optim.SGD, torch.optim.Muon))
    return not state.keys() <= {"momentum_buffer", "step"}


def _decoupled_decay(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """The share of a weight that a step takes away whatever the gradient."""
    if not group.get("weight_decay", 0.0) or decay_of(base, group) == "coupled":
        return 0.0
    return group["lr"] * group["weight_decay"]


def _coupled_decay(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor | None:
    """What the base optimizer adds to a gradient, in weights; ``None``: nothing."""
    if not group.get("weight_decay", 0.0) or decay_of(base, group) != "coupled":
        return None
    return -group["weight_decay"] if group.get("maximize", False) else group["weight_decay"]


def update_scales(
    base: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], shape: tuple[int, int, int]
) -> Scales:
    """Bring the updates of K and L to the spectral norm that the dense step could have had.

    * Linear in the gradient (SGD, with momentum): nothing to do, K and L take W's step exactly.
    * Entry by entry (Adam and its kin): each entry moves by up to lr, so an update of W has a spectral
      norm of up to lr sqrt(mn), which a gradient with a preferred direction comes near; that of K
      only lr sqrt(mk). Hence sqrt(n/k) for K and sqrt(m/k) for L. Of pure noise an update of W
      has only about lr (sqrt(m) + sqrt(n)), and one of K lr (sqrt(m) + sqrt(k)) before it is scaled: there the
      step is too long, at m = n = 256 by 3.5 times with k = 8, by 1.4 times with k = 102 (both parts together).
    * Muon: its update is orthogonal, so its size is set by the shape that it sees. Its shape factor is
      exchanged for that of W. Two steps of norm a together, dK V^T + U dL^T, have a norm of up to
      sqrt(2) a where they share their directions: times 1/sqrt(2) they have at most the dense step's. Times
      1/2 measured better still.

    Args:
        state: what the optimizer keeps for K.
        shape: (m, n, k).
    """
    m, n, k = shape
    decay = _decoupled_decay(base, group)
    if is_muon(base, group):
        adjust = group.get("adjust_lr_fn")
        dense = MUON_SCALE * _muon_ratio(adjust, m, n)
        return Scales(dense / _muon_ratio(adjust, m, k), dense / _muon_ratio(adjust, n, k), decay)
    if _is_entrywise(base, state):
        return Scales(ENTRYWISE_SCALE * math.sqrt(n / k), ENTRYWISE_SCALE * math.sqrt(m / k), decay)
    return Scales(1.0, 1.0, decay)


class FactorBatch(NamedTuple):
    """Layers of one shape, type and state whose parameters hold K (in low precision 0) and 0 at the moment."""

    layers: list[FactorState]
    scales: Scales
    U: Tensor  # (b, m, k)
    S: Tensor  # (b, k)
    V: Tensor  # (b, n, k)
    K: Tensor  # (b, m, k), as the base optimizer sees it
    sound: Tensor  # (b,) bool: layers whose gradients are finite
    gradients: dict[Tensor, Tensor]  # of those parameters to whose gradients decay is added meanwhile

    def restore_(self) -> None:
        """Put U, S and V back, as if nothing had happened."""
        self.restore_gradients_()
        for i, layer in enumerate(self.layers):
            layer.module.U.copy_(self.U[i])
            layer.module.S.copy_(self.S[i])
            layer.module.V.copy_(self.V[i])

    def restore_gradients_(self) -> None:
        """Take the decay out of the gradients of K again."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient


def _silence_(layers: Sequence[FactorState]) -> Tensor:
    """Make the gradients of a layer zero if one of them is not finite, so that no moment takes it in.

    Returns:
        Whose gradients are finite, (b,) bool. Nothing is read from the device.
    """
    gradients = [[p.grad for p in (x.module.U, x.module.V) if p.grad is not None] for x in layers]
    of_K, of_L = (linalg.finite(torch.stack(of)) for of in zip(*gradients, strict=True))
    sound = of_K & of_L
    for pair, bad in zip(gradients, ~sound, strict=True):
        for gradient in pair:
            gradient.masked_fill_(bad, 0.0)
    return sound


def enter_factors_(
    layers: Iterable[FactorState],
    base: torch.optim.Optimizer,
    groups: Mapping[Tensor, Mapping[str, Any]],
) -> list[FactorBatch]:
    """Put K and 0 where U and V are, in all layers that will move; equal layers in one batch.

    In bfloat16 or float16 K would swallow steps smaller than its rounding. There the base optimizer steps
    on 0, where they are exact, and decay, which is all that it needs K for, is taken off the float32 K
    afterwards, or added to the gradient now.

    A layer with a gradient that is not finite gets gradients of zero: its moments only fade, and
    :func:`leave_factors_` leaves its factors as they were.

    Layers without gradients or with a learning rate of zero are left as they are.

    Args:
        groups: the param group of each parameter.
    """
    batches: dict[Any, list[FactorState]] = {}
    for layer in layers:
        U, V = layer.module.U, layer.module.V
        if U.grad is None or V.grad is None or U not in groups or lr_is_zero(groups[U]):
            continue
        keys = tuple(base.state[U]) if U in base.state else ()
        batches.setdefault((U.shape, V.shape, U.dtype, U.device, keys, id(groups[U])), []).append(layer)
    entered: list[FactorBatch] = []
    decayed: dict[Tensor, Tensor] = {}  # gradients with decay
    for (U_shape, V_shape, *_), batch in batches.items():
        first = batch[0].module.U
        state = base.state.get(first, {})
        scales = update_scales(base, groups[first], state, (U_shape[0], V_shape[0], U_shape[1]))
        factors = Basis(
            *(torch.stack(f) for f in zip(*(float32_factors(x.module, x.masters) for x in batch), strict=True))
        )
        sound = _silence_(batch)
        K = factors.U * factors.S.unsqueeze(-2)
        gradients: dict[Tensor, Tensor] = {}
        if first.dtype != K.dtype:
            if (rate := _coupled_decay(base, groups[first])) is not None:
                gradients = {x.module.U: x.module.U.grad for x in batch if x.module.U.grad is not None}
                decayed |= {p: (G + rate * K_p).to(G.dtype) for (p, G), K_p in zip(gradients.items(), K, strict=True)}
            K = torch.zeros_like(K)
        entered.append(FactorBatch(batch, scales, *factors, K, sound, gradients))
    for ready in entered:  # only now, when nothing can fail any more
        for layer, K_layer in zip(ready.layers, ready.K, strict=True):
            layer.module.U.copy_(K_layer)
            layer.module.V.zero_()
    for parameter, gradient in decayed.items():
        parameter.grad = gradient
    return entered


def leave_factors_(batch: FactorBatch, state: Mapping[Tensor, Any]) -> list[tuple[FactorState, bool]]:
    """After the base optimizer's step: scale, decay, retract, turn the moments, write U, S, V back.

    A layer whose gradients, K or L are not finite keeps the factors it had, and counts it; so does one
    whose retraction fails.

    Returns:
        The layers, and whether their retractions were possible at all.
    """
    batch.restore_gradients_()
    K, L = _stepped(batch)
    new, rotations, finite, failed = _retracted_quickly(K, L, batch) or _retracted(K, L, batch)
    for i, layer in enumerate(batch.layers):
        if layer.anchor is not None:
            old = Basis(batch.U[i], batch.S[i], batch.V[i])
            one = _anchored(Basis(*(factor[i] for factor in new)), layer.anchor, old)
            if one is None:
                failed.add(i)
                one = old
            for factor, restored in zip(new, one, strict=True):
                factor[i].copy_(restored)
            rotations = None
    states_K = [state.get(layer.module.U) or {} for layer in batch.layers]
    states_L = [state.get(layer.module.V) or {} for layer in batch.layers]
    transport_(states_K, states_L, (batch.U, batch.V), (new.U, new.V), rotations)
    for i, layer in enumerate(batch.layers):
        write_(layer, Basis(new.U[i], new.S[i], new.V[i]))
        bad = (~finite[i]).to(torch.int64)
        layer.nonfinite = bad if layer.nonfinite is None else layer.nonfinite + bad
    return [(layer, i not in failed) for i, layer in enumerate(batch.layers)]


def _stepped(batch: FactorBatch) -> tuple[Tensor, Tensor]:
    """K and L as the base optimizer's step leaves them, scaled; (b, m, k) and (b, n, k)."""
    K1 = torch.stack([layer.module.U.to(batch.U.dtype) for layer in batch.layers])
    L1 = torch.stack([layer.module.V.to(batch.U.dtype) for layer in batch.layers])
    # What the gradient did, apart from decay, which keeps its size whatever the scale.
    scale_K, scale_L, decay = batch.scales
    dK = K1.sub_(batch.K * (1.0 - decay))
    K = (batch.U * batch.S.unsqueeze(-2)).mul_(1.0 - decay).add_(dK, alpha=scale_K)
    return K, L1.mul_(scale_L)


class _Retracted(NamedTuple):
    new: Basis  # (b, ...)
    rotations: tuple[Tensor, Tensor] | None  # (U^T U', V^T V'), if that is known
    finite: Tensor  # (b,) bool: layers that moved
    failed: set[int]  # indices of those whose retraction was not possible


def _retracted_quickly(K: Tensor, L: Tensor, batch: FactorBatch) -> _Retracted | None:
    """Without QR, if all of the batch is up to it: the host asks, which costs nothing on a CPU."""
    if K.device.type != "cpu" or K.dtype != torch.float32:
        return None
    with suppress(LinAlgError):
        spread = float((batch.S[:, 0] / batch.S[:, -1]).square().max())
        core = torch.float32 if spread <= MAX_AMPLIFICATION else torch.float64
        quick = quick_retract(K, L, batch.U, batch.V, core)
        good = quick.amplified <= MAX_AMPLIFICATION  # not so if K or L is not finite
        if bool((good & batch.sound).all()):
            return _Retracted(quick.basis, (quick.of_U, quick.of_V), good, set())
    return None


def _retracted(K: Tensor, L: Tensor, batch: FactorBatch) -> _Retracted:
    """By QR. A layer whose K or L is not finite keeps its factors, and so does one whose retraction fails."""
    old = Basis(batch.U, batch.S, batch.V)
    L = project_off(L, old.V)  # Adam rotations the update of L back into span(V)
    finite = batch.sound & linalg.finite(K) & linalg.finite(L)  # (b,)
    ok = finite[:, None, None]
    K, L = torch.where(ok, K, old.U * old.S.unsqueeze(-2)), torch.where(ok, L, 0.0)
    new, failed = _attempted(K, L, old)
    for factor in (new.U, new.S.unsqueeze(-1), new.V):
        finite = finite & linalg.finite(factor)
    ok = finite[:, None, None]
    new = Basis(torch.where(ok, new.U, old.U), torch.where(ok[..., 0], new.S, old.S), torch.where(ok, new.V, old.V))
    return _Retracted(new, None, finite, failed)


def _attempted(K: Tensor, L: Tensor, old: Basis) -> tuple[Basis, set[int]]:
    """The retraction of all layers of a batch; where it fails, also in float64, the old factors and the index."""
    with suppress(LinAlgError):
        return retract(K, L, old.U, old.V), set()
    done: list[Basis] = []
    failed: set[int] = set()
    for i in range(len(K)):
        inputs = [t[i] for t in (K, L, old.U, old.V)]
        one = with_float64_fallback(partial(_retract_in, inputs), K.dtype)
        if one is None:
            failed.add(i)
        done.append(one or Basis(*(t[i] for t in old)))
    return Basis(*(torch.stack(t) for t in zip(*done, strict=True))), failed


def _retract_in(inputs: Sequence[Tensor], dtype: torch.dtype) -> Basis:
    return retract(*(t.to(dtype) for t in inputs))


def _anchored(factors: Basis, anchor: Anchor, old: Basis) -> Basis | None:
    """:func:`restored_factors`, or ``None`` if the core can't be decomposed (it is in float64 already)."""
    with suppress(LinAlgError):
        return restored_factors(factors, anchor, old)
    return None


def write_(layer: FactorState, factors: Basis) -> None:
    """Write U, S, V into the parameters, and keep them as masters under lower precision."""
    module = layer.module
    for parameter, factor in zip((module.U, module.S, module.V), factors, strict=True):
        parameter.copy_(factor)
    low_precision = module.U.dtype not in (torch.float32, torch.float64)
    layer.masters = Basis(*(f.clone() for f in factors)) if low_precision else None


def all_lr_zero(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every learning rate is known to be zero, without reading a device tensor."""
    return all(lr_is_zero(group) for group in param_groups)


def lr_is_zero(group: Mapping[str, Any]) -> bool:
    """Whether a group's learning rate is known to be zero, without reading a device tensor."""
    lr = group.get("lr", None)
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False
    return lr is not None and float(lr) == 0.0
