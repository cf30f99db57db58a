"""The README: its code runs, its commands, names and links exist, and it stays short."""

from __future__ import annotations

import importlib
import io
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, net, train
from rich.console import Console

import svd_optim
from svd_optim import SubspaceAwareOptimizer, load_checkpoint
from svd_optim.console import read_log
from svd_optim.console.commands import parser
from svd_optim.console.tables import layer_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = ConfigParser()
PACKAGE.read(ROOT / "setup.cfg", encoding="utf-8")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCED.sub("", README)
INLINE = re.findall(r"`([^`]+)`", PROSE)
LINKS = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'src="([^"]+)"', README)
FILES = {link for link in LINKS if "://" not in link}
REQUIRED = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "benchmarks/README.md",
            "examples/pictures/run.png", "examples/quickstart.py", "examples/teaching.py",
            "examples/lightning_averaging.py"}  # fmt: skip


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED.findall(README) if name == language]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands() -> list[list[str]]:
    """The words of each command of the shell blocks, and of those in the text."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [code for code in INLINE if code.startswith(("python examples/", "svd-optim "))]
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a reader of the README has at hand, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    model = net()
    matrices = [model.up.weight, model.mid.weight]
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return {"torch": torch, "model": model, "matrices": matrices, "optimizer": SubspaceAwareOptimizer(base, model)}


# ---- code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[0])
def test_each_python_block_runs_by_itself(block: str, reader: dict[str, Any]) -> None:
    exec(compile(block, "README.md", "exec"), reader)


def test_the_listeners_that_the_readme_adds_tell_of_the_run(
    reader: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    exec(next(block for block in blocks("python") if "add_listener" in block), reader)
    train(reader["model"], reader["optimizer"], 200)
    assert "analysis 10 " in capsys.readouterr().out
    assert len(read_log(Path("runs/log.jsonl"))) == 10


def test_the_checkpoint_that_the_readme_saves_is_the_run(reader: dict[str, Any]) -> None:
    train(reader["model"], reader["optimizer"], 3)
    exec(next(block for block in blocks("python") if "save_checkpoint" in block), reader)
    assert reader["extra"] == {"step": 100}
    other = Net()
    wrapped = SubspaceAwareOptimizer(torch.optim.AdamW(other.parameters()), other)
    assert load_checkpoint("run/checkpoints", other, wrapped) == {"step": 100} and wrapped.steps == 3
    for name, value in reader["model"].state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_the_diff_wraps_the_optimizer_that_it_takes_away(reader: dict[str, Any]) -> None:
    (diff,) = blocks("diff")
    lines = {sign: [line[1:] for line in diff.splitlines() if line[0] == sign] for sign in "+-"}
    assert len(lines["+"]) == 2 and len(lines["-"]) == 1 and len(diff.splitlines()) == 3
    exec("\n".join(lines["-"]), reader)
    bare = reader["optimizer"]
    exec("\n".join(lines["+"]), reader)
    assert isinstance(reader["optimizer"], SubspaceAwareOptimizer)
    assert reader["optimizer"].base_optimizer.state_dict() == bare.state_dict()


# ---- names and commands ------------------------------------------------------------------------------


def test_the_api_at_a_glance_has_all_public_names_and_no_other_methods() -> None:
    api = section("API at a glance")
    named = {match[1] for code in re.findall(r"`([^`]+)`", api) if (match := re.fullmatch(r"(\w+)(\(.*\))?", code))}
    public = {name for name in svd_optim.__all__ if not name.startswith("__")}
    assert public <= named
    methods = {name for name in named - public if name not in ("help", "svd_optim", "read_log", "replay")}
    assert {name for name in methods if not hasattr(SubspaceAwareOptimizer, name)} == set()
    own = {name for name, value in vars(SubspaceAwareOptimizer).items()
           if not name.startswith("_") and name not in dir(torch.optim.Optimizer)}  # fmt: skip
    assert own - methods <= {"param_groups", "state", "defaults"}


def test_the_modules_that_the_readme_names_can_be_imported() -> None:
    modules = set(re.findall(r"svd_optim\.[a-z]+", " ".join(INLINE)))
    assert {"svd_optim.console", "svd_optim.factors", "svd_optim.records", "svd_optim.storage"} <= modules
    for module in modules:
        importlib.import_module(module)


def test_the_table_has_the_columns_that_the_terminal_shows() -> None:
    (table,) = (block for block in blocks("") if "decision" in block)
    header, _, *rows = table.splitlines()
    model = net()
    summary = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters()), model).summary()
    console = Console(file=io.StringIO(), width=99)
    console.print(layer_table(summary, console.width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    (head,) = (line for line in shown.splitlines() if line.startswith("layer "))
    assert header.split() == [word for word in head.split() if word in header.split()]  # it may have more
    assert len(rows) >= 3 and max(map(len, table.splitlines())) <= 80
    explained = set(re.findall(r"`(\w+)`", section("What you see")))
    assert {"exc", "drift", "recon", "capt", "cexc"} <= explained & set(header.split())


def _check_install(words: list[str]) -> None:
    assert words[:2] == ["pip", "install"]
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    if "-e" in words:
        target = words[words.index("-e") + 1]
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", target)
        assert extra is not None and (extra[1] is None or extra[1] in PACKAGE["options.extras_require"])


def _check_script(words: list[str]) -> None:
    source = (ROOT / words[1]).read_text()
    assert [option for option in words[2:] if f'"{option}"' not in source] == []


@pytest.mark.parametrize("words", [words for words in commands() if words], ids=" ".join)
def test_each_command_exists(words: list[str]) -> None:
    if words[0] == "pip":
        _check_install(words)
    elif words[0] == "svd-optim":
        assert "svd-optim = svd_optim.console.commands:main" in PACKAGE["options.entry_points"]["console_scripts"]
        if words[1:] != ["report"]:  # in the text it stands without its log
            parser().parse_args(words[1:])
    elif words[0] == "python" and words[1] != "-m":
        _check_script(words)
    else:
        venv = [["python3.11", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]]
        assert words in [*venv, ["python", "-m", "pytest"]]


def test_the_readme_has_the_two_commands_that_install_and_run_and_install_and_test() -> None:
    install = "python3.11 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e"
    assert f"{install} . && python examples/train_gpt.py\n" in blocks("bash")
    assert f'{install} ".[dev]" && python -m pytest\n' in blocks("bash")


# ---- the page ----------------------------------------------------------------------------------------


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert 8_000 <= len(README.encode()) <= 10_240
    assert len(re.findall(r"^\|.*\|$", README, re.MULTILINE)) <= 12  # rows of tables


@pytest.mark.parametrize("file", sorted(REQUIRED | FILES))
def test_each_link_leads_to_a_file(file: str) -> None:
    assert file in FILES and (ROOT / file).is_file()


def test_the_result_is_on_the_first_screen() -> None:
    head, start, rest = README.partition("<!-- headline -->\n")
    headline, end, _ = rest.partition("\n<!-- /headline -->\n")
    assert start and end and head.count("\n") < 10
    assert re.search(r"\d", headline), "put the result there: python benchmarks/tables.py"


def test_the_citation_is_of_this_package_and_leaves_its_version_to_it() -> None:
    citation = dict(re.findall(r"^([\w-]+): *(.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert citation.keys() >= {"cff-version", "message", "title", "authors", "abstract"}
    assert citation["cff-version"] == "1.2.0" and "version" not in citation
    assert citation["title"] == PACKAGE["metadata"]["name"] and citation["license"] == PACKAGE["metadata"]["license"]
