"""The log of a run: JSON Lines, written during training, which can be read at any time.

Version 2. Each line is an object with a key ``record``:

- ``run``: the header, repeated where a resumed process continues: ``schema``, ``svd_optim``, ``torch``, ``python``,
  ``time`` (UTC), ``step`` (of the next record: earlier records of this step and later ones are void), ``optimizer``,
  ``mode``, ``config``, ``skipped`` ([name, shape, reason]) and ``columns``, the names of the values in ``metrics``;
- ``layer``: before the first record of a layer: ``layer`` (its number in this log), ``name``, ``shape``;
- ``metrics``: a layer at an analysis: ``step``, ``layer``, ``state`` and ``rank`` (after it acted), ``values`` (one
  per column, null where undefined), ``spectrum``, and optionally ``protected``, ``bytes`` (of weight, gradient,
  optimizer state, monitoring; the first three of the dense layer; if they changed), ``policy_input``
  (:class:`PolicyInput` without defaults and what other keys contain), ``decision`` (of a user's policy; decisions of
  the library's policy are recomputed by the reader; null: there was an intervention since);
- ``analysis``: after the metrics of all layers: ``step``, ``analyses``, ``seconds`` by phase, ``seconds_total``;
- ``event``: see :class:`Event`; its kinds are those of :data:`svd_optim.decisions.lifecycle.EVENTS`.

A number that is not finite is a string, as JSON has no such numbers. Readers must ignore unknown keys.
"""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..distributed import is_main_process
from ..records import Event, LayerInfo, LayerMetrics, LayerReport, Summary
from ..tracking.listeners import Listener, Monitored
from .log_file import LogFile

logger = logging.getLogger(__name__)

SCHEMA = 2
COLUMNS = tuple(field.name for field in fields(LayerMetrics) if field.name != "step")
BYTES = ("weight_bytes", "grad_bytes", "state_bytes", "monitoring_bytes",
          "weight_bytes_dense", "grad_bytes_dense", "state_bytes_dense")  # fmt: skip
INFO_DEFAULTS = {
    field.name: field.default for field in fields(LayerInfo) if field.name not in ("name", "shape", "rank")
}


def plain(value: Any) -> Any:
    """``value`` for JSON: mappings, lists and tuples converted, numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


class RunLog(Listener):
    """Appends all metrics and events of an optimizer to a file; the module's docstring has the format.

        optimizer.add_listener(RunLog("runs/log.jsonl"))

    Read it with :func:`svd_optim.console.read_log` or ``python -m svd_optim``. Only complete lines are written; a run
    that is killed loses at most the last one, and one that is resumed with the same path appends to the file. Where
    another process is writing to it already, this one warns and uses a file of its own (``log-2.jsonl``; see ``path``).
    It takes 300 to 350 bytes per layer and analysis. In a distributed run only rank 0 writes. If the disk is full,
    logging stops with a warning and training continues.

    Args:
        path: of the file; missing folders are created.

    Raises:
        OSError: the file can't be opened for writing.
        ValueError: it is added to a second optimizer; each needs its own log.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._head: dict[str, Any] = {}
        self._write_decisions = False
        self._begin()
        self._file = LogFile(self.path) if is_main_process() else None
        self.path = self.path if self._file is None else self._file.path

    def _begin(self) -> None:
        """In a file that says nothing of this run yet."""
        self._said_head = False
        self._layers: dict[str, int] = {}
        self._bytes: dict[str, list[int]] = {}

    def on_start(self, optimizer: Monitored) -> None:
        """Remember what stands at the head."""
        if self._head:
            raise ValueError(f"RunLog({str(self.path)!r}) belongs to another optimizer already; give each its own file")
        config = optimizer.config
        self._write_decisions = config.policy is not None
        self._head = {
            "record": "run",
            "schema": SCHEMA,
            "svd_optim": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": 0,
            "optimizer": type(optimizer.base_optimizer).__name__,
            "mode": config.mode,
            "config": {
                **{f.name: getattr(config, f.name) for f in fields(config)},
                "policy": None if config.policy is None else repr(config.policy),
                "thresholds": asdict(config.thresholds),
                "overrides": {glob: asdict(override) for glob, override in config.overrides.items()},
            },
            "skipped": [[x.name, x.shape, x.reason] for x in optimizer.summary().skipped],
            "columns": COLUMNS,
        }

    def on_event(self, event: Event) -> None:
        """Write the event."""
        self._move_on(event.step)
        self._write([{"record": "event", **event.as_plain()}], event.step)

    def on_analysis(self, summary: Summary) -> None:
        """Write the layers, and that the analysis is complete."""
        self._move_on(summary.step)
        records = [record for layer in summary.layers for record in self._records(layer, summary.step)]
        seconds = {phase: round(value, 4) for phase, value in summary.seconds.items()}
        totals = {"analyses": summary.analyses, "seconds": seconds, "seconds_total": round(summary.seconds_total, 3)}
        self._write([*records, {"record": "analysis", "step": summary.step, **totals}], summary.step)

    def _records(self, layer: LayerReport, step: int) -> Iterator[dict[str, Any]]:
        if layer.name not in self._layers:
            self._layers[layer.name] = len(self._layers)
            yield {"record": "layer", "layer": self._layers[layer.name], "name": layer.name, "shape": layer.shape}
        record: dict[str, Any] = {"record": "metrics", "step": step, "layer": self._layers[layer.name],
                                  "state": str(layer.state), "rank": layer.rank}  # fmt: skip
        if layer.metrics is not None and layer.metrics.step == step:
            record["values"] = [getattr(layer.metrics, column) for column in COLUMNS]
            record["spectrum"] = layer.spectrum
        if layer.protected:
            record["protected"] = True
        sizes = [getattr(layer, name) for name in BYTES]
        if sizes != self._bytes.get(layer.name):
            self._bytes[layer.name] = record["bytes"] = sizes
        if layer.policy_input is not None:
            info = {key: value for key, default in INFO_DEFAULTS.items()
                    if (value := getattr(layer.policy_input.info, key)) != default}  # fmt: skip
            record["policy_input"] = {
                "state": str(layer.policy_input.state),
                "analyses": layer.policy_input.analyses,
                **info,
            }
            record["policy_input"] |= (
                {} if layer.policy_input.info.rank == layer.rank else {"rank": layer.policy_input.info.rank}
            )
            if layer.decision is None:
                record["decision"] = None  # there was an intervention since
            elif self._write_decisions:
                record["decision"] = asdict(layer.decision)
        yield record

    def _move_on(self, step: int) -> None:
        """If the file has become somebody else's: to one of its own."""
        try:
            if self._file is not None and self._file.moved():
                self.path = self._file.path
                self._begin()
        except OSError as error:
            self._end(step, error)

    def _write(self, records: list[dict[str, Any]], step: int) -> None:
        if self._file is None:
            return
        if not self._said_head:
            records, self._said_head = [self._head | {"step": step}, *records], True
        lines = (json.dumps(plain(r), separators=(",", ":"), allow_nan=False) + "\n" for r in records)
        try:
            self._file.write("".join(lines).encode())
        except OSError as error:
            self._end(step, error)

    def _end(self, step: int, error: OSError) -> None:
        """The training goes on without."""
        assert self._file is not None
        logger.warning("the log %s ends at step %d: %s", self.path, step, error)
        self._file.close()
        self._file = None
