"""The log of a run: JSON Lines, written while it trains, read while it goes on or afterwards.

Version 2. Each line is an object with a key ``record``:

- ``run``: at the head, and again where a resumed process goes on: ``schema``, ``svd_optim``, ``torch``,
  ``python``, ``time`` (UTC), ``step`` (of the record behind it: what an earlier process wrote of this step and
  later ones no longer counts), ``optimizer``, ``mode``, ``config``, ``skipped`` ([name, shape, reason]) and
  ``columns``, the names of the values in what follows;
- ``layer``: before a layer is first spoken of: ``layer`` (its number in this log), ``name``, ``shape``;
- ``metrics``: a layer at an analysis: ``step``, ``layer``, ``state`` and ``rank`` (after it acted), ``values`` (one
  for each column, null where undefined), ``spectrum``, and where there is something to say ``protected``,
  ``bytes`` (of weight, gradient, optimizer state, monitoring; the first three of the dense layer; if they changed),
  ``policy_input`` (what the policy was asked: :class:`PolicyInput`, without what the rest says), ``decision`` (of a
  policy of the user's; the library's own is asked again by whoever reads);
- ``analysis``: behind the metrics of all layers: ``step``, ``analyses``, ``seconds`` by phase, ``seconds_total``;
- ``event``: see :class:`Event`; its kinds are those of :data:`svd_optim.decisions.lifecycle.EVENTS`.

A number that is not finite is a string, as JSON has none. Keys that a reader does not know are to be ignored.
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
ASKED = {field.name: field.default for field in fields(LayerInfo) if field.name not in ("name", "shape", "rank")}


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


class RunLog(Listener):
    """Appends everything that an optimizer finds and does to a file: see the module's docstring.

        optimizer.add_listener(RunLog("runs/log.jsonl"))

    Read it with :func:`svd_optim.console.read_log` or ``python -m svd_optim``. One line at a time is handed to
    the operating system, whole; a run that is killed loses at most the line it was writing, and one that is
    resumed with the same path goes on in the same file. Where another process is writing to it already, this one
    warns and goes on in a file of its own (``log-2.jsonl``; see ``path``). A layer takes about 300 bytes an analysis.
    In a distributed run only rank 0 writes. A full disk ends the log, with a warning, and not the training.

    Args:
        path: of the file; its folders are made.

    Raises:
        OSError: the file can't be opened for writing.
        ValueError: on being added to a second optimizer; each needs a log of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._head: dict[str, Any] = {}
        self._keep_decisions = False
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
        self._keep_decisions = config.policy is not None
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
        whole = {"analyses": summary.analyses, "seconds": seconds, "seconds_total": round(summary.seconds_total, 3)}
        self._write([*records, {"record": "analysis", "step": summary.step, **whole}], summary.step)

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
            info = {key: value for key, default in ASKED.items()
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
                record["decision"] = None  # somebody has stepped in since
            elif self._keep_decisions:
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
