"""Names of layers in few cells, so that they still tell layers apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len, set_cell_size

from ..records import clean

Parts = list[list[str]]  # of each name


def layer_name(name: str) -> str:
    return clean(name) or "(model)"  # the model itself may be the layer; its name is empty


def shorten(text: str, width: int, head: int | None = None) -> str:
    """``text`` in at most ``width`` cells, ``…`` in the middle, ``head`` cells before it."""
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, width)
    head = width // 2 if head is None else head
    tail = width - 1 - head
    return set_cell_size(text, head) + "…" + set_cell_size(text[::-1], tail)[::-1]


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Each name in at most ``width`` cells, and different names differently if that can be had.

    What tells layers apart goes last. Given up, in all names alike and no more than needed, are what they all end in
    (and ``.weight``), then the letters of the parts but their first few, from the left: ``model.layers.7.attn.q_proj``
    becomes ``m.layers.7.attn.q_proj``, and ``m.l.7.a.q_proj`` in the end. Those that even so are too long are cut in
    the middle.
    """
    levels = [[".".join(part) for part in parts] for parts in _shorter([name.split(".") for name in names])]
    least = levels[-1]
    fit = [i for i, name in enumerate(least) if cell_len(name) <= width]
    level = next(level for level in levels if all(cell_len(level[i]) <= width for i in fit))
    whole = {i: level[i] for i in fit}
    best: list[str] = []
    for candidates in (least, names):
        for head in sorted(range(1, max(width - 1, 2)), key=lambda h: abs(h - width // 2)):
            short = [whole[i] if i in whole else shorten(name, width, head) for i, name in enumerate(candidates)]
            if len(set(short)) == len(set(names)):
                return short
            best = max(best, short, key=lambda x: len(set(x)))
    return best


def _shorter(parts: Parts) -> Iterator[Parts]:
    """The names with less and less in them, as different as they were."""
    yield parts
    parts = _without_ends(parts)
    yield parts
    for depth in range(max(map(len, parts), default=0) - 1):
        inner = [part[depth] for part in parts if len(part) > depth + 1]
        short = _prefixes(inner)
        parts = [[*p[:depth], short[p[depth]], *p[depth + 1 :]] if len(p) > depth + 1 else p for p in parts]
        yield parts


def _without_ends(parts: Parts) -> Parts:
    """Without the last parts that say nothing: those of all names, and ``weight``."""
    different = len(set(map(tuple, parts)))
    while different > 1:
        ends = {part[-1] for part in parts}
        last = ends.pop() if len(ends) == 1 else "weight"
        without = [part[:-1] if part[-1] == last else part for part in parts]
        if without == parts or not all(without) or len(set(map(tuple, without))) < different:
            break
        parts = without
    return parts


def _prefixes(words: Sequence[str]) -> dict[str, str]:
    """For each word a beginning of it that no other one has, as short as can be; numbers are whole."""
    short: dict[str, str] = {word: word for word in words if word.isdigit()}
    taken = set(short)
    for word in words:
        if word not in short:
            lengths = range(1, len(word) + 1)
            short[word] = next((word[:n] for n in lengths if word[:n] not in taken and word[:n] not in words), word)
            taken.add(short[word])
    return short
