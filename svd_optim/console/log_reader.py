"""Reading the log of a run, in progress or finished; :mod:`.run_log` has the format."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

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
    PolicyInput,
    Skipped,
    Summary,
)
from .run_log import BYTES, COLUMNS, INFO_DEFAULTS, SCHEMA


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


class Run:
    """A run as recorded by a log: summaries at each analysis, and events. Lines are fed to it one by one."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.config = SubspaceConfig()
        self.events: list[Event] = []
        self.analyses: list[dict[str, Any]] = []  # records of the complete analyses
        self.reports: dict[str, list[LayerReport]] = {}  # by layer, one per analysis, without decisions
        self.steps: dict[str, list[int]] = {}  # steps of these reports
        self.damaged_lines = 0  # lines that are incomplete, or of an unknown kind
        self._names: dict[int, tuple[str, tuple[int, int]]] = {}
        self._decisions: dict[str, dict[int, Decision | None]] = {}  # those that the log contains

    def feed(self, line: str) -> None:
        """Process one line. A damaged one is counted and skipped.

        Raises:
            ValueError: the log is of a newer version.
        """
        try:
            record = json.loads(line)
            handlers = {"run": self._run, "layer": self._layer, "metrics": self._metrics, "event": self._event,
                        "analysis": self.analyses.append}  # fmt: skip
            handler = handlers[record["record"]]
        except (ValueError, KeyError, TypeError):
            self.damaged_lines += 1
            return
        if record["record"] == "run" and record.get("schema", 0) > SCHEMA:
            raise ValueError(f"the log has schema {record['schema']}, written by svd_optim {record.get('svd_optim')}; "
                             f"this version reads up to {SCHEMA}: upgrade svd_optim")  # fmt: skip
        try:
            handler(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged_lines += 1

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
        sizes = record.get("bytes") or [getattr(before, key) for key in BYTES]
        metrics = None if before is None else before.metrics
        if "values" in record:
            values = dict(zip(self.head["columns"], map(_number, record["values"]), strict=True))
            metrics = LayerMetrics(step=record["step"], **{key: values[key] for key in COLUMNS if key in values})
        saved, policy_input = record.get("policy_input"), None
        if saved is not None:
            flags = {key: saved.get(key, default) for key, default in INFO_DEFAULTS.items()}
            info = LayerInfo(name=name, shape=shape, rank=saved.get("rank", record["rank"]), **flags)
            policy_input = PolicyInput(info=info, state=LayerState(saved["state"]), analyses=saved["analyses"])
        report = LayerReport(
            name=name,
            shape=shape,
            state=LayerState(record["state"]),
            rank=record["rank"],
            protected=record.get("protected", False),
            metrics=metrics,
            decision=None,
            policy_input=policy_input,
            spectrum=tuple(map(_number, record.get("spectrum", before.spectrum if before else ()))),
            **dict(zip(BYTES, sizes, strict=True)),
        )
        self.reports[name].append(report)
        self.steps[name].append(record["step"])
        if "decision" in record:
            self._decisions[name][record["step"]] = _decision(record["decision"])

    # ---- queries -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.analyses)

    def thresholds(self, layer: str) -> Thresholds:
        """The thresholds for one layer, overrides included."""
        return self.config.thresholds_of(layer)

    def history(self, layer: str, step: int, last: int | None = None) -> list[LayerMetrics]:
        """The metrics of a layer up to a step, oldest first: the last ``last`` ones, or all."""
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
        """The decision about a layer at the step of a report: from the log, or by querying the policy again."""
        if step in self._decisions[layer]:
            return self._decisions[layer][step]
        policy_input = report.policy_input
        if policy_input is None:
            return None
        window = self.history(layer, step, policy_input.analyses)
        return policy_of(self.config).decide(policy_input.info, policy_input.state, window, self.thresholds(layer))

    def summary(self, index: int = -1) -> Summary:
        """The run at its ``index``-th analysis; by default the last one, with all events.

        Raises:
            IndexError: there is no such analysis.
        """
        analysis = self.analyses[index]
        step = analysis["step"]
        layers = []
        for name, steps in self.steps.items():
            count = bisect_right(steps, step)
            if count and steps[count - 1] == step:  # else it was not tracked then
                report = self.reports[name][count - 1]
                layers.append(replace(report, decision=self.decide(name, report, step)))
        last = analysis is self.analyses[-1]
        return Summary(
            step=step,
            mode=self.config.mode,
            analyses=analysis["analyses"],
            stall_analyses=self.config.stall_analyses,
            layers=tuple(layers),
            skipped=tuple(Skipped(name=a, shape=tuple(b), reason=c) for a, b, c in self.head["skipped"]),
            events=tuple(event for event in self.events if last or event.step <= step),
            seconds=analysis["seconds"],
            seconds_total=analysis["seconds_total"],
        )

    def summaries(self) -> Iterator[Summary]:
        """The run at each analysis, oldest first."""
        return (self.summary(index) for index in range(len(self)))


def _config(plain: Mapping[str, Any]) -> SubspaceConfig:
    """The configuration in the header of a log, without a user's policy."""
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
    """The run in a file that a :class:`RunLog` wrote; damaged lines are skipped.

    Raises:
        OSError: the file can't be read.
        ValueError: it contains no run, or one of a newer version.
    """
    run = Run()
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        feed(run, file)
    if not run.head:
        raise ValueError(f"{path} is not a log of svd_optim: it has no header")
    return run


def feed(run: Run, lines: Iterable[str]) -> None:
    """Process lines, except blank ones."""
    for line in lines:
        if line.strip():
            run.feed(line)
