"""The report is read by people: these tests read what is printed."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from helpers import make, quick, train
from helpers_records import METRICS, layer, names_of, summary
from rich.cells import cell_len
from rich.console import Console, RenderableType

from svd_optim import SubspaceAwareOptimizer
from svd_optim.console import ConsoleReport
from svd_optim.console.report import event_line, renderable, summary_renderable
from svd_optim.console.tables import layer_table, plan_table
from svd_optim.decisions.lifecycle import WARNINGS
from svd_optim.records import (
    Action,
    Condition,
    Decision,
    Event,
    LayerReport,
    LayerState,
    Plan,
    PlannedLayer,
    Skipped,
)

GPT = names_of(4)
LONG = [f"model.decoder.layers.{i}.self_attention.{p}_projection.{'z' * 36}" for i in (1, 11) for p in "qkv"]
HOSTILE = {  # name -> as printed
    "x[/y]": "x[/y]",
    "[link=http://a]b": "[link=http://a]b",
    "a\x1b[31mred\r\nz\u202e": "a[31mredz",
    "": "(model)",
}


def show(what: RenderableType, width: int) -> list[str]:
    """The lines as printed without color, trailing blanks stripped; none may exceed the width."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    lines = file.getvalue().split("\n")
    assert max(map(cell_len, lines)) <= width
    return [line.rstrip() for line in lines]


def row(lines: list[str], start: str) -> list[str]:
    return next(line for line in lines if line.startswith(start)).split()


def test_140_columns_hold_every_name_and_value() -> None:
    lines = show(layer_table(summary(*map(layer, GPT)), 140), 140)
    rows = [line.split() for line in lines if line.startswith("blocks.")]
    assert [r[0] for r in rows] == GPT  # whole, and in model order
    values = ["0.618", "0.382", "0.246", "0.042", "1.234", "0.271", "0.532", "0.314"]
    assert rows[0][1:] == ["dense", "128x512", "42", *values, "capture", ".31<.40"]


def test_80_columns_keep_what_decisions_rest_on() -> None:
    lines = show(layer_table(summary(*map(layer, GPT)), 80), 80)
    rows = [line.split() for line in lines if line.startswith("blocks.")]
    assert [r[0] for r in rows] == GPT
    shown = dict(zip(row(lines, "layer"), rows[3], strict=False))
    kept = {"state": "dense", "rank": "42", "exc": "0.25", "drift": "0.042", "recon": "0.271", "capt": "0.53"}
    assert kept | {"cexc": "0.31", "decision": "capture"} == {k: shown[k] for k in (*kept, "cexc", "decision")}


@pytest.mark.parametrize("width", [30, 60, 80, 99, 100, 140])
def test_rows_are_single_lines_and_long_names_stay_apart(width: int) -> None:
    lines = show(layer_table(summary(*map(layer, LONG)), width), width)
    start = next(i for i, line in enumerate(lines) if line.startswith("──")) + 1
    rows = lines[start : start + len(LONG)]
    assert all(line.startswith("m") and line.endswith("capture .31<.40") for line in rows)
    if width >= 60:
        assert len({line.split()[0] for line in rows}) == len(LONG)


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str, width: int) -> None:
    one = summary(layer(name), skipped=(Skipped(name=name, shape=(1,), reason=name),))
    event = Event(step=1, layer=name, kind="descend", reason=name, numbers={name: 1.0})
    for what in (layer_table(one, width), summary_renderable(one, width), event_line(event)):
        file = io.StringIO()
        Console(file=file, width=width, force_terminal=True, color_system="truecolor").print(what)
        printed = file.getvalue()
        assert HOSTILE[name] in printed
        assert "\x1b[31m" not in printed and "\x1b]8" not in printed  # neither its color nor a link
        assert "\r" not in printed and "\u202e" not in printed


def test_undefined_values_are_dashes() -> None:
    lines = show(layer_table(summary(layer("a", **dict.fromkeys(METRICS))), 140), 140)
    assert row(lines, "a ")[4:] == ["–"] * 8 + ["drift", "–"]
    never = replace(layer("b"), metrics=None, decision=None)
    assert row(show(layer_table(summary(never), 80), 80), "b ")[-3:] == ["waits", "for", "gradients"]


@pytest.mark.parametrize("width", [80, 140])
def test_absurd_values_are_printed(width: int) -> None:
    absurd = layer("a", principal_excess=math.nan, subspace_drift=math.inf, reconstruction_error=-1e300)
    absurd = replace(absurd, rank=10**9)
    values = row(show(layer_table(summary(absurd), width), width), "a ")
    assert {"nan", "inf", "-1e300", str(10**9)} <= set(values)
    assert values[-2:] == ["drift", "inf>.10"]
    lines = show(summary_renderable(summary(absurd, seconds_total=math.nan), width), width)
    assert row(lines, "analysis")[4] == "nan"
    show(layer_table(summary(), width), width)  # no layers at all
    assert "0 dense" in show(summary_renderable(summary(), width), width)[0]


def test_near_values_are_marked_without_color() -> None:
    lines = show(layer_table(summary(layer("near", capture_excess=0.37), layer("far")), 140), 140)
    assert row(lines, "near")[11:] == ["~0.370", "~capture", ".37<.40"]
    assert "~" not in " ".join(row(lines, "far"))


@pytest.mark.parametrize(
    ("name", "value", "threshold", "above", "text"),
    [
        ("drift_stable", 0.21, 0.1, False, "drift .21>.10"),
        ("reconstruction_safe", 0.0104, 0.01, False, "recon .0104>.0100"),  # decimals that tell them apart
        ("capture_safe", -0.03, 0.4, True, "capture -.03<.40"),
        ("patience", 1, 3, True, "patience 1<3"),
        ("mine", 0.5, 0.5, True, "mine 0.5=0.5"),
        ("[b]", None, 0.5, True, "[b] –"),
    ],
)
def test_decision_column_names_the_blocker(
    name: str, value: float | None, threshold: float, above: bool, text: str
) -> None:
    condition = Condition(name=name, value=value, threshold=threshold, above=above)
    held = Decision(action=Action.HOLD, reason="r", conditions=(condition,))
    lines = show(layer_table(summary(replace(layer("a"), decision=held)), 80), 80)
    assert next(line for line in lines if line.startswith("a ")).endswith(" " + text)


def test_decision_column_names_the_state_of_other_layers() -> None:
    danger = Decision(action=Action.HOLD, reason="", danger=True)
    factorized = layer("f", LayerState.FACTORIZED)
    layers = [layer("d", capture_excess=0.9), layer("e", LayerState.DESCENDING), factorized]
    lines = show(layer_table(summary(*layers, replace(factorized, name="g", decision=danger)), 140), 140)
    shown = [row(lines, f"{name} ")[12:] for name in "defg"]
    assert shown == [["descend"], ["descending"], ["factorized"], ["!", "factorized"]]


@pytest.mark.parametrize(("width", "name"), [(140, "dense"), (80, "dense"), (140, "factorized"), (80, "factorized")])
def test_protected_layers_are_marked_without_color(width: int, name: str) -> None:
    state = LayerState(name)
    layers = [layer("free", state), replace(layer("masters", state), protected=True)]
    lines = show(layer_table(summary(*layers), width), width)
    shown = name if width == 140 else {"dense": "dense", "factorized": "fact"}[name]
    assert row(lines, "free")[1] == shown and row(lines, "masters")[1] == shown + "*"
    assert "* principal block protected: kept from moving" in lines
    assert "*" not in " ".join(show(layer_table(summary(layers[0]), width), width))  # a sign nobody needs


@pytest.mark.parametrize(
    ("action", "rank", "text"),
    [
        (Action.GROW, 56, "grow to 56"),
        (Action.SHRINK, 8, "shrink to 8"),
        (Action.MERGE, None, "merge"),
        (Action.HOLD, None, "factorized"),
    ],
)
def test_decision_column_names_the_move_inside_factors(action: Action, rank: int | None, text: str) -> None:
    decision = Decision(action=action, reason="r", rank=rank)
    one = replace(layer("a", LayerState.FACTORIZED), decision=decision)
    for width in (80, 140):
        lines = show(layer_table(summary(one), width), width)
        assert next(line for line in lines if line.startswith("a ")).endswith(" " + text)


@pytest.mark.parametrize(
    ("name", "value", "threshold", "above", "text", "why"),
    [
        ("in_plan", 0.0, 1, True, "kept dense", "the plan keeps it dense"),
        ("unprotected", 0.0, 1, True, "protected", "being kept from moving"),
        ("cooldown", 320, 0, False, "cooldown 320", "cooldown: 320, needs <= 0"),
        ("in_time", 0.0, 1, True, "too late", "too few steps"),
    ],
)
def test_decision_column_names_what_keeps_a_layer_out(
    name: str, value: float, threshold: int, above: bool, text: str, why: str
) -> None:
    condition = Condition(name=name, value=value, threshold=threshold, above=above, or_equal=True)
    decision = Decision(action=Action.HOLD, reason=f"{name}: {why}", conditions=(condition,))
    one = summary(replace(layer("a"), decision=decision))
    for width in (80, 140):
        lines = show(layer_table(one, width), width)
        assert next(line for line in lines if line.startswith("a ")).endswith(" " + text)
        assert why in " ".join(show(summary_renderable(one, width), width))


# ---- the plan ----------------------------------------------------------------------------------------


def planned(name: str = "a", rank: int | None = 16, **values: object) -> PlannedLayer:
    defaults = {"shape": (128, 512), "state": LayerState.DENSE, "fixed": "", "missed": 0.21234}
    defaults |= {"predicted_increase": 0.0 if rank is None else 0.012345}
    return PlannedLayer(name=name, rank=rank, **(defaults | values))


def plan(*layers: PlannedLayer, budget: float = 0.5) -> Plan:
    return Plan(step=1200, budget=budget, layers=layers)


@pytest.mark.parametrize("width", [80, 140])
def test_the_plan_table_holds_every_name_and_value(width: int) -> None:
    state = LayerState.DESCENDING
    layers = [planned(name) for name in GPT]
    layers[1] = planned(GPT[1], None, missed=0.0)
    layers[2] = planned(GPT[2], 40, state=state, fixed="descending", missed=math.nan)
    lines = show(plan_table(plan(*layers), width), width)
    assert lines[0] == "step 1200 · plan: budget 50.0%"
    assert row(lines, "layer") == ["layer", "shape", "state", "rank", "share", "missed", "loss", "fixed"]
    rows = [line.split() for line in lines if line.startswith("blocks.")]
    assert [r[0] for r in rows] == GPT  # whole, and in model order
    assert rows[0][1:] == ["128x512", "dense", "16", f"{16 * 641 / 128 / 512:.1%}", "0.212", "0.012"]
    assert rows[1][1:] == ["128x512", "dense", "dense", "100.0%", "0", "0"]
    short = "descending" if width == 140 else "desc"
    assert rows[2][1:] == ["128x512", short, "40", f"{40 * 641 / 128 / 512:.1%}", "nan", "0.012", "descending"]
    assert any("share: of its parameters" in line for line in lines)
    assert f"all of it at once would raise the loss by {0.012345 * (len(GPT) - 1):.2g}" in " ".join(lines)


@pytest.mark.parametrize("width", [80, 140])
def test_the_last_line_of_the_plan_sums_up(width: int) -> None:
    lines = show(plan_table(plan(planned("a", 16), planned("b", None)), width), width)
    now, whole = 16 * 641 + 65536, 2 * 65536
    assert lines[-3] == f"{now:,} of {whole:,} parameters kept: {now / whole:.1%} (budget 50.0%)"
    assert lines[-2] == f"! above the budget by {now - 65536:,}: fixed layers and least ranks take more"
    lines = show(plan_table(plan(planned("a", 16), planned("b", None), budget=0.6), width), width)
    assert lines[-2] == f"{now:,} of {whole:,} parameters kept: {now / whole:.1%} (budget 60.0%)"
    exactly = plan(planned("a", 16), budget=16 * 641 / 65536)
    assert "above" not in " ".join(show(plan_table(exactly, width), width))
    rounded = plan(planned("a", 3, shape=(5, 36)), budget=0.7)
    assert rounded.parameters == 126 > 0.7 * rounded.parameters_dense  # by 1e-14
    assert "above" not in " ".join(show(plan_table(rounded, width), width))
    just = plan(planned("a", 16), budget=16 * 641 / 65536 - 1e-6)
    assert "! above the budget by 1:" in " ".join(show(plan_table(just, width), width))


def test_a_plan_for_no_layers_keeps_no_parameters() -> None:
    lines = show(plan_table(plan(), 80), 80)
    assert lines[-2] == "0 of 0 parameters kept: 0.0% (budget 50.0%)"


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_in_a_plan_are_text(name: str, width: int) -> None:
    file = io.StringIO()
    table = plan_table(plan(planned(name, fixed=name)), width)
    Console(file=file, width=width, force_terminal=True, color_system="truecolor").print(table)
    printed = file.getvalue()
    assert printed.count(HOSTILE[name]) == (2 if name else 1)
    assert "\x1b[31m" not in printed and "\x1b]8" not in printed
    assert "\r" not in printed and "\u202e" not in printed


@pytest.mark.parametrize("width", [30, 50, 80, 99, 100, 140])
def test_rows_of_a_plan_are_single_lines_and_long_names_stay_apart(width: int) -> None:
    layers = [planned(name, 10**9, shape=(10**6, 10**6), fixed="explicit " + "x" * 80) for name in LONG]
    lines = show(plan_table(plan(*layers), width), width)
    start = next(i for i, line in enumerate(lines) if line.startswith("──")) + 1
    rows = lines[start : start + len(LONG)]
    assert all(line.startswith("m") for line in rows)
    if width >= 50:
        assert len({line.split()[0] for line in rows}) == len(LONG)
        assert all("explicit" in line for line in rows)
    if width >= 140:
        assert all("1000000x1000000" in line and "1000000000" in line for line in rows)


def test_a_plan_table_without_a_width_uses_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 140):
        monkeypatch.setattr("rich.get_console", lambda width=width: Console(file=io.StringIO(), width=width))
        whole = plan(*map(planned, GPT))
        assert show(plan_table(whole), 140) == show(plan_table(whole, width), 140)


def test_the_plan_of_a_real_optimizer_can_be_printed() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 48))
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    lines = show(plan_table(optimizer.plan(), 80), 80)
    assert row(lines, "0 ")[1:3] == ["96x64", "warm"] and row(lines, "2 ")[1:3] == ["48x96", "warm"]
    assert "(budget 50.0%)" in lines[-2]


# ---- events ------------------------------------------------------------------------------------------


EVENTS = {  # kind -> before, after, numbers, as printed
    "grow": ("factorized", "factorized", {"rank_before": 48, "rank": 56}, "held  [rank_before=48, rank=56]"),
    "shrink": ("factorized", "factorized", {"rank_before": 48, "rank": 32}, "held  [rank_before=48, rank=32]"),
    "protect": (None, None, {"rank": 42}, "held  [rank=42]"),
    "release": (None, None, {}, "held"),
    "loss_rose": (None, None, {"standard_errors": math.inf, "noise": 4.0}, "held  [standard_errors=inf, noise=4.0000]"),
    "skewed": (None, None, {"skew": 0.25}, "held  [skew=0.2500]"),
    "merge": ("factorized", "dense", {}, "factorized → dense  held"),
}


@pytest.mark.parametrize("kind", EVENTS)
def test_every_kind_of_event_has_its_line(kind: str) -> None:
    before, after, numbers, text = EVENTS[kind]
    states = {key: LayerState(s) if s else None for key, s in (("before", before), ("after", after))}
    line = event_line(Event(step=7, layer="a[/b]", kind=kind, reason="held", numbers=numbers, **states))
    assert line.plain == f"step 7  a[/b]  {kind}  {text}"
    loud = kind in ("loss_rose", "skewed")
    assert loud == any("red" in str(span.style) for span in line.spans)
    assert show(line, 140)[0] == line.plain


def test_events_that_the_log_warns_of_are_red_in_the_terminal() -> None:
    for kind in WARNINGS:
        line = event_line(Event(step=7, layer="a", kind=kind, reason="r"))
        assert any("red" in str(span.style) for span in line.spans), kind


def test_an_event_line_has_states_reason_and_numbers() -> None:
    event = Event(
        step=20,
        layer="blocks.0",
        kind="factorize",
        reason="all held",
        before=LayerState.DESCENDING,
        after=LayerState.FACTORIZED,
        numbers={"rank": 42, "error": 1e-5, "bad": math.nan},
    )
    assert event_line(event).plain == (
        "step 20  blocks.0  factorize  descending → factorized  all held  [rank=42, error=1e-5, bad=nan]"
    )
    run = Event(step=9, layer="*", kind="stalled", reason="nothing acted")
    assert event_line(run).plain == "step 9  run  stalled  nothing acted"


def test_summary_counts_sizes_and_time() -> None:
    alone = tuple(Skipped(name=f"norm{i}", shape=(8,), reason="not a matrix") for i in range(9))
    whole = summary(layer("a"), layer("b", LayerState.FACTORIZED), skipped=alone)
    lines = show(summary_renderable(whole, 140), 140)
    text = "\n".join(lines)
    assert "0 warmup · 1 dense · 0 descending · 1 factorized" in text
    now = 128 * 512 + 42 * (128 + 512 + 1)
    assert row(lines, "parameters") == ["parameters", "131,072", f"{now:,}", f"{now / 131072:.1%}"]
    assert row(lines, "  gradients") == ["gradients", "8.0", "MB", "6.0", "MB", "75.0%"]
    assert row(lines, "  monitoring") == ["monitoring", "0", "bytes", "2.0", "MB", "–"]  # the bare optimizer has none
    assert row(lines, "bytes") == ["bytes", "24.0", "MB", "20.0", "MB", "83.3%"]
    assert "analysis took 3.5% of 100.0 s: base 40.0 s (40.0%) · measure 2.00 s (2.0%)" in text
    assert "not a matrix (9): norm0, norm1, norm2, norm3 and 5 more" in text


def test_summary_says_why_layers_did_not_switch() -> None:
    unknown = Condition(name="base_supported", value=0.0, threshold=1, above=True, or_equal=True)
    odd = Decision(action=Action.HOLD, reason="base_supported: LBFGS has no moments", conditions=(unknown,))
    layers = [
        layer("a"),
        layer("b", capture_excess=0.37),
        layer("c", LayerState.FACTORIZED),
        layer("d", LayerState.DESCENDING),
        layer("e", capture_excess=0.9),
        replace(layer("odd"), decision=odd),
    ]
    lines = show(summary_renderable(summary(*layers), 80), 80)
    why = lines[lines.index("did not switch, because") :]
    assert row(why, "a ")[1:] == ["capture_safe:", "0.314,", "needs", ">", "0.4", "(off", "by", "0.086)"]
    assert row(why, "b ")[1] == "~capture_safe:"
    assert row(why, "d ")[1:] == ["still", "descending"]
    assert row(why, "e ")[1:3] == ["would", "descend:"]
    assert "LBFGS" in row(why, "odd")
    assert not any(line.startswith("c ") for line in why)


def test_summary_says_when_nothing_acted() -> None:
    def said(*rows: LayerReport, **kwargs: object) -> str:
        return " ".join(show(summary_renderable(summary(*rows, **kwargs), 140), 140))

    layers = [layer("far", capture_excess=0.1), layer("close", capture_excess=0.39)]
    layers.append(layer("x", subspace_drift=0.9))
    stalled = Event(step=5, layer="*", kind="stalled", reason="")
    late = said(*layers, events=(stalled,))
    assert "!! NOTHING ACTED in 60 analyses of 3 layers. Blocked by capture_safe (2), drift_stable (1)." in late
    assert "Nearest: close: capture_safe: 0.39, needs > 0.4 (off by 0.01)." in late
    early = said(*layers, analyses=5)
    assert "!!" not in early and "nothing acted in 5 analyses" in early
    assert "acted" not in said(*layers, layer("f", LayerState.FACTORIZED)).lower()
    assert "acted" not in said(*layers, mode="observe").lower()  # it never does


def test_console_report_prints_tables_now_and_then_and_on_rank_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def printed(every: int) -> list[str]:
        file = io.StringIO()
        report = ConsoleReport(every, Console(file=file, width=80, color_system=None))
        for n in range(1, 7):
            report.on_analysis(summary(layer("a"), analyses=n))
        report.on_event(Event(step=1, layer="a", kind="descend", reason="r"))
        report.finish(summary(layer("a")))
        return [line for line in file.getvalue().split("\n") if line.startswith("step ")]

    assert [line.split()[4] for line in printed(3)[:2]] == ["3", "6"]
    assert len(printed(3)) == 4 and len(printed(0)) == 2
    monkeypatch.setenv("RANK", "1")
    assert printed(3) == []
    monkeypatch.setenv("RANK", "0")
    assert len(printed(3)) == 4


def test_console_report_survives_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, "ascii")
    report = ConsoleReport(1, Console(file=file, width=80, color_system=None))
    report.on_analysis(summary(layer("层[/b]", subspace_drift=None)))
    report.finish(summary(layer("a")))
    file.flush()
    assert b"?[/b]" in raw.getvalue() and b"1 dense" in raw.getvalue()


@pytest.mark.parametrize(("every", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_console_report_names_the_bad_value(every: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"ConsoleReport.every .*{every}"):
        ConsoleReport(every)


def test_tables_without_a_width_use_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summary(*map(layer, GPT))
    for width in (80, 140):
        monkeypatch.setattr("rich.get_console", lambda width=width: Console(file=io.StringIO(), width=width))
        assert show(layer_table(whole), 140) == show(layer_table(whole, width), 140)


# ---- as numbers ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_are_one_flat_dict_of_the_last_analysis() -> None:
    model, optimizer = make("adamw", quick())
    assert set(optimizer.metrics()) == {"svd/parameters", "svd/factorized", "svd/overhead"}
    assert optimizer.metrics()["svd/parameters"] == 1.0
    train(model, optimizer, 130)
    values = optimizer.metrics()
    assert all(type(value) is float for value in values.values())
    dense, now = optimizer.summary().parameters()
    assert values["svd/parameters"] == now / dense < 0.6 and values["svd/factorized"] == 1.0
    for row in optimizer.why():
        for key in ("principal_excess", "tangent_capture", "rank", "measured"):
            assert values[f"svd/{row.name}/{key}"] == getattr(row.metrics, key)
        assert f"svd/{row.name}/subspace_angle" not in values  # undefined inside factors
    assert not any(key.endswith("/step") for key in values)


def test_history_is_each_metric_over_the_analyses() -> None:
    model, optimizer = make("muon", quick())
    assert all(len(values) == 0 for values in optimizer.history("up").values())
    train(model, optimizer, 100)
    history = optimizer.history("up")
    records = optimizer.layers["up"].history
    assert history["step"].tolist() == [m.step for m in records] == list(range(10, 101, 10))
    for name, values in history.items():
        assert values.dtype == torch.float64 and values.shape == (len(records),)
        for value, record in zip(values.tolist(), records, strict=True):
            known = getattr(record, name)
            assert math.isnan(value) if known is None else value == known
    with pytest.raises(KeyError, match="no tracked layer is called 'down'; tracked: up, mid"):
        optimizer.history("down")


def test_records_show_themselves_in_a_terminal_and_in_a_notebook() -> None:
    end = summary(*map(layer, GPT), layer("x[/y]<b>&\x1b[2J"))
    assert show(end, 140) == show(summary_renderable(end, 140), 140)
    page = end._repr_html_()
    assert "blocks.3.mlp.c_fc" in page and "x[/y]&lt;b&gt;&amp;[2J" in page and "\x1b" not in page
    plan = Plan(step=1, budget=0.5, layers=())
    assert show(plan, 120) == show(plan_table(plan, 120), 120)
    with pytest.raises(TypeError, match="int"):
        renderable(3, 80)
