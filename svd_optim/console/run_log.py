"""The log of a run: JSON Lines, written while it trains, read while it goes on or afterwards.

Version 1. Each line is an object with a key ``record``:

- ``run``: at the head, and again where a resumed process goes on: ``schema``, ``svd_optim``, ``torch``,
  ``python``, ``time`` (UTC), ``step`` (of the record behind it: what an earlier process wrote of this step and
  later ones no longer counts), ``optimizer``, ``mode``, ``config``, ``left_alone`` ([name, shape, reason]) and
  ``columns``, the names of the values in what follows;
- ``layer``: before a layer is first spoken of: ``layer`` (its number in this log), ``name``, ``shape``;
- ``metrics``: a layer at an analysis: ``step``, ``layer``, ``state`` and ``rank`` (after it acted), ``values`` (one
  for each column, null where undefined), ``spectrum``, and where there is something to say ``protected``,
  ``bytes`` (of weight, gradient, optimizer state, watching; the first three of the dense layer; if they changed),
  ``asked`` (what the policy was asked: :class:`Question`, without what the rest says), ``decision`` (of a
  policy of the user's; the library's own is asked again by whoever reads);
- ``analysis``: behind the metrics of all layers: ``step``, ``analyses``, ``seconds`` by phase, ``seconds_total``;
- ``event``: see :class:`Event`.

A number that is not finite is a string, as JSON has none. Keys that a reader does not know are to be ignored.
"""

from __future__ import annotations

import json
import logging
import math
import platform
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import LayerOverride, SubspaceConfig, Thresholds
from ..decisions.policy import policy_of
from ..records import (
    Action,
    Condition,
    Decision,
    Event,
    LayerInfo,
    LayerMetrics,
    LayerReport,
    LayerState,
    LeftAlone,
    Question,
    Summary,
)
from ..tracking.listeners import Listener, is_main_process
from ..tracking.selection import first_match

if TYPE_CHECKING:
    from ..optimizer import SubspaceAwareOptimizer

logger = logging.getLogger(__name__)

SCHEMA = 1
COLUMNS = tuple(field.name for field in fields(LayerMetrics) if field.name != "step")
_BYTES = ("weight_bytes", "grad_bytes", "state_bytes", "watching_bytes",
          "weight_bytes_dense", "grad_bytes_dense", "state_bytes_dense")  # fmt: skip
_ASKED = {field.name: field.default for field in fields(LayerInfo) if field.name not in ("name", "shape", "rank")}


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


# ---- writing -----------------------------------------------------------------------------------------


class RunLog(Listener):
    """Appends everything that an optimizer finds and does to a file: see the module's docstring.

        optimizer.add_listener(RunLog("runs/log.jsonl"))

    Read it with :func:`read_log` or ``python -m svd_optim``. One line at a time is handed to the operating
    system, whole; a run that is killed loses at most the line it was writing, and one that is resumed with
    the same path goes on in the same file. A layer takes about 300 bytes an analysis. In a distributed run only
    rank 0 writes (environment variable ``RANK``). A full disk ends the log, with a warning, and not the training.

    Args:
        path: of the file; its folders are made.

    Raises:
        OSError: the file can't be opened for writing.
        ValueError: on being added to a second optimizer; each needs a log of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._head: dict[str, Any] | None = None  # until it is written
        self._started = False
        self._keep_decisions = False
        self._layers: dict[str, int] = {}
        self._bytes: dict[str, list[int]] = {}
        self._file = None
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            if self._file.tell() and not self._ends_with_newline():
                self._file.write(b"\n")  # the line that a killed run left unfinished stays a line of its own

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def on_start(self, optimizer: SubspaceAwareOptimizer) -> None:
        """Remember what stands at the head."""
        if self._started:
            raise ValueError(f"RunLog({str(self.path)!r}) belongs to another optimizer already; give each its own file")
        self._started = True
        config = optimizer.config
        self._keep_decisions = config.policy is not None
        self._head = {
            "record": "run",
            "schema": SCHEMA,
            "svd_optim": _version(),
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
            "left_alone": [[x.name, x.shape, x.reason] for x in optimizer.summary().left_alone],
            "columns": COLUMNS,
        }

    def on_event(self, event: Event) -> None:
        """Write the event."""
        self._write([{"record": "event", **event.as_plain()}], event.step)

    def on_analysis(self, summary: Summary) -> None:
        """Write the layers, and that the analysis is complete."""
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
        sizes = [getattr(layer, name) for name in _BYTES]
        if sizes != self._bytes.get(layer.name):
            self._bytes[layer.name] = record["bytes"] = sizes
        if layer.question is not None:
            info = {key: value for key, default in _ASKED.items()
                    if (value := getattr(layer.question.info, key)) != default}  # fmt: skip
            record["asked"] = {"state": str(layer.question.state), "analyses": layer.question.analyses, **info}
            record["asked"] |= {} if layer.question.info.rank == layer.rank else {"rank": layer.question.info.rank}
            if layer.decision is None:
                record["decision"] = None  # somebody has stepped in since
            elif self._keep_decisions:
                record["decision"] = asdict(layer.decision)
        yield record

    def _write(self, records: list[dict[str, Any]], step: int) -> None:
        if self._file is None:
            return
        if self._head is not None:
            records, self._head = [self._head | {"step": step}, *records], None
        lines = (json.dumps(plain(r), separators=(",", ":"), allow_nan=False) + "\n" for r in records)
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            logger.warning("the log %s ends at step %d: %s", self.path, step, error)
            self._file = None


def _version() -> str:
    from .. import __version__  # not yet there while the package is being imported

    return __version__


# ---- reading -----------------------------------------------------------------------------------------


class Run:
    """What a log says of a run: summaries as of each analysis, and events. Lines are fed to it one by one."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.config = SubspaceConfig()
        self.events: list[Event] = []
        self.analyses: list[dict[str, Any]] = []  # records of the complete ones
        self.reports: dict[str, list[LayerReport]] = {}  # by layer, one an analysis, without their decisions
        self.steps: dict[str, list[int]] = {}  # theirs
        self.skipped = 0  # lines that are not whole, or of a kind that this version does not know
        self._names: dict[int, tuple[str, tuple[int, int]]] = {}
        self._decisions: dict[str, dict[int, Decision | None]] = {}  # those that were written down

    def feed(self, line: str) -> None:
        """Take in a line. One that is damaged is counted and skipped.

        Raises:
            ValueError: the log is of a newer version.
        """
        try:
            record = json.loads(line)
            take = {"run": self._run, "layer": self._layer, "metrics": self._metrics, "analysis": self.analyses.append,
                    "event": self._event}[record["record"]]  # fmt: skip
        except (ValueError, KeyError, TypeError):
            self.skipped += 1
            return
        if record["record"] == "run" and record.get("schema", 0) > SCHEMA:
            raise ValueError(f"the log has schema {record['schema']}, written by svd_optim {record.get('svd_optim')}; "
                             f"this version reads up to {SCHEMA}: upgrade svd_optim")  # fmt: skip
        try:
            take(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.skipped += 1

    def _run(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self.config = _config(record["config"])
        self.head = record
        self.events = [event for event in self.events if event.step < step]
        self.analyses = [analysis for analysis in self.analyses if analysis["step"] < step]
        for name, steps in self.steps.items():
            count = bisect_right(steps, step - 1)
            del steps[count:], self.reports[name][count:]

    def _layer(self, record: dict[str, Any]) -> None:
        name = record["name"]
        self._names[record["layer"]] = name, (record["shape"][0], record["shape"][1])
        for table in (self.reports, self.steps):
            table.setdefault(name, [])
        self._decisions.setdefault(name, {})

    def _event(self, record: dict[str, Any]) -> None:
        numbers = {key: _number(value) for key, value in record["numbers"].items()}
        known = {field.name: record[field.name] for field in fields(Event)}
        self.events.append(Event.from_plain(known | {"numbers": numbers}))

    def _metrics(self, record: dict[str, Any]) -> None:
        name, shape = self._names[record["layer"]]
        before = self.reports[name][-1] if self.reports[name] else None
        sizes = record.get("bytes") or [getattr(before, key) for key in _BYTES]
        metrics = None if before is None else before.metrics
        if "values" in record:
            values = dict(zip(self.head["columns"], map(_number, record["values"]), strict=True))
            metrics = LayerMetrics(step=record["step"], **{key: values[key] for key in COLUMNS})
        asked, question = record.get("asked"), None
        if asked is not None:
            flags = {key: asked.get(key, default) for key, default in _ASKED.items()}
            info = LayerInfo(name=name, shape=shape, rank=asked.get("rank", record["rank"]), **flags)
            question = Question(info=info, state=LayerState(asked["state"]), analyses=asked["analyses"])
        report = LayerReport(
            name=name,
            shape=shape,
            state=LayerState(record["state"]),
            rank=record["rank"],
            protected=record.get("protected", False),
            metrics=metrics,
            decision=None,
            question=question,
            spectrum=tuple(map(_number, record.get("spectrum", before.spectrum if before else ()))),
            **dict(zip(_BYTES, sizes, strict=True)),
        )
        self.reports[name].append(report)
        self.steps[name].append(record["step"])
        if "decision" in record:
            self._decisions[name][record["step"]] = _decision(record["decision"])

    # ---- what it says --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.analyses)

    def thresholds(self, layer: str) -> Thresholds:
        """Those that held for a layer."""
        return first_match(layer, self.config.overrides).thresholds or self.config.thresholds

    def history(self, layer: str, step: int, last: int | None = None) -> list[LayerMetrics]:
        """The analyses of a layer up to a step, oldest first; the ``last`` ones, or all."""
        steps, reports = self.steps[layer], self.reports[layer]
        found: list[LayerMetrics] = []
        for i in reversed(range(bisect_right(steps, step))):
            if last is not None and len(found) == last:
                break
            metrics = reports[i].metrics
            if metrics is not None and metrics.step == steps[i]:  # else it repeats an earlier one
                found.append(metrics)
        return found[::-1]

    def decide(self, layer: str, report: LayerReport, step: int) -> Decision | None:
        """What the policy decided of a layer, as a report of a step says it: from the log, or by asking it again."""
        if step in self._decisions[layer]:
            return self._decisions[layer][step]
        question = report.question
        if question is None:
            return None
        line = self.history(layer, step, question.analyses)
        return policy_of(self.config).decide(question.info, question.state, line, self.thresholds(layer))

    def summary(self, index: int = -1) -> Summary:
        """The run as of its ``index``-th analysis; by default the last one, with all events.

        Raises:
            IndexError: there is no such analysis.
        """
        analysis = self.analyses[index]
        step = analysis["step"]
        layers = []
        for name, steps in self.steps.items():
            count = bisect_right(steps, step)
            if count and steps[count - 1] == step:  # else it was not followed then
                report = self.reports[name][count - 1]
                layers.append(replace(report, decision=self.decide(name, report, step)))
        last = analysis is self.analyses[-1]
        return Summary(
            step=step,
            mode=self.config.mode,
            analyses=analysis["analyses"],
            stall_after=self.config.stall_after,
            layers=tuple(layers),
            left_alone=tuple(LeftAlone(name=a, shape=tuple(b), reason=c) for a, b, c in self.head["left_alone"]),
            events=tuple(event for event in self.events if last or event.step <= step),
            seconds=analysis["seconds"],
            seconds_total=analysis["seconds_total"],
        )

    def summaries(self) -> Iterator[Summary]:
        """The run as of each analysis, oldest first."""
        return (self.summary(index) for index in range(len(self)))


def _config(plain: Mapping[str, Any]) -> SubspaceConfig:
    """The configuration at the head of a log; a policy of the user's is not part of it."""
    known = {field.name for field in fields(SubspaceConfig)}
    values = {key: value for key, value in plain.items() if key in known and key != "policy"}
    values["thresholds"] = Thresholds(**values["thresholds"])
    overrides = {}
    for glob, override in values["overrides"].items():
        own = override["thresholds"]
        overrides[glob] = LayerOverride(**{**override, "thresholds": None if own is None else Thresholds(**own)})
    return SubspaceConfig(**{**values, "overrides": overrides})


def _decision(plain: Mapping[str, Any] | None) -> Decision | None:
    if plain is None:
        return None
    conditions = tuple(map(_condition, plain["conditions"]))
    attack = None if plain["attack"] is None else _condition(plain["attack"])
    return Decision(**{**plain, "action": Action(plain["action"]), "conditions": conditions, "attack": attack})


def _condition(plain: Mapping[str, Any]) -> Condition:
    numbers = ("value", "threshold", "margin")
    return Condition(**{key: _number(value) if key in numbers else value for key, value in plain.items()})


def read_log(path: str | Path) -> Run:
    """What a :class:`RunLog` wrote, as far as it is whole.

    Raises:
        OSError: the file can't be read.
        ValueError: it holds no run, or one of a newer version.
    """
    run = Run()
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        feed(run, file)
    if not run.head:
        raise ValueError(f"{path} is not a log of svd_optim: no line of it says what run it is of")
    return run


def feed(run: Run, lines: Iterable[str]) -> None:
    """Take in those of the lines that say something."""
    for line in lines:
        if line.strip():
            run.feed(line)
