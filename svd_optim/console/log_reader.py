"""Reading the log of a run, in progress or finished; :mod:`.run_log` has the format."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
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
    Events,
    LayerInfo,
    LayerMetrics,
    LayerReport,
    LayerState,
    PolicyInput,
    Skipped,
    Summary,
)
from ..tracking.kinds import record as record_of
from .log_records import NewerSchema, finite, parsed
from .run_log import BYTES, COLUMNS, INFO_DEFAULTS

_METRICS = record_of(LayerMetrics)
_UNMEASURED = {field.name: field.default for field in fields(LayerMetrics)}


class Run:
    """A run as recorded by a log: summaries at each analysis, and events. Lines are fed to it one by one."""

    def __init__(self) -> None:
        self.head: dict[str, Any] = {}
        self.config = SubspaceConfig()
        self.events = Events()
        self.analyses: list[dict[str, Any]] = []  # records of the complete ones
        self.reports: dict[str, list[LayerReport]] = {}  # by layer, one an analysis, without their decisions
        self.steps: dict[str, list[int]] = {}  # theirs
        self.damaged_lines = 0  # lines that are not whole, contradict others, or are of an unknown kind
        self.damage = ""  # what is wrong with the first of them
        self._lines = 0
        self._names: dict[int, tuple[str, tuple[int, int]]] = {}
        self._decisions: dict[str, dict[int, Decision | None]] = {}  # those that the log contains

    def feed(self, line: str) -> None:
        """Process one line. A damaged one is counted and skipped.

        Raises:
            ValueError: the log is of a newer version.
        """
        self._lines += 1
        if not line.strip():
            return
        take = {"run": self._run, "layer": self._layer, "metrics": self._metrics, "analysis": self._analysis,
                "event": self._event}  # fmt: skip
        try:
            record = parsed(line)
            take[record["record"]](record)
        except NewerSchema:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.damaged_lines += 1
            self.damage = self.damage or f"line {self._lines}: {error}"

    def _run(self, record: dict[str, Any]) -> None:
        step = record["step"]
        try:
            self.config = _config(record["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"run: its config can't be read: {error}") from error
        self.head = record
        self.events = Events(event for event in self.events if event.step < step)
        self.analyses = [analysis for analysis in self.analyses if analysis["step"] < step]
        for name, steps in self.steps.items():
            count = bisect_right(steps, step - 1)
            del steps[count:], self.reports[name][count:]

    def _analysis(self, record: dict[str, Any]) -> None:
        _require(bool(self.head), "analysis: nothing says of what run")
        last = self.analyses[-1]["step"] if self.analyses else -1
        _require(record["step"] > last, f"analysis: of step {record['step']}, after that of step {last}")
        seconds = {phase: finite(value) for phase, value in record["seconds"].items()}
        self.analyses.append(record | {"seconds": seconds, "seconds_total": finite(record["seconds_total"])})

    def _layer(self, record: dict[str, Any]) -> None:
        name, shape = record["name"], (record["shape"][0], record["shape"][1])
        self._names[record["layer"]] = name, shape
        if name not in self.reports or any(report.shape != shape for report in self.reports[name][-1:]):
            self.reports[name], self.steps[name], self._decisions[name] = [], [], {}

    def _event(self, record: dict[str, Any]) -> None:
        numbers = {key: finite(value) for key, value in record["numbers"].items()}
        known = {field.name: record[field.name] for field in fields(Event)}
        self.events.append(Event.from_plain(known | {"numbers": numbers}))

    def _metrics(self, record: dict[str, Any]) -> None:
        _require(bool(self.head), "metrics: nothing says of what run")
        _require(record["layer"] in self._names, f"metrics: layer {record['layer']} has not been spoken of")
        name, shape = self._names[record["layer"]]
        before = self.reports[name][-1] if self.reports[name] else None
        last = self.steps[name][-1] if self.steps[name] else -1
        _require(record["step"] > last, f"metrics: of step {record['step']}, after those of step {last}")
        _require(record["rank"] <= min(shape), f"metrics: no matrix of shape {shape} has rank {record['rank']}")
        sizes = record.get("bytes", [getattr(before, key, 0) for key in BYTES])  # 0: the line that says it is damaged
        metrics = None if before is None else before.metrics
        if "values" in record:
            metrics = self._measured(record, shape)
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
            spectrum=tuple(map(finite, record.get("spectrum", before.spectrum if before else ()))),
            **dict(zip(BYTES, sizes, strict=True)),
        )
        self.reports[name].append(report)
        self.steps[name].append(record["step"])
        if "decision" in record:
            self._decisions[name][record["step"]] = _decision(record["decision"])

    def _measured(self, record: dict[str, Any], shape: tuple[int, int]) -> LayerMetrics:
        columns = self.head["columns"]
        _require(len(record["values"]) == len(columns), f"metrics: {len(columns)} values are expected")
        values = dict(zip(columns, map(finite, record["values"]), strict=True))
        known = {key: values[key] for key in COLUMNS if key in values}  # a log of an older version has fewer
        values = {**_UNMEASURED, **known, "step": record["step"]}
        _require(_METRICS(values) and 1 <= values["rank"] <= min(shape), "metrics: its values don't fit their columns")
        return LayerMetrics(**values)

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
            layers=tuple(layers),
            skipped=tuple(Skipped(name=a, shape=tuple(b), reason=c) for a, b, c in self.head["skipped"]),
            events=tuple(event for event in self.events if last or event.step <= step),
            seconds=analysis["seconds"],
            seconds_total=analysis["seconds_total"],
        )

    def summaries(self) -> Iterator[Summary]:
        """The run at each analysis, oldest first."""
        return (self.summary(index) for index in range(len(self)))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


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
    return Condition(**{key: finite(value) if key in numbers else value for key, value in plain.items()})


def read_log(path: str | Path) -> Run:
    """The run in a file that a :class:`RunLog` wrote; damaged lines are skipped.

    Raises:
        OSError: the file can't be read.
        ValueError: it contains no run, or one of a newer version.
    """
    run = Run()
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            run.feed(line)
    if not run.head:
        why = f" ({run.damage})" if run.damage else ""
        raise ValueError(f"{path} is not a log of svd_optim: no line of it says what run it is of{why}")
    return run
