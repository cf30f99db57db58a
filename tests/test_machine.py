"""The state machine of a layer: every cell of its table, cooldowns and windows; in a run, in a replay, in the docs."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import PARALLEL, Net, Parallel, factorized, loss_of, make, quick, train
from hypothesis import given
from hypothesis import strategies as st
from torch import linalg, nn, optim, zeros

import svd_optim
from svd_optim import (
    Listener,
    RunLog,
    SubspaceAwareOptimizer,
    SubspaceConfig,
    Thresholds,
    load_checkpoint,
    save_checkpoint,
)
from svd_optim.console import read_log
from svd_optim.console.replay import _Replayer, replay
from svd_optim.decisions import LayerStatus, Protection, Trigger
from svd_optim.decisions.lifecycle import EVENTS, WARNINGS
from svd_optim.decisions.machine import LayerLife, transition_table
from svd_optim.records import Action, Decision, Event, LayerMetrics, LayerState
from svd_optim.tracking.layer import TrackedLayer

WARMUP, DENSE, DESCENDING, FACTORIZED = LayerState
STATES = tuple(LayerState)

# What follows from what, written from the description of a layer's life and not from the code.
# Per state WARMUP, DENSE, DESCENDING, FACTORIZED: the next state ("=": the same one, "-": impossible), then
#   new      a new decision window: what was known of the layer says nothing any more
#   flat     left as it is for the cooldown
#   doubled  the same, twice as long for each revert before, and this is one more
#   uncount  the same, but this is none
BY_HAND: dict[Trigger, tuple[str, str, str, str]] = {
    Trigger.WARMUP_OVER: ("dense", "-", "-", "-"),
    Trigger.DESCEND: ("-", "descending", "-", "-"),
    Trigger.FACTORIZE: ("-", "factorized new", "factorized new", "-"),  # never in warmup, whatever a policy says
    Trigger.DESCENT_EXACT: ("-", "-", "factorized new", "-"),
    Trigger.DESCENT_EXTENDED: ("-", "-", "=", "-"),
    Trigger.DESCENT_FAILED: ("-", "-", "dense new doubled", "-"),
    Trigger.UNSUPPORTED: ("-", "-", "dense new", "-"),
    Trigger.PROTECT: ("=", "=", "dense new", "="),  # the layer did nothing wrong: no cooldown
    Trigger.RELEASE: ("=", "=", "=", "="),
    Trigger.LOSS_ROSE: ("-", "-", "dense new doubled", "dense new doubled"),
    Trigger.SKEWED: ("-", "-", "-", "dense new doubled"),
    Trigger.NONFINITE: ("-", "-", "-", "dense new doubled"),
    Trigger.MERGE: ("-", "-", "-", "dense new doubled"),
    Trigger.GROW: ("-", "-", "-", "= new flat"),
    Trigger.SHRINK: ("-", "-", "-", "= new flat"),
    Trigger.IDLE: ("=", "=", "=", "="),
    Trigger.FACTORIZE_MANUALLY: ("factorized new", "factorized new", "factorized new", "="),
    Trigger.MERGE_MANUALLY: ("=", "=", "dense new", "dense new uncount"),  # on a dense layer it does nothing
    Trigger.LOAD_FACTORIZED: ("factorized new", "factorized new", "factorized new", "="),
    Trigger.LOAD_DENSE: ("=", "=", "=", "dense new"),
}
CELLS = [(trigger, state) for trigger in BY_HAND for state in STATES]


def cell(trigger: Trigger, state: LayerState) -> tuple[LayerState, frozenset[str]] | None:
    """The next state and what goes with it; ``None``: impossible."""
    following, *also = BY_HAND[trigger][STATES.index(state)].split()
    if following == "-":
        return None
    return state if following == "=" else LayerState(following), frozenset(also)


def analyses(*steps: int, rank: int = 7) -> list[LayerMetrics]:
    return [LayerMetrics(step=step, rank=rank, measured=1) for step in steps]


def a_life(state: LayerState) -> LayerLife:
    """A layer in the middle of its life: nothing in its status is what it begins with."""
    status = LayerStatus(
        state=state, rank=7, window_start=10, descent_end=90, extensions=2, waited=4, cooldown_until=35, reverts=2,
        in_danger=True, protection=Protection.MANUAL,
    )  # fmt: skip
    return LayerLife("blocks.3.mlp", (48, 64), Thresholds(), status, analyses(10, 20, 30))


# ---- the cells ---------------------------------------------------------------------------------------


def test_the_expected_table_has_every_trigger_and_every_state() -> None:
    assert list(BY_HAND) == list(Trigger)
    assert all(len(row) == len(STATES) == 4 for row in BY_HAND.values())
    assert len({trigger for trigger in Trigger if "-" not in BY_HAND[trigger]}) == 7  # can happen at any time


@pytest.mark.parametrize(("trigger", "state"), [c for c in CELLS if cell(*c)], ids=lambda x: x.name.lower())
def test_a_possible_event_leads_where_the_table_says(trigger: Trigger, state: LayerState) -> None:
    layer = a_life(state)
    expected = replace(layer.status)
    expected.state, also = cell(trigger, state)
    if "new" in also:
        expected.window_start, expected.descent_end, expected.extensions, expected.waited = 30, None, 0, 0
    if "flat" in also:
        expected.cooldown_until = 40 + 50
    if "doubled" in also or "uncount" in also:
        expected.cooldown_until = 40 + 4 * 50  # two reverts before
    if "doubled" in also:
        expected.reverts = 3
    assert layer.can(trigger)
    assert layer.fire(trigger, step=40, cooldown_steps=50) == state
    assert layer.status == expected
    assert [m.step for m in layer.window] == ([] if "new" in also else [20, 30])


@pytest.mark.parametrize(("trigger", "state"), [c for c in CELLS if not cell(*c)], ids=lambda x: x.name.lower())
def test_an_impossible_event_says_so_and_changes_nothing(trigger: Trigger, state: LayerState) -> None:
    layer, same = a_life(state), a_life(state)
    assert not layer.can(trigger)
    with pytest.raises(RuntimeError) as error:
        layer.fire(trigger, step=40, cooldown_steps=50)
    assert layer == same
    assert "blocks.3.mlp" in str(error.value) and state in str(error.value) and trigger in str(error.value)


def test_every_state_can_be_reached_and_left() -> None:
    ways = {(a, cell(t, a)[0]) for t, a in CELLS if cell(t, a)}
    assert {b for a, b in ways if a != b} == set(STATES) - {WARMUP}  # where a layer begins, and never comes back to
    assert {a for a, b in ways if a != b} == set(STATES)


def test_the_table_in_markdown_shows_the_next_states_and_cooldowns_of_the_expected_one() -> None:
    head, rule, *rows = (line.strip("|").split("|") for line in transition_table().splitlines())
    assert [text.strip() for text in head[1:-1]] == [state.upper() for state in STATES]
    assert {text.strip() for text in rule} == {"---"}
    words = {"flat": "flat", "doubled": "back-off", "uncount": "back-off, not counted"}
    for trigger, row in zip(Trigger, rows, strict=True):
        name, *cells, cooldown = (text.strip() for text in row)
        assert name == trigger
        signs = [text.split()[0] for text in BY_HAND[trigger]]
        assert cells == [{"-": "–", "=": "same"}.get(sign, sign.upper()) for sign in signs]
        told = {words[word] for text in BY_HAND[trigger] for word in text.split() if word in words}
        assert set(re.sub(r" \([A-Z]+\)", "", cooldown).split("; ")) == (told or {"none"})


# ---- cooldowns and windows, over whole lives ---------------------------------------------------------

# (which of what can happen, steps until then, analyses before it)
LIVES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 900), st.integers(0, 3)), max_size=30)


def steps_of(life: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, list[LayerMetrics]]]:
    """Choices, and when they are made; the analyses since the one before."""
    step = 0
    for choice, gap, count in life:
        known = analyses(*range(step + 1, step + 1 + count))
        step += gap + count
        yield choice, step, known


def choose(state: LayerState, choice: int) -> Trigger:
    """One of what can happen in a state."""
    possible = [trigger for trigger in Trigger if cell(trigger, state)]
    return possible[choice % len(possible)]


@given(LIVES, st.integers(0, 500))
def test_each_revert_doubles_the_next_cooldown_and_nothing_else_does(
    life: list[tuple[int, int, int]], cooldown: int
) -> None:
    layer = LayerLife("a", (48, 64), Thresholds(), LayerStatus(state=FACTORIZED))
    factor, until = 1, 0
    for choice, step, _ in steps_of(life):
        trigger = choose(layer.state, choice)
        _, also = cell(trigger, layer.state)
        layer.fire(trigger, step, cooldown)
        if "flat" in also:
            until = step + cooldown
        if "doubled" in also or "uncount" in also:
            until = step + cooldown * factor
        if "doubled" in also:
            factor *= 2
        assert (layer.status.cooldown_until, 2**layer.status.reverts) == (until, factor)
        assert layer.info(step).cooldown == max(0, until - step)
        assert layer.info(until).cooldown == 0
        assert layer.info(until - 1).cooldown == min(1, until) or until == 0


@given(LIVES)
def test_windows_start_anew_exactly_where_the_table_says(life: list[tuple[int, int, int]]) -> None:
    layer = LayerLife("a", (48, 64), Thresholds(), LayerStatus(rank=7))
    window: list[LayerMetrics] = []
    for choice, step, known in steps_of(life):
        layer.history += known
        window += known
        trigger = choose(layer.state, choice)
        _, also = cell(trigger, layer.state)
        layer.fire(trigger, step, 10)
        if "new" in also:
            window = []
            assert layer.status.descent_end is None and layer.status.extensions == layer.status.waited == 0
        assert list(layer.window) == window
        layer.status.descent_end, layer.status.extensions, layer.status.waited = step + 40, 1, 3  # as in a descent


def test_the_exponential_back_off_has_these_numbers() -> None:
    layer = LayerLife("a", (48, 64), Thresholds(), LayerStatus(state=FACTORIZED))
    told = []
    for trigger in (Trigger.MERGE, Trigger.LOSS_ROSE, Trigger.MERGE_MANUALLY, Trigger.SKEWED, Trigger.NONFINITE):
        layer.fire(trigger, 1000, 500)
        told.append(layer.status.cooldown_until - 1000)
        layer.fire(Trigger.FACTORIZE_MANUALLY, 2000, 500)
        layer.fire(Trigger.GROW, 3000, 500)
        assert layer.status.cooldown_until == 3500
    assert told == [500, 1000, 2000, 2000, 4000]  # what is done manually waits as long, and counts as nothing


# ---- the same machine in a run, and in its replay ----------------------------------------------------


@given(LIVES)
def test_a_tracked_layer_and_a_bare_life_go_the_same_way(life: list[tuple[int, int, int]]) -> None:
    module = nn.Linear(64, 48)
    live = TrackedLayer(name="a", shape=(48, 64), thresholds=Thresholds(), module=module, index=0)
    bare = LayerLife("a", (48, 64), Thresholds())
    for choice, step, known in steps_of(life):
        trigger = choose(bare.state, choice)
        live.guarded_since, live.pending = step, zeros(8)
        before = bare.state
        for layer in (live, bare):
            layer.history += known
            assert layer.fire(trigger, step, 50) == before
        assert live.status == bare.status
        assert (live.window, live.factorized, live.info(step)) == (bare.window, bare.factorized, bare.info(step))
        # What only a layer with tensors has: nothing measured outlives its window, and a dense layer is to blame for
        # nothing.
        assert (live.pending is None) == ("new" in cell(trigger, before)[1])
        assert (live.guarded_since is None) == (before != DENSE and live.state == DENSE)


class Taught:
    """Layers of known ranks, one of which learns something else half-way: they descend, go in and come back."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.path = path
        self.fired: list[tuple[str, Trigger, int, int]] = []  # layer, trigger, step and cooldown_steps
        self.model = Parallel(0, low=3, middle=8, high=40)
        settings = {"warmup_steps": 20, "analyze_every": 5, "descent_steps": 40, "cohort_steps": 20, "patience": 2,
                    "cooldown_steps": 40}  # fmt: skip
        self.optimizer = SubspaceAwareOptimizer(
            PARALLEL["adamw"](self.model), self.model, SubspaceConfig(**(settings | config)), listeners=[RunLog(path)]
        )
        fire = TrackedLayer.fire

        def spy(layer: TrackedLayer, trigger: Trigger, step: int = 0, cooldown_steps: int = 0) -> LayerState:
            self.fired.append((layer.name, trigger, step, cooldown_steps))
            return fire(layer, trigger, step, cooldown_steps)

        monkeypatch.setattr(TrackedLayer, "fire", spy)
        self.train(0, 90)
        self.optimizer.protect_("high", rank=4)
        self.train(90, 100)
        self.model.teach("low", 48, 7)
        self.train(100, 140)
        self.optimizer.release_("high")
        self.optimizer.merge_("middle")
        self.train(140, 200)
        monkeypatch.undo()

    def train(self, start: int, end: int) -> None:
        self.model.train_on(self.optimizer, range(start, end))


HELD_BACK = Thresholds(capture_safe=0.6, capture_held=0.6, capture_lost=0.3)
RUNS: dict[str, tuple[dict[str, Any], set[Trigger]]] = {  # configurations, and some of what happens with them
    "defaults": ({}, {Trigger.DESCENT_EXACT, Trigger.MERGE, Trigger.MERGE_MANUALLY}),
    "held back": ({"thresholds": HELD_BACK, "budget": 0.7}, {Trigger.DESCENT_EXACT, Trigger.MERGE}),
    "never exact": (
        {"thresholds": Thresholds(reconstruction_safe=0.0)},
        {Trigger.DESCENT_EXTENDED, Trigger.DESCENT_FAILED},
    ),
    "protect": ({"on_danger": "protect", "thresholds": Thresholds(principal_danger=0.25)}, {Trigger.RELEASE}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_replay_of_a_run_ends_in_the_same_status(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, triggers = RUNS[name]
    run = Taught(tmp_path / "log", monkeypatch, **config)
    assert {trigger for _, trigger, _, _ in run.fired} >= triggers | {Trigger.DESCEND, Trigger.PROTECT}
    bare = {name: LayerLife(name, (48, 56), Thresholds()) for name in run.optimizer.layers}
    for layer, trigger, step, cooldown in run.fired:
        bare[layer].fire(trigger, step, cooldown)
    log = read_log(run.path)
    replayer = _Replayer(log, log.config)
    replayer.run_through()
    assert tuple(replay(log).events) == tuple(run.optimizer.events)
    for name, layer in run.optimizer.layers.items():
        again = replayer.layers[name]
        assert again.window == layer.window
        assert replace(again.status, window_start=0) == replace(layer.status, window_start=0)
        # What the triggers alone decide needs neither tensors nor a log.
        assert (bare[name].state, bare[name].status.reverts) == (layer.state, layer.status.reverts)
        assert bare[name].status.cooldown_until == layer.status.cooldown_until


class Impatient:
    """A policy of a user's who does not wait for the end of the warmup."""

    def __init__(self) -> None:
        self.asked_in_warmup = 0

    def decide(self, layer: Any, state: LayerState, history: Any, thresholds: Thresholds) -> Decision:
        self.asked_in_warmup += state == WARMUP
        return Decision(action=Action.FACTORIZE, reason="now")


def test_no_policy_acts_in_warmup() -> None:
    policy = Impatient()
    model, optimizer = make("adamw", quick(policy=policy, warmup_steps=100))
    for step in range(99):
        train(model, optimizer, [step])
        assert not factorized(model) and not optimizer.events
    assert policy.asked_in_warmup == 9 * 2  # it was asked, and said so each time
    train(model, optimizer, [99])
    assert factorized(model) == ["up", "mid"]
    assert [(e.step, e.kind, e.before, e.after) for e in optimizer.events] == [
        (100, "factorize", DENSE, FACTORIZED)
    ] * 2


def test_no_policy_acts_in_warmup_of_a_replay(tmp_path: Path) -> None:
    model, optimizer = make("adamw", quick(warmup_steps=100, mode="observe"))
    optimizer.add_listener(RunLog(tmp_path / "log"))
    train(model, optimizer, 120)
    run, policy = read_log(tmp_path / "log"), Impatient()
    events = replay(run, replace(run.config, mode="auto", policy=policy)).events
    assert policy.asked_in_warmup == 9 * 2
    moved = [(e.step, e.layer, e.before, e.after) for e in events if e.kind == "factorize"]
    assert moved == [(100, "up", DENSE, FACTORIZED), (100, "mid", DENSE, FACTORIZED)]


def test_protecting_what_is_protected_is_repeated_by_the_replay(tmp_path: Path) -> None:
    model, optimizer = make("adamw", quick(on_danger="protect", thresholds=Thresholds(principal_danger=0.05)))
    optimizer.add_listener(RunLog(tmp_path / "log"))
    train(model, optimizer, 45)
    assert {layer.status.protection for layer in optimizer.layers.values()} == {Protection.DANGER}
    optimizer.protect_("mid", rank=4)
    train(model, optimizer, range(45, 65))
    optimizer.protect_("mid", rank=6)
    train(model, optimizer, range(65, 80))
    ranks = [e.numbers["rank"] for e in optimizer.events if (e.layer, e.kind, e.reason) == ("mid", "protect", "manual")]
    assert ranks == [4, 6]
    assert replay(read_log(tmp_path / "log")).events == tuple(optimizer.events)


class Saving(Listener):
    """Saves the run whenever something has happened, and loads it into another one."""

    def __init__(self, folder: Path, model: Net, optimizer: SubspaceAwareOptimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.seen: set[str] = set()

    def on_event(self, event: Event) -> None:
        save_checkpoint(self.folder, self.model, self.optimizer)
        model, optimizer = make("adamw", self.optimizer.config, seed=1)
        load_checkpoint(self.folder, model, optimizer)
        for name, layer in optimizer.layers.items():
            assert layer.status == self.optimizer.layers[name].status
            assert layer.protected == (layer.anchor is not None)
        if event.after is not None:
            assert optimizer.layers[event.layer].state == event.after
        self.seen.add(event.kind)


def test_an_event_is_told_when_all_of_the_status_fits_it(tmp_path: Path) -> None:
    model, optimizer = make("adamw", quick())
    saving = Saving(tmp_path, model, optimizer)
    optimizer.add_listener(saving)
    train(model, optimizer, 45)
    assert optimizer.layers["up"].state == optimizer.layers["mid"].state == DESCENDING
    optimizer.protect_("up")
    train(model, optimizer, range(45, 65))
    optimizer.merge_("mid")
    optimizer.release_("up")
    assert saving.seen >= {"descend", "descent_stopped", "protect", "factorize", "merge", "release"}


# ---- what is written about it ------------------------------------------------------------------------

ROOT = Path(svd_optim.__file__).parent
GUIDE = ROOT.parent / "CONTRIBUTING.md"


def test_the_guide_shows_the_table_of_the_code() -> None:
    shown = GUIDE.read_text(encoding="utf-8").split("<!-- transitions -->\n")[1].split("<!-- /transitions -->")[0]
    assert shown == transition_table()


def test_the_guide_can_be_read_at_a_sitting() -> None:
    assert len(GUIDE.read_bytes()) <= 14_000


def test_the_guide_has_a_line_for_every_file() -> None:
    row = re.compile(r"^\| (?:\*\*(\w+/)\*\*|`(/?)(\w+\.py)`) \| .+ \|$", re.MULTILINE)  # a folder, or a file in it
    folder, rows = "", []
    for opened, root, name in row.findall(GUIDE.read_text(encoding="utf-8")):
        folder = opened or ("" if root else folder)
        rows += [folder + name] if name else []
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    assert sorted(rows) == sorted(file for file in files if not file.endswith("/__init__.py"))


def names_in(file: Path) -> set[str]:
    """Functions, classes, their methods and fields, and what is assigned in a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part}" for body in getattr(node, "body", []) for part in defined(body)}
        names |= set(defined(node))
    return names


def defined(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_where_the_guide_points_there_is_something() -> None:
    pointers = re.findall(r"`([\w/]+\.py): ([\w., ]+)`", GUIDE.read_text(encoding="utf-8"))
    assert len(pointers) >= 30
    for file, names in pointers:
        path = next(base / file for base in (ROOT, ROOT.parent) if (base / file).exists())
        assert set(names.split(", ")) <= names_in(path), file


def constants(node: ast.AST, function: ast.AST) -> set[str]:
    """The strings that an expression can be, in a function: conditional ones and local variables included."""
    match node:
        case ast.Constant(value=str(value)):
            return {value}
        case ast.IfExp():
            return constants(node.body, function) | constants(node.orelse, function)
        case ast.Name():
            found = set()
            for assigned in (n for n in ast.walk(function) if isinstance(n, ast.Assign)):
                for target in assigned.targets:
                    if isinstance(target, ast.Tuple) and isinstance(assigned.value, ast.IfExp):
                        at = [i for i, t in enumerate(target.elts) if isinstance(t, ast.Name) and t.id == node.id]
                        values = [assigned.value.body, assigned.value.orelse]
                        pairs = itertools.product(at, (v for v in values if isinstance(v, ast.Tuple)))
                        found |= {text for i, v in pairs for text in constants(v.elts[i], function)}
            return found
    return set()  # a parameter, or a field: whoever gave it stands in the list, too


KIND_AT = {"note": 2, "_fire": 3, "Trip": 1}  # where in a call the kind of an event stands


def kinds_in_the_source() -> set[str]:
    kinds: set[str] = set()
    for path in (*(ROOT / "decisions").glob("*.py"), *(ROOT / "tracking").glob("*.py"), ROOT / "optimizer.py"):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                if name in KIND_AT and len(call.args) > KIND_AT[name]:
                    kinds |= constants(call.args[KIND_AT[name]], function)
    return kinds


def test_the_kinds_of_events_that_the_source_emits_are_those_that_are_documented() -> None:
    assert kinds_in_the_source() == set(EVENTS)
    assert set(EVENTS) > WARNINGS


class Script:
    """A policy that says what stands in its script, from the given steps on."""

    def __init__(self, script: dict[int, Decision]) -> None:
        self.script = script

    def decide(self, layer: Any, state: LayerState, history: Any, thresholds: Thresholds) -> Decision:
        return self.script[max(step for step in self.script if step <= history[-1].step)]


def decided(action: Action, **facts: Any) -> Decision:
    return Decision(action=action, reason="by the script", **facts)


def a_script() -> SubspaceAwareOptimizer:
    hold = Action.HOLD
    script = {0: decided(hold, danger=True), 40: decided(hold), 60: decided(Action.FACTORIZE),
              80: decided(Action.SHRINK, rank=4), 100: decided(Action.GROW, rank=6),
              120: decided(Action.MERGE)}  # fmt: skip
    model, optimizer = make("sgd", quick(budget=0.5, policy=Script(script)))
    train(model, optimizer, 120)
    return optimizer


def done_manually() -> SubspaceAwareOptimizer:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 45)
    optimizer.protect_("mid")
    optimizer.release_("mid")
    train(model, optimizer, range(45, 62))
    return optimizer


def never_exact() -> SubspaceAwareOptimizer:
    model, optimizer = make("adamw", quick(thresholds=Thresholds(drift_stable=0.9, reconstruction_safe=0.0)))
    train(model, optimizer, 130)
    return optimizer


def a_layer_that_is_frozen_for_a_while() -> SubspaceAwareOptimizer:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 43)
    model.mid.weight.requires_grad_(False).grad = None
    train(model, optimizer, range(43, 55))
    model.mid.weight.requires_grad_(True)
    train(model, optimizer, range(55, 82))
    return optimizer


def a_loss_that_rises() -> SubspaceAwareOptimizer:
    model, optimizer = make("adamw", quick())
    for step in range(70):
        train(model, optimizer, [step])
        optimizer.observe_loss(1.0 + 0.01 * (step % 3) + (step >= 40))
    return optimizer


def factors_that_somebody_edits() -> SubspaceAwareOptimizer:
    model = Net()
    groups = [{"params": model.up.parameters(), "lr": 0.0}, {"params": model.mid.parameters()}]
    optimizer = SubspaceAwareOptimizer(
        optim.SGD(groups, lr=0.1), model, quick(policy=Script({0: decided(Action.HOLD)}))
    )
    optimizer.factorize_("up", rank=6)
    train(model, optimizer, 12)
    model.up.V.data[:, 0] *= 1.2  # in a layer that takes no step, which would mend it
    train(model, optimizer, range(12, 20))
    return optimizer


def gradients_that_nobody_can_use() -> SubspaceAwareOptimizer:
    model = Net()
    optimizer = SubspaceAwareOptimizer(optim.SGD(model.parameters(), lr=0.1), model, quick())
    train(model, optimizer, 4)
    optimizer.zero_grad()
    loss_of(model, 4).backward()
    model.up.weight.grad[0, 0] = float("nan")
    model.mid.weight.grad = model.mid.weight.grad.to_sparse()
    optimizer.step()
    model.up.weight.data.nan_to_num_()
    train(model, optimizer, range(5, 10))
    return optimizer


def decompositions_that_fail() -> SubspaceAwareOptimizer:
    model, optimizer = make("adamw", quick(mode="observe"))
    train(model, optimizer, 10)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("svd", "eigh", "qr"):
            patch.setattr(linalg, name, failing)
        train(model, optimizer, range(10, 40))
    return optimizer


def failing(*_: Any, **__: Any) -> Any:
    raise linalg.LinAlgError("did not converge")


def stuck() -> SubspaceAwareOptimizer:
    model, optimizer = make("sgd", quick(stall_analyses=2, thresholds=Thresholds(drift_stable=0.0)))
    train(model, optimizer, 40)
    return optimizer


def expensive() -> SubspaceAwareOptimizer:
    model, optimizer = make("sgd", quick(max_overhead=1e-9))
    train(model, optimizer, 40)
    return optimizer


EMITTED: dict[Callable[[], SubspaceAwareOptimizer], set[str]] = {  # a run, and what has to happen in it
    a_script: {"danger", "danger_over", "factorize", "shrink", "grow", "merge"},
    done_manually: {"descend", "descent_stopped", "protect", "release", "factorize"},
    never_exact: {"descend", "descent_extended", "descent_failed"},
    a_layer_that_is_frozen_for_a_while: {"descend", "descent_waits", "descent_resumed", "factorize"},
    a_loss_that_rises: {"descend", "loss_rose"},
    factors_that_somebody_edits: {"factorize", "skewed", "merge"},
    gradients_that_nobody_can_use: {"nonfinite", "unsupported"},
    decompositions_that_fail: {"decomposition_failed"},
    stuck: {"stalled"},
    expensive: {"interval"},
}


@pytest.mark.slow
@pytest.mark.parametrize("run", EMITTED, ids=lambda run: run.__name__)
def test_runs_emit_the_kinds_of_events_that_are_documented(run: Callable[[], SubspaceAwareOptimizer]) -> None:
    assert EMITTED[run] <= {event.kind for event in run().events} <= set(EVENTS)


def test_each_documented_kind_of_event_is_emitted_by_one_of_these_runs() -> None:
    assert set().union(*EMITTED.values()) == set(EVENTS)
