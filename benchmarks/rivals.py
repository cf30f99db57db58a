"""Other ways to train in fewer matrix parameters, as their users would write them: what we compare with.

Each turns every ``nn.Linear`` of a module into low rank at one moment, truncating at once, and hands
the pieces to the same base optimizer as ordinary parameters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from svd_optim.records import largest_useful_rank


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
        rank = uniform_rank(weight, budget, lambda m, n, k: k * (m + n + 1))
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
        self.B = nn.Parameter(S[:rank, None].sqrt() * Vh[:rank])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.B), self.A)


class Core(nn.Module):
    """W = U C V^T with U, V frozen: only the (k, k) core is trained, as in OIALR between its updates."""

    def __init__(self, weight: Tensor, budget: float) -> None:
        super().__init__()
        m, n = weight.shape
        rank = uniform_rank(weight, budget, lambda m, n, k: k * (m + n + 1))
        rank = min(rank, largest_useful_rank(m, n))
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.U = nn.Parameter(U[:, :rank].contiguous(), requires_grad=False)
        self.C = nn.Parameter(torch.diag(S[:rank]))
        self.V = nn.Parameter(Vh[:rank].mT.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.V.mT), self.C), self.U)


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
            factors = ThreeFactors(module.weight, budget)
            module.weight.copy_((factors.U * factors.S) @ factors.V.mT)


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
