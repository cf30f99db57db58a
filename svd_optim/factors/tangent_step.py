"""The tangent step: an ordinary step of any base optimizer, taken within the tangent space at U diag(S) V^T.

During the base optimizer's step the parameters of a factorized layer hold K = U diag(S) instead of U and 0 (called L)
instead of V. With U0 = U T orthonormal their gradients are G V and (I - V V^T) G^T U0 (:mod:`.linear`). Both are in the
units of W, so learning rate, momentum and weight decay keep their meaning. Then K V^T + U0 L^T is retracted to rank k
(:mod:`..linalg`), and the optimizer's moments are transported to the new bases. Between two analyses the columns of U
are of unit length and nearly orthogonal, and are what they were, but for the steps: so second moments, which belong to
entries, stay where they belong. At an analysis U, S and V become singular triplets again (:mod:`.diagonal`). For plain
SGD this is Riemannian gradient descent on the manifold of rank-k matrices (Vandereycken, SIAM J. Optim. 23 (2013)), up
to the O(lr^2) difference between retractions.

The retraction costs the same however few tokens a step has: with few it can take longer than the dense step would have.

Under bfloat16 or float16 parameters float32 masters of the factors stay beside them. So at half the parameters a
layer's weights, gradients and optimizer state take three quarters of dense with AdamW, and five sixths with Muon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..linalg import Basis, project_off, retract
from ..linalg.fallback import LinAlgError, with_float64_fallback
from ..linalg.protection import Anchor, restored_factors
from .linear import FactorizedLinear
from .moments import SUPPORTED, transport_
from .weight_decay import decay_of, is_muon

MAX_AMPLIFICATION = 30.0  # of rounding errors, 1e-7, in retractions by Cholesky-QR


def float32_factors(module: FactorizedLinear, masters: Basis | None) -> Basis:
    """U (m, k), S (k,), V (n, k) in float32 (float64 for a float64 layer), from the masters if there are any.

    Args:
        masters: the float32 factors that low-precision parameters were rounded from. Entries of a parameter that are
            no longer their rounding (they were loaded or edited) take precedence.
    """
    current = Basis(module.U.detach(), module.S.detach(), module.V.detach())
    if not _in_low_precision(module):
        return current
    if masters is None or masters.U.shape != current.U.shape:
        return Basis(*(p.float() for p in current))
    return Basis(*(torch.where(m.to(p.dtype) == p, m, p.float()) for m, p in zip(masters, current, strict=True)))


@dataclass
class FactorState:
    """The state of a factorized layer in the tangent step."""

    name: str
    module: FactorizedLinear
    masters: Basis | None = None  # float32, only under lower-precision parameters
    nonfinite: Tensor | None = None  # number of steps skipped because of NaN or Inf; 0-d int64, on the device
    triplets_of: tuple[tuple[int, int], ...] | None = None  # what U, S, V were as they were made singular triplets
    exact: bool = False  # retracted by QR, until the next analysis
    turned_away: Tensor | None = None  # whether a step since the last analysis was too much for anything else; 0-d
    anchor: Anchor | None = None  # while the principal block is held fixed
    deviation: Tensor | None = None  # largest | |u|^2 - 1 | of a column before a step since the last refresh; 0-d

    @property
    def diagonal(self) -> bool:
        """Whether U, S, V are its singular triplets: not, if anything was written to them since they were."""
        return self.triplets_of == self._versions()

    @diagonal.setter
    def diagonal(self, value: bool) -> None:
        self.triplets_of = self._versions() if value else None

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(p), p._version) for p in (self.module.U, self.module.S, self.module.V))


class Scales(NamedTuple):
    """Factors on the base optimizer's updates of K and L, and its decoupled weight decay."""

    K: float
    L: float
    decay: float | Tensor  # lr * weight_decay: the fraction by which a step shrinks K whatever the gradient


def _muon_ratio(adjust: str | None, rows: int, cols: int) -> float:
    """torch.optim.Muon's learning-rate factor for a matrix of this shape."""
    if adjust is None or adjust == "original":
        return math.sqrt(max(1.0, rows / cols))
    return 0.2 * math.sqrt(max(rows, cols)) if adjust == "match_rms_adamw" else 1.0


def _is_entrywise(base: torch.optim.Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether the base optimizer normalizes each entry's update to about the learning rate (Adam and its variants)."""
    if not state:
        return isinstance(base, SUPPORTED) and not isinstance(base, (torch.optim.SGD, torch.optim.Muon))
    return not state.keys() <= {"momentum_buffer", "step"}


def _decoupled_decay(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """lr * weight_decay of a decoupled decay: the fraction by which a step shrinks a weight; 0 without one."""
    if not group.get("weight_decay", 0.0) or decay_of(base, group) == "coupled":
        return 0.0
    return group["lr"] * group["weight_decay"]


def _coupled_decay(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | Tensor | None:
    """The multiple of the weight that the base optimizer adds to its gradient (L2 penalty); ``None``: nothing."""
    if not group.get("weight_decay", 0.0) or decay_of(base, group) != "coupled":
        return None
    return -group["weight_decay"] if group.get("maximize", False) else group["weight_decay"]


def update_scales(
    base: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], shape: tuple[int, int, int]
) -> Scales:
    """Scale the updates of K and L to what a dense update would do to them.

    * Linear in the gradient (SGD, with momentum): no scaling, K and L take the projected step of W exactly.
    * Entrywise (Adam and its variants): each entry changes by up to lr, so an update of W has a spectral norm of up to
      lr sqrt(mn), which low-rank gradients approach, but one of K only lr sqrt(mk). Hence sqrt(n/k) for K and
      sqrt(m/k) for L. For pure noise an update of W has a norm of about lr (sqrt(m) + sqrt(n)), and one of K
      lr (sqrt(m) + sqrt(k)) before it is scaled: in that case the step is too long, at m = n = 256 by a factor of 3.5
      with k = 8 and of 1.4 with k = 102 (K and L together).
    * Muon: its update of a square W is an orthogonal O, of which a projection onto the tangent space keeps O V and
      O^T U, whose columns are orthonormal too: as long as its updates of K and L. So only the shape factor of K or L is
      replaced by that of W. A GPT in half of its parameters ends 0.7 to 1.2 % worse with half of that step, at 1.4
      times it on a par (widths 64 and 128, 1 to 5 tokens a parameter, batches of 512 and 4096). At 0.13 tokens (width
      256, 800 batches of 512) half of it is on a par, and 1.4 % better where the learning rate decays over the last
      fifth only: there a shorter step stands in for the decay (``benchmarks/quality.py``, "step x ...").

    Args:
        state: the base optimizer's state of K.
        shape: (m, n, k).
    """
    m, n, k = shape
    decay = _decoupled_decay(base, group)
    if is_muon(base, group):
        adjust = group.get("adjust_lr_fn")
        dense = _muon_ratio(adjust, m, n)
        return Scales(dense / _muon_ratio(adjust, m, k), dense / _muon_ratio(adjust, n, k), decay)
    if _is_entrywise(base, state):
        return Scales(math.sqrt(n / k), math.sqrt(m / k), decay)
    return Scales(1.0, 1.0, decay)


class FactorBatch(NamedTuple):
    """Layers of equal shape, dtype and state keys whose parameters hold K (under low precision 0) and 0 at present.

    All batches wait for the base optimizer's step together, so they hold only what it overwrites: K follows from U and
    S, and under low precision the masters are a copy already.
    """

    layers: list[FactorState]
    scales: Scales
    copies: Basis | None  # (b, m, k), (b, k), (b, n, k); None: they are the masters
    turns: list[Tensor]  # of :func:`_orthonormalizers`
    finite: Tensor  # (b,) bool: layers whose gradients are finite
    gradients: dict[Tensor, Tensor]  # original gradients of the parameters to whose gradients decay was added

    def factors(self) -> Basis:
        """U (b, m, k), S (b, k), V (b, n, k) from before the base optimizer's step."""
        return stacked(x.masters for x in self.layers if x.masters) if self.copies is None else self.copies

    def restore_(self) -> None:
        """Put U, S, V and the gradients back, to undo :func:`enter_factors_`."""
        self.restore_gradients_()
        for layer, *factors in zip(self.layers, *self.factors(), strict=True):
            for parameter, values in zip((layer.module.U, layer.module.S, layer.module.V), factors, strict=True):
                parameter.copy_(values)

    def restore_gradients_(self) -> None:
        """Put the gradients without decay back."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient


def stacked(factors: Iterable[Basis]) -> Basis:
    return Basis(*(torch.stack(f) for f in zip(*factors, strict=True)))


def _orthonormalizers(layers: Sequence[FactorState], columns: Iterable[Tensor]) -> list[Tensor]:
    """T (k, k) of each layer, with U T orthonormal for its U in ``columns``, which in low precision is the masters'."""
    if _in_low_precision(layers[0].module):
        return [*linalg.orthonormalizer(torch.stack([*columns]))]
    return [layer.module.orthonormalizer() for layer in layers]


def _in_low_precision(module: FactorizedLinear) -> bool:
    return module.U.dtype not in (torch.float32, torch.float64)


def _batches(
    layers: Iterable[FactorState], base: torch.optim.Optimizer, groups: Mapping[Tensor, Any]
) -> Iterator[list[FactorState]]:
    """Those that the base optimizer is to step on, in batches of equal layers and bounded size."""
    equal: dict[Any, list[FactorState]] = {}
    for layer in layers:
        U, V = layer.module.U, layer.module.V
        if U.grad is None or V.grad is None or U not in groups or lr_is_zero(groups[U]):
            continue
        keys = tuple(base.state[U]) if U in base.state else ()
        key = (U.shape, V.shape, U.dtype, U.device, keys, id(groups[U]), layer.exact)
        equal.setdefault(key, []).append(layer)
    for batch in equal.values():
        yield from linalg.portions(batch, lambda x: linalg.compute_bytes(x.module.U, x.module.V))


def _zero_nonfinite_(layers: Sequence[FactorState]) -> Tensor:
    """Zero both gradients of a layer if one is not finite, so that NaN or Inf enters no moment.

    Returns:
        Which layers have finite gradients, (b,) bool. No host-device synchronization.
    """
    gradients = [[p.grad for p in (x.module.U, x.module.V) if p.grad is not None] for x in layers]
    finite_K, finite_L = (linalg.finite(torch.stack(side)) for side in zip(*gradients, strict=True))
    finite = finite_K & finite_L
    for pair, nonfinite in zip(gradients, ~finite, strict=True):
        for gradient in pair:
            gradient.masked_fill_(nonfinite, 0.0)
    return finite


def _note_deviations(layers: Sequence[FactorState], factors: Sequence[Basis]) -> None:
    """How far the columns are from unit vectors, before a retraction hides it. No host-device synchronization.

    They are some way off where something else has written to U and V, such as an optimizer around this one that
    averages them: an average of factors is not the average of their products.
    """
    for layer, (U, _, V) in zip(layers, factors, strict=True):
        norms = torch.cat([torch.linalg.vector_norm(Q, dim=0) for Q in (U, V)])
        off = (norms.square_() - 1).abs_().amax()
        layer.deviation = off if layer.deviation is None else torch.maximum(layer.deviation, off)


def enter_factors_(
    layers: Iterable[FactorState],
    base: torch.optim.Optimizer,
    groups: Mapping[Tensor, Mapping[str, Any]],
) -> list[FactorBatch]:
    """Before the base optimizer's step: replace U and V by K and 0, in batches of equal layers.

    In bfloat16 or float16 an update below the rounding error of K would be lost. There the base optimizer updates 0,
    which is exact; weight decay, for which alone it needs K, is applied to the float32 K afterwards (decoupled), or
    added to the gradient here (coupled).

    A layer with a gradient that is not finite gets zero gradients: its moments only decay, and :func:`leave_factors_`
    leaves its factors unchanged. Layers without gradients, or with a learning rate of zero, are skipped.

    Args:
        groups: the param group of each parameter.

    Returns:
        The batches, for :func:`leave_factors_`. On an error nothing was changed but gradients zeroed.
    """
    entered: list[FactorBatch] = []
    with_decay: dict[Tensor, Tensor] = {}  # parameter -> its gradient with decay added
    for batch in _batches(layers, base, groups):
        first = batch[0].module
        m, k, n = *first.U.shape, len(first.V)
        scales = update_scales(base, groups[first.U], base.state.get(first.U, {}), (m, n, k))
        factors = [float32_factors(x.module, x.masters) for x in batch]
        _note_deviations(batch, factors)
        finite = _zero_nonfinite_(batch)
        turns = _orthonormalizers(batch, (U for U, _, _ in factors))
        low = _in_low_precision(first)
        gradients: dict[Tensor, Tensor] = {}
        if low and (rate := _coupled_decay(base, groups[first.U])) is not None:
            gradients = {x.module.U: x.module.U.grad for x in batch if x.module.U.grad is not None}
            with_decay |= {
                p: (G + rate * (U * S)).to(G.dtype)
                for (p, G), (U, S, _) in zip(gradients.items(), factors, strict=True)
            }
        in_masters = low and all(layer.masters for layer in batch)
        if in_masters:  # which are the same afterwards, but where somebody has edited a parameter
            for layer, current in zip(batch, factors, strict=True):
                layer.masters = current
        copies = None if in_masters else stacked(factors)
        entered.append(FactorBatch(batch, scales, copies, turns, finite, gradients))
    for entered_batch in entered:  # last, when nothing can fail any more
        for layer in entered_batch.layers:
            module = layer.module
            if _in_low_precision(module):
                module.U.zero_()
            else:
                module.U.mul_(module.S)
            module.V.zero_()
    for parameter, gradient in with_decay.items():
        parameter.grad = gradient
    return entered


def leave_factors_(batch: FactorBatch, state: Mapping[Tensor, Any]) -> list[tuple[FactorState, bool]]:
    """After the base optimizer's step: scale, decay, retract, transport the moments, write U, S, V.

    A layer keeps its factors if its gradients, K or L are not finite (which its ``nonfinite`` counts), or if its
    retraction fails.

    Returns:
        Each layer, and whether its retraction succeeded.
    """
    batch.restore_gradients_()
    old, T = batch.factors(), torch.stack(batch.turns)
    new, turns, finite, failed = _retracted(batch, old, T)
    for i, layer in enumerate(batch.layers):
        if layer.anchor is not None:
            before = Basis(*(factor[i] for factor in old))
            restored = _with_block(Basis(*(factor[i] for factor in new)), layer.anchor, before)
            if restored is None:
                failed.add(i)
                restored = before
            for factor, values in zip(new, restored, strict=True):
                factor[i].copy_(values)
            turns = None
    states_K = [state.get(layer.module.U) or {} for layer in batch.layers]
    states_L = [state.get(layer.module.V) or {} for layer in batch.layers]
    for i, layer in enumerate(batch.layers):
        write_(layer, Basis(new.U[i], new.S[i], new.V[i]), diagonal=False)
    T1 = torch.stack(_orthonormalizers(batch.layers, new.U))
    rotations = None if turns is None else (turns[0] @ T1, turns[1])
    transport_(states_K, states_L, (old.U @ T, old.V), (new.U @ T1, new.V), rotations)
    for i, layer in enumerate(batch.layers):
        skipped = (~finite[i]).to(torch.int64)
        layer.nonfinite = skipped if layer.nonfinite is None else layer.nonfinite + skipped
    return [(layer, i not in failed) for i, layer in enumerate(batch.layers)]


def _scaled_update(batch: FactorBatch, old: Basis) -> tuple[Tensor, Tensor]:
    """K (b, m, k) and L (b, n, k) after the base optimizer's step, with its updates scaled."""
    K1 = torch.stack([layer.module.U.to(old.U.dtype) for layer in batch.layers])
    L1 = torch.stack([layer.module.V.to(old.U.dtype) for layer in batch.layers])
    # The update without decay, which must not be scaled.
    scale_K, scale_L, decay = batch.scales
    decayed = (old.U * old.S.unsqueeze(-2)).mul_(1.0 - decay)
    dK = K1 if _in_low_precision(batch.layers[0].module) else K1.sub_(decayed)
    return decayed.add_(dK, alpha=scale_K), L1.mul_(scale_L)


class _Retracted(NamedTuple):
    """A retracted batch."""

    new: Basis  # (b, m, k), (b, k), (b, n, k)
    turns: tuple[Tensor, Tensor] | None  # (U0^T U', V^T V'), each (b, k, k), if known
    finite: Tensor  # (b,) bool: layers that were updated
    failed: set[int]  # indices of layers whose retraction failed


def _retracted(batch: FactorBatch, old: Basis, T: Tensor) -> _Retracted:
    K, L = _scaled_update(batch, old)
    if batch.layers[0].exact:
        return _retract_by_qr(K, L, old.U @ T, old, batch.finite)
    quick = linalg.retract_columns(K, L, old.U, old.V, T)
    accurate = quick.amplification <= MAX_AMPLIFICATION  # False if K or L is not finite
    if K.device.type == "cpu":  # reading it is free
        if bool((accurate & batch.finite).all()):
            return _Retracted(quick.factors, (quick.of_U, quick.of_V), accurate, set())
        return _retract_by_qr(K, L, old.U @ T, old, batch.finite)
    finite = batch.finite & linalg.finite(K) & linalg.finite(L)
    for layer, away in zip(batch.layers, finite & ~accurate, strict=True):
        layer.turned_away = away if layer.turned_away is None else layer.turned_away | away
    kept = ~(finite & accurate)[:, None, None]
    new = Basis(torch.where(kept, old.U, quick.factors.U), torch.where(kept[..., 0], old.S, quick.factors.S),
                torch.where(kept, old.V, quick.factors.V))  # fmt: skip
    stay = (linalg.gram_factor(old.U), torch.eye(old.S.shape[-1], dtype=K.dtype, device=K.device))
    of_U, of_V = (torch.where(kept, a, b) for a, b in zip(stay, (quick.of_U, quick.of_V), strict=True))
    return _Retracted(new, (of_U, of_V), finite, set())


def _retract_by_qr(K: Tensor, L: Tensor, U0: Tensor, old: Basis, finite: Tensor) -> _Retracted:
    """By QR. A layer keeps its factors if its K or L is not finite, or if its retraction fails."""
    L = project_off(L, old.V)  # Adam's update of L has a component in span(V)
    finite = finite & linalg.finite(K) & linalg.finite(L)  # (b,)
    mask = finite[:, None, None]
    K, L = torch.where(mask, K, old.U * old.S.unsqueeze(-2)), torch.where(mask, L, 0.0)
    new, failed = _retract_with_fallback(K, L, U0, old)
    for factor in (new.U, new.S.unsqueeze(-1), new.V):
        finite = finite & linalg.finite(factor)
    mask = finite[:, None, None]
    U, V = torch.where(mask, new.U, old.U), torch.where(mask, new.V, old.V)
    new = Basis(U, torch.where(mask[..., 0], new.S, old.S), V)
    return _Retracted(new, None, finite, failed)


def _retract_with_fallback(K: Tensor, L: Tensor, U0: Tensor, old: Basis) -> tuple[Basis, set[int]]:
    """The retractions of a batch; of layers where it fails, also in float64, the old factors, and their indices."""
    with suppress(LinAlgError):
        return retract(K, L, U0, old.V), set()
    retracted: list[Basis] = []
    failed: set[int] = set()
    for i in range(len(K)):
        inputs = [t[i] for t in (K, L, U0, old.V)]
        single = with_float64_fallback(partial(_retract_in_dtype, inputs), K.dtype)
        if single is None:
            failed.add(i)
        retracted.append(single or Basis(*(t[i] for t in old)))
    return Basis(*(torch.stack(t) for t in zip(*retracted, strict=True))), failed


def _retract_in_dtype(inputs: Sequence[Tensor], dtype: torch.dtype) -> Basis:
    return retract(*(t.to(dtype) for t in inputs))


def _with_block(factors: Basis, anchor: Anchor, old: Basis) -> Basis | None:
    """:func:`restored_factors`; ``None`` if a decomposition fails (they are in float64 already)."""
    with suppress(LinAlgError):
        return restored_factors(factors, anchor, old)
    return None


def write_(layer: FactorState, factors: Basis, diagonal: bool = True) -> None:
    """Copy U, S, V into the parameters, and keep them as float32 masters of low-precision parameters.

    Args:
        diagonal: whether they are singular triplets.
    """
    module = layer.module
    for parameter, factor in zip((module.U, module.S, module.V), factors, strict=True):
        parameter.copy_(factor)
    layer.masters = Basis(*(f.clone() for f in factors)) if _in_low_precision(module) else None
    layer.diagonal = diagonal
    module.orthonormalizer()


def all_lr_zero(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every learning rate is known to be zero. No host-device synchronization."""
    return all(lr_is_zero(group) for group in param_groups)


def lr_is_zero(group: Mapping[str, Any]) -> bool:
    """Whether a param group's learning rate is known to be zero. No host-device synchronization."""
    lr = group.get("lr", None)
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False
    return lr is not None and float(lr) == 0.0
