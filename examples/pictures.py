"""The pictures of the README, from the log of a run: the table as it was printed, and the plot.

    python examples/train_gpt.py && python examples/pictures.py runs/train_gpt/log.jsonl --out examples/pictures

Needs the extra ``plots``.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console

from svd_optim.console import Run, read_log
from svd_optim.console.plots import plot_run
from svd_optim.console.tables import layer_table


def table_svg(run: Run, step: int | None, path: Path, width: int = 118) -> None:
    """The layer table as of the last analysis up to ``step``, as a terminal of ``width`` columns shows it."""
    index = max(i for i, analysis in enumerate(run.analyses) if step is None or analysis["step"] <= step)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(layer_table(run.summary(index), width))
    console.save_svg(str(path), title="svd_optim")


def main() -> int:
    """Draw both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--step", type=int, help="of the table; default: the last analysis")
    parser.add_argument("--out", type=Path, default=Path("examples/pictures"))
    args = parser.parse_args()
    run = read_log(args.log)
    args.out.mkdir(parents=True, exist_ok=True)
    table_svg(run, args.step, args.out / "table.svg")
    plot_run(run, args.out / "run.png")
    print(f"drawn: {args.out / 'table.svg'}, {args.out / 'run.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
