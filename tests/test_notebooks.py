"""What notebooks and ``rich.print`` show: tables, of records that stay what they are for code."""

from __future__ import annotations

import copy
import html
import io
import json
import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from helpers import make, quick, train
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file

from svd_optim import RunLog, SubspaceAwareOptimizer
from svd_optim.console import read_log
from svd_optim.console.report import event_line, why_table
from svd_optim.console.spectra import inspect_file, inspection_table
from svd_optim.records import Event, LayerReport, LayerState


@pytest.fixture(scope="module")
def optimizer() -> SubspaceAwareOptimizer:
    _, optimizer = make("adamw", quick())
    train(optimizer.model, optimizer, 130)
    return optimizer


def printed(what: Any, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    assert max(map(cell_len, file.getvalue().split("\n"))) <= width
    return "\n".join(line.rstrip() for line in file.getvalue().split("\n"))


def page(what: Any) -> str:
    """The text of what a notebook shows."""
    shown = what._repr_html_()
    assert shown.startswith("<pre") and "Report(" not in shown and "Event(" not in shown
    text = html.unescape(re.sub(r"<[^>]*>", "", shown))
    return "\n".join(line.rstrip() for line in text.split("\n"))


def test_why_is_a_table_with_the_reasons_and_a_list(optimizer: SubspaceAwareOptimizer) -> None:
    why = optimizer.why()
    for shown in (printed(why), page(why)):
        lines = shown.split("\n")
        assert lines[0] == "layers: 2" and lines[1].split() == ["layer", "state", "rank", "why"]
        for layer in why:
            [line] = [line for line in lines if line.startswith(layer.name)]
            assert line.split()[1:3] == [str(layer.state), str(layer.rank)] and line.endswith(layer.reason)
    assert isinstance(why, list) and len(why) == 2 and why == list(why) == [why[0], why[1]]
    assert isinstance(why[0], LayerReport) and {row.name for row in why} == {"up", "mid"}
    assert sorted(why, key=lambda row: row.name)[0].name == "mid"


def test_why_of_dense_layers_names_what_blocks() -> None:
    model, optimizer = make("adamw", quick(patience=50))
    train(model, optimizer, 60)
    [first, second] = optimizer.why()
    assert first.decision is not None and first.decision.blocker is not None
    assert str(first.decision.blocker) in page(optimizer.why()) and second.name in page(optimizer.why())
    fresh = make("adamw", quick())[1]
    assert page(fresh.why()).count("not analyzed yet") == 2


def test_one_layer_is_its_conditions_and_one_event_its_line(optimizer: SubspaceAwareOptimizer) -> None:
    layer, event = optimizer.why()[0], optimizer.events[0]
    assert printed(layer) == printed(why_table(layer)) and "condition" in page(layer)
    assert printed(event) == printed(event_line(event)) and page(event).startswith(f"step {event.step}")


def test_events_are_a_table_and_the_list_that_they_were(optimizer: SubspaceAwareOptimizer) -> None:
    events = optimizer.events
    for shown in (printed(events, 200), page(events)):
        for event in events:
            assert re.search(rf"^ +{event.step}  {event.layer} +{event.kind}  ", shown, re.MULTILINE)
    assert "descending → factorized  descent done  [rank=" in printed(events, 200)
    assert isinstance(events, list) and all(isinstance(event, Event) for event in events)
    assert events == list(events) and events is optimizer.events  # of the run, not a copy
    last = events[-2:]
    assert page(last).split("\n")[0] == "events: 2" and last == list(events)[-2:]


def test_tables_stay_tables_in_copies_and_through_loading(optimizer: SubspaceAwareOptimizer) -> None:
    for records in (optimizer.why(), optimizer.events):
        for again in (copy.copy(records), copy.deepcopy(records), pickle.loads(pickle.dumps(records))):
            assert type(again) is type(records) and again == records
            assert page(again) == page(records)
    fresh = make("adamw", quick())[1]
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.events == optimizer.events and page(fresh.events) == page(optimizer.events)
    assert page(copy.deepcopy(fresh).events) == page(fresh.events)


def test_tables_are_plain_lists_for_programs(optimizer: SubspaceAwareOptimizer) -> None:
    assert json.loads(json.dumps([event.as_plain() for event in optimizer.events])) == [
        event.as_plain() for event in optimizer.events
    ]
    assert Event.from_plain(optimizer.events[0].as_plain()) == optimizer.events[0]
    assert [row["name"] for row in map(asdict, optimizer.why())] == ["up", "mid"]
    assert repr(optimizer.why()) == repr(list(optimizer.why()))


def test_the_events_of_a_log_are_a_table_too(tmp_path: Path) -> None:
    model, optimizer = make("adamw", quick())
    optimizer.add_listener(RunLog(tmp_path / "log"))
    train(model, optimizer, 130)
    assert page(read_log(tmp_path / "log").events) == page(optimizer.events) != ""


def test_of_many_events_the_last_are_shown(optimizer: SubspaceAwareOptimizer) -> None:
    events = type(optimizer.events)(Event(step=i, layer="a", kind="danger", reason="r") for i in range(2_500))
    steps = re.findall(r"^(\d+)  a +danger", printed(events), re.MULTILINE)
    assert steps == [str(step) for step in range(2_400, 2_500)]


def test_an_inspection_is_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a.weight": torch.randn(30, 20), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    found = inspect_file(tmp_path)
    assert printed(found, 100) == printed(inspection_table(found, 100), 100)
    assert "30x20" in page(found) and "MatrixReport" not in page(found)
    assert asdict(found)["matrices"][0]["shape"] == (30, 20)
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(rich, "_console", console)
    rich.print(found)
    assert "1 matrices" in console.file.getvalue()  # type: ignore[attr-defined]


def test_hostile_names_are_text_in_a_page(optimizer: SubspaceAwareOptimizer) -> None:
    name = "x[/y]<script>&\x1b[2J"
    event = Event(step=1, layer=name, kind=name, reason=name, before=LayerState.DENSE, after=LayerState.DESCENDING)
    events = type(optimizer.events)([event])
    report = optimizer.why()[0]
    reports = type(optimizer.why())([LayerReport(**{**vars(report), "name": name, "decision": None})])
    for what in (event, events, reports, reports[0]):
        shown = what._repr_html_()
        assert shown is not None and "x[/y]&lt;script&gt;&amp;[2J" in shown and "\x1b" not in shown
        printed(what, 30)
    assert page(type(optimizer.events)()).startswith("events: 0")
    assert page(type(optimizer.why())()).startswith("layers: 0")
