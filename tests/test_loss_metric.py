"""The metric of the loss, against its plain definition in float64; and what is sampled of a run."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import batch, factorized, loss_of, make, manual, quick, same_bits, train, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, load_checkpoint, save_checkpoint
from svd_optim.decisions.planner import Candidate, cheapest
from svd_optim.linalg import (
    Projectors,
    exact_basis,
    fade_minor_,
    loss_basis,
    predicted_increases,
    projectors,
    second_moment,
    truncated,
)
from svd_optim.linalg.loss_metric import DAMPING
from svd_optim.records import largest_useful_rank, parameter_count
from svd_optim.tracking import loss_metric
from svd_optim.tracking.budget import ranks_within
from svd_optim.tracking.loss_metric import Tap, collect

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    m, n = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    return m, n, draw(st.integers(1, min(m, n)))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, size: int) -> Tensor:
    """A second moment whose eigenvalues span some magnitudes."""
    X = random(seed, 4 * size, size) * torch.logspace(0, -2, size, dtype=torch.float64)
    return second_moment(X)


def symmetric_root(C: Tensor) -> Tensor:
    """The symmetric square root of the damped moment, by eigenvectors."""
    eigenvalues, Q = torch.linalg.eigh(C)
    return (Q * (eigenvalues.clamp(min=0) + DAMPING * eigenvalues.mean()).sqrt()) @ Q.mT


def best(W: Tensor, outputs: Tensor, inputs: Tensor, k: int) -> Tensor:
    """The definition: the truncated full SVD of A W B with symmetric roots, mapped back."""
    A, B = symmetric_root(outputs), symmetric_root(inputs)
    U, S, Vh = torch.linalg.svd(A @ W @ B)
    return torch.linalg.inv(A) @ (U[:, :k] * S[:k]) @ Vh[:k] @ torch.linalg.inv(B)


def ours(W: Tensor, outputs: Tensor, inputs: Tensor, k: int) -> Tensor:
    basis = loss_basis(W, outputs, inputs, min(W.shape))
    U, S, V = truncated(W, projectors(basis, outputs, inputs, k))
    return (U * S) @ V.mT


def cost(D: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    """tr(A D S D^T), of the damped moments."""
    return float(torch.linalg.matrix_norm(symmetric_root(outputs) @ D @ symmetric_root(inputs)) ** 2)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    return bool(torch.linalg.vector_norm(a - b) <= tolerance * (1e-9 + torch.linalg.vector_norm(b)))


# ---- truncation --------------------------------------------------------------------------------------


@given(shapes(), SEEDS)
def test_a_truncation_is_the_best_one_by_definition(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    assert close(ours(W, outputs, inputs, k), best(W, outputs, inputs, k), 1e-6)


@given(shapes(), SEEDS)
def test_no_other_weight_of_the_rank_is_cheaper(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    W_k = ours(W, outputs, inputs, k)
    least = cost(W - W_k, outputs, inputs)
    U, S, V = exact_basis(W, k)
    near, _, _ = exact_basis(W_k + 0.1 * random(seed + 3, m, n), k)
    for other in ((U * S) @ V.mT, near @ (near.mT @ W)):
        assert least <= cost(W - other, outputs, inputs) * (1 + 1e-9) + 1e-20 * cost(W, outputs, inputs)


@given(shapes(), SEEDS)
def test_all_of_the_rank_keeps_the_weight_and_the_cost_falls_with_the_rank(
    shape: tuple[int, int, int], seed: int
) -> None:
    m, n, _ = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    costs = [cost(W - ours(W, outputs, inputs, k), outputs, inputs) for k in range(1, min(m, n) + 1)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 1e-12 * cost(W, outputs, inputs)


@given(shapes(), SEEDS)
def test_without_preferences_it_is_the_singular_value_decomposition(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W = random(seed, m, n)
    U, S, V = exact_basis(W, k)
    for eye in (lambda size: torch.eye(size, dtype=W.dtype), lambda size: torch.ones(size, dtype=W.dtype)):
        assert close(ours(W, eye(m), 3.0 * eye(n), k), (U * S) @ V.mT, 1e-6)


@given(shapes(), SEEDS)
def test_a_diagonal_stands_for_the_diagonal_moment(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W, a, b = random(seed, m, n), moment(seed + 1, m).diagonal(), moment(seed + 2, n).diagonal()
    assert close(ours(W, a, b, k), ours(W, torch.diag(a), torch.diag(b), k), 1e-6)


@given(shapes(), SEEDS)
def test_turning_inputs_and_outputs_turns_the_truncation(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    P, Q = torch.linalg.qr(random(seed + 3, m, m))[0], torch.linalg.qr(random(seed + 4, n, n))[0]
    turned = ours(P @ W @ Q.mT, P @ outputs @ P.mT, Q @ inputs @ Q.mT, k)
    assert close(turned, P @ ours(W, outputs, inputs, k) @ Q.mT, 1e-6)


@given(shapes(), SEEDS)
def test_projectors_project(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    P = projectors(loss_basis(W, outputs, inputs, min(m, n)), outputs, inputs, k)
    eye = torch.eye(k, dtype=W.dtype)
    assert close(P.L_dual.mT @ P.L, eye) and close(P.R.mT @ P.R_dual, eye)
    assert close(P.L @ (P.L_dual.mT @ W), (W @ P.R_dual) @ P.R.mT, 1e-6)  # both are the truncation


@given(shapes(), SEEDS, st.integers(1, 9))
def test_a_descent_ends_at_the_truncation(shape: tuple[int, int, int], seed: int, steps: int) -> None:
    m, n, k = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    expected = ours(W, outputs, inputs, k)
    P = projectors(loss_basis(W, outputs, inputs, min(m, n)), outputs, inputs, k)
    for left in range(steps, 0, -1):
        fade_minor_(W, P, 1 / left)
    assert close(W, expected, 1e-6)


# ---- prediction --------------------------------------------------------------------------------------


@given(shapes(), SEEDS, st.integers(1, 5), st.integers(1, 6))
def test_predictions_are_those_of_the_definition(shape: tuple[int, int, int], seed: int, e: int, t: int) -> None:
    m, n, _ = shape
    W, outputs, inputs = random(seed, m, n), moment(seed + 1, m), moment(seed + 2, n)
    x, g = random(seed + 3, e, t, n), random(seed + 4, e, t, m)
    basis = loss_basis(W, outputs, inputs, min(m, n))
    first, second, pieces = predicted_increases(W, basis.L, basis.R * basis.S, x, g)
    gradients = g.mT @ x  # (e, m, n)
    p = math.gcd(t, 16 // e)
    pieces_of = [part for example in g[..., None] * x[..., None, :] for part in example.view(p, t // p, m, n).sum(1)]
    for k in range(1, min(m, n) + 1):
        D = ours(W, outputs, inputs, k) - W
        changes = (gradients * D).sum((1, 2))
        of_pieces = (torch.stack(pieces_of) * D).sum((1, 2))
        assert math.isclose(float(first[k - 1]), float(changes.sum()), abs_tol=1e-6)
        assert math.isclose(float(second[k - 1]), float(changes.square().sum() / 2), rel_tol=1e-6, abs_tol=1e-9)
        assert math.isclose(float(pieces[k - 1]), float(of_pieces.square().sum() / 2), rel_tol=1e-6, abs_tol=1e-9)


def softmax_regression(seed: int, rows: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A model that predicts its own labels as well as anything could: there Fisher information is the Hessian."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(12, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(8, 12, generator=generator) / 2)
    x = torch.randn(rows, 12, generator=generator).double() * torch.logspace(0, -1, 12)
    y = torch.multinomial(model(x).softmax(-1), 1, generator=generator)[:, 0]
    return model, x, y


@pytest.mark.parametrize("seed", range(3))
def test_a_prediction_is_near_what_truncation_does_to_the_loss(seed: int) -> None:
    model, x, y = softmax_regression(seed, 1000)
    tap = Tap()
    handle = model.register_forward_hook(tap)
    model(x).log_softmax(-1).gather(1, y[:, None]).mean().neg().backward()
    handle.remove()
    W, q = model.weight.detach(), 8
    inputs, outputs = second_moment(tap.samples[0].x.flatten(0, 1)), second_moment(tap.samples[0].g.flatten(0, 1))
    basis = loss_basis(W, outputs, inputs, q)
    (sample,) = tap.samples
    first, second, _ = predicted_increases(W, basis.L, basis.R * basis.S, sample.x, sample.g)

    def loss(weight: Tensor) -> float:
        return float(-(x @ weight.mT).log_softmax(-1).gather(1, y[:, None]).mean())

    for k in (3, 4, 5):
        U, S, V = truncated(W, projectors(basis, outputs, inputs, k))
        found = loss((U * S) @ V.mT) - loss(W)
        assert found > 0 and 0.6 < float(first[k - 1] + tap.rows * second[k - 1]) / found < 1.7, k


# ---- sampling ----------------------------------------------------------------------------------------


def test_a_sample_is_of_whole_examples_and_counts_them_all() -> None:
    layer = nn.Linear(6, 4)
    tap = Tap()
    layer.register_forward_hook(tap)
    x = torch.randn(40, 100, 6)
    G = torch.randn(40, 100, 4)
    layer(x).backward(G)
    (sample,) = tap.samples
    assert (sample.examples, sample.rows, tap.rows) == (40, 4000, 4000)
    assert sample.x.shape == (10, 100, 6) and sample.g.shape == (10, 100, 4)
    for rows, gradients in zip(sample.x, sample.g, strict=True):
        [i] = [i for i in range(40) if torch.equal(x[i], rows)]
        assert torch.equal(G[i], gradients)


def test_only_passes_that_train_the_layer_are_sampled() -> None:
    layer = nn.Linear(6, 4)
    tap = Tap()
    layer.register_forward_hook(tap)
    x = torch.randn(3, 6, requires_grad=True)
    with torch.no_grad():
        layer(x)
    layer(x)  # never goes back
    layer.requires_grad_(False)
    layer(x).sum().backward()
    layer.requires_grad_(True)
    torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, (x.detach(),)).sum())(
        layer.weight.detach()
    )
    assert tap.samples == [] and tap.rows == 0
    layer(x).sum().backward()
    copied = copy.deepcopy(layer)
    copied(x).sum().backward()
    assert tap.rows == 3 and len(tap.samples) == 1
    assert [hook.samples for hook in copied._forward_hooks.values()] == [[]]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_layers_have_hooks_only_for_the_steps_that_are_sampled() -> None:
    model, optimizer = make("adamw", manual(metric="loss", analyze_every=10, measure_every=5))
    seen = []
    for step in range(1, 81):
        seen += [step] if hooks(model) else []
        train(model, optimizer, [step])
    assert seen == [*range(5, 51, 5), 60, 70, 80]
    for config in (manual(metric="weight"), SubspaceConfig(mode="observe", metric="loss", min_size=8)):
        model, optimizer = make("adamw", config)
        train(model, optimizer, 25)
        assert hooks(model) == 0 and all(layer.loss_metric is None for layer in optimizer.layers.values())


def test_a_wrapper_that_is_gone_leaves_no_hooks() -> None:
    model, optimizer = make("adamw", manual(metric="loss", measure_every=1))
    assert hooks(model) == 2
    del optimizer
    assert hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_bitwise_what_it_is_without_sampling(dtype: torch.dtype) -> None:
    runs = []
    for metric in ("loss", "weight"):
        model, optimizer = make("adamw", manual(metric=metric, measure_every=1), dtype=dtype)
        train(model, optimizer, 30)
        runs.append(weights(model))
    same_bits(*runs)


def test_a_compiled_model_is_sampled_as_one_that_is_not() -> None:
    found = []
    for compiled in (False, True):
        model, optimizer = make("sgd", manual(metric="loss", measure_every=1, analyze_every=100))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(12):
            optimizer.zero_grad()
            loss_of(run, step).backward()
            optimizer.step()
        metric = optimizer.layers["up"].loss_metric
        assert metric.samples == loss_metric.WINDOW
        found.append(metric.inputs)
    torch.testing.assert_close(*found)


def test_only_the_sampled_step_of_a_compiled_model_is_not_compiled() -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal compiled
            compiled += 1
            return graph(*args)

        return counted

    model, optimizer = make("sgd", manual(metric="loss", measure_every=5, analyze_every=5, total_steps=20))
    run = torch.compile(model, backend=backend, fullgraph=True)

    def runs(x: Tensor) -> int:
        before = compiled
        run(x)
        return compiled - before

    x = torch.randn(4, 48)
    for step in range(1, 11):
        assert runs(x) == (0 if step % 5 == 0 else 1)
        train(model, optimizer, [step])
    train(model, optimizer, range(11, 25))
    assert runs(x) == 1  # the training is over
    model, optimizer = make("sgd", manual(metric="loss", measure_every=1))
    run = torch.compile(model, backend=backend, fullgraph=True)
    assert runs(x) == 0
    del optimizer
    assert runs(x) == 1


def test_predictions_do_not_depend_on_the_scale_of_the_loss() -> None:
    found = []
    for scaled in (False, True):
        model, optimizer = make("sgd", manual(metric="loss", measure_every=1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        for step in range(30):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            optimizer.observe_loss(loss, scale=scaler.get_scale())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.tensor([layer.predicted_increase(4) for layer in optimizer.layers.values()]))
        assert optimizer.state_dict()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-9)
    assert bool((found[0] > 0).all())
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="observe_loss: scale must be above 0"):
            optimizer.observe_loss(1.0, scale=wrong)
    before = optimizer.state_dict()
    with pytest.raises(TypeError, match="a loss must be"):
        optimizer.observe_loss("no loss", scale=2.0)  # type: ignore[arg-type]
    same_bits(optimizer.state_dict(), before)


def test_two_wrappers_leave_the_compiler_as_it_was() -> None:
    stance = torch._dynamo.eval_frame._stance.stance  # type: ignore[attr-defined]
    pairs = [make("sgd", manual(metric="loss", measure_every=1, analyze_every=5, total_steps=60)) for _ in range(2)]
    seen = set()
    for step in range(60):
        for model, optimizer in pairs:
            train(model, optimizer, [step])
        seen.add(torch._dynamo.eval_frame._stance.stance)  # type: ignore[attr-defined]
    assert seen == {stance, "force_eager"} and torch._dynamo.eval_frame._stance.stance == stance  # type: ignore[attr-defined]


def test_an_error_in_a_sampled_step_leaves_the_compiler_as_it_was() -> None:
    class Failing:
        def decide(self, *_: Any) -> Any:
            raise RuntimeError("policy")

    stance = torch._dynamo.eval_frame._stance.stance  # type: ignore[attr-defined]
    model, optimizer = make("sgd", manual(metric="loss", measure_every=5, analyze_every=5, policy=Failing()))
    with pytest.raises(RuntimeError, match="policy"):
        train(model, optimizer, 5)
    assert torch._dynamo.eval_frame._stance.stance == stance and hooks(model) == 0  # type: ignore[attr-defined]


def passed(layer: nn.Linear, x: Tensor, g: Tensor) -> Tap:
    """What is sampled of one pass with the inputs x and the gradients g."""
    tap = Tap()
    handle = layer.register_forward_hook(tap)
    layer(x).backward(g)
    handle.remove()
    return tap


def means(values: list[Tensor]) -> Tensor:
    """The plain definition: each value counts the same up to the WINDOW-th, then the newest a WINDOW-th."""
    mean = values[0]
    for count, value in enumerate(values[1:], 2):
        mean = mean + (value - mean) / min(count, loss_metric.WINDOW)
    return mean


# What inputs and gradients are: all of them 0, one row of them NaN or Inf.
PASSES = {
    "both": (1.0, 1.0),
    "no gradient": (1.0, 0.0),
    "NaN gradient": (1.0, math.nan),
    "Inf gradient": (1.0, math.inf),
    "no input": (0.0, 1.0),
    "NaN input": (math.nan, 1.0),
    "Inf input": (math.inf, 1.0),
}


@given(st.lists(st.sampled_from(sorted(PASSES)), min_size=1, max_size=3 * loss_metric.WINDOW), SEEDS)
def test_inputs_count_without_gradients_and_gradients_without_inputs(kinds: list[str], seed: int) -> None:
    _, optimizer = make("sgd", manual(metric="loss"), dtype=torch.float64)
    layer = optimizer.layers["up"]
    m, n = layer.shape
    inputs, outputs = [], []
    for i, kind in enumerate(kinds):
        x, g = random(seed + 2 * i, 12, n), random(seed + 2 * i + 1, 12, m)
        x, g = (t * by if by == 0.0 else t.index_fill(0, torch.tensor(3), by) if not math.isfinite(by) else t
                for t, by in zip((x, g), PASSES[kind], strict=True))  # fmt: skip
        collect(layer, passed(layer.module, x, g))
        if kind in ("both", "no gradient", "NaN gradient", "Inf gradient"):
            inputs.append(second_moment(x))
        if kind in ("both", "no input"):
            outputs.append(second_moment(g) / second_moment(g).diagonal().mean())
    metric = layer.loss_metric
    assert (int(metric.input_samples), int(metric.samples)) == (len(inputs), len(outputs))
    assert close(metric.inputs, means(inputs) if inputs else torch.eye(n, dtype=torch.float64))
    assert close(metric.outputs, means(outputs) if outputs else torch.eye(m, dtype=torch.float64))
    assert all(bool(torch.isfinite(t).all()) for t in metric)


@pytest.mark.parametrize("kind", ["NaN input", "Inf input"])
def test_nonfinite_inputs_change_nothing(kind: str) -> None:
    model, optimizer = make("sgd", manual(metric="loss"))
    train(model, optimizer, 6)
    layer = optimizer.layers["up"]
    loss_metric.refresh(layer)  # of the weight after the last step
    before = [t.clone() for t in layer.loss_metric]
    x, g = torch.randn(12, layer.shape[1]), torch.randn(12, layer.shape[0])
    x[3] *= PASSES[kind][0]
    collect(layer, passed(layer.module, x, g))
    same_bits(before, list(layer.loss_metric))


def distilled(seed: int, steps: int = 20) -> tuple[nn.Module, SubspaceAwareOptimizer, dict[str, Tensor]]:
    """A student that still equals its teacher, and the second moments of what its two layers were fed."""
    model, optimizer = make("adamw", manual(metric="loss", budget=0.5, overrides={}), seed=seed)
    teacher = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    fed: dict[str, list[Tensor]] = {"up": [], "mid": []}
    hooks = [teacher.get_submodule(name).register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
             for name, seen in fed.items()]  # fmt: skip
    for step in range(steps):
        x = batch(step)[0] * torch.logspace(0, -1, 48)
        with torch.no_grad():
            target = teacher(x)
        sampled = bool(model.up._forward_hooks)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        for seen in fed.values():
            seen[-1:] = seen[-1:] if sampled else []
    for hook in hooks:
        hook.remove()
    return model, optimizer, {name: means([second_moment(x.double()) for x in seen]) for name, seen in fed.items()}


@pytest.mark.parametrize("rank", [4, 12])
def test_without_gradients_weights_are_truncated_in_the_metric_of_their_inputs(rank: int) -> None:
    """SVD-LLM's: the truncated SVD of W C with C C^T the inputs' second moment, damped, times C^-1."""
    model, optimizer, moments = distilled(seed=1)
    before = {name: model.get_submodule(name).weight.detach().double() for name in moments}
    assert optimizer.factorize_("all", rank=rank) == ["up", "mid"]
    for name, inputs in moments.items():
        C = torch.linalg.cholesky(inputs + DAMPING * inputs.diagonal().mean() * torch.eye(len(inputs)).double())
        U, S, Vh = torch.linalg.svd(before[name] @ C, full_matrices=False)
        expected = (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(C)
        assert close(model.get_submodule(name).weight.double(), expected, 1e-4)
        assert not close(expected, before[name], 0.05)  # or any truncation would pass


def test_without_gradients_nothing_is_predicted(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer, _ = distilled(seed=2)
    for layer in optimizer.layers.values():
        optimizer.observe_loss(1.0)
        assert int(layer.loss_metric.input_samples) > 2 and int(layer.loss_metric.samples) == 0
        assert layer.increases == [] and layer.predicted_increase(4) is None and layer.predicted_increase(None) == 0.0
        assert layer.history[-1].predicted_increase is None
    for plan in (optimizer.plan(), optimizer.plan(budget=0.3)):
        assert all(row.predicted_increase is None for row in plan.layers) and plan.predicted_increase is None
    assert all(row.rank is None for row in optimizer.plan(max_loss_increase=0.1).layers)
    with pytest.raises(ValueError, match="'up' costs is not known yet"):
        optimizer.factorize_("all", max_loss_increase=0.1)
    optimizer.factorize_("all", rank=4)
    assert "is not known without metric='loss', gradients and a loss" in caplog.text
    assert optimizer.summary().predicted_share in (None, 0.0)
    assert all("predicted_share" not in event.numbers for event in optimizer.events)


def test_predictions_begin_with_the_second_sample_of_gradients() -> None:
    model, optimizer, _ = distilled(seed=3)
    layer = optimizer.layers["up"]
    known = []
    for step in range(100, 120):
        train(model, optimizer, [step])
        if optimizer.steps % 5 == 0:
            known.append((int(layer.loss_metric.samples), bool(layer.increases)))
    assert known == [(1, False), (2, True), (3, True), (4, True)]


def test_a_metric_of_inputs_alone_is_saved(tmp_path: Path) -> None:
    model, optimizer, _ = distilled(seed=4)
    save_checkpoint(tmp_path, model, optimizer)
    loaded, other, _ = distilled(seed=5, steps=1)
    load_checkpoint(tmp_path, loaded, other)
    runs = []
    for one, its in ((model, optimizer), (loaded, other)):
        train(one, its, 6)
        runs.append({name: list(layer.loss_metric) for name, layer in its.layers.items()})
    same_bits(*runs)
    assert all(int(metric[-1]) > int(metric[-2]) > 0 for metric in runs[0].values())  # inputs, gradients


def test_predictions_are_in_the_metrics_and_right_in_proportion() -> None:
    model, optimizer = make("adamw", manual(metric="loss", rank=6, overrides={}, analyze_every=10, measure_every=2))
    train(model, optimizer, 120)
    for name in ("up", "mid"):
        increases = optimizer.layers[name].increases
        assert all(x >= 0 for x in increases) and increases[0] > increases[-1]
        assert float(optimizer.history(name)["predicted_increase"][-1]) >= 0  # NaN: not known


# ---- acting in it -------------------------------------------------------------------------------------


def lost_by(metric: str, seed: int) -> float:
    """By truncation at once, in the loss on batches that were not trained on."""

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(loss_of(model, step, size=512)) for step in range(1000, 1010))

    model, optimizer = make("adamw", manual(metric=metric, analyze_every=10, measure_every=2), seed=seed)
    train(model, optimizer, 300)
    before = held_out()
    optimizer.factorize_("all", rank=8)
    assert factorized(model) == ["up", "mid"]
    return held_out() - before


def test_factorizing_in_it_costs_less_than_by_singular_values() -> None:
    pairs = [(lost_by("loss", seed), lost_by("weight", seed)) for seed in range(3)]
    assert all(ours < theirs for ours, theirs in pairs), pairs


def test_factors_need_no_metric() -> None:
    model, optimizer = make("adamw", manual(metric="loss"))
    train(model, optimizer, 20)
    with_metric = optimizer.resident_bytes()
    assert optimizer.layers["up"].loss_metric is not None
    optimizer.factorize_("all")
    assert optimizer.layers["up"].loss_metric is None and optimizer.layers["up"].increases == []
    assert sum(optimizer.resident_bytes().values()) < sum(with_metric.values())


def test_the_end_of_a_descent_installs_the_truncation_it_led_to() -> None:
    model, optimizer = make("adamw", quick(metric="loss"))
    train(model, optimizer, 120)
    errors = [e.numbers["reconstruction_error"] for e in optimizer.events if e.kind == "factorize"]
    assert len(errors) == 2 and max(errors) < 0.01


def test_orthogonal_projectors_are_those_of_the_singular_vectors() -> None:
    W = random(0, 9, 7)
    U, S, V = exact_basis(W, 3)
    truncation = truncated(W, Projectors.orthogonal(U, V))
    assert close((truncation.U * truncation.S) @ truncation.V.mT, (U * S) @ V.mT)


def test_each_sample_counts_and_the_means_forget() -> None:
    model, optimizer = make("sgd", manual(metric="loss", measure_every=1, analyze_every=1))
    train(model, optimizer, 2 * loss_metric.WINDOW)
    metric = optimizer.layers["up"].loss_metric
    assert int(metric.samples) == 2 * loss_metric.WINDOW
    with torch.no_grad():
        optimizer.layers["up"].loss_metric = metric._replace(inputs=1e6 * metric.inputs)
    train(model, optimizer, range(20, 20 + 20 * loss_metric.WINDOW))
    assert float(optimizer.layers["up"].loss_metric.inputs.diagonal().mean()) < 10


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    """Layers whose predicted increases fall with the rank, each in its own way."""
    found = []
    for i in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(8, 8), (6, 12), (12, 6)]))
        falls = draw(st.lists(st.floats(1e-6, 1.0), min_size=12, max_size=12))
        increases = [sum(falls[k:]) for k in range(1, len(falls))]
        found.append(Candidate(name=str(i), shape=shape, increases=increases))
    return found


def of_all(layers: list[Candidate]) -> list[tuple[int, float, tuple[int | None, ...]]]:
    """(parameters, increase, ranks) of every combination of ranks below break-even and dense."""
    each = [[None, *range(1, largest_useful_rank(*x.shape) + 1)] for x in layers]
    rows = []
    for ranks in itertools.product(*each):
        cost = sum(parameter_count(*x.shape, k) for x, k in zip(layers, ranks, strict=True))
        damage = sum(0.0 if k is None else x.increases[k - 1] for x, k in zip(layers, ranks, strict=True))
        rows.append((cost, damage, ranks))
    return rows


@given(candidates(), st.floats(0.0, 4.0))
def test_the_cheapest_ranks_are_within_the_damage_and_near_the_best_there_are(
    layers: list[Candidate], allowed: float
) -> None:
    """The best by trying all of them; a greedy choice on convex hulls is at most one step behind."""
    ranks = cheapest(layers, allowed)
    cost, damage = next((c, d) for c, d, found in of_all(layers) if found == tuple(ranks[x.name] for x in layers))
    assert damage <= allowed + 1e-12
    best = min(c for c, d, _ in of_all(layers) if d <= allowed)
    dense = [parameter_count(*x.shape, None) for x in layers]
    assert best <= cost <= best + max(dense)
    more = cheapest(layers, allowed * 1.5 + 1e-9)
    assert sum(parameter_count(*x.shape, more[x.name]) for x in layers) <= cost


class Known(NamedTuple):
    """What :func:`ranks_within` asks of a layer."""

    name: str
    shape: tuple[int, int]
    increases: list[float]
    slopes: list[float]

    def predicted_increase(self, rank: int | None) -> float:
        return 0.0 if rank is None else self.slopes[rank - 1] + self.increases[rank - 1]


@given(candidates(), st.floats(-0.5, 0.5), st.floats(0.0, 4.0))
def test_ranks_within_a_tolerance_count_both_parts(layers: list[Candidate], tilt: float, allowed: float) -> None:
    known = [Known(x.name, x.shape, list(x.increases), [tilt * i for i in x.increases]) for x in layers]
    ranks = ranks_within(known, allowed)  # type: ignore[arg-type]
    assert sum(x.predicted_increase(ranks[x.name]) for x in known) <= allowed + 1e-9
    if tilt <= 0:  # then the part of second order alone decides
        assert ranks == cheapest(layers, allowed)


def test_nothing_within_a_tolerance_of_nothing() -> None:
    layer = Known("a", (8, 8), [3.0, 2.0, 1.0], [0.0, 0.0, 0.0])
    assert ranks_within([layer], 0.0) == {"a": None}  # type: ignore[list-item]
