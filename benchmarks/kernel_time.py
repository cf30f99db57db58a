"""Each kernel against its rivals and against the bound: time, growth with size, and accuracy.

    python benchmarks/kernel_time.py --json kernels.json  # about 10 minutes on two cores
    python benchmarks/kernel_time.py --only refresh
    python benchmarks/kernel_time.py --smoke              # the same code at tiny sizes

- refresh: bringing the cached basis of a weight up to date, against a full SVD, ``torch.svd_lowrank`` and ``eigh``
  of the Gram matrix. Errors are against a float64 SVD, on random matrices that have moved by 5 % and on weights of a
  GPT in training, 20 steps apart: of the subspace (energy-weighted sine), of tangent capture and reconstruction error.
- measure: the alignments of a gradient, against the explicit projections of the Phase 1 experiment (its SVD apart).
- layer: forward + backward of a linear layer inside factors at half its parameters, against dense, and the
  optimizer's step of each, with the retraction.
- retract: bringing factors back to rank k after a step, one layer or a batch: by columns, which is what a step takes
  unless a layer is too ill-conditioned, by QR and an SVD, and by a full SVD of the product.

Rivals take turns, round by round; times are medians, ratios medians of ratios of the same round. "Bound" is the larger
of operations over the measured matmul rate and bytes over the measured bandwidth: the time without which it can't be
done this way.

With ``--json`` every kernel is kept as soon as it is done, and none that is there is measured again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from corpus import batches, load_corpus, split
from gpt import GPT
from results_file import about_line, open_results, output_file
from rivals import PhaseOneAnalysis
from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig, linalg
from svd_optim.linalg import Basis
from train_gpt import base_optimizers

TOKENS = 4096


@dataclass
class Line:
    """A row of the table: one way to do one thing at one size."""

    kernel: str
    size: str
    way: str
    seconds: float
    spread: tuple[float, float]  # 10 % and 90 %
    ratio: float  # to the first way
    bound: float | None = None  # seconds
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What the bound is made of."""

    flops: float  # a second, float32 matmul
    bandwidth: float  # bytes a second, read + written

    @classmethod
    def measured(cls, device: str) -> Machine:
        A = torch.randn(1024, 1024, device=device)
        x = torch.randn(2**24, device=device)
        y = torch.empty_like(x)
        times = turns({"matmul": lambda: A @ A, "copy": lambda: y.copy_(x)}, device, rounds=9)
        best = {name: min(seconds) for name, seconds in times.items()}
        return cls(2 * 1024**3 / best["matmul"], 8 * 2**24 / best["copy"])

    def bound(self, operations: float, numbers: float) -> float:
        return max(operations / self.flops, 4 * numbers / self.bandwidth)


def turns(ways: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; on CUDA by its events."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            if device.startswith("cuda"):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                seconds[name].append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def lines(
    kernel: str,
    size: str,
    ways: dict[str, Callable[[], object]],
    args: argparse.Namespace,
    bound: float | None = None,
    errors: dict[str, dict[str, float]] | None = None,
) -> Iterator[Line]:
    """One line for each way; the first is ours, and the bound's."""
    seconds = turns(ways, args.device, args.rounds)
    first = next(iter(seconds.values()))
    for i, (way, spent) in enumerate(seconds.items()):
        ordered = sorted(spent)
        spread = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        ratio = statistics.median(a / b for a, b in zip(spent, first, strict=True))
        yield Line(kernel, size, way, statistics.median(spent), spread, ratio,
                   bound if i == 0 else None, (errors or {}).get(way, {}))  # fmt: skip


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


# ---- refresh -----------------------------------------------------------------------------------------


def moved_pair(m: int, n: int, device: str) -> tuple[Tensor, Tensor]:
    """A matrix with singular values 1, 1/2^0.5, 1/3^0.5, ... and the same after it has moved by 5 %."""
    r = min(m, n)
    U, V = (torch.linalg.qr(random(x, r, device=device))[0] for x in (m, n))
    W = (U * torch.arange(1, r + 1, device=device) ** -0.5) @ V.mT
    D = random(n, m, device=device).mT
    return W, W + 0.05 * torch.linalg.matrix_norm(W) / torch.linalg.matrix_norm(D) * D


def trained_pairs(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(W, W 20 steps later, a gradient then) of layers of a GPT trained with Muon, one of each shape."""
    torch.manual_seed(0)
    length = 512 if not args.smoke else 64
    width = 256 if not args.smoke else 64
    model = GPT.of_width(2, width, length).to(args.device)
    optimizers = base_optimizers("muon", model, lr=0.01)
    stream = batches(split(load_corpus(None))[0], 1, length, 0)
    names = ["blocks.1.attn.c_q", "blocks.1.mlp.c_fc", "blocks.1.mlp.c_proj"]
    before: dict[str, Tensor] = {}
    steps = args.training_steps
    for step in range(steps + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        inputs, targets = (t.to(args.device) for t in next(stream))
        model(inputs, targets).backward()
        if step == steps - 20:
            before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
        if step < steps:
            for optimizer in optimizers:
                optimizer.step()
    layers = {name: model.get_submodule(name).weight for name in names}
    return {name: (before[name], W.detach(), W.grad.detach()) for name, W in layers.items()}


def refresh(args: argparse.Namespace, machine: Machine) -> Iterator[Line]:
    """Random matrices of growing size and rank, then real ones."""
    cases: list[tuple[str, int, tuple[Tensor, Tensor, Tensor]]] = []
    for (m, n), k in args.refreshes:
        old, W = moved_pair(m, n, args.device)
        cases.append((f"{m} × {n}, k = {k}", k, (old, W, random(m, n, device=args.device))))
    for name, pair in trained_pairs(args).items():
        m, n = pair[0].shape
        k = max(1, round(0.5 * m * n / (m + n + 1)))
        cases.append((f"{m} × {n}, k = {k} ({name.split('.', 2)[2]})", k, pair))
    for size, k, (old, W, G) in cases:
        m, n = W.shape
        basis = linalg.exact_basis(old, min(k + linalg.OVERSAMPLING, m, n))
        q = basis.S.shape[0]
        ways: dict[str, Callable[[], Basis]] = {
            "refresh": lambda W=W, basis=basis: linalg.refresh_basis(W, basis),
            "svd": lambda W=W, q=q: linalg.exact_basis(W, q),
            "svd_lowrank": lambda W=W, q=q: Basis(*torch.svd_lowrank(W, q=q)),
            "eigh of the Gram matrix": lambda W=W, q=q: by_gram(W, q),
        }
        exact = linalg.exact_basis(W.double(), k)
        errors = {way: basis_errors(call(), exact, W, G, k) for way, call in ways.items()}
        operations = 4 * 2 * m * n * q  # two power steps
        yield from lines("refresh", size, ways, args, machine.bound(operations, 4 * m * n), errors)


def by_gram(W: Tensor, q: int) -> Basis:
    """Singular triplets from the eigenvectors of W^T W or W W^T, whichever is smaller."""
    m, n = W.shape
    if m < n:
        V, S, U = by_gram(W.mT, q)
        return Basis(U, S, V)
    squares, V = torch.linalg.eigh(W.mT @ W)
    V = V[:, -q:].flip(-1)
    S = squares[-q:].flip(-1).clamp(min=0).sqrt()
    return Basis(W @ V / S, S, V)


def basis_errors(found: Basis, exact: Basis, W: Tensor, G: Tensor, k: int) -> dict[str, float]:
    """Against the float64 SVD: of the subspaces, of tangent capture, of the reconstruction error."""
    found = Basis(*(t.double() for t in found.leading(k)))
    drift = max(float(linalg.subspace_change(a, b, exact.S)[1]) for a, b in ((found.U, exact.U), (found.V, exact.V)))
    captures, kept = [], []
    for basis in (found, exact):
        captures.append(float(linalg.alignments(linalg.gradient_energies(G.double(), basis.U, basis.V))[2].sum()))
        kept.append(float(linalg.reconstruction_error(basis.S, linalg.energy(W))))
    return {"subspace": drift, "capture": abs(captures[0] - captures[1]), "reconstruction": abs(kept[0] - kept[1])}


# ---- measure -----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, machine: Machine) -> Iterator[Line]:
    """The alignments of one gradient."""
    for (m, n), k in args.refreshes:
        W = nn.Parameter(random(m, n, device=args.device))
        W.grad = random(n, m, device=args.device).mT.contiguous()
        basis = linalg.exact_basis(W.detach(), k)
        U, _, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
        G = W.grad

        def explicit(G: Tensor = G, U: Tensor = U, Vh: Tensor = Vh, k: int = k) -> Tensor:
            return PhaseOneAnalysis.projections(G, U, Vh, k)

        ways: dict[str, Callable[[], object]] = {
            "measure": lambda G=G, basis=basis: linalg.alignments(linalg.gradient_energies(G, basis.U, basis.V)),
            "explicit projections": explicit,
        }
        yield from lines("measure", f"{m} × {n}, k = {k}", ways, args,
                         machine.bound(4 * m * n * k + 2 * n * k * k, 2 * m * n))  # fmt: skip


# ---- layers ------------------------------------------------------------------------------------------


def layer(args: argparse.Namespace, machine: Machine) -> Iterator[Line]:
    """A square layer and a tall one, dense and at half its parameters."""
    for width, expansion in itertools.product(args.widths, (1, 4)):
        m, n = expansion * width, width
        x = random(args.tokens, n, device=args.device).requires_grad_()
        dy = random(args.tokens, m, device=args.device)
        for kind in ("adamw", "muon"):
            passes: dict[str, Callable[[], object]] = {}
            steps: dict[str, Callable[[], object]] = {}
            for way in ("factors", "dense"):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(n, m, bias=False)).to(args.device)
                base: torch.optim.Optimizer
                if kind == "adamw":
                    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
                else:
                    base = torch.optim.Muon(model.parameters(), lr=1e-3)
                optimizer = base
                if way == "factors":
                    # No analyses: they are the business of step_time.py.
                    config = SubspaceConfig(mode="manual", analyze_every=10**6, measure_every=10**6, min_size=1,
                                            overrides={"*": LayerOverride(budget=0.5)})  # fmt: skip
                    optimizer = SubspaceAwareOptimizer(base, model, config)
                    optimizer.factorize_("all")
                    k = optimizer.layers["0"].rank

                passes[way] = functools.partial(both_ways, model, optimizer, x, dy)
                steps[way] = optimizer.step
                passes[way]()
                if way == "factors" and args.compile:
                    passes["factors, compiled"] = functools.partial(both_ways, torch.compile(model), optimizer, x, dy)
            size = f"{m} × {n}, k = {k}"
            if kind == "adamw":
                bound = machine.bound(6 * args.tokens * k * (m + n), args.tokens * (m + n) * 3)
                yield from lines("forward + backward", size, passes, args, bound)
            yield from lines(f"step, {kind}", size, steps, args)


def both_ways(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, to the inputs too."""
    optimizer.zero_grad(set_to_none=False)
    x.grad = None
    model(x).backward(dy)


# ---- retract -----------------------------------------------------------------------------------------


def retract(args: argparse.Namespace, machine: Machine) -> Iterator[Line]:
    """One layer or several, after a step of 1 % of the weight."""
    for (m, n), k in args.refreshes:
        for b in (1, 8):
            U, V = (torch.linalg.qr(random(b, x, k, device=args.device))[0] for x in (m, n))
            K = U * torch.linspace(2, 0.5, k, device=args.device)  # as a Muon layer's
            K = K + 0.01 * random(b, m, k, device=args.device) * K.std()
            L = linalg.project_off(0.01 * random(b, n, k, device=args.device) * K.std(), V)
            ways: dict[str, Callable[[], Basis]] = {
                "columns": lambda K=K, L=L, U=U, V=V: (
                    linalg.retract_columns(K, L, U, V, linalg.orthonormalizer(U)).factors
                ),
                "QR, QR, SVD": lambda K=K, L=L, U=U, V=V: linalg.retract(K, L, U, V),
                "full SVD": lambda K=K, L=L, U=U, V=V, k=k: linalg.exact_basis(K @ V.mT + U @ L.mT, k),
            }
            product = K.double() @ V.double().mT + U.double() @ L.double().mT
            errors = {}
            for way, call in ways.items():
                new = linalg.diagonalized(Basis(*(t.double() for t in call())))
                skew = max(float((Q.mT @ Q - torch.eye(k, device=args.device)).abs().max()) for Q in (new.U, new.V))
                gone = torch.linalg.matrix_norm((new.U * new.S.unsqueeze(-2)) @ new.V.mT - product)
                errors[way] = {"skew": skew, "lost": float((gone / torch.linalg.matrix_norm(product)).max())}
            operations = b * (8 * (m + n) * k * k + 20 * k**3)
            yield from lines("retract", f"{b} of {m} × {n}, k = {k}", ways, args,
                             machine.bound(operations, b * 8 * (m + n) * k), errors)  # fmt: skip


# ---- the table ---------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[[argparse.Namespace, Machine], Iterator[Line]]] = {
    "refresh": refresh,
    "measure": measure,
    "layer": layer,
    "retract": retract,
}


def table(found: Sequence[Line]) -> Table:
    """One row a line."""
    made = Table("kernel", "size", "way", "ms", "10–90 %", "to ours", "× bound", "errors")
    last = None
    for line in found:
        if last is not None and (line.kernel, line.size) != last:
            made.add_section()
        last = line.kernel, line.size
        made.add_row(
            line.kernel,
            line.size,
            line.way,
            f"{1e3 * line.seconds:.2f}",
            f"{1e3 * line.spread[0]:.2f}–{1e3 * line.spread[1]:.2f}",
            f"{line.ratio:.2f}",
            f"{line.seconds / line.bound:.1f}" if line.bound else "",
            ", ".join(f"{name} {value:.1e}" for name, value in line.errors.items()),
        )
    return made


def lines_of(records: Iterable[Mapping[str, Any]]) -> list[Line]:
    """From the rows of a file."""
    return [Line(**{name: value for name, value in record.items() if name != "part"}) for record in records]


def main() -> int:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = tuple(KERNELS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="KERNEL", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=output_file, help="keep the figures here, and go on from those that are there")
    parser.add_argument("--compile", action="store_true", help="layers through torch.compile too (needs a compiler)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    args.refreshes = [((256, 256), 64), ((1024, 256), 102), ((768, 768), 64), ((3072, 768), 64), ((1280, 1280), 64),
                      ((1280, 1280), 16), ((1280, 1280), 320)]  # fmt: skip
    args.widths, args.tokens, args.training_steps = (256, 512, 1024, 2048), TOKENS, 200
    if args.smoke:
        args.refreshes, args.widths, args.rounds = [((48, 32), 4)], (32,), 2
        args.tokens, args.training_steps, args.threads = 64, 22, 1
    torch.set_num_threads(args.threads)
    machine = Machine.measured(args.device)
    console = Console(width=170 if not sys.stdout.isatty() else None)
    console.print(f"{machine.flops / 1e9:.0f} GFLOP/s in float32 matmul, {machine.bandwidth / 1e9:.1f} GB/s, "
                  f"{args.threads} threads, {args.device}")  # fmt: skip
    job = {"rounds": args.rounds, "tokens": args.tokens, "compile": args.compile}
    store = open_results(parser, args.json, job, args.device)
    for name in args.only:
        if not store.has(part=name):
            store.add(*({"part": name, **asdict(line)} for line in KERNELS[name](args, machine)))
    console.print(table(lines_of(store.records)))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
