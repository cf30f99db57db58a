"""Long work, item by item: the lower floors say what they go through, the console shows how far they are.

No file that does such work knows how it is shown (:mod:`svd_optim.console.bars`), or whether.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
Show = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""What is done, and to how many items; inside it gives what is to be called when one more is done."""

_show: Show | None = None


def show_with(show: Show | None) -> Show | None:
    """Show all work from now on with ``show``, ``None``: not at all. Returns what has shown it before."""
    global _show
    before, _show = _show, show
    return before


@contextmanager
def tracked(items: Collection[T], what: str) -> Iterator[Iterator[T]]:
    """The items, one by one, while it is shown how many are done.

        with tracked(layers, "first bases") as each:
            for layer in each:

    The block emits no events and calls nothing of the user's: what these print would go into what is shown.
    """
    if _show is None or len(items) < 2:
        yield iter(items)
        return
    with _show(what, len(items)) as one_done:
        yield _counted(items, one_done)


def _counted(items: Collection[T], one_done: Callable[[], None]) -> Iterator[T]:
    for item in items:
        yield item
        one_done()
