"""Factors between two analyses: unit columns, not orthogonal; what loads, saves, asks and repairs them there."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import check_factors, loss_of, make, manual, net, quick, same_bits, train, weights

from svd_optim import SubspaceAwareOptimizer, load_checkpoint, save_checkpoint
from svd_optim.factors import FactorizedLinear
from svd_optim.factors.diagonal import diagonalize_
from svd_optim.linalg import Basis, orthonormalizer, retract_columns
from svd_optim.storage.validation import check_columns


def skew(Q: torch.Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[1])).abs().max())


def between(base: str = "sgd", steps: int = 17) -> tuple[torch.nn.Module, SubspaceAwareOptimizer]:
    """In factors, some steps after the last analysis."""
    model, optimizer = make(base, manual(analyze_every=20))
    train(model, optimizer, 2)
    optimizer.factorize_("all", rank=8)
    train(model, optimizer, range(2, steps))
    assert skew(model.up.U.detach()) > 1e-4
    return model, optimizer


@pytest.mark.parametrize("base", ["sgd", "adamw", "muon"])
def test_columns_become_singular_triplets_and_the_weight_stays(base: str) -> None:
    model, optimizer = between(base)
    before = [layer.weight.detach().clone() for layer in (model.up, model.mid)]
    asked = optimizer.layers["up"].basis
    with torch.no_grad():
        diagonalize_([layer.factors for layer in optimizer.layers.values()], optimizer.state)
    for layer, W in zip((model.up, model.mid), before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-5, atol=1e-6)
        assert skew(layer.U.detach()) < 1e-5 and (layer.S.diff() <= 0).all()
        torch.testing.assert_close(layer.S.detach(), torch.linalg.svdvals(W)[:8], rtol=1e-5, atol=1e-6)
    assert asked is not None
    torch.testing.assert_close(asked.S, model.up.S.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_loaded_from_between_two_analyses_is_no_triplets() -> None:
    model, optimizer = between()
    state = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(17, 20))
    assert optimizer.layers["up"].factors.diagonal  # an analysis
    model.load_state_dict(state)
    assert not optimizer.layers["up"].factors.diagonal
    basis = optimizer.layers["up"].basis
    assert basis is not None and skew(basis.U) < 1e-5
    optimizer.protect_("up", rank=3)
    anchor = optimizer.layers["up"].anchor
    assert anchor is not None and skew(anchor.U) < 1e-5
    torch.testing.assert_close(anchor.U.mT @ model.up.weight.detach() @ anchor.V, anchor.block, rtol=1e-4, atol=1e-5)
    train(model, optimizer, range(20, 45))
    check_factors(model)


def test_a_dense_model_takes_them_up_and_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = between("adamw")
    save_checkpoint(tmp_path, model, optimizer)
    other = net(5)
    resumed = SubspaceAwareOptimizer(torch.optim.AdamW(other.parameters(), lr=1.0), other, optimizer.config)
    load_checkpoint(tmp_path, other, resumed)
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(17, 45))
    same_bits(weights(model), weights(other))
    dense = net(6)
    alone = SubspaceAwareOptimizer(torch.optim.AdamW(dense.parameters()), dense, manual())
    dense.load_state_dict(model.state_dict())
    alone.merge_("all")
    torch.testing.assert_close(dense.up.weight.detach(), model.up.weight.detach().clone(), rtol=1e-5, atol=1e-6)
    cached = alone.layers["up"].cached
    assert cached is not None and skew(cached.U) < 1e-5


def test_every_retraction_that_is_accepted_can_be_saved() -> None:
    """One column takes up much of all the others."""
    generator = torch.Generator().manual_seed(0)
    m, n, k = 200, 160, 100
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator))[0] for size in (m, n))
    S = torch.ones(k)
    S[0] = 10
    least = 1.0
    for size in (1.0, 2.0, 3.0, 3.4):
        dK = size * U[:, :1] * torch.randn(k, generator=generator).sign()
        new = retract_columns(U * S + dK, torch.zeros(n, k), U, V, orthonormalizer(U))
        if float(new.amplification) <= 30:
            check_columns(new.factors.U, "here", "U")
            least = min(least, float(torch.linalg.eigvalsh(new.factors.U.mT @ new.factors.U)[0]))
    assert least < 2e-3


def test_no_product_is_formed_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make("sgd", manual(analyze_every=20, measure_every=2))
    optimizer.factorize_("all")

    def formed(_: FactorizedLinear) -> None:
        raise AssertionError("formed")

    monkeypatch.setattr(FactorizedLinear, "weight", property(formed))
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(16, 48, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def test_a_model_may_change_its_type_in_a_descent() -> None:
    model, optimizer = make("sgd", quick())
    step = 0
    while not any(layer.status.descent_end for layer in optimizer.layers.values()):
        train(model, optimizer, [step])
        step += 1
    model.double()
    for i in range(4):
        optimizer.zero_grad()
        x = torch.randn(16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_layer_that_is_no_number_keeps_its_moments_and_holds_nobody_up() -> None:
    model, optimizer = make("adamw", manual(analyze_every=50))
    optimizer.factorize_("all", rank=8)
    train(model, optimizer, 5)
    with torch.no_grad():
        model.up.V[0, 0] = math.nan
        diagonalize_([layer.factors for layer in optimizer.layers.values()], optimizer.state)
    for p in (model.up.U, model.up.V):
        assert all(torch.isfinite(v).all() for v in optimizer.state[p].values())
    assert not optimizer.layers["up"].factors.diagonal and optimizer.layers["mid"].factors.diagonal
    assert skew(model.mid.U.detach()) < 1e-5


def test_gradients_that_are_kept_turn_with_the_columns() -> None:
    """Accumulated across an analysis: they are those of the same matrix."""
    model, optimizer = between()
    optimizer.zero_grad()
    loss_of(model, 17).backward()
    layer = model.up
    with torch.no_grad():
        before = layer.U.grad @ layer.V.mT + layer.U @ layer.orthonormalizer() @ layer.V.grad.mT
        diagonalize_([optimizer.layers["up"].factors], optimizer.state)
        after = layer.U.grad @ layer.V.mT + layer.U @ layer.orthonormalizer() @ layer.V.grad.mT
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
    assert isinstance(optimizer.layers["up"].basis, Basis)
