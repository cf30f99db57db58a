"""README.md of this folder: every table, from the result files in results/.

    python benchmarks/tables.py          # write it anew
    python benchmarks/tables.py --check  # exit status 1 if it is not what the result files say; --smoke is the same

All figures, those in the sentences too, come from the files. Where one is missing the section says so, with the
command that makes it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import forgetting
import kernel_time
import main_job
import peak_memory
import quality
import step_time
import thresholds
from results_file import Results, about_line, read_results

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
NAMES = {"muon": "Muon", "adamw": "AdamW"}
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the files in `results/`, which the command above each table fills: change
those, not this page. A command goes on from what its file holds; to measure anew, delete the file first. Commands run
in the repository's root, after `pip install -c constraints.txt -e ".[rivals]"`. The text that models train on is the
standard library of the Python that is named; a token is a byte."""
MISSING = "Not measured with this version yet."


# ---- Markdown ----------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A row a line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def signed(value: float, digits: int = 2) -> str:
    """With a true minus, and none before zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")


def listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(signed(value, digits) for value in values)


def joined(values: Iterable[Any]) -> str:
    """Each one once, sorted."""
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None


def number(value: float | None, form: str) -> str:
    """Empty where there is none."""
    return "" if value is None else format(value, form)


# ---- quality.py --------------------------------------------------------------------------------------


def run_name(line: dict[str, Any]) -> str:
    return f"{NAMES[line['optimizer']]}, {line['row']}"


def learning_rate(line: dict[str, Any]) -> str:
    return f"{line['lr']:g} of {joined(line['tried'])}"


def of_line(line: dict[str, Any], name: str) -> list[Any]:
    """A figure of each seed."""
    return [line["results"][seed].get(name) for seed in sorted(line["results"])]


def to_dense(line: dict[str, Any]) -> str:
    """The mean, and each seed if there are several."""
    differences = line["to_dense"]
    if not differences or line["row"] == "dense":
        return ""
    each = f" ({listed(differences)})" if len(differences) > 1 else ""
    return f"**{signed(statistics.mean(differences))}**{each}"


def share_of(value: float | None, whole: float | None) -> str:
    """In percent; empty where either is not known."""
    return f"{100 * value / whole:.0f}" if value and whole else ""


def jump(line: dict[str, Any]) -> str:
    """Of validation at a switch, where there was one."""
    return signed(max(of_line(line, "jump_percent")), 3) if mean(of_line(line, "switched_at")) is not None else ""


def cost(line: dict[str, Any], name: str) -> str:
    """Share of the loss that the factors were predicted to cost, or found to, in percent, where that was known."""
    share = mean(of_line(line, name))
    return "" if share is None else signed(100 * share)


def headline(results: Results) -> str | None:
    """All seeds."""
    runs = {job: run for job, run in quality.runs_of(results.records).items() if quality.ROWS[job.row].headline}
    lines = quality.summarize(runs, NAMES, 1 + max((job.seed for job in runs), default=0))
    if not lines:
        return None
    columns = ("run", "learning rate", "seeds", "bits per byte", "to dense, %", "matrix parameters", "resident, MB",
               "operations, % of dense", "switched at step", "jump, %", "predicted, %",
               "measured, %")  # fmt: skip
    dense = {line["optimizer"]: mean(of_line(line, "operations")) for line in lines if line["row"] == "dense"}
    rows = [
        (run_name(line), learning_rate(line), str(len(line["results"])), f"{mean(of_line(line, 'bpb')):.4f}",
         to_dense(line), f"{mean(of_line(line, 'parameters')):,.0f}",
         f"{(mean(of_line(line, 'resident_bytes')) or 0) / 1e6:.1f}",
         share_of(mean(of_line(line, "operations")), dense.get(line["optimizer"])),
         number(mean(of_line(line, "switched_at")), ".0f"), jump(line),
         cost(line, "predicted_share"), cost(line, "found_share"))
        for line in lines
    ]  # fmt: skip
    return table(columns, rows)


def other_ways(results: Results) -> str | None:
    """The first seed, a row for all optimizers."""
    runs = {job: run for job, run in quality.runs_of(results.records).items() if job.seed == 0}
    lines = {(line["row"], line["optimizer"]): line for line in quality.summarize(runs, NAMES, 1)}
    if all(quality.ROWS[row].headline for row, _ in lines):
        return None
    shown = ("learning rate", "bits per byte", "to dense, %", "jump, %", "resident, MB")
    columns = ["run", *(f"{name}: {column}" for name in NAMES.values() for column in shown)]
    rows = []
    for row in dict.fromkeys(row for row, _ in lines):
        cells = [row]
        for kind in NAMES:
            if (line := lines.get((row, kind))) is None:
                cells += [""] * len(shown)
                continue
            resident = line["results"][0]["resident_bytes"] / 1e6
            cells += [learning_rate(line), f"{line['results'][0]['bpb']:.4f}", to_dense(line), jump(line),
                      f"{resident:.1f}"]  # fmt: skip
        rows.append(cells)
    return table(columns, rows)


def by_width(*each: Results) -> str | None:
    """The first seed, a line for each width: at its best learning rate what the rows cost to the dense one."""
    rows = []
    shown = ("smaller dense 0.5", "ours 0.5", "ours within 1 %")
    for results in sorted(each, key=lambda results: results.about["job"]["width"]):
        job = quality.Sizes(**results.about["job"])
        runs = {run: figures for run, figures in quality.runs_of(results.records).items() if run.seed == 0}
        lines = {(line["optimizer"], line["row"]): line for line in quality.summarize(runs, NAMES, 1)}
        for kind, name in NAMES.items():
            if (dense := lines.get((kind, "dense"))) is None:
                continue
            parameters = of_line(dense, "parameters")[0]
            tokens = job.steps * job.sequences * job.sequence_length / parameters
            found = [lines.get((kind, row)) for row in shown]
            kept = "" if found[-1] is None else share_of(mean(of_line(found[-1], "parameters")), parameters)
            rows.append((f"{name}, {job.width}", f"{parameters:,.0f}", f"{tokens:.3g}", learning_rate(dense),
                         f"{of_line(dense, 'bpb')[0]:.4f}", *("" if x is None else to_dense(x) for x in found),
                         kept))  # fmt: skip
    heads = ("optimizer, width", "matrix parameters", "tokens a parameter", "learning rate", "dense, bits per byte",
             *(f"{row}, %" for row in shown), "of which kept, %")  # fmt: skip
    return table(heads, rows) if rows else None


# ---- main_job.py -------------------------------------------------------------------------------------


def jobs(results: Results) -> str:
    """Means over seeds, then the replay of each."""
    records = results.records
    rows = []
    for kind, mode in dict.fromkeys((record["optimizer"], record["mode"]) for record in records):
        found, bare = main_job.of_mode(records, kind, mode), main_job.of_mode(records, kind, "bare")
        difference = 100 * (main_job.mean(found, "bpb") / main_job.mean(bare, "bpb") - 1)
        layers = main_job.mean(found, "layers")
        rows.append((
            f"{NAMES[kind]}, {mode}", str(len(found)), f"{main_job.mean(found, 'bpb'):.4f}",
            "" if mode == "bare" else signed(difference), f"{main_job.mean(found, 'parameters'):,.0f}",
            f"{main_job.mean(found, 'factorized'):.1f} of {layers:.0f}" if layers else "",
            signed(max(record["largest_jump_percent"] for record in found), 3) if mode == "auto" else "",
            f"× {main_job.mean(found, 'ratio_to_bare'):.2f}",
            f"× {main_job.mean(found, 'ratio_to_bare_at_the_end'):.2f}",
        ))  # fmt: skip
    columns = ("run", "seeds", "bits per byte", "to bare, %", "matrix parameters", "factorized", "largest jump, %",
               "time of a step", "at the end")  # fmt: skip
    replay = [
        (f"{NAMES[record['optimizer']]}, seed {record['seed']}", name, f"{len(steps)} of {record['layers']}",
         str(steps[0]) if steps else "", f"{statistics.median(steps):.0f}" if steps else "")
        for record in records for name, steps in record["replay"].items()
    ]  # fmt: skip
    heads = ("run", "thresholds, rule", "layers that start to descend", "first step", "median step")
    return f"{table(columns, rows)}\n\n{table(heads, replay)}"


# ---- forgetting.py -----------------------------------------------------------------------------------

FRONTS = {
    "plain": "plain, {} learning rates",
    "plain, only lr of the others": "plain, only the {} learning rates of those below",
    "protect, any rank": "`protect_`, {} ranks and learning rates",
    "outside, any rank": "updates outside the leading directions, {} ranks and learning rates",
}


def forgotten(results: Results) -> str | None:
    """The least rise at each level, a row for each way."""
    outcomes = forgetting.outcomes_of(forgetting.runs_of(results.records))
    if not outcomes:
        return None
    columns = [
        f"{NAMES[outcome.optimizer]}: {share:.0%}" for outcome in outcomes for share in forgetting.LEVELS
    ]  # fmt: skip
    rows = []
    for group, label in FRONTS.items():
        cells = [label.format(len(forgetting.fronts(outcomes[0])[group]))]
        for outcome in outcomes:
            for share in forgetting.LEVELS:
                best = outcome.best(forgetting.fronts(outcome)[group], share)
                cells.append("" if best is None else least(*best))
        rows.append(cells)
    seeds = ", ".join(f"{NAMES[outcome.optimizer]} {len(outcome.curves)}" for outcome in outcomes)
    return f"Seeds: {seeds}.\n\n{table(['', *columns], rows)}"


def least(setting: forgetting.Setting, values: Sequence[float]) -> str:
    """The mean, each seed if there are several, and where in the grid."""
    each = f" ({listed(values)})" if len(values) > 1 else ""
    return f"**{signed(statistics.mean(values))}**{each} at × {setting.factor:g}"


# ---- thresholds.py -----------------------------------------------------------------------------------

METRICS = {
    "parameters_saved": "parameters given up",
    "outside_absolute_of_mean": "mean gradient outside the tangent space, sum of absolute values",
    "outside_energy_of_mean": "its energy",
    "outside_nuclear_of_mean": "its nuclear norm",
    "movement_outside_share": "share of the weight's last movement outside",
    "reconstruction_error": "reconstruction error",
    "output_error": "the same of the layer's outputs",
    "capture": "tangent capture",
    "capture_excess": "capture above chance (`capture_safe`)",
    "principal_excess": "principal alignment above chance (`principal_danger`)",
    "drift": "drift (`drift_stable`)",
    "first_order_squared": "second order by the empirical Fisher",
    "jump": "rise of the training loss at truncation",
}


def predictions(results: Results) -> str:
    """Rank correlations, then what the rules let through."""
    trials = thresholds.trials_of(results.records)
    by_kind = {kind: found for kind in NAMES if (found := [trial for trial in trials if trial.optimizer == kind])}
    counts = [
        f"{NAMES[kind]}: {len(found)} trials (seeds {joined(t.seed for t in found)}; at steps "
        f"{joined(t.moment for t in found)}; to shares {joined(t.share for t in found)})"
        for kind, found in by_kind.items()
    ]
    columns, values = ["measured beforehand"], []
    for kind, found in by_kind.items():
        for target, name in zip(thresholds.TARGETS, ("validation", "training"), strict=True):
            for groups, suffix in (([found], "all"), (thresholds.alike(found), "alike")):
                columns.append(f"{NAMES[kind]}: {name}, {suffix}")
                values.append(thresholds.correlations(found, groups, target))
    rows = [[label, *(signed(column[metric]) for column in values)] for metric, label in METRICS.items()]
    heads = ("optimizer, rule", "lets through", "their damage, %", "blocks", "damage of these, %")
    verdicts = []
    for kind, found in by_kind.items():
        for name, rule in thresholds.RULES.items():
            cells = [f"{NAMES[kind]}, {name}"]
            for passes in (True, False):
                chosen = [t.damage for t in found if rule(t.metrics) == passes]
                cells += [str(len(chosen)), signed(statistics.mean(chosen), 3) if chosen else ""]
            verdicts.append(cells)
    return f"{'; '.join(counts)}.\n\n{table(columns, rows)}\n\n{table(heads, verdicts)}"


# ---- loss_metric.py ----------------------------------------------------------------------------------


def truncations(results: Results) -> str:
    """A line for each way and target, the mean over seeds."""
    heads = ["", "target"]
    kinds = [kind for kind in NAMES if any(record["optimizer"] == kind for record in results.records)]
    for kind in kinds:
        heads += [f"{NAMES[kind]}: kept", "found, %", "predicted, %"]
    rows = []
    for row, target in dict.fromkeys((record["row"], record["target"]) for record in results.records):
        cells = [row, f"{target:g}"]
        for kind in kinds:
            alike = [r for r in results.records if (r["optimizer"], r["row"], r["target"]) == (kind, row, target)]
            found, predicted = (mean(r[name] for r in alike) for name in ("found", "predicted"))
            cells += [number(mean(r["share"] for r in alike), ".1%")]
            cells += ["" if value is None else signed(100 * value) for value in (found, predicted)]
        rows.append(cells)
    seeds = joined(record["seed"] for record in results.records)
    return f"Seeds: {seeds}.\n\n{table(heads, rows)}"


# ---- faults.py ---------------------------------------------------------------------------------------


def survived(results: Results) -> str:
    """Every fault."""
    order = {name: i for i, name in enumerate(faults.FAULTS)}
    rows = []
    for row in sorted(results.records, key=lambda row: order[row["name"]]):
        tried, lost = row["tried"], len(row["lost"])
        rows.append((row["fault"], f"{tried:,}", f"{tried - lost:,}", f"{lost:,}", row["notes"]))
    took = sum(row["seconds"] for row in results.records) / 60
    parts = [f"Minutes in all: {took:.0f}.", table(("fault", "tried", "survived", "lost", ""), rows)]
    for verdicts in (row["verdicts"] for row in results.records if row["verdicts"]):
        counts = faults.situations_table(verdicts)
        cells = zip(*([str(cell) for cell in column.cells] for column in counts.columns), strict=True)
        parts.append(table([str(column.header) for column in counts.columns], [list(row) for row in cells]))
        shown = [(source or "own", title, verdict) for source, title, verdict in verdicts]
        parts.append(table(("source", "situation", "verdict"), shown))
    return "\n\n".join(parts)


# ---- step_time.py ------------------------------------------------------------------------------------


def step_times(results: Results) -> str:
    """A row for each optimizer, width and number of tokens."""
    cases: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for record in results.records:
        case = -record["tokens"], list(NAMES).index(record["optimizer"]), record["width"]
        cases.setdefault(case, {})[record["row"]] = record
    columns = ("optimizer, width, tokens a step", "monitoring overhead at half rank", f"at rank {step_time.RANK}",
               "Phase 1 analysis", "slowest step: bare, ours, Phase 1", "factorized at half", "of that: retraction",
               "GaLore", "peak memory: bare, observed, factorized, MB")  # fmt: skip

    def share(record: dict[str, Any] | None, *phases: str) -> str:
        return "" if record is None else f"{100 * sum(record['shares'].get(phase, 0) for phase in phases):.1f} %"

    def ratio(record: dict[str, Any] | None) -> str:
        return "" if record is None else f"× {record['ratio']:.2f}"

    rows = []
    for _, by_row in sorted(cases.items()):
        get, first = by_row.get, next(iter(by_row.values()))
        slowest = [by_row[row]["slowest"] for row in ("bare", "observe", "phase 1") if row in by_row]
        peaks = [by_row[row]["peak"] for row in ("bare", "observe", "half") if row in by_row]
        rows.append((
            f"{NAMES[first['optimizer']]}, {first['width']}, {first['tokens']}",
            share(get("observe"), *step_time.MONITORING), share(get("rank 10"), *step_time.MONITORING),
            share(get("phase 1"), "analyze"), ", ".join(f"{value:.2f}" for value in slowest), ratio(get("half")),
            share(get("half"), "retract"), ratio(get("galore")),
            ", ".join(f"{peak / 1e6:.0f}" for peak in peaks if peak is not None),
        ))  # fmt: skip
    return table(columns, rows)


# ---- peak_memory.py ----------------------------------------------------------------------------------


def peaks(results: Results) -> str:
    """A row for each optimizer and type, a column for each moment."""
    rows = [
        [f"{NAMES[optimizer]}, {dtype}", *(peak_memory.cell(moments.get(name)) for name in peak_memory.MOMENTS)]
        for (optimizer, dtype), moments in peak_memory.by_run(results.records).items()
    ]
    return table(["optimizer, weights", *peak_memory.MOMENTS], rows)


# ---- kernel_time.py ----------------------------------------------------------------------------------


def layer_times(results: Results) -> str | None:
    """Factors against dense, a column for each size."""
    lines = kernel_time.lines_of(row for row in results.records if row["part"] == "layer")
    seconds = {(line.kernel, line.size, line.way): line.seconds for line in lines}
    sizes = list(dict.fromkeys(line.size for line in lines))
    ways = {
        "forward + backward": ("forward + backward",),
        "with Muon's step": ("forward + backward", "step, muon"),
        "with AdamW's step": ("forward + backward", "step, adamw"),
    }
    rows = []
    for name, kernels in ways.items():
        totals = [
            [sum(seconds[kernel, size, way] for kernel in kernels) for way in ("factors", "dense")] for size in sizes
        ]
        rows.append([name, *(f"× {factors / dense:.2f}" for factors, dense in totals)])
    return table(["layer", *sizes], rows) if sizes else None


def kernel_times(results: Results) -> str | None:
    """The other kernels: ours, then each rival's time to ours."""
    lines = kernel_time.lines_of(row for row in results.records if row["part"] != "layer")
    groups: dict[tuple[str, str], list[kernel_time.Line]] = {}
    for line in lines:
        groups.setdefault((line.kernel, line.size), []).append(line)
    rows = []
    for (kernel, size), (ours, *rivals) in groups.items():
        rows.append((
            kernel, size, f"{1e3 * ours.seconds:.2f}", f"× {ours.seconds / ours.bound:.1f}" if ours.bound else "",
            ", ".join(f"{rival.way} × {rival.ratio:.1f}" for rival in rivals),
            ", ".join(f"{name} {value:.0e}" for name, value in ours.errors.items()),
        ))  # fmt: skip
    return table(("kernel", "size", "ours, ms", "to the bound", "rivals to ours", "our errors"), rows) if rows else None


# ---- the page ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A table or two of one file."""

    title: str
    file: str  # or several, as a glob
    command: str  # that fills the file, where there is none; FILE is its path
    about: str  # what is asked, and how to read it: no figures
    body: Callable[..., str | None]  # of the results of each file; None: of this there is nothing in them


SECTIONS = (
    Section("Quality", "quality_20.json", "quality.py --regime 20 --json FILE",
        "What does training in fewer parameters cost, at 20 tokens a parameter? Dense training, training within 1 % "
        "of the loss (the default where `total_steps` is known), with `budget=0.5` and `budget=0.25`, in the metric "
        "of the weight and in that of the loss, smaller dense models of about as many parameters, for equal steps and "
        "tokens, and a dense model truncated after the last step with `factorize_(max_loss_increase=0.01)`. Each row "
        "is at its best learning rate of those listed: every rate that is close to the best with the first seed gets "
        "all seeds, and the lowest mean decides. In bold the mean difference to the dense runs of the same seeds, in "
        "brackets that of each seed: lower is better. Matrix parameters and what is resident (weights, gradients, "
        "optimizer state, and all that the wrapper keeps) are those of the tracked matrices, at the end. Switched: "
        "the mean step at which weights went into factors, by the numbers in them. Operations are those of the "
        "matrices in forward and backward passes. Jump: the largest rise of validation loss at a switch. Predicted: "
        "what the factors were predicted to cost when their descents began, of the training loss; measured: what "
        "their descents have added to it, as the run itself measures it.",
        headline),
    Section("Quality at 5 tokens a parameter", "quality_5.json", "quality.py --regime 5 --json FILE",
        "The same at the beginning of such a training, with a learning rate that has fallen to zero by its end.",
        headline),
    Section("Quality after 800 steps of 512 tokens", "quality.json", "quality.py --regime short --json FILE",
        "The same on the job of `examples/train_gpt.py`: 0.13 tokens a parameter.",
        headline),
    Section("Other ways to the same size", "quality_5.json", "quality.py --regime 5 --json FILE",
        "Is there another way? At 5 tokens a parameter; one seed, each row at its best learning rate of those listed. "
        "Early: short descents from the beginning on. Uniform: the same "
        "share of each layer. No descent: `factorize_` at once. Step x: other lengths of the step inside factors. "
        "Two factors, and U, S, V, are ordinary parameters of the optimizer after truncation; core only: U and V "
        "frozen. Spectron (arXiv:2602.12429): two factors from the first step on, at four times the learning rates. "
        "Riemannion (arXiv:2507.12142): Muon on the manifold of the rank, here on dense weights, truncated at once. "
        "Projected: a dense run that is brought back to the rank regularly, which saves nothing and shows "
        "what the rank costs. GaLore keeps all parameters and saves optimizer state.",
        other_ways),
    Section("Quality by width", "quality_width_*.json",
        "quality.py --regime 'width 256' --json benchmarks/results/quality_width_256.json",
        "What does half cost in wider layers? One block, equal steps, as many tokens a parameter at each width but the "
        "last; of the first seed, to the dense model of the same width.",
        by_width),
    Section("The main job", "main_job.json", "main_job.py --json FILE",
        "The job of `examples/train_gpt.py` bare, observed and wrapped, step by step in turns: does observing change "
        "anything, and what does wrapping cost? Times are medians of ratios of simultaneous steps. Then: when would "
        "layers of the observed run have started to descend under other thresholds and rules?",
        jobs),
    Section("Forgetting", "forgetting.json", "forgetting.py --json FILE",
        "Does protection forget less? A model learns Python sources, then the prose of `help()`. Shown is by how "
        "many percent the loss on the sources has risen where the loss on the prose has come so far (the column) on "
        "the way that the best plain run goes; each row at its best setting, with the factor to the learning rate of "
        "the first training. Negative: the first training was still going on.",
        forgotten),
    Section("Thresholds", "thresholds.json", "thresholds.py --seeds 1 --json FILE",
        "Which metric predicts the damage of factorizing a layer? One layer at a time is truncated at a moment of a "
        "dense run and trains on in its factors; damage is by how much the loss ends above that of the untouched "
        "run. The table holds Spearman's rank correlation of the damage, of validation or training loss, with what "
        "was measured beforehand: over all trials, and alike, the mean over groups of one kind of layer and share, "
        "where sizes do not help. Positive: more of it, more damage. The second table has the mean damage of what "
        "each rule would let through and of what it would block.",
        predictions),
    Section("The metric of the loss", "loss_metric.json", "loss_metric.py --json FILE",
        "What does truncating a trained model at once cost, without any training afterwards, and is that predicted? "
        "By the leading singular values of the weight, in the metric of the layer's inputs alone, in that of the "
        "loss with the same share of each layer, and with the ranks of `optimizer.plan()`; then the smallest that "
        "`factorize_(max_loss_increase=...)` finds within a share of the loss. Found and predicted: the rise of "
        "validation loss, and of training loss as the wrapper sees it, in percent.",
        truncations),
    Section("Faults", "faults.json", "faults.py --json FILE",
        "What survives? Real runs of a small network through its whole life, and what can happen to them. Lost is "
        "whatever ends otherwise than it should: another run's bytes, an error that does not say what is wrong, "
        "something changed by a call that failed. Situations are what has gone wrong for others, by the issue that "
        "tells of it, and this repository's own: right is as without the wrapper, or as a reference; refused is that "
        "nothing is harmed and somebody is told.",
        survived),
    Section("Speed", "step_time.json", "step_time.py --intervals 1 --json FILE",
        "What does monitoring cost, and what do factors save? Whole steps of a GPT in turns; ratios are to the bare "
        "optimizer's steps. Monitoring overhead is its share of the step's time by the wrapper's own clock, and that "
        "of the Phase 1 experiment's analysis (full SVDs) by its own. Slowest: the slowest step of an interval to "
        "the median one. Retraction is what brings factors back to rank k after a step.",
        step_times),
    Section("Memory", "peak_memory.json", "peak_memory.py --json FILE",
        "How much memory does a step take? A GPT trains bare, and wrapped through its whole life: dense and watched, "
        "descending, in the step in which all layers switch, and factorized at half of the matrix parameters. MB that "
        "are resident above those before the model was built, activations included, at the highest moment of all such "
        "steps: where freed memory goes back to the system at once (`MALLOC_MMAP_THRESHOLD_=65536`), and in brackets "
        "by default, where the C library keeps much of it.",
        peaks),
    Section("A layer by itself", "kernel_time.json", "kernel_time.py --json FILE",
        "From which size on are factors faster? Forward and backward of a linear layer, and the optimizer's step "
        "with its retraction, at half the parameters: time to that of the dense layer.",
        layer_times),
    Section("Kernels", "kernel_time.json", "kernel_time.py --json FILE",
        "How near are the kernels to what the machine could do, and how far ahead of their rivals? The bound is the "
        "larger of operations at the measured matmul rate and bytes at the measured bandwidth. Above one: the rival "
        "is slower. Refreshes named after a layer are of weights in training, the others of random matrices; errors "
        "are against a float64 SVD.",
        kernel_times),
)  # fmt: skip


def section(of: Section, folder: Path) -> str:
    """Heading, question, commands, circumstances, tables."""
    results = [found for file in sorted(folder.glob(of.file)) if (found := read_results(file)).records]
    body = of.body(*results) if results else None
    if body is None:
        commands = [f"python benchmarks/{of.command.replace('FILE', f'benchmarks/results/{of.file}')}"]
        found = [MISSING]
    else:
        commands = [command for each in results for command in each.about["commands"]]
        found = [*(f"{each.about['date']}; {about_line(each.about)}." for each in results), body]
    shown = "\n".join(commands)
    return "\n\n".join(
        [f"## {of.title}", textwrap.fill(of.about, 119, break_on_hyphens=False), f"```bash\n{shown}\n```", *found]
    )


def page(folder: Path = RESULTS) -> str:
    """All sections, from the files in a folder."""
    return "\n\n".join([INTRODUCTION, *(section(each, folder) for each in SECTIONS)]) + "\n"


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", "--smoke", action="store_true", help="write nothing; 1 if it would change")
    args = parser.parse_args()
    made = page()
    if not args.check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print("benchmarks/README.md is not what the files in benchmarks/results say: python benchmarks/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
