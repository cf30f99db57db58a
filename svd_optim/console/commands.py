"""The command line, to inspect runs in progress or finished, and model files: ``python -m svd_optim --help``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import DEFAULT_BUDGET, SubspaceConfig, Thresholds
from ..decisions.alerts import AlertWatch
from ..records import Event, LayerReport, Summary, clean
from .live import LiveView
from .log_reader import Run, read_log
from .replay import Replay, differences, replay
from .report import event_line, summary_renderable, why_table
from .run_log import plain
from .tables import Strip, layer_table, name_table

EXAMPLES = """examples:
  python -m svd_optim report runs/log.jsonl                   the tables and the summary at its end
  python -m svd_optim watch runs/log.jsonl                    follow a run in progress
  python -m svd_optim events runs/log.jsonl --kind factorize
  python -m svd_optim why runs/log.jsonl "blocks.3.*"         each layer's conditions and events
  python -m svd_optim plot runs/log.jsonl -o run.svg
  python -m svd_optim replay runs/log.jsonl --thresholds capture_safe=0.1 --set patience=5
  python -m svd_optim inspect model.safetensors --budget 0.25

A log is what RunLog writes: optimizer.add_listener(RunLog("runs/log.jsonl"))."""
WATCH_SECONDS = 0.5  # between two reads of a log that is being written
DECIDES = ("mode", "rule", "warmup_steps", "patience", "descent_steps", "total_steps", "cohort_steps",
           "cooldown_steps", "on_danger", "stall_analyses")  # fmt: skip


class Problem(Exception):
    """An error that the user can fix; the message says how."""


def open_log(path: Path) -> Run:
    """The run of a log with at least one complete analysis.

    Raises:
        Problem: it can't be read, or has none.
    """
    try:
        run = read_log(path)
    except OSError as error:
        raise Problem(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise Problem(str(error)) from error
    if not len(run):
        about = f"; {damage(run)}" if run.damaged_lines else ""
        when = f"the first comes after {run.config.analyze_every} steps"
        raise Problem(f"{path} holds no complete analysis yet: {when}{about}")
    if run.damaged_lines:
        complain(f"{path}: {damage(run)}")
    return run


def damage(run: Run) -> str:
    """What of a log could not be read."""
    lines = "a line" if run.damaged_lines == 1 else f"{run.damaged_lines} lines"
    return f"skipped {lines} that can't be read ({run.damage})"


def complain(text: str) -> None:
    """One line, beside the output."""
    Console(stderr=True).print(Text(clean(text)), soft_wrap=True)


def matching(summary: Summary, pattern: str | None) -> list[LayerReport]:
    """The layers that match a name or glob; all without one."""
    found = [x for x in summary.layers if pattern is None or x.name == pattern or fnmatchcase(x.name, pattern)]
    if not found:
        names = ", ".join([layer.name for layer in summary.layers][:5])
        raise Problem(f"no layer matches {pattern!r}; there are {len(summary.layers)}: {names}, ...")
    return found


def as_json(console: Console, value: Any) -> None:
    """Print machine-readable output: no NaN, no styles, no wrapping."""
    console.file.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def as_dict(layer: LayerReport) -> dict[str, Any]:
    """A layer for machine-readable output."""
    blocking = {key: getattr(layer, key) for key in ("condition", "value", "threshold", "distance", "reason")}
    return {**asdict(layer), "blocked_by": blocking}


# ---- the commands ------------------------------------------------------------------------------------


def report(args: argparse.Namespace, console: Console) -> None:
    """The tables as at the end of a run."""
    run = open_log(args.log)
    summary = run.summary()
    if args.json:
        as_json(console, {**asdict(summary), "layers": [as_dict(layer) for layer in summary.layers],
                          "parameters": summary.parameters(), "damaged_lines": run.damaged_lines})  # fmt: skip
        return
    optimizer, ours, torch, when = (run.head.get(key, "?") for key in ("optimizer", "svd_optim", "torch", "time"))
    console.print(Text(clean(f"{optimizer}, svd_optim {ours}, torch {torch}, {when}")))
    console.print(layer_table(summary, console.width))
    console.print(summary_renderable(summary, console.width))


def events(args: argparse.Namespace, console: Console) -> None:
    """The events, oldest first."""
    run = open_log(args.log)
    kinds = {event.kind for event in run.events}
    unknown = set(args.kind or ()) - kinds
    if unknown:
        raise Problem(f"no event of kind {', '.join(sorted(unknown))}; there are: {', '.join(sorted(kinds)) or 'none'}")
    wanted = [event for event in run.events if not args.kind or event.kind in args.kind]
    if args.layer is not None:
        wanted = [event for event in wanted if fnmatchcase(event.layer, args.layer)]
    if args.json:
        as_json(console, [event.as_plain() for event in wanted])
        return
    for event in wanted:
        console.print(event_line(event))
    if not wanted:
        console.print("no events")


def why(args: argparse.Namespace, console: Console) -> None:
    """Why each layer is in its state: all conditions, and its events."""
    run = open_log(args.log)
    layers = matching(run.summary(), args.layer)
    if args.json:
        as_json(console, [as_dict(layer) for layer in layers])
        return
    for layer in layers:
        console.print(why_table(layer))
        for event in run.events:
            if event.layer == layer.name:
                console.print(Text("  ").append(event_line(event)))
        console.print()


def watch(args: argparse.Namespace, console: Console) -> None:
    """Follow a log that is being written, until interrupted."""
    run, watching, last_step = Run(), AlertWatch(), -1
    head = run.head
    if not args.log.exists():
        console.print(Text(f"waiting for {args.log}"))
    with LiveView(console) as view:
        for lines in appended(args.log):
            try:
                for line in lines:
                    run.feed(line)
            except ValueError as error:
                raise Problem(str(error)) from error
            if run.head is not head:  # a resumed run voids what came after its checkpoint
                head = run.head
                last_step = min(last_step, head["step"] - 1)
            new = [index for index, analysis in enumerate(run.analyses) if analysis["step"] > last_step]
            for index in new:
                summary = run.summary(index)
                alerts = watching.update(summary)
                for event in run.events:
                    if last_step < event.step <= summary.step:
                        view.on_event(event)
                last_step = summary.step
                if index < new[-1]:
                    view.state.update(summary)  # outdated already: needed only for trends
                    continue
                if alerts:
                    view.on_alerts(alerts)
                view.on_analysis(summary)


def plot(args: argparse.Namespace, console: Console) -> None:
    """Plot the run."""
    from .plots import plot_run

    run = open_log(args.log)
    try:
        plot_run(run, args.output)
    except (ImportError, ValueError, OSError) as error:
        raise Problem(str(error)) from error
    console.print(Text(f"drawn: {args.output}"))


def replayed(args: argparse.Namespace, console: Console) -> None:
    """What would have happened under another configuration."""
    run = open_log(args.log)
    try:
        config = changed(run.config, args.thresholds or (), args.set or ())
        result = replay(run, config)
    except (ValueError, TypeError) as error:
        raise Problem(str(error)) from error
    missing, new = differences(run.events, result.events)
    if args.json:
        as_json(console, {
            "config": {key: getattr(config, key) for key in DECIDES} | {"thresholds": asdict(config.thresholds)},
            "events": [event.as_plain() for event in result.events],
            "not_in_replay": [event.as_plain() for event in missing],
            "only_in_replay": [event.as_plain() for event in new],
            "diverged": dict(result.diverged),
        })  # fmt: skip
        return
    console.print(replay_table(run, result, console.width))
    if not missing and not new:
        console.print(f"the replay gives all {len(run.events)} events of the run, and no other")
    else:
        console.print(f"{len(missing)} events of the run do not happen, {len(new)} others do")
    if config.mode == "observe":
        console.print("the run was observed only: --set mode=auto shows what would have acted")


def inspect(args: argparse.Namespace, console: Console) -> None:
    """The spectra of the matrices in a model file."""
    from .spectra import inspect_file, inspection_table

    try:
        found = inspect_file(args.file, args.budget)
    except OSError as error:
        raise Problem(f"can't read {args.file}: {error.strerror or error}") from error
    except ValueError as error:
        raise Problem(str(error)) from error
    if args.json:
        as_json(console, asdict(found))
        return
    console.print(inspection_table(found, console.width))


def appended(path: Path) -> Iterator[list[str]]:
    """Complete lines of a growing file, forever; the file may not exist yet."""
    partial_line = ""
    while not path.exists():
        time.sleep(WATCH_SECONDS)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            text = partial_line + file.read()
            *lines, partial_line = text.split("\n")
            yield lines
            time.sleep(WATCH_SECONDS)


# ---- helpers of the commands -------------------------------------------------------------------------


def changed(config: SubspaceConfig, thresholds: Iterable[str], settings: Iterable[str]) -> SubspaceConfig:
    """A run's configuration with some thresholds and settings replaced, given as ``name=value``.

    Thresholds apply to all layers; ``phase1`` and ``phase1_proposed`` are presets.

    Raises:
        Problem: an unknown name, or a threshold that is no number or out of range.
    """
    presets = {"phase1": Thresholds.phase1, "phase1_proposed": Thresholds.phase1_proposed}
    values: dict[str, Any] = {}
    given = list(thresholds)
    if given:
        base = config.thresholds
        for word in given:
            if word in presets:
                base = presets[word]()
                continue
            name, value = assignment(word, [field.name for field in fields(Thresholds)])
            try:
                base = replace(base, **{name: float(value)})
            except ValueError as error:
                raise Problem(f"{word}: {error}") from error
        values = {
            "thresholds": base,
            "overrides": {k: replace(v, thresholds=None) for k, v in config.overrides.items()},
        }
    for word in settings:
        name, value = assignment(word, DECIDES)
        values[name] = int(value) if value.lstrip("-").isdigit() else value
    return replace(config, **values)


def assignment(word: str, names: Sequence[str]) -> tuple[str, str]:
    """``name=value``, split; ``name`` must be one of ``names``."""
    name, sign, value = word.partition("=")
    if not sign or name not in names:
        raise Problem(f"{word!r} is not one of {', '.join(f'{n}=VALUE' for n in names)}")
    return name, value


def replay_table(run: Run, result: Replay, width: int) -> Table:
    """When each layer started its descent and switched: in the run, and in the replay."""

    def first(events: Iterable[Event], kind: str) -> dict[str, str]:
        steps: dict[str, str] = {}
        for event in events:
            if event.kind == kind:
                steps.setdefault(event.layer, str(event.step))
        return steps

    names = list(run.reports)
    columns = [
        (header, first(log, kind))
        for log, headers in ((run.events, ("run: start", "switch")), (result.events, ("replay: start", "switch")))
        for kind, header in zip(("descend", "factorize"), headers, strict=True)
    ]
    strips = [Strip(header, [steps.get(name, "–") for name in names], 9) for header, steps in columns]
    notes = [f"from {result.diverged[name]}" if name in result.diverged else "" for name in names]
    strips.append(Strip("estimate", notes, 8, left=True))
    caption = (
        f"start: of the first descent  switch: into factors ({len(columns[1][1])}, in the replay {len(columns[3][1])})"
        "\nestimate: from that step on the layer's states differ from the recorded ones  – never"
    )
    return name_table("replay", Text(caption, style="dim"), names, strips, width)


# ---- the command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(
        prog="python -m svd_optim",
        description="See what training did to the weights: from the log of a run, or from a model file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, do: Callable[[argparse.Namespace, Console], None], example: str, log: bool = True,
                machine: bool = True) -> argparse.ArgumentParser:  # fmt: skip
        text = (do.__doc__ or "").rstrip(".")
        sub = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=f"example: python -m svd_optim {example}"
        )
        sub.set_defaults(do=do)
        if log:
            sub.add_argument("log", type=Path, metavar="LOG", help="the file that RunLog writes")
        if machine:
            sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    command("report", report, "report runs/log.jsonl")
    command("watch", watch, "watch runs/log.jsonl", machine=False)
    sub = command("events", events, "events runs/log.jsonl --kind factorize merge")
    sub.add_argument("--kind", nargs="+", help="only these kinds")
    sub.add_argument("--layer", metavar="GLOB", help="only of these layers")
    sub = command("why", why, 'why runs/log.jsonl "blocks.3.*"')
    sub.add_argument("layer", nargs="?", metavar="LAYER", help="a name or a glob; default: all")
    sub = command("plot", plot, "plot runs/log.jsonl -o run.svg", machine=False)
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="png, svg or pdf")
    sub = command(
        "replay", replayed, "replay runs/log.jsonl --thresholds phase1_proposed capture_safe=0.1 --set patience=5"
    )
    sub.add_argument("--thresholds", nargs="+", metavar="NAME=VALUE", help="or phase1, phase1_proposed; of all layers")
    sub.add_argument("--set", nargs="+", metavar="NAME=VALUE", help=f"one of {', '.join(DECIDES)}")
    sub = command("inspect", inspect, "inspect model.safetensors --budget 0.25", log=False)
    sub.add_argument(
        "file", type=Path, metavar="FILE", help="a model file, or a folder of them: safetensors, .pt, a checkpoint"
    )
    sub.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="share of each matrix's numbers to keep")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; 2 for an error, with its message on stderr."""
    args = parser().parse_args(argv)
    console = Console()
    try:
        args.do(args, console)
    except Problem as problem:
        complain(f"svd_optim {args.command}: {problem}")
        return 2
    except BrokenPipeError:  # as of `... | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        complain(f"svd_optim {args.command}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
