"""Other ways to train in fewer matrix parameters, as their users would write them: what we compare with.

The forms turn every ``nn.Linear`` of a module into low rank at one moment, truncating at once, and hand the pieces to
the base optimizer as ordinary parameters. :class:`Spectron` and :class:`Riemannion` are base optimizers for that,
written from their papers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Muon, Optimizer
from torch.optim._muon import _zeropower_via_newtonschulz  # what torch's Muon orthogonalizes by

from svd_optim.records import largest_useful_rank, parameter_count


def uniform_rank(weight: Tensor, budget: float, numbers: Callable[[int, int, int], int]) -> int:
    """The largest rank whose ``numbers(m, n, k)`` fit into a share of the weight's."""
    m, n = weight.shape
    fitting = [k for k in range(1, min(m, n) + 1) if numbers(m, n, k) <= budget * m * n]
    return max(fitting, default=1)


def has_galore() -> bool:
    """Whether the extra ``rivals`` is installed."""
    return importlib.util.find_spec("galore_torch") is not None


def galore(matrices: list[nn.Parameter], rest: list[nn.Parameter], lr: float, budget: float = 0.5) -> Optimizer:
    """GaLore under AdamW, of the rank that square factors of the budget would have."""
    from galore_torch import GaLoreAdamW

    width = min(matrices[0].shape)
    rank = max(1, int(budget * width * width / (2 * width + 1)))
    # scale=1: the grid of learning rates is everybody's.
    low_rank = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    return GaLoreAdamW([low_rank, {"params": rest}], lr=lr, betas=(0.9, 0.95), no_deprecation_warning=True)


class ThreeFactors(nn.Module):
    """W = U diag(S) V^T, all three trained."""

    def __init__(self, weight: Tensor, budget: float) -> None:
        super().__init__()
        rank = uniform_rank(weight, budget, parameter_count)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.U = nn.Parameter(U[:, :rank].contiguous())
        self.S = nn.Parameter(S[:rank].clone())
        self.V = nn.Parameter(Vh[:rank].mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.V.mT) * self.S, self.U)


class TwoFactors(nn.Module):
    """W = A B with A = U sqrt(S), B = sqrt(S) V^T: balanced, as in LoRA-like and Cuttlefish-like training."""

    def __init__(self, weight: Tensor, budget: float) -> None:
        super().__init__()
        rank = uniform_rank(weight, budget, lambda m, n, k: k * (m + n))
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.A = nn.Parameter(U[:, :rank] * S[:rank].sqrt())
        # Directions of no size, as of a weight that begins at zero, could not be learned if both factors were zero.
        self.B = nn.Parameter(torch.where(S > 0, S.sqrt(), 1.0)[:rank, None] * Vh[:rank])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.B), self.A)


class Core(nn.Module):
    """W = U C V^T with U, V frozen: only the (k, k) core is trained, as in OIALR between its updates."""

    def __init__(self, weight: Tensor, budget: float) -> None:
        super().__init__()
        m, n = weight.shape
        rank = uniform_rank(weight, budget, parameter_count)
        rank = min(rank, largest_useful_rank(m, n))
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.U = nn.Parameter(U[:, :rank].contiguous(), requires_grad=False)
        self.C = nn.Parameter(torch.diag(S[:rank]))
        self.V = nn.Parameter(Vh[:rank].mT.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.V.mT), self.C), self.U)


def truncate_weight_(W: Tensor, budget: float) -> None:
    """Replace a weight by the nearest one whose U, S, V would fit into ``budget``."""
    factors = ThreeFactors(W, budget)
    W.copy_((factors.U * factors.S) @ factors.V.mT)


def orthogonalized(M: Tensor) -> Tensor:
    """About U V^T of M = U S V^T, as torch's Muon has it by default."""
    return _zeropower_via_newtonschulz(M, (3.4445, -4.7750, 2.0315), 5, 1e-7).to(M.dtype)


def shape_factor(m: int, n: int) -> float:
    """By which torch's Muon multiplies its learning rate for an (m, n) weight."""
    return math.sqrt(max(1.0, m / n))


class Spectron(Optimizer):
    """Muon on two factors W = A B, its step divided by 1 + ||A|| + ||B||: then W moves by the learning rate at most.

    Janson et al., arXiv:2602.12429. Norms are spectral, by one power iteration a step.

    Args:
        params: A (m, k), B (k, n), the next A and its B, and so on.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
                updates = [self._update(p, group["momentum"]) for p in (A, B)]
                rho = group["lr"] / (1 + self._norm(A) + self._norm(B))
                for p, update in zip((A, B), updates, strict=True):
                    p.sub_(rho * shape_factor(len(A), B.shape[1]) * update)

    def _update(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The orthogonalized momentum, Nesterov's, as in torch's Muon."""
        assert p.grad is not None
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return orthogonalized(p.grad.lerp(buffer, momentum))

    def _norm(self, p: nn.Parameter) -> Tensor:
        v = self.state[p].setdefault("vector", torch.ones(p.shape[1], dtype=p.dtype, device=p.device))
        v.copy_(torch.nn.functional.normalize(p.mT @ (p @ v), dim=0))
        return (p @ v).norm()


class Riemannion(Muon):
    """Muon on the manifold of matrices of rank k, from when its ``budget`` is set; on dense weights, so saving nothing.

    Bogachev et al., arXiv:2507.12142 (ICLR 2026): gradient and momentum are projected onto the tangent space at W, the
    momentum is orthogonalized, projected again, and the step brought back to rank k by the truncated SVD.
    """

    budget: float | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.budget is None:
            return super().step(closure)
        for group in self.param_groups:
            for W in group["params"]:
                self._step_of(W, group["lr"], group["momentum"])

    def _step_of(self, W: nn.Parameter, lr: float, momentum: float) -> None:
        assert W.grad is not None and self.budget is not None
        factors = ThreeFactors(W, self.budget)
        U, V = factors.U, factors.V

        def tangent(M: Tensor) -> Tensor:
            outside = M - U @ (U.mT @ M)
            return M - outside + outside @ V @ V.mT

        buffer, gradient = self.state[W]["momentum_buffer"], tangent(W.grad)
        buffer.copy_(tangent(buffer).lerp(gradient, 1 - momentum))
        update = tangent(orthogonalized(gradient.lerp(buffer, momentum)))
        W.sub_(lr * shape_factor(*W.shape) * update)
        truncate_weight_(W, self.budget)


@torch.no_grad()
def truncate_(model: nn.Module, matrices: Optimizer, vectors: Optimizer, form: type[nn.Module], budget: float) -> None:
    """Put ``form(weight, budget)`` in the place of every ``nn.Linear`` in ``model``, and train its parameters.

    Args:
        matrices: the optimizer of the weights; it takes the two-dimensional pieces, in their place.
        vectors: the optimizer that takes one-dimensional pieces (Muon can't); may be the same one.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            new = form(child.weight, budget)
            setattr(parent, name, new)
            matrices.state.pop(child.weight, None)
            trained = [p for p in new.parameters() if p.requires_grad]
            for group in matrices.param_groups:
                at = next((i for i, p in enumerate(group["params"]) if p is child.weight), None)
                if at is not None:
                    group["params"][at : at + 1] = [p for p in trained if p.ndim == 2]
            vectors.param_groups[0]["params"].extend(p for p in trained if p.ndim == 1)


@torch.no_grad()
def project_(model: nn.Module, budget: float) -> None:
    """Bring every ``nn.Linear`` in ``model`` to the nearest weight whose U, S, V would fit into ``budget``.

    What remains a dense model, trained densely in between, is the bound for training at that rank.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            truncate_weight_(module.weight, budget)


class PhaseOneAnalysis:
    """The analysis of the Phase 1 experiment: a full SVD of each weight, projections formed explicitly.

    Args:
        weights: (m, n) matrices with gradients.
        rank: of the principal subspace; everything else of the thin SVD is the minor one.
    """

    def __init__(self, weights: list[nn.Parameter], rank: int) -> None:
        self.weights, self.rank = weights, rank
        self.previous: dict[nn.Parameter, Tensor] = {}  # U_k (m, k) of the analysis before

    @torch.no_grad()
    def analyze(self) -> list[dict[str, float]]:
        """Principal and minor alignment, subspace angle and reconstruction error of each weight."""
        return [self._analyze_one(W) for W in self.weights if W.grad is not None]

    @staticmethod
    def projections(G: Tensor, U: Tensor, Vh: Tensor, k: int) -> Tensor:
        """[principal, minor] share of ||G||, from projections of the size of G. (2,)"""
        principal = U[:, :k] @ (U[:, :k].mT @ G @ Vh[:k].mT) @ Vh[:k]
        minor = U[:, k:] @ (U[:, k:].mT @ G @ Vh[k:].mT) @ Vh[k:]
        return torch.stack([principal.norm(), minor.norm()]) / G.norm()

    def _analyze_one(self, W: nn.Parameter) -> dict[str, float]:
        assert W.grad is not None
        U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
        G, k = W.grad.float(), self.rank
        principal, minor = self.projections(G, U, Vh, k).tolist()
        kept = (U[:, :k] * S[:k]) @ Vh[:k]
        angle = 0.0
        if W in self.previous:
            cosines = torch.linalg.svdvals(self.previous[W].mT @ U[:, :k])
            angle = float(cosines.clamp(max=1.0).acos().max())
        self.previous[W] = U[:, :k].clone()
        return {
            "principal_alignment": principal,
            "minor_alignment": minor,
            "subspace_angle": angle,
            "reconstruction_error": float((W - kept).norm() / W.norm()),
        }
