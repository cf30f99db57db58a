"""What each dense layer's loss metric is made of: samples of its inputs and of the gradients at its outputs.

They are taken from the ordinary forward and backward passes of a share of the steps: after the step before, a hook is
put on each layer, and it is removed afterwards. As a compiled model would not run it, such a step is not compiled
(``torch.compiler.set_stance``). A sample becomes part of running means, and the layer's weight is decomposed anew in
their metric. A factorized layer keeps nothing of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import linalg
from ..factors.linear import function_is_opaque
from ..linalg import LossBasis, to_compute_dtype
from ..linalg.fallback import LinAlgError
from ..records import largest_useful_rank
from .layer import LossMetric, TrackedLayer

WINDOW = 10  # samples over which means run
ROWS = 1024  # rows of a batch that are sampled, in whole examples, of each pass through a layer
PASSES = 8  # through a layer that are sampled, of one step


class Sample(NamedTuple):
    """Some examples of one pass through a layer."""

    x: Tensor  # (e, t, n): the inputs of e examples with t positions each
    g: Tensor  # (e, t, m): the gradients at the outputs
    examples: int  # in the whole pass
    rows: int  # positions in the whole pass


def sample(x: Tensor, g: Tensor) -> Sample:
    """Of inputs (..., n) and gradients (..., m): the first dimension counts examples, what is between positions."""
    x, g = (t.reshape(1, 1, -1) if t.ndim == 1 else t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
    examples, positions = x.shape[:2]
    taken = min(examples, max(1, ROWS // max(1, positions)))
    at = torch.arange(taken, device=x.device) * examples // max(1, taken)
    return Sample(x[at], g[at], examples, examples * positions)


class Tap:
    """A forward hook that keeps a sample of each pass whose backward pass comes. A copy of it is another model's."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.samples: list[Sample] = []
        self.rows = 0  # of all passes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """See ``nn.Module.register_forward_hook``."""
        if not self.active or torch.compiler.is_compiling() or function_is_opaque() or not args:
            return
        if not (type(output) is Tensor and output.requires_grad and type(args[0]) is Tensor and args[0].numel()):
            return
        if not (isinstance(module.weight, nn.Parameter) and module.weight.requires_grad):
            return  # a pass that is not for it, as of a GAN's other player
        x = args[0].detach()

        def keep(g: Tensor) -> None:
            self.rows += x.numel() // x.shape[-1]
            if len(self.samples) < PASSES:
                self.samples.append(sample(x, g.detach()))

        output.register_hook(keep)

    def clear(self) -> None:
        """Forget the passes so far."""
        self.samples, self.rows = [], 0

    def __reduce__(self) -> tuple[type[Self], tuple[bool]]:
        return type(self), (False,)


class _Uncompiled:
    """Keeps ``torch.compile`` off while anybody's step is sampled: there is one stance for the process."""

    def __init__(self) -> None:
        self._holders: set[int] = set()
        self._stance: Any = None

    def hold(self, holder: int) -> None:
        if not self._holders and "torch._dynamo.eval_frame" in sys.modules:  # else nothing is compiled
            self._stance = torch.compiler.set_stance("force_eager")
        self._holders.add(holder)

    def release(self, holder: int) -> None:
        self._holders.discard(holder)
        if not self._holders and self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


_uncompiled = _Uncompiled()


class Taps:
    """The hooks of one step, by layer name."""

    def __init__(self) -> None:
        self._taps: dict[str, tuple[Tap, RemovableHandle]] = {}

    def place(self, layers: Iterable[TrackedLayer]) -> None:
        """Put one on each dense layer that has none."""
        for layer in layers:
            if not layer.factorized and layer.name not in self._taps:
                tap = Tap()
                self._taps[layer.name] = tap, layer.module.register_forward_hook(tap)
        if self._taps:
            _uncompiled.hold(id(self))

    def remove(self) -> None:
        """Take all of them off."""
        for _, handle in self._taps.values():
            handle.remove()
        self._taps.clear()
        _uncompiled.release(id(self))

    def clear(self) -> None:
        """Forget the passes so far: their gradients are dropped too."""
        for tap, _ in self._taps.values():
            tap.clear()

    def get(self, layer: TrackedLayer) -> Tap | None:
        """The one of a layer, if there was a pass through it."""
        tap, _ = self._taps.get(layer.name, (None, None))
        return tap if tap is not None and tap.samples else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_taps": {}}  # a copy has other modules


def new_metric(W: Tensor) -> LossMetric:
    """The one that a layer begins with, W (m, n): that of the weight's own singular vectors."""
    (m, n), q = W.shape, largest_useful_rank(*W.shape)

    def identity(size: int) -> Tensor:
        return W.new_ones(size) if size > linalg.DIAGONAL_ABOVE else torch.eye(size, dtype=W.dtype, device=W.device)

    L, S, R = W.new_zeros(m, q), W.new_zeros(q), W.new_zeros(n, q)
    increases = torch.zeros(3, q, dtype=torch.float64, device=W.device)
    return LossMetric(identity(m), identity(n), L, S, R, increases, increases.new_zeros(()), increases.new_zeros(()))


@torch.no_grad()
def collect(layer: TrackedLayer, tap: Tap, scale: float = 1.0) -> None:
    """Predict with a layer's new samples what truncation costs, add them to its metric, and decompose the weight in it.

    In this order, as a prediction from samples that chose the directions would be too low. Inputs that are zero, NaN or
    Inf change nothing, gradients that are change nothing but the inputs: a student that still equals its teacher has no
    gradient, and its weights are then truncated by their inputs alone (SVD-LLM, arXiv:2403.07378).

    Args:
        scale: what the loss was multiplied by for these gradients.
    """
    W = to_compute_dtype(layer.module.weight)
    old = layer.loss_metric or new_metric(W)
    R = W.mT @ linalg.dual(old.outputs, old.L)  # (n, q): what the old directions keep of the present weight is L R^T
    samples = [Sample(to_compute_dtype(s.x), to_compute_dtype(s.g) / scale, s.examples, s.rows) for s in tap.samples]
    sampled = sum(s.rows for s in samples)
    whole = tap.rows / sampled  # there may have been more passes than were sampled
    parts = [linalg.predicted_increases(W, old.L, R, s.x, s.g) * (s.examples / len(s.x)) for s in samples]
    slope, *fisher = whole * torch.stack(parts).sum(0)
    predicted = torch.stack([slope, *(part * tap.rows for part in fisher)])
    inputs = linalg.second_moment(torch.cat([s.x.flatten(0, 1) for s in samples]))
    outputs = linalg.second_moment(torch.cat([s.g.flatten(0, 1) for s in samples]))
    size = (outputs if outputs.ndim == 1 else outputs.diagonal()).mean()
    finite = torch.isfinite(inputs).all()
    fed = finite & (inputs != 0).any()
    taught = finite & torch.isfinite(outputs).all() & (size > 0) & torch.isfinite(predicted).all()

    def mean(before: Tensor, now: Tensor, usable: Tensor, number: Tensor) -> Tensor:
        weight = (usable.double() / number.clamp(max=WINDOW)).to(before.dtype)  # of this sample, the number-th
        return torch.lerp(before, torch.where(usable, now, before), weight)

    layer.loss_metric = old._replace(
        outputs=mean(old.outputs, outputs / size, taught, old.samples + 1),
        inputs=mean(old.inputs, inputs, fed, old.input_samples + 1),
        # The first gradients had no metric to be judged in.
        increases=mean(old.increases, predicted, taught, old.samples.clamp(min=1)),
        samples=old.samples + taught.double(),
        input_samples=old.input_samples + fed.double(),
    )
    refresh(layer)


def decomposed(W: Tensor, metric: LossMetric) -> LossBasis:
    """The weight W (m, n) in its layer's metric; the old basis where it can't be decomposed."""
    old = LossBasis(*(t.to(W.dtype) for t in metric.basis))
    try:
        new = linalg.loss_basis(W, metric.outputs, metric.inputs, len(metric.S))
    except LinAlgError:
        return old
    finite = torch.isfinite(new.S).all() & torch.isfinite(new.L).all() & torch.isfinite(new.R).all()
    return LossBasis(*(torch.where(finite, a, b) for a, b in zip(new, old, strict=True)))


def refresh(layer: TrackedLayer) -> None:
    """Decompose the weight as it is now, in the metric that is there."""
    if layer.loss_metric is not None:
        new = decomposed(to_compute_dtype(layer.module.weight), layer.loss_metric)
        layer.loss_metric = layer.loss_metric._replace(L=new.L, S=new.S, R=new.R)
