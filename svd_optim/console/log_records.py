"""What may stand in a line of a log (see :mod:`.run_log`): a log may have been edited by hand, or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..records import Action, LayerState
from ..tracking.kinds import Kind, dict_of, exactly, flag, list_of, one_of, or_none, text
from .run_log import BYTES, INFO_DEFAULTS, SCHEMA

LARGEST = 2**53  # of an integer: steps and counts are less, and drawing takes them for floating-point numbers
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # what JSON has no number for


def _integer(digits: str) -> int | float:
    """As in JSON; one that no record has is a floating-point number, which then is of the wrong kind."""
    return int(digits) if len(digits) < 18 else float(digits)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _number(value: Any) -> bool:
    if type(value) is str:
        return value in NOT_FINITE
    return type(value) in (int, float) and (not math.isfinite(value) or abs(value) <= 1e100)  # so are squares finite


def _columns(value: Any) -> bool:
    return list_of(text)(value) and len(set(value)) == len(value) and {"rank", "measured"} <= set(value)


def _skipped(value: Any) -> bool:
    fits = (text, list_of(_count), text)
    return isinstance(value, list) and len(value) == 3 and all(kind(x) for kind, x in zip(fits, value, strict=True))


def fields_of(kinds: Mapping[str, Kind], optional: Mapping[str, Kind]) -> Kind:
    """A dict with these keys, and perhaps those; others are ignored."""
    return lambda value: isinstance(value, dict) and misfit(value, kinds, optional) is None


def misfit(value: Mapping[str, Any], kinds: Mapping[str, Kind], optional: Mapping[str, Kind]) -> str | None:
    """The first key that is missing or whose value is not of its kind, in words."""
    for key, kind in kinds.items():
        if key not in value:
            return f"{key!r} is missing"
        if not kind(value[key]):
            return f"{key!r} can't be {json.dumps(value[key])[:40]}"
    for key, kind in optional.items():
        if key in value and not kind(value[key]):
            return f"{key!r} can't be {json.dumps(value[key])[:40]}"
    return None


_rank: Kind = lambda value: _count(value) and value > 0  # noqa: E731
_state, _words = one_of(LayerState), dict.fromkeys(("svd_optim", "torch", "python", "time", "optimizer", "mode"), text)
_condition = fields_of(
    {"name": text, "value": or_none(_number), "threshold": _number, "above": flag, "or_equal": flag, "margin": _number},
    {},
)
_decision = fields_of(
    {"action": one_of(Action), "reason": text, "conditions": list_of(_condition), "danger": flag,
     "rank": or_none(_rank), "attack": or_none(_condition)}, {},
)  # fmt: skip
_FLAGS: dict[type, Kind] = {bool: flag, str: text, int: _count}
_input = fields_of(
    {"state": _state, "analyses": _count},
    {"rank": _rank, **{key: _FLAGS[type(default)] for key, default in INFO_DEFAULTS.items()}},
)
RECORDS: dict[str, tuple[dict[str, Kind], dict[str, Kind]]] = {  # what is in each, and what may be
    "run": ({"schema": _count, "step": _count, "config": exactly(dict), "skipped": list_of(_skipped),
             "columns": _columns}, _words),
    "layer": ({"layer": _count, "name": text, "shape": list_of(_rank, length=2)}, {}),
    "metrics": ({"step": _count, "layer": _count, "state": _state, "rank": _rank},
                {"values": list_of(or_none(_number)), "spectrum": list_of(_number), "protected": flag,
                 "bytes": list_of(_count, length=len(BYTES)), "policy_input": _input, "decision": or_none(_decision)}),
    "analysis": ({"step": _count, "analyses": _count, "seconds": dict_of(_number), "seconds_total": _number}, {}),
    "event": ({"step": _count, "layer": text, "kind": text, "reason": text, "before": or_none(_state),
               "after": or_none(_state), "numbers": dict_of(_number)}, {}),
}  # fmt: skip


class NewerSchema(ValueError):
    """The log is of a version that is not known here."""


def parsed(line: str) -> dict[str, Any]:
    """The record in a line.

    Raises:
        NewerSchema: it begins a log of a newer version.
        ValueError: it is none, or not complete; the text says what is wrong with it.
    """
    try:
        record = json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON, or not whole") from None
    kind = record.get("record") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in RECORDS:
        raise ValueError("it is of no kind that is known")
    schema = record.get("schema")
    if kind == "run" and type(schema) is int and schema > SCHEMA:
        raise NewerSchema(f"the log has schema {schema}, written by svd_optim {record.get('svd_optim')}; "
                          f"this version reads up to {SCHEMA}: upgrade svd_optim")  # fmt: skip
    if problem := misfit(record, *RECORDS[kind]):
        raise ValueError(f"{kind}: {problem}")
    return record


def finite(value: Any) -> Any:
    """A number as it was before it was written."""
    return NOT_FINITE[value] if isinstance(value, str) else value
