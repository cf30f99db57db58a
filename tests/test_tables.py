"""benchmarks/README.md: the right figures in the right cells, and none that no file holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import script
from helpers_runs import faults, results_file  # with all that they import

rivals = script("benchmarks/rivals.py")  # which others import
loaded = {name: script(f"benchmarks/{name}.py") for name in (
    "forgetting", "kernel_time", "main_job", "quality", "step_time", "peak_memory", "thresholds",
    "tables")}  # fmt: skip
kernel_time, quality = loaded["kernel_time"], loaded["quality"]
peak_memory, thresholds, tables = loaded["peak_memory"], loaded["thresholds"], loaded["tables"]

Cells = dict[str, dict[str, str]]  # by the first cell of the row, then by column


def written(folder: Path, name: str, *records: Mapping[str, Any]) -> Path:
    results_file.ResultFile(folder / name, {"scale": 7}).add(*records)
    return folder


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(page: str, title: str) -> list[Cells]:
    """The tables of a section."""
    found = []
    for part in section(page, title).split("\n\n"):
        if part.lstrip().startswith("|"):
            head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.strip().splitlines())
            found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows})
    return found


def run(row: str, lr: float, seed: int, bpb: float, optimizer: str = "adamw", **others: Any) -> dict[str, Any]:
    figures = {"parameters": 1000, "resident_bytes": 2_500_000, "jump_percent": 0.0, "switched_at": None,
               "operations": 1000}  # fmt: skip
    return {"optimizer": optimizer, "row": row, "lr": lr, "seed": seed, "bpb": bpb, **figures, **others}


def test_quality_shows_means_and_each_seed_at_the_best_rate(tmp_path: Path) -> None:
    ours = {"parameters": 496, "jump_percent": 0.0004, "switched_at": 300.0, "operations": 750, "predicted_share": 0.02,
            "found_share": -0.001}  # fmt: skip
    runs = (
        run("dense", 0.002, 0, 2.0), run("dense", 0.002, 1, 2.2), run("dense", 0.004, 0, 3.0),
        run("ours 0.5", 0.001, 0, 2.02, **ours), run("ours 0.5", 0.001, 1, 2.189, **{**ours, "switched_at": 500.0}),
        run("two factors 0.5", 0.004, 0, 2.2, jump_percent=4.8, switched_at=300),
    )  # fmt: skip
    for file in ("quality_20.json", "quality_5.json"):
        folder = written(tmp_path, file, *runs)
    [table] = cells(tables.page(folder), "Quality")
    assert table["AdamW, dense"] == {
        "learning rate": "0.002 of 0.002, 0.004", "seeds": "2", "bits per byte": "2.1000", "to dense, %": "",
        "matrix parameters": "1,000", "resident, MB": "2.5", "operations, % of dense": "100",
        "switched at step": "", "jump, %": "", "predicted, %": "",
        "measured, %": "",
    }  # fmt: skip
    row = table["AdamW, ours 0.5"]
    assert row["to dense, %"] == "**+0.25** (+1.00, −0.50)"
    assert (row["learning rate"], row["matrix parameters"], row["switched at step"]) == ("0.001 of 0.001", "496", "400")
    assert (row["jump, %"], row["operations, % of dense"]) == ("0.000", "75")
    assert (row["predicted, %"], row["measured, %"]) == ("+2.00", "−0.10")
    assert "AdamW, two factors 0.5" not in table

    [others] = cells(tables.page(folder), "Other ways to the same size")
    assert list(others) == ["dense", "ours 0.5", "two factors 0.5"]
    assert others["two factors 0.5"]["AdamW: to dense, %"] == "**+10.00**"
    assert others["two factors 0.5"]["AdamW: jump, %"] == "+4.800"
    assert others["ours 0.5"]["AdamW: bits per byte"] == "2.0200"  # of the first seed alone
    assert others["ours 0.5"]["Muon: bits per byte"] == ""


def test_widths_have_a_line_each(tmp_path: Path) -> None:
    for width, bpb in ((128, 2.0), (64, 3.0)):
        runs = [run("dense", 0.002, 0, bpb), run("ours 0.5", 0.002, 0, 1.01 * bpb),
                run("ours within 1 %", 0.002, 0, 1.005 * bpb, parameters=750)]  # fmt: skip
        sizes = asdict(quality.Sizes(steps=10, width=width, sequences=2, sequence_length=250))
        results_file.ResultFile(tmp_path / f"quality_width_{width}.json", sizes).add(*runs)
    [table] = cells(tables.page(tmp_path), "Quality by width")
    assert list(table) == ["AdamW, 64", "AdamW, 128"]
    assert table["AdamW, 128"] == {
        "matrix parameters": "1,000", "tokens a parameter": "5", "learning rate": "0.002 of 0.002",
        "dense, bits per byte": "2.0000", "smaller dense 0.5, %": "", "ours 0.5, %": "**+1.00**",
        "ours within 1 %, %": "**+0.50**", "of which kept, %": "75",
    }  # fmt: skip
    assert "width 64" in section(tables.page(tmp_path), "Quality by width")


def test_a_section_says_where_and_by_which_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(tables.__file__).parents[1]
    monkeypatch.setattr(sys, "argv", [str(root / "benchmarks" / "quality.py"), "--json", str(root / "x" / "q.json")])
    written(tmp_path, "quality_20.json", run("dense", 0.002, 0, 2.0))
    monkeypatch.setattr(sys, "argv", ["benchmarks/quality.py", "--rows", "ours 0.5"])
    written(tmp_path, "quality_20.json", run("ours 0.5", 0.002, 0, 2.0))
    text = section(tables.page(tmp_path), "Quality")
    assert "python benchmarks/quality.py --json x/q.json\npython benchmarks/quality.py --rows 'ours 0.5'\n```" in text
    for part in ("scale 7", "1 thread,", "torch 2", tables.read_results(tmp_path / "quality_20.json").about["date"]):
        assert part in text


def test_the_main_job_has_its_table(tmp_path: Path) -> None:
    def job(mode: str, seed: int, bpb: float, ratio: float, **others: Any) -> dict[str, Any]:
        figures = {"parameters": 100, "layers": 4, "factorized": 0, "largest_jump_percent": 0.0, "replay": {}}
        times = {"ratio_to_bare": ratio, "ratio_to_bare_at_the_end": ratio / 2}
        return {"optimizer": "muon", "seed": seed, "mode": mode, "bpb": bpb, **figures, **times, **others}

    replay = {"default, capture": [100, 200, 400], "lenient, capture": []}
    folder = written(
        tmp_path, "main_job.json",
        job("bare", 0, 2.0, 1.0, layers=0), job("observe", 0, 2.0, 1.02, replay=replay),
        job("auto", 0, 2.02, 1.2, factorized=3, largest_jump_percent=0.002, parameters=50),
        job("bare", 1, 2.0, 1.0, layers=0), job("auto", 1, 2.06, 1.4, factorized=4, parameters=40),
    )  # fmt: skip
    runs, replays = cells(tables.page(folder), "The main job")
    assert runs["Muon, auto"] == {
        "seeds": "2", "bits per byte": "2.0400", "to bare, %": "+2.00", "matrix parameters": "45",
        "factorized": "3.5 of 4", "largest jump, %": "+0.002", "time of a step": "× 1.30", "at the end": "× 0.65",
    }  # fmt: skip
    assert (runs["Muon, bare"]["to bare, %"], runs["Muon, bare"]["factorized"]) == ("", "")
    assert list(replays["Muon, seed 0"].values()) == ["lenient, capture", "0 of 4", "", ""]
    assert "| default, capture | 3 of 4 | 100 | 200 |" in tables.page(folder)


def test_forgetting_is_read_off_at_levels_between_validations(tmp_path: Path) -> None:
    def tuned(method: str, factor: float, old: float, new: float) -> dict[str, Any]:
        share = 0.0 if method == "plain" else 0.25
        setting = {"method": method, "share": share, "factor": factor, "seconds_per_step": 0.1}
        return {"optimizer": "muon", "seed": 0, **setting, "curve": [[0, 4.0, 2.0], [10, new, old]]}

    folder = written(
        tmp_path, "forgetting.json",
        tuned("plain", 1.0, 2.2, 2.0), tuned("plain", 0.1, 2.04, 3.0),  # levels: 3.5, 3.0 and 2.5
        tuned("protect", 1.0, 2.08, 2.0), tuned("outside", 1.0, 2.0, 3.9),
    )  # fmt: skip
    [table] = cells(tables.page(folder), "Forgetting")
    plain, alike, protect, outside = table.values()
    assert list(plain.values()) == ["**+1.00** at × 0.1", "**+2.00** at × 0.1", "**+7.50** at × 1"]
    assert alike["Muon: 25%"] == "**+2.50** at × 1"  # at the learning rate of the others
    assert protect["Muon: 75%"] == "**+3.00** at × 1"
    assert list(outside.values()) == ["", "", ""]
    assert list(table)[:2] == ["plain, 2 learning rates", "plain, only the 1 learning rates of those below"]


def test_thresholds_orders_trials_by_damage(tmp_path: Path) -> None:
    def trial(i: int, layer: str, damage: float) -> dict[str, Any]:
        metrics = dict.fromkeys(tables.METRICS, float(i)) | {"drift": -damage, "capture_excess": (i > 1) * 0.5}
        return thresholds.Trial(
            optimizer="muon", seed=0, moment=300, layer=f"blocks.{i}.{layer}", share=0.5, rank=4, bpb=2.0,
            damage=damage, training_damage=-damage, metrics=metrics,
        ).as_record()  # fmt: skip

    damages = {"up": [0.1, 0.2], "down": [0.4, 0.3]}
    folder = written(
        tmp_path, "thresholds.json", *(trial(i, kind, damages[kind][i]) for i in (0, 1) for kind in damages)
    )
    metrics, rules = cells(tables.page(folder), "Thresholds")
    assert metrics["tangent capture"] == {
        "Muon: validation, all": "0.00", "Muon: validation, alike": "0.00",  # up and down cancel out
        "Muon: training, all": "0.00", "Muon: training, alike": "0.00",
    }  # fmt: skip
    assert list(metrics["drift (`drift_stable`)"].values()) == ["−1.00", "−1.00", "+1.00", "+1.00"]
    assert list(rules["Muon, capture"].values()) == ["0", "", "4", "+0.250"]
    alignment = [thresholds.RULES["alignment"]({"principal_excess": float(i)}) for i in (0, 1)]
    assert alignment == [True, False]
    assert list(rules["Muon, alignment"].values()) == ["2", "+0.250", "2", "+0.250"]
    assert "Muon: 4 trials (seeds 0; at steps 300; to shares 0.5)" in tables.page(folder)


def test_faults_are_in_the_campaigns_order(tmp_path: Path) -> None:
    def fault(name: str, tried: int, lost: list[str]) -> dict[str, Any]:
        return {"name": name, "seconds": 90.0, **asdict(faults.Outcome(f"the {name}", tried, lost, "a | b"))}

    folder = written(tmp_path, "faults.json", fault("writers", 10_000, ["x"]), fault("kills", 3, []))
    text = section(tables.page(folder), "Faults")
    rows = [line for line in text.splitlines() if line.startswith("| the")]
    assert rows == [r"| the kills | 3 | 3 | 0 | a \| b |", r"| the writers | 10,000 | 9,999 | 1 | a \| b |"]
    assert "Minutes in all: 3." in text


def test_speed_has_its_table(tmp_path: Path) -> None:
    def step(row: str, tokens: int = 512, **others: Any) -> dict[str, Any]:
        figures = {"ratio": 1.0, "slowest": 1.1, "shares": {}, "peak": 2_000_000}
        return {"optimizer": "adamw", "width": 256, "tokens": tokens, "row": row, **figures, **others}

    parts = {"measure": 0.01, "refresh": 0.02, "decide": 0.003, "base": 0.5}
    folder = written(
        tmp_path, "step_time.json",
        step("bare"), step("observe", shares=parts, slowest=1.2, peak=3_000_000),
        step("rank 10", shares={"refresh": 0.01}),
        step("phase 1", shares={"analyze": 0.09}, slowest=3.0), step("galore", ratio=1.05),
        step("half", ratio=0.85, shares={"retract": 0.2, **parts}, peak=4_000_000), step("bare", 4096, peak=None),
    )  # fmt: skip
    [table] = cells(tables.page(folder), "Speed")
    assert list(table) == ["AdamW, 256, 4096", "AdamW, 256, 512"]
    assert list(table["AdamW, 256, 512"].values()) == [
        "3.3 %", "1.0 %", "9.0 %", "1.10, 1.20, 3.00", "× 0.85", "20.0 %", "× 1.05", "2, 3, 4",
    ]  # fmt: skip
    assert list(table["AdamW, 256, 4096"].values()) == ["", "", "", "1.10", "", "", "", ""]


def test_memory_is_shown_without_and_with_what_is_kept_of_it(tmp_path: Path) -> None:
    def peak(moment: str, peak: int, by_default: int, dtype: str = "float32") -> dict[str, Any]:
        return {"optimizer": "adamw", "dtype": dtype, "moment": moment, "peak": peak, "by_default": by_default}

    folder = written(
        tmp_path, "peak_memory.json",
        peak("factorized", 3_000_000, 2_000_000), peak("bare", 1_000_000, 4_000_000),
        peak("bare", 6_000_000_000, 0, "bfloat16"),
    )  # fmt: skip
    [table] = cells(tables.page(folder), "Memory")
    assert list(table["AdamW, float32"].values()) == ["1 (4)", "", "", "", "3 (2)"]
    assert table["AdamW, bfloat16"]["bare"] == "6,000 (0)"


@pytest.mark.slow
def test_a_run_for_its_memory_passes_through_the_whole_life() -> None:
    job = {"optimizer": "muon", "dtype": "bfloat16", "depth": 1, "width": 128, "tokens": 32, "device": "cpu"}
    bare, found = (peak_memory.in_a_process(peak_memory.Job(**job, wrapped=w), 1, True) for w in (False, True))
    assert list(bare) == ["bare"]
    assert list(found) == [*peak_memory.MOMENTS[1:]] and all(peak > 0 for peak in found.values())


def test_layers_and_kernels_have_their_tables(tmp_path: Path) -> None:
    def line(part: str, kernel: str, way: str, seconds: float, bound: float | None = None, **errors: float) -> Any:
        made = kernel_time.Line(kernel, "8 × 8, k = 2", way, seconds, (0, 0), seconds / 0.002, bound, errors)
        return {"part": part, **asdict(made)}

    folder = written(
        tmp_path, "kernel_time.json",
        line("layer", "forward + backward", "factors", 0.002), line("layer", "forward + backward", "dense", 0.004),
        line("layer", "step, muon", "factors", 0.001), line("layer", "step, muon", "dense", 0.002),
        line("layer", "step, adamw", "factors", 0.004), line("layer", "step, adamw", "dense", 0.001),
        line("refresh", "refresh", "refresh", 0.002, 0.001, capture=2e-6), line("refresh", "refresh", "svd", 0.05),
    )  # fmt: skip
    [layers] = cells(tables.page(folder), "A layer by itself")
    assert [row["8 × 8, k = 2"] for row in layers.values()] == ["× 0.50", "× 0.50", "× 1.20"]
    [kernels] = cells(tables.page(folder), "Kernels")
    assert list(kernels["refresh"].values()) == ["8 × 8, k = 2", "2.00", "× 2.0", "svd × 25.0", "capture 2e-06"]


def test_what_is_not_measured_has_its_command_and_no_table(tmp_path: Path) -> None:
    page = tables.page(tmp_path / "nowhere")
    assert "|" not in page and page.count(tables.MISSING) == len(tables.SECTIONS)
    for each in tables.SECTIONS:
        script, _, options = each.command.partition(" ")
        assert (Path(tables.__file__).parent / script).exists()
        file = f"benchmarks/results/{each.file}"
        assert f"python benchmarks/{script} {options.replace('FILE', file)}\n```" in section(page, each.title)
    headline = {name: row for name, row in quality.ROWS.items() if row.headline}
    written(tmp_path, "quality.json", *(run(row, 0.002, 0, 2.0) for row in headline))
    assert len(cells(tables.page(tmp_path), "Quality after 800 steps of 512 tokens")) == 1
    assert tables.MISSING in section(tables.page(tmp_path), "Other ways to the same size")


def test_the_committed_page_is_what_the_committed_files_give() -> None:
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``tables.main`` on a page and files of its own."""
    written(tmp_path, "quality_20.json", run("dense", 0.002, 0, 2.0))
    monkeypatch.setattr(tables, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(tables, "page", lambda made=tables.page: made(tmp_path))

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tables.py", *words])
        return tables.main()

    return call


def test_the_check_fails_until_the_page_is_written(elsewhere: Callable[..., int], tmp_path: Path) -> None:
    assert elsewhere("--check") == 1 and not (tmp_path / "README.md").exists()
    assert elsewhere() == 0 and elsewhere("--check") == 0 and elsewhere("--smoke") == 0
    written(tmp_path, "quality_20.json", run("dense", 0.002, 1, 2.4))
    assert elsewhere("--check") == 1
    assert "2.2000" not in (tmp_path / "README.md").read_text()


def test_truncations_are_means_over_seeds_with_what_was_predicted(tmp_path: Path) -> None:
    about = {"optimizer": "muon", "row": "loss", "target": 0.5, "share": 0.49, "bpb": 2.5, "dense": 2.4}
    written(
        tmp_path,
        "loss_metric.json",
        about | {"seed": 0, "found": 0.01, "predicted": 0.03},
        about | {"seed": 1, "found": 0.02, "predicted": 0.05},
        about | {"seed": 0, "row": "weight", "found": -0.001, "predicted": None},
    )
    text = tables.truncations(results_file.read_results(tmp_path / "loss_metric.json"))
    assert "| loss | 0.5 | 49.0% | +1.50 | +4.00 |" in text
    assert "| weight | 0.5 | 49.0% | −0.10 |  |" in text
    assert text.startswith("Seeds: 0, 1.")
