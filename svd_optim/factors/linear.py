"""FactorizedLinear: a linear layer with the weight U diag(S) V^T, which is never formed.

Its gradients come in two conventions. As an ordinary module it has the true ones. While a
:class:`~svd_optim.SubspaceAwareOptimizer` trains it (``tangent=True``) it has those of the two matrices that the
optimizer updates, in the units of W:

    U.grad = G V                    (m, k), the gradient of K = U diag(S)
    V.grad = (I - V V^T) G^T U0     (n, k), the gradient of L, which starts at 0 each step
    S.grad = None

with G the gradient of W, and U0 = U T an orthonormal basis of what the columns of U span: these are of unit length, and
orthogonal where U, S and V are singular triplets, but need not be between analyses (:mod:`.tangent_step`). The sum of
the squared norms of the gradients is that of the projection of G onto the tangent space of the rank-k matrices
(Vandereycken, SIAM J. Optim. 23 (2013)), so a global gradient norm is comparable before and after a switch: it is the
part of the dense norm that the factors can follow, without the factor S of the true gradients.

In other words, W is a function of K and L, with the bases held fixed as U0 and V0 = V:

    W(K, L) = K V0^T + U0 ((I - V0 V0^T) L)^T    at K = U diag(S), L = 0.

Derivatives of any order are those of this function. First ones are written out below, in
:class:`_TangentLinear`; where autograd has to see more than that (``create_graph=True``, ``torch.func``,
forward mode, a tracer) it gets the function itself, which takes twice the multiplications.

To the rest of PyTorch it is an ordinary module: ``deepcopy``, pickling, ``.to()`` and ``torch.compile`` work (which
gains nothing inside factors, and recompiles the model once for each switch), and plain optimizers where none of this
library trains it. A parent that computes with ``layer.weight`` itself gets the product, formed at each access: right,
not fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Never, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..linalg import Basis, exact_basis, full_precision, orthonormalizer, project_off, to_compute_dtype
from .claims import owner_of
from .readonly import NOT_WRITABLE, ReadOnlyWeight

_is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]

SKETCH_SIZE = 8  # columns of the sketch that estimates the part of ||G|| outside the tangent space


class _Tangent(NamedTuple):
    """W as a function of K and L (see above), and of a sketch that is 0: W(K, L) + sketch Omega^T."""

    K: Tensor  # (m, k + s), [U diag(S), sketch]; derivatives go to the parameter U and to the sketch
    L: Tensor  # (n, k), (I - V0 V0^T) L = 0; derivatives go to the parameter V
    U0: Tensor  # (m, k), orthonormal
    V0: Tensor  # (n, k + s), [V0, Omega]

    @classmethod
    def of(cls, U: Tensor, S: Tensor, V: Tensor, sketch: Tensor, Omega: Tensor, T: Tensor) -> Self:
        columns, V0 = U.detach(), V.detach()
        K, L = columns * S.detach() + (U - columns), project_off(V - V0, V0)
        return cls(torch.cat([K, sketch], dim=1), L, columns @ T, torch.cat([V0, Omega], dim=1))

    def weight(self) -> Tensor:
        """W, (m, n)."""
        return F.linear(self.K, self.V0) + F.linear(self.U0, self.L)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T, (..., m)."""
        return F.linear(x @ self.V0, self.K) + F.linear(x @ self.L, self.U0)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W, (..., n)."""
        return F.linear(dy @ self.K, self.V0) + F.linear(dy @ self.U0, self.L)


class _TangentLinear(torch.autograd.Function):
    """y = x V diag(S) U^T, with the gradients of K and L (see the module) and the sketch G Omega."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, S: Tensor, V: Tensor, sketch: Tensor, Omega: Tensor, T: Tensor
    ) -> Tensor:
        k = V.shape[1]
        H = x @ torch.cat([V, Omega], dim=1)  # (..., k + s): the projections of x on V and Omega
        ctx.save_for_backward(x, U, S, V, sketch, Omega, T, H)
        return F.linear(H[..., :k] * S, U)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, U, S, V, sketch, Omega, T, H = ctx.saved_tensors
        k = V.shape[1]
        tangent = None
        if torch.is_grad_enabled():  # create_graph=True: the same gradients as functions of x, dy, K and L
            tangent = _Tangent.of(U, S, V, sketch, Omega, T)
            U, V, H = tangent.U0, tangent.V0[:, :k], x @ tangent.V0
        Z = dy @ U  # (..., k)
        dx = G_K = G_L = G_sketch = None
        if ctx.needs_input_grad[0]:
            dx = F.linear(Z * S, V) if tangent is None else tangent.input_gradient(dy)
        x, dy, H, Z = (t.reshape(-1, t.shape[-1]) for t in (x, dy, H, Z))
        if ctx.needs_input_grad[1]:
            G_both = dy.mT @ H  # (m, k + s) = G [V, Omega]
            G_K, G_sketch = G_both[:, :k], G_both[:, k:]
        if ctx.needs_input_grad[3]:
            G_L = x.mT @ Z if tangent else x.mT @ Z @ T  # (n, k) = G^T U0
            G_L = G_L - V @ (V.mT @ G_L)
        return dx, G_K, None, G_L, G_sketch, None, None


def function_is_opaque() -> bool:
    """Whether something is at work that can't look into a custom Function: torch.func, forward mode or a tracer."""
    # For the first two torch has no public question.
    return _is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


OF_THE_OPTIMIZER = ("tangent", "owner", "Omega", "sketch", "_T", "_T_of")  # attributes of a layer while one trains it


class FactorizedLinear(nn.Linear):
    """``nn.Linear`` with W = U diag(S) V^T.

    Parameters: ``U`` (out_features, rank), ``S`` (rank,), ``V`` (in_features, rank), ``bias``.

    ``weight`` is the product, formed anew at each access, for readers: it carries gradients to the
    factors. It can't be written to: in-place functions, ``out=``, item assignment, ``.data`` and
    ``nn.init`` raise ``RuntimeError`` and change nothing, and so do setting ``weight`` and registering
    a parameter of that name. The ways to another weight are :meth:`set_weight_` and
    :meth:`reset_parameters`. Inside what torch compiles, exports, traces or transforms (``torch.func``)
    the product is an ordinary tensor, and a write to it is not noticed.

    Derivatives of any order are right, under ``torch.func``, forward mode and ``torch.jit.trace`` too
    (while an optimizer of this library trains the layer, those with respect to K and L, see the head of
    this file). ``torch.jit.script`` is refused: script the dense model that ``export_dense`` gives.

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
    _T: Tensor | None = None  # see `orthonormalizer`
    _T_of: tuple[int, int] | None = None  # the identity and the version of U that it is for

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
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        dense = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias", dense.bias)
        self.install(*exact_basis(to_compute_dtype(dense.weight), rank), dense.weight.dtype)

    def install(self, U: Tensor, S: Tensor, V: Tensor, dtype: torch.dtype) -> None:
        """Register copies of U (m, k), S (k,), V (n, k) in ``dtype`` as parameters, before ``bias``."""
        bias = self._parameters.pop("bias", None)
        for name, factor in (("U", U), ("S", S), ("V", V)):
            data = factor.detach().to(dtype).clone(memory_format=torch.contiguous_format)
            self.register_parameter(name, nn.Parameter(data))
        self.register_parameter("bias", bias)

    def orthonormalizer(self) -> Tensor:
        """T (rank, rank), upper triangular, such that U T is orthonormal: for singular triplets I, up to rounding."""
        if torch.compiler.is_compiling() and self._T is not None:
            return self._T  # what is compiled can't look at versions: of the last step, or the last `zero_grad`
        U = self.U
        if function_is_opaque():  # there may be another tensor in the place of U
            return orthonormalizer(to_compute_dtype(U.detach()))
        if self._T is None or self._T_of != (id(U), U._version):
            with torch.no_grad(), full_precision():
                T = orthonormalizer(to_compute_dtype(U.detach()))
            if self._T is None or (self._T.shape, self._T.device, self._T.dtype) != (T.shape, T.device, T.dtype):
                self._T = T
            else:  # the same tensor: what is compiled holds it
                self._T.copy_(T)
            self._T_of = id(U), U._version
        return self._T

    @property
    def rank(self) -> int:
        """The number of singular triplets."""
        return self.S.shape[0]

    # ---- the weight, for others --------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """U diag(S) V^T, (out_features, in_features), formed anew at each access; read-only."""
        opaque = function_is_opaque()
        if self._takes_tangent(opaque):
            W = _Tangent.of(*self._tangent_factors(self.U.dtype)).weight()
        else:
            W = (self.U * self._scales) @ self.V.mT
        if opaque or torch.compiler.is_compiling() or type(W) is not Tensor:
            return W  # what torch makes of a program has no place for our subclass
        return W.as_subclass(ReadOnlyWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_write("setting weight")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``; a parameter called "weight" is refused."""
        if name == "weight":
            self._refuse_write("registering a parameter as weight")
        super().register_parameter(name, param)

    def _refuse_write(self, tried: str) -> Never:
        raise RuntimeError(f"FactorizedLinear({self.extra_repr()}): {tried} {NOT_WRITABLE}")

    @torch.no_grad()
    @full_precision()
    def set_weight_(self, W: Tensor) -> None:
        """Give the layer the leading singular triplets of W (m, n): the nearest weight of its rank.

        U, S and V are written in place. Where an optimizer of this library trains the layer, its moments and a
        pending gradient are carried into the new bases (another optimizer's stay as they are), and a block that it
        protects comes back in the next steps.

        Raises:
            ValueError: W has another shape, is complex, or holds NaN or Inf. Nothing was changed.
        """
        shape = (self.out_features, self.in_features)
        if W.shape != shape or W.is_complex():
            raise ValueError(f"set_weight_: W must be a real matrix of shape {shape}, got {W.dtype} {tuple(W.shape)}")
        if not torch.isfinite(W).all():
            raise ValueError(f"set_weight_: W of shape {shape} holds NaN or Inf")
        U, S, V = (to_compute_dtype(p) for p in (self.U, self.S, self.V))
        old = Basis(U @ self.orthonormalizer(), S.clone(), V.clone())
        new = exact_basis(W.to(self.U.device, torch.promote_types(W.dtype, old.U.dtype)), self.rank)
        new = Basis(*(factor.to(old.U.dtype) for factor in new))
        for parameter, factor in zip((self.U, self.S, self.V), new, strict=True):
            parameter.copy_(factor)
        owner = owner_of(self)
        if owner is not None:
            owner.transport_(self.U, self.V, old, new)
        if self.tangent:
            self.orthonormalizer()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise anew: as a fresh ``nn.Linear``, cut to the rank."""
        factory = {"device": self.U.device, "dtype": self.U.dtype}
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, **factory)
        self.set_weight_(dense.weight)
        if self.bias is not None:
            self.bias.copy_(dense.bias)

    # ---- derivatives -------------------------------------------------------------------------------------

    def track_tangent(self, Omega: Tensor | None, owner: object = None) -> None:
        """Switch to the gradients of K and L, with a zero sketch; ``None``: back to the true gradients.

        Args:
            Omega: (in_features, s), standard normal, in the parameters' dtype.
            owner: identifies the caller, so that it detaches the layer only if no other one has attached it since.
        """
        for name in OF_THE_OPTIMIZER:
            self.__dict__.pop(name, None)
        if Omega is not None:
            self.tangent, self.owner, self.Omega = True, owner, Omega
            self.sketch = Omega.new_zeros(self.out_features, Omega.shape[1]).requires_grad_()
            self.orthonormalizer()

    def _takes_tangent(self, opaque: bool) -> bool:
        """Whether derivatives can be asked for now that are to be those of K and L."""
        return self.tangent and (opaque or (torch.is_grad_enabled() and self.U.requires_grad))

    @property
    def _scales(self) -> Tensor:
        """S. While an optimizer trains the layer it takes no gradient, also in a pass with U and V frozen (GANs)."""
        return self.S.detach() if self.tangent else self.S

    def _tangent_factors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """U, S, V, sketch, Omega, T as :class:`_Tangent` takes them."""
        assert self.sketch is not None and self.Omega is not None
        # A tracer takes the sketch for a constant, which must not require a gradient.
        sketch = self.Omega.new_zeros(self.out_features, self.Omega.shape[1]) if _is_tracing() else self.sketch
        return tuple(t.to(dtype) for t in (self.U, self.S, self.V, sketch, self.Omega, self.orthonormalizer()))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        bias, opaque = self.bias, function_is_opaque()
        if not self._takes_tangent(opaque):
            y = F.linear(F.linear(x, self.V.mT) * self._scales, self.U)
        else:
            # Cast here, outside of the function, so that autocast sees leaves of one dtype inside it.
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.U.dtype
            factors = self._tangent_factors(dtype)
            x = x.to(dtype) if x.dtype != dtype else x
            y = _Tangent.of(*factors).forward(x) if opaque else _TangentLinear.apply(x, *factors)
        return y if bias is None else y + bias.to(y.dtype)

    def __prepare_scriptable__(self) -> Never:
        # torch.jit.script calls this. A script is made once, and could not follow the layer from one convention of
        # its gradients to the other.
        raise RuntimeError(
            f"FactorizedLinear({self.extra_repr()}): torch.jit.script is not supported; use torch.jit.trace, "
            f"torch.export or torch.compile, or script the dense model that svd_optim.export_dense(model) gives"
        )

    def extra_repr(self) -> str:
        """The text of ``nn.Linear``, with the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.tangent:
            self.orthonormalizer()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.Omega is not None:  # the sketch is a leaf and no buffer, so nn.Module does not move it
            self.track_tangent(fn(self.Omega), self.owner)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle belongs to no optimizer: it has true gradients until one attaches it.
        state = self.__dict__.copy()
        for name in OF_THE_OPTIMIZER:
            state.pop(name, None)
        return state
