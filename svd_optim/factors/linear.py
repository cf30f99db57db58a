"""FactorizedLinear: a linear layer with the weight U diag(S) V^T, which is never formed.

Its gradients come in two conventions. As an ordinary module it has the true ones. While a
:class:`~svd_optim.SubspaceAwareOptimizer` trains it (``tangent=True``) it has those of the two matrices that the
optimizer updates, in the units of W:

    U.grad = G V                    (m, k), the gradient of K = U diag(S)
    V.grad = (I - V V^T) G^T U      (n, k), the gradient of L, which starts at 0 each step
    S.grad = None

with G the gradient of W. The sum of their squared norms is that of the projection of G onto the tangent space of the
rank-k matrices (Vandereycken, SIAM J. Optim. 23 (2013)), so a global gradient norm is comparable before and after a
switch: it is the part of the dense norm that the factors can follow, without the factor S of the true gradients.

To the rest of PyTorch it is an ordinary module: plain optimizers, ``deepcopy``, pickling, ``.to()`` and
``torch.compile`` work (which gains nothing inside factors, and recompiles the model once for each switch). A parent
that computes with ``layer.weight`` itself gets the product, formed at each access: right, not fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg import to_compute_dtype

SKETCH_SIZE = 8  # columns of the sketch that estimates the part of ||G|| outside the tangent space


class _TangentLinear(torch.autograd.Function):
    """y = x V diag(S) U^T, with the gradients of K and L (see the module) and the sketch G Omega."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, S: Tensor, V: Tensor, sketch: Tensor, Omega: Tensor) -> Tensor:
        k = V.shape[1]
        H = x @ torch.cat([V, Omega], dim=1)  # (..., k + s): the projections of x on V and Omega
        ctx.save_for_backward(x, U, S, V, H)
        return F.linear(H[..., :k] * S, U)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, U, S, V, H = ctx.saved_tensors
        k = V.shape[1]
        Z = dy @ U  # (..., k)
        dx = F.linear(Z * S, V) if ctx.needs_input_grad[0] else None
        x, dy, H, Z = (t.reshape(-1, t.shape[-1]) for t in (x, dy, H, Z))
        G_K = G_L = G_sketch = None
        if ctx.needs_input_grad[1]:
            G_both = dy.mT @ H  # (m, k + s) = G [V, Omega]
            G_K, G_sketch = G_both[:, :k], G_both[:, k:]
        if ctx.needs_input_grad[3]:
            G_L = x.mT @ Z  # (n, k) = G^T U
            G_L = G_L - V @ (V.mT @ G_L)
        return dx, G_K, None, G_L, G_sketch, None


class _TangentWeight(torch.autograd.Function):
    """U diag(S) V^T as a matrix, for code that reads ``layer.weight``, with the gradients of K and L."""

    @staticmethod
    def forward(ctx: Any, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(U, V)
        return (U * S) @ V.mT

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        U, V = ctx.saved_tensors
        G_L = G.mT @ U
        return G @ V, None, G_L - V @ (V.mT @ G_L)


class FactorizedLinear(nn.Linear):
    """``nn.Linear`` with W = U diag(S) V^T.

    Parameters: ``U`` (out_features, rank), ``S`` (rank,), ``V`` (in_features, rank), ``bias`` (out_features,).
    ``weight`` is a read-only property that forms the product; modifying the result has no effect on the layer.

    The constructor fills the factors with the leading triplets of a newly initialized ``nn.Linear``; to convert an
    existing layer in place use :func:`svd_optim.factors.factorize_`.

    Args:
        rank: number of singular triplets, 1 to min(in_features, out_features).

    The constructor fills the factors with the leading triplets of a fresh ``nn.Linear``; use
    :func:`svd_optim.factors.factorize_` to turn an existing layer into this class in place.

    Raises:
        ValueError: ``rank`` is out of range.
    """

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    tangent: bool = False
    owner: object = None
    sketch: Tensor | None = None  # (out_features, s), a leaf that collects G Omega in its .grad
    Omega: Tensor | None = None  # (in_features, s)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"FactorizedLinear: rank must be in [1, {min(in_features, out_features)}] "
                f"for a layer of shape ({out_features}, {in_features}), got {rank}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        dense = self._parameters.pop("weight")
        assert dense is not None
        U, S, Vh = torch.linalg.svd(to_compute_dtype(dense), full_matrices=False)
        self.install(U[:, :rank], S[:rank], Vh[:rank].mT, dense.dtype)

    def install(self, U: Tensor, S: Tensor, V: Tensor, dtype: torch.dtype) -> None:
        """Register copies of U (m, k), S (k,), V (n, k) in ``dtype`` as parameters, before ``bias``."""
        bias = self._parameters.pop("bias", None)
        for name, factor in (("U", U), ("S", S), ("V", V)):
            data = factor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
            self.register_parameter(name, nn.Parameter(data))
        self.register_parameter("bias", bias)

    @property
    def rank(self) -> int:
        """The number of singular triplets."""
        return self.S.shape[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """U diag(S) V^T, (out_features, in_features), computed at each access."""
        if self.tangent:
            return _TangentWeight.apply(self.U, self.S, self.V)
        return (self.U * self.S) @ self.V.mT

    def track_tangent(self, Omega: Tensor | None, owner: object = None) -> None:
        """Switch to the gradients of K and L, with a zero sketch; ``None``: back to the true gradients.

        Args:
            Omega: (in_features, s), standard normal, in the parameters' dtype.
            owner: identifies the caller, so that it detaches the layer only if no other one has attached it since.
        """
        for name in ("tangent", "owner", "Omega", "sketch"):
            self.__dict__.pop(name, None)
        if Omega is not None:
            self.tangent, self.owner, self.Omega = True, owner, Omega
            self.sketch = Omega.new_zeros(self.out_features, Omega.shape[1]).requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        U, S, V, bias = self.U, self.S, self.V, self.bias
        if not (self.tangent and torch.is_grad_enabled() and U.requires_grad):
            y = F.linear(F.linear(x, V.mT) * S, U)
        else:
            assert self.sketch is not None and self.Omega is not None
            # Cast here, outside the autograd function, so that all of its inputs have one dtype under autocast.
            device_type = x.device.type
            autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocast else U.dtype
            factors = (t.to(dtype) for t in (U, S, V, self.sketch, self.Omega))
            y = _TangentLinear.apply(x.to(dtype) if x.dtype != dtype else x, *factors)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """The text of ``nn.Linear``, with the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.Omega is not None:  # the sketch is a leaf and no buffer, so nn.Module does not move it
            self.track_tangent(fn(self.Omega), self.owner)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle belongs to no optimizer: it has true gradients until one attaches it.
        state = self.__dict__.copy()
        for name in ("tangent", "owner", "Omega", "sketch"):
            state.pop(name, None)
        return state
