"""Progress bars for what takes longer than a second: first bases, ``factorize_``, checkpoints, model files.

They are drawn on standard error, by the main process, and leave nothing behind. There are none where standard error is
no terminal, in notebooks and CI, and while a live display of rich is shown; bars of tqdm make room. To do without them,
redirect standard error, or set ``TTY_INTERACTIVE=0`` (rich's own) or ``TERM=dumb``.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from types import TracebackType
from typing import Any

import rich
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from ..distributed import is_main_process
from ..records.progress import show_with

AFTER = 1.0  # seconds of work before there is a bar
EVERY = 0.1  # seconds between two drawings of it
_UNDRAWABLE = (OSError, ValueError)  # the terminal is gone, or closed, or can't encode it: the work goes on

clock = time.monotonic


def can_redraw(console: Console) -> bool:
    """Whether what this process prints there can be drawn over."""
    return console.is_interactive and not console.is_jupyter and not os.environ.get("CI") and is_main_process()


def tqdm_class() -> Any:
    """``tqdm.tqdm`` if somebody has imported it, else ``None``."""
    return getattr(sys.modules.get("tqdm"), "tqdm", None)


def without_tqdm(console: Console) -> AbstractContextManager[None]:
    """Inside, the bars of tqdm are cleared from where the console prints."""
    tqdm = tqdm_class()
    return nullcontext() if tqdm is None else tqdm.external_write_mode(file=console.file)


def _live_display() -> bool:
    """Whether rich redraws something at present, on whatever console: it redirects the standard streams meanwhile."""
    redirected = any(hasattr(stream, "rich_proxied_file") for stream in (sys.stdout, sys.stderr))
    return redirected or bool(getattr(rich.get_console(), "_live_stack", ()))  # there is no public interface for it


class Bar:
    """The bar for one piece of work (:data:`svd_optim.records.progress.Show`).

    It is drawn when an item is done, if it is time; no thread draws.
    """

    def __init__(self, what: str, items: int) -> None:
        self.what, self.items, self.done = what, items, 0
        self._when = math.inf  # it is drawn next
        self._progress: Progress | None = None
        self._shown = ExitStack()

    def __enter__(self) -> Callable[[], None]:
        self._when = clock() + AFTER
        return self._one_done

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(*_UNDRAWABLE):
            self._shown.close()

    def _one_done(self) -> None:
        self.done += 1
        now = clock()
        if now < self._when:
            return
        self._when = now + EVERY
        try:
            self._draw()
        except _UNDRAWABLE:
            self._when = math.inf

    def _draw(self) -> None:
        if self._progress is None:
            console = Console(stderr=True)
            in_background = threading.current_thread() is not threading.main_thread()
            if in_background or not can_redraw(console) or _live_display():
                self._when = math.inf
                return
            self._shown.enter_context(without_tqdm(console))
            columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False, get_time=clock
            )
            self._progress.add_task(self.what, total=self.items, completed=self.done)
            self._shown.enter_context(self._progress)
            console.show_cursor(True)  # a run that is killed can't restore it
        else:
            self._progress.update(self._progress.task_ids[0], completed=self.done, refresh=True)


show_with(Bar)
