"""A file that lines are appended to by one writer at a time."""

from __future__ import annotations

import logging
import os
import stat
from io import FileIO
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

from ..storage.file_system import try_lock

logger = logging.getLogger(__name__)

_NO_LOCKS = "two processes that log to one file there go unnoticed: give each a log of its own"


class LogFile:
    """Whole lines at the end of a file. Its lock ends with the process, so a dead writer blocks nobody.

    Where another process is writing to the file, this writer takes one of its own. In one process the newest
    writer has the file (a cell of a notebook that is run again), and the older one moves if it goes on.

    Args:
        path: of the file; its folders are made.

    Raises:
        OSError: the file can't be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._taken_by = ""  # who writes to the file now; empty: this one
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: FileIO | None = FileIO(path, "ab")
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            older = _writers.get(os.path.realpath(path))
            if older is not None:
                older._leave("a newer log of this process")
            if not self._lock(self._file):
                self._leave("another process")
                self.moved()
            elif self._file.tell() and not _ends_with_newline(path):
                self._file.write(b"\n")  # the line that a killed run left unfinished stays a line of its own

    def _lock(self, file: FileIO) -> bool:
        if try_lock(file.fileno(), self.path.parent, _NO_LOCKS) is False:
            return False
        _writers[os.path.realpath(self.path)] = self
        return True

    def _leave(self, to: str) -> None:
        self._taken_by = to
        self.close()

    def moved(self) -> bool:
        """Whether the file became somebody else's since the last time, and this writer has taken an empty one."""
        if not self._taken_by:
            return False
        shared, by, self._taken_by = self.path, self._taken_by, ""
        for number in count(2):
            self.path = shared.with_stem(f"{shared.stem}-{number}")
            try:
                self._file = FileIO(self.path, "xb")
            except FileExistsError:
                continue
            self._lock(self._file)
            break
        logger.warning("%s is written by %s: this run goes on in %s; give each its own", shared, by, self.path)
        return True

    def write(self, lines: bytes) -> None:
        """Hand them to the operating system, at once where it takes them so."""
        rest = memoryview(lines)
        while self._file is not None and rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Nothing more is written."""
        if self._file is not None:
            self._file.close()
            self._file = None


_writers: WeakValueDictionary[str, LogFile] = WeakValueDictionary()  # of this process, by the real paths


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _leave_to_parent() -> None:
    """In a forked child: what it keeps open would stay locked when its parent is killed and the run resumed."""
    for writer in [*_writers.values()]:
        writer._leave("the process that this one was forked from")
    _writers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
