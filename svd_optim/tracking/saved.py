"""The saved state of a run and of each layer: one table each, used to save, load and validate it.

A field in a table is saved, loaded and checked; adding one, raise ``STATE_VERSION``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decisions.machine import LayerStatus, Protection
from ..factors.linear import SKETCH_SIZE
from ..linalg import DIAGONAL_ABOVE, Basis
from ..linalg.protection import Anchor
from ..records import Event, LayerMetrics, LayerState, largest_useful_rank
from . import kinds
from .fingerprints import fingerprint
from .kinds import Kind, or_none
from .layer import LossMetric, TrackedLayer
from .loss_guard import PENDING
from .refreshing import SCALARS

STATE_VERSION = 10


class Sizes(NamedTuple):
    """The sizes that determine the shapes of a layer's tensors."""

    m: int
    n: int
    k: int  # its rank


class Field(NamedTuple):
    """One field of the saved state."""

    save: Callable[[Any], Any]  # from its owner: a tensor, or plain values
    load: Callable[[Any, Any], None]  # the inverse, once the layers have the saved structure
    kind: Callable[[Sizes], Kind]  # the valid values


def _resolve(root: Any, path: str) -> tuple[Any, str]:
    """The object that has the last attribute of the dotted ``path``, or ``None``, and the name of that attribute."""
    *parents, name = path.split(".")
    for parent in parents:
        root = getattr(root, parent) if root is not None else None
    return root, name


def _get(root: Any, path: str) -> Any:
    owner, name = _resolve(root, path)
    return None if owner is None else getattr(owner, name)


def _set(root: Any, path: str, value: Any) -> None:
    owner, name = _resolve(root, path)
    if owner is not None:  # a dense layer has no factors
        setattr(owner, name, value)


def _plain(path: str, kind: Kind) -> Field:
    return Field(lambda root: _get(root, path), lambda root, value: _set(root, path, value), lambda _: kind)


def _numbers(name: str) -> Field:
    """One for each rank from 1 up, or none."""
    return Field(
        lambda x: getattr(x, name),
        lambda x, value: setattr(x, name, [float(c) for c in value]),
        lambda s: kinds.list_of(kinds.number, most=min(s.m, s.n)),
    )


def _tensor(path: str, kind: Callable[[Sizes], Kind]) -> Field:
    def load(layer: TrackedLayer, value: Tensor | None) -> None:
        _set(layer, path, None if value is None else value.to(layer.weight.device, copy=True))

    return Field(lambda layer: _get(layer, path), load, lambda sizes: or_none(kind(sizes)))


def _tensors(path: str, make: Callable[..., Any], kind: Callable[[Sizes], Kind]) -> Field:
    def save(layer: TrackedLayer) -> list[Tensor] | None:
        value = _get(layer, path)
        return None if value is None else list(value)

    def load(layer: TrackedLayer, value: list[Tensor] | None) -> None:
        _set(layer, path, None if value is None else make(*(t.to(layer.weight.device, copy=True) for t in value)))

    return Field(save, load, lambda sizes: or_none(kind(sizes)))


def _component(path: str, kind: Kind) -> Field:
    """An object with its own ``state_dict`` and ``load_state_dict``."""
    return Field(
        lambda root: _get(root, path).state_dict(),
        lambda root, value: _get(root, path).load_state_dict(value),
        lambda _: kind,
    )


def _save_status(layer: TrackedLayer) -> dict[str, Any]:
    status = layer.status
    return {**vars(status), "state": str(status.state), "protection": str(status.protection)}


def _load_status(layer: TrackedLayer, value: Mapping[str, Any]) -> None:
    known = {"state": LayerState(value["state"]), "protection": Protection(value["protection"])}
    layer.status = LayerStatus(**{**value, **known})


def _load_history(layer: TrackedLayer, value: list[dict[str, Any]]) -> None:
    layer.history = [LayerMetrics(**values) for values in value]


def _load_anchor(layer: TrackedLayer, value: list[Tensor] | None) -> None:
    anchor = None if value is None else Anchor(*(t.to(layer.weight.device, copy=True) for t in value))
    layer.dense_anchor = anchor if layer.factors is None else None
    if layer.factors is not None:
        layer.factors.anchor = anchor


def _save_fingerprint(layer: TrackedLayer) -> list[Tensor] | None:
    return fingerprint(layer) if layer.expected is None else layer.expected


def _of_loss_metric(sizes: Sizes) -> Kind:
    m, n, _ = sizes
    q = largest_useful_rank(m, n)
    moments = [(size,) if size > DIAGONAL_ABOVE else (size, size) for size in (m, n)]
    return kinds.tensors(*moments, (m, q), (q,), (n, q), (3, q), (), ())


def _pair(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


LAYER_FIELDS: Mapping[str, Field] = {
    "status": Field(_save_status, _load_status, lambda _: kinds.record(LayerStatus)),
    "shape": Field(lambda x: list(x.shape), lambda *_: None, lambda s: lambda value: value == [s.m, s.n]),
    "basis": _tensors("cached", Basis, lambda s: kinds.tensors((s.m, None), (None,), (s.n, None))),
    "loss_metric": _tensors("loss_metric", LossMetric, _of_loss_metric),
    "increases": _numbers("increases"),
    "slopes": _numbers("slopes"),
    "images": _tensors("images", _pair, lambda s: kinds.tensors((s.m, SKETCH_SIZE), (s.n, SKETCH_SIZE))),
    "basis_step": _plain("basis_step", kinds.integer),
    "pending": _tensor("pending", lambda _: kinds.dtype_and_shape(torch.float64, (SCALARS,))),
    "sums": _tensor("sums", lambda s: kinds.tensor(2 + 3 * s.k)),
    "outside": _tensor("outside", lambda s: kinds.tensor(s.m, SKETCH_SIZE)),
    "idle": _tensor("idle", lambda _: kinds.dtype_and_shape(torch.int64, ())),
    "idle_known": _plain("idle_known", kinds.integer),
    "faded": _tensor("faded", lambda _: kinds.dtype_and_shape(torch.float64, ())),
    "capture": _numbers("capture"),
    "history": Field(
        lambda x: [vars(metrics) for metrics in x.history],
        _load_history,
        lambda _: kinds.list_of(kinds.record(LayerMetrics)),
    ),
    "keep_dense": _plain("keep_dense", kinds.flag),
    "guarded_since": _plain("guarded_since", or_none(kinds.integer)),
    "nonfinite": _plain("nonfinite", kinds.flag),
    "failures": _plain("failures", kinds.integer),
    "anchor": Field(
        lambda x: None if x.anchor is None else list(x.anchor),
        _load_anchor,
        lambda s: or_none(kinds.tensors((s.m, None), (s.n, None), (None, None))),
    ),
    "masters": _tensors("factors.masters", Basis, lambda s: kinds.tensors((s.m, s.k), (s.k,), (s.n, s.k))),
    "fingerprint": Field(
        _save_fingerprint,
        lambda x, value: setattr(x, "expected", value if x.factorized else None),
        lambda s: or_none(kinds.tensors((s.k,), (s.k,), (s.k,))),
    ),
    "exact": _plain("factors.exact", or_none(kinds.flag)),
    "turned_away": _tensor("factors.turned_away", lambda _: kinds.dtype_and_shape(torch.bool, ())),
    "nonfinite_steps": _tensor("factors.nonfinite", lambda _: kinds.dtype_and_shape(torch.int64, ())),
}


def _load_events(run: Any, value: list[dict[str, Any]]) -> None:
    run.journal.replace([Event.from_plain(values) for values in value])


def _is_losses(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point() and len(value) <= PENDING


_WINDOWS = kinds.list_of(kinds.list_of(kinds.number, length=3))
_GUARD: Mapping[str, Kind] = {"pending": or_none(_is_losses), "windows": _WINDOWS, "since": or_none(_WINDOWS),
                              "lost": kinds.integer}  # fmt: skip

_NAME = kinds.text
_ALERTS: Mapping[str, Kind] = {
    "said": kinds.list_of(kinds.row(_NAME, _NAME, kinds.integer)),
    "values": kinds.list_of(kinds.row(_NAME, _NAME, kinds.integer, or_none(kinds.number))),
    "lives": kinds.list_of(kinds.row(_NAME, kinds.one_of(LayerState), kinds.integer)),
}

RUN_FIELDS: Mapping[str, Field] = {
    "steps": _plain("steps", kinds.integer),
    "analyses": _plain("lifecycle.analyses", kinds.integer),
    "waited": _plain("lifecycle.waited", kinds.integer),
    "last_analysis": _plain("lifecycle.last_analysis", kinds.integer),
    "acted": _plain("lifecycle.acted", kinds.flag),
    "loss_scale": _plain("loss_scale", lambda value: kinds.number(value) and 0 < value < math.inf),
    "stretch": _plain("overhead.stretch", lambda value: type(value) is int and value >= 1),
    "guard": _component("guard", lambda x: isinstance(x, dict) and x.keys() == _GUARD.keys()
                        and all(kind(x[key]) for key, kind in _GUARD.items())),
    "alerts": _component("alerts", lambda x: isinstance(x, dict) and x.keys() == _ALERTS.keys()
                         and all(kind(x[key]) for key, kind in _ALERTS.items())),
    "events": Field(lambda run: [event.as_plain() for event in run.journal.events], _load_events,
                    lambda _: kinds.list_of(kinds.record(Event))),
}  # fmt: skip


def save(owner: Any, fields: Mapping[str, Field]) -> dict[str, Any]:
    """All fields of a layer or of a run."""
    return {name: field.save(owner) for name, field in fields.items()}


def load(owner: Any, fields: Mapping[str, Field], saved: Mapping[str, Any]) -> None:
    """The inverse of :func:`save`, once the layers have the saved structure."""
    for name, field in fields.items():
        field.load(owner, saved[name])
