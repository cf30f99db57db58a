"""What has gone wrong for others: every situation of the campaign of faults is right, or refused clearly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import faults, public_reports, situations

REPORTS, OWN = public_reports.REPORTS, situations.OWN
SLOW = {"huggingface/accelerate#4159", "wandb/wandb#5573"}  # take a second


def _named(situation: Any) -> Any:
    marks = [pytest.mark.slow] if situation.source in SLOW else []
    return pytest.param(situation, id=situation.source or situation.title, marks=marks)


@pytest.mark.parametrize("situation", [_named(each) for each in REPORTS])
def test_what_public_reports_tell_of_is_right_or_refused(situation: Any, tmp_path: Path) -> None:
    assert situation.attempt(tmp_path) in (situations.RIGHT, situations.REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("situation", [_named(each) for each in OWN])
def test_short_forms_of_this_repositorys_own_situations_agree_with_its_tests(situation: Any, tmp_path: Path) -> None:
    assert situation.attempt(tmp_path) in (situations.RIGHT, situations.REFUSED)


def test_reports_name_their_issue_once_each() -> None:
    sources = [situation.source for situation in REPORTS]
    assert len(set(sources)) == len(sources) >= 20
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", source) for source in sources)
    titles = [situation.title for situation in (*OWN, *REPORTS)]
    assert len(set(titles)) == len(titles)


def test_what_is_wrong_is_counted_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path) -> str:
        raise RuntimeError("another end")

    three = [situations.Situation("a/b#1", "wrong", wrong), situations.Situation("", "right", lambda _: "right"),
             situations.Situation("a/b#2", "refused", lambda _: "refused")]  # fmt: skip
    monkeypatch.setattr(faults, "OWN", three[1:2])
    monkeypatch.setattr(faults, "REPORTS", [three[0], three[2]])
    outcome = faults.tried_situations(1000, faults.random.Random(0), tmp_path)
    assert (outcome.tried, outcome.lost) == (3, ["a/b#1: wrong: RuntimeError: another end"])
    assert outcome.notes == "1 right, 1 refused clearly, 1 wrong"
    table = faults.situations_table(outcome.verdicts)
    rows = list(zip(*([*column.cells] for column in table.columns), strict=True))
    assert [row[1:] for row in rows] == [("1", "1", "0", "0"), ("2", "0", "1", "1"), ("3", "1", "1", "1")]
