"""Transfer of an optimizer's moments with its weight: dense to factors and back, and from basis to basis.

First moments are linear in the gradient and are transferred exactly (within the tangent space). Second moments are
transferred under the assumption that a gradient's entries are uncorrelated: E[(G V)_ia^2] = sum_j E[G_ij^2] V_ja^2.
v >= M^2 is enforced: without it the first Adam step after a transfer can be thousands of learning rates long.

K = U diag(S) (m, k) has the gradient G V, L (n, k) has (I - V V^T) G^T U; M_K, M_L, v_K, v_L are
their moments. All functions take leading batch dimensions.

So the base optimizer may be any whose state for a weight is made of such moments, whatever its class: Muon, AdamW,
Adam, SGD, RMSprop, Adagrad, ..., and Keller Jordan's ``muon-optimizer``. Layers of one whose state is of other kinds
(Adafactor, Adamax) are measured and never factorized, and ``why()`` says so; so are those of one that evaluates its
closure more than once in a step (LBFGS), and of one whose step depends on the size of the weight (LAMB, LARS; see
:mod:`.weight_decay`), or that keeps matrices elsewhere than in ``state`` (:func:`hidden_state`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..linalg import project_off, to_compute_dtype

# State keys of torch.optim, which most other optimizers use too.
FIRST = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})
FIRST_OF = {"exp_avg_sq": "exp_avg", "max_exp_avg_sq": "exp_avg", "square_avg": "grad_avg"}

# Optimizers whose state is known to have only these keys before they have taken a step.
SUPPORTED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Muon,
)

Moments = dict[str, Any]
Pair = tuple[Tensor, Tensor]


def unsupported_reason(state: Mapping[str, Any], weight: Tensor) -> str:
    """Why a parameter's optimizer state can't be transferred to factors; empty if it can."""
    cannot = "which svd_optim can't move into factors; wrap one that keeps moments only, as AdamW, Muon and SGD do"
    for key, value in state.items():
        if isinstance(value, Tensor):
            known = key in FIRST or key in SECOND
            if value.numel() > 1 and not (known and value.shape == weight.shape):
                shape = "" if value.shape == weight.shape else " in another shape than the weight's"
                return f"the optimizer keeps {key!r}{shape}, {cannot}"
            if value.numel() > 1 and not (type(value) is Tensor and value.is_floating_point()):
                form = f"{type(value).__name__} of {value.dtype}"
                return f"the optimizer keeps {key!r} as {form}, {cannot}"
        elif not isinstance(value, (int, float, bool, str, type(None))):
            return f"the optimizer keeps {key!r}, a {type(value).__name__}, {cannot}"
    return ""


def hidden_state(base: torch.optim.Optimizer) -> str:
    """What an optimizer keeps for its parameters elsewhere than in ``state``, where it can't be moved; empty: nothing.

    Such are the slow weights of some Lookahead wrappers, and the state of an optimizer inside another one.
    """
    for name, value in vars(base).items():
        if isinstance(value, torch.optim.Optimizer):
            if value.state is not base.state:
                return (
                    f"{type(base).__name__} is around a {type(value).__name__} with a state of its own; wrap that one"
                )
        elif name not in ("param_groups", "state", "defaults") and _holds_matrices(value):
            where = f"{type(base).__name__} keeps matrices in {name!r}, beside its state"
            return f"{where}, which svd_optim can't move; wrap an optimizer that keeps all in its state"
    return ""


def _holds_matrices(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 1 and not isinstance(value, torch.nn.Parameter)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return depth > 0 and isinstance(value, (list, tuple)) and any(_holds_matrices(item, depth - 1) for item in value)


def _is_moment(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and (key in FIRST or key in SECOND)


def _copy(value: Any) -> Any:
    # K and L must not share one `step` tensor: a fused or foreach step would increment it twice.
    return value.clone() if isinstance(value, Tensor) else value


def _bound_ratios(after: Sequence[Moments], before: Sequence[Mapping[str, Any]]) -> None:
    """Raise v such that max M^2 / v is at most 1, or at most what it was before the transfer if that was more.

    In the first steps of Adam v is far below M^2 (0.001 g^2 against (0.1 g)^2 after one step, which its bias correction
    compensates). Raising v to M^2 then would slow the layer down for a thousand steps.
    """
    for key, first in FIRST_OF.items():
        if not all(key in moments and first in moments for moments in (*after, *before)):
            continue
        allowed = torch.ones((), dtype=torch.float32, device=after[0][key].device)
        for moments in before:
            v = to_compute_dtype(moments[key])
            nonzero = v.clamp(min=torch.finfo(v.dtype).tiny)  # where there was no gradient yet, M = v = 0
            ratio = to_compute_dtype(moments[first]).square().div_(nonzero).amax((-2, -1), keepdim=True)
            allowed = torch.maximum(allowed, ratio)
        for moments in after:
            moments[key] = torch.maximum(moments[key], moments[first].square().div_(allowed))


def split_first(M: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """M (m, n) -> M_K = M V (m, k), M_L = (I - V V^T) M^T U (n, k)."""
    return M @ V, project_off(M.mT @ U, V)


def join_first(M_K: Tensor, M_L: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The inverse of :func:`split_first` on the tangent space: M_K V^T + U M_L^T, (m, n)."""
    return M_K @ V.mT + U @ M_L.mT


def split_second(v: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """v (m, n) -> v_K = v (V o V) (m, k), v_L = v^T (U o U) (n, k)."""
    return v @ V.square(), v.mT @ U.square()


def join_second(v_K: Tensor, v_L: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """An estimate of v (m, n) from v_K, v_L.

    v_K (V o V)^T + (U o U) v_L^T is the variance of the gradient's projection onto the tangent space. For an isotropic
    gradient that is the fraction k/m + k/n - k^2/mn of its variance (with v_L the variance of the projected gradient),
    by which it is divided: exact in that case, and too large, hence conservative, where the factors capture more.
    """
    m, k = U.shape[-2:]
    n = V.shape[-2]
    captured = 1 - (1 - k / m) * (1 - k / n)
    return (v_K @ V.square().mT + U.square() @ v_L.mT) / captured


def transport_first(M_K: Tensor, M_L: Tensor, U: Tensor, V: Tensor, U1: Tensor, V1: Tensor) -> tuple[Tensor, Tensor]:
    """M_K (m, k), M_L (n, k) in the bases U1, V1 (vector transport): the split of M_K V^T + U M_L^T, never formed.

    Computed in the compute dtype; returned in those of M_K and M_L.
    """
    M = to_compute_dtype(M_K), to_compute_dtype(M_L)
    M_K1, M_L1 = _transport_first(*M, (U, V), (U1, V1), (U.mT @ U1, V.mT @ V1))
    return M_K1.to(M_K.dtype), M_L1.to(M_L.dtype)


def _transport_first(M_K: Tensor, M_L: Tensor, old: Pair, new: Pair, rotations: Pair) -> Pair:
    (U, V), (U1, V1), (of_U, of_V) = old, new, rotations
    to_K, to_L = M_L.mT @ V1, M_K.mT @ U1  # (k, k)
    M_K1, M_L1 = M_K @ of_V, M_L @ of_U
    M_K1 += U @ to_K
    M_L1 += V @ to_L
    M_L1 -= V1 @ (of_V.mT @ to_L + to_K.mT @ of_U)  # V1 V1^T of it
    return M_K1, M_L1


def transport_second(v_K: Tensor, v_L: Tensor, rotations: Pair) -> Pair:
    """v_K, v_L in bases U', V', whose spans are nearly those of U, V; rotations: (U^T U', V^T V')."""
    of_U, of_V = rotations
    return v_K @ of_V.square(), v_L @ of_U.square()


def resize(
    state_K: Mapping[str, Any], state_L: Mapping[str, Any], old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
) -> tuple[Moments, Moments]:
    """The states of K and L in bases with more or fewer columns, the common columns being the same.

    First moments are projected onto the new tangent space, so adding columns and removing them again changes nothing.
    Variances of new columns are the means of the old ones; those of old columns stay, except where v >= M^2 would not
    hold: an input that was always zero has v_L = 0, but M_L = 0 only while it is orthogonal to the old V.

    Args:
        old, new: (U, V), (m, k) and (n, k), k being the rank before and after.
    """
    k0, k1 = old[0].shape[-1], new[0].shape[-1]
    resized: tuple[Moments, Moments] = ({}, {})
    for key, value in state_K.items():
        if not (_is_moment(key, value) and key in state_L):
            for after, state in zip(resized, (state_K, state_L), strict=True):
                if key in state:
                    after[key] = _copy(state[key])
        elif key in FIRST:
            for after, M in zip(resized, transport_first(value, state_L[key], *old, *new), strict=True):
                after[key] = M.contiguous()
        else:
            for after, v in zip(resized, (value, state_L[key]), strict=True):
                extra = v.mean(-1, keepdim=True).expand(-1, max(0, k1 - k0))
                after[key] = torch.cat([v[:, :k1], extra], dim=-1).contiguous()
    return _finished(resized[0], state_K, state_L), _finished(resized[1], state_K, state_L)


def split(state: Mapping[str, Any], U: Tensor, V: Tensor) -> tuple[Moments, Moments]:
    """The state of a dense weight -> the states of K and L."""
    state_K: Moments = {}
    state_L: Moments = {}
    for key, value in state.items():
        if _is_moment(key, value):
            move = split_first if key in FIRST else split_second
            state_K[key], state_L[key] = move(to_compute_dtype(value), U, V)
        else:
            state_K[key], state_L[key] = _copy(value), _copy(value)
    return _finished(state_K, state), _finished(state_L, state)


def join(state_K: Mapping[str, Any], state_L: Mapping[str, Any], U: Tensor, V: Tensor) -> Moments:
    """The states of K and L -> the state of the dense weight."""
    state: Moments = {}
    for key, value in state_K.items():
        if _is_moment(key, value):
            combine = join_first if key in FIRST else join_second
            state[key] = combine(to_compute_dtype(value), to_compute_dtype(state_L[key]), U, V)
        else:
            state[key] = _copy(value)
    return _finished(state, state_K, state_L)


def transport_(
    states_K: list[Moments], states_L: list[Moments], old: Pair, new: Pair, rotations: Pair | None = None
) -> None:
    """Transport the states of b layers of equal shapes and equal keys from the bases ``old`` to ``new``, in place.

    Args:
        old, new: (U, V), each (b, m, k) and (b, n, k).
        rotations: (U^T U', V^T V'), each (b, k, k), if known.
    """
    K0: Moments = {}
    L0: Moments = {}
    K1: Moments = {}
    L1: Moments = {}
    keys = [key for key, value in states_K[0].items() if _is_moment(key, value) and key in states_L[0]]
    if not keys:
        return
    rotations = rotations or (old[0].mT @ new[0], old[1].mT @ new[1])
    for key in keys:
        K0[key] = torch.stack([to_compute_dtype(s[key]) for s in states_K])
        L0[key] = torch.stack([to_compute_dtype(s[key]) for s in states_L])
        if key in FIRST:
            K1[key], L1[key] = _transport_first(K0[key], L0[key], old, new, rotations)
        else:
            K1[key], L1[key] = transport_second(K0[key], L0[key], rotations)
    _bound_ratios((K1, L1), (K0, L0))
    for moments, states in ((K1, states_K), (L1, states_L)):
        for key, value in moments.items():
            for state, transported in zip(states, value, strict=True):
                state[key].copy_(transported)


def _finished(moments: Moments, *before: Mapping[str, Any]) -> Moments:
    """The moments with bounded ratios, in the dtypes of the optimizer's state."""
    _bound_ratios((moments,), before)
    for key, value in moments.items():
        if isinstance(value, Tensor):
            moments[key] = value.to(before[0][key].dtype).contiguous()
    return moments
