"""What a file system may lack: locks (Lustre, NFS), syncing of folders (FUSE, CIFS), modes (CIFS, FAT).

Each is done where it can be done. Where it can't, the work goes on without, and a warning says once for each
folder what is missing and what follows from it. Other errors (a full disk, no permission) are raised.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_NOT_SUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_LOCKS = _NOT_SUPPORTED | {errno.ENOLCK}
_NO_SYNC = _NOT_SUPPORTED | {errno.EINVAL}
_NO_MODES = _NOT_SUPPORTED | {errno.EPERM}
_told: set[tuple[str, str]] = set()  # (folder, what it lacks)
_telling = threading.Lock()  # checkpoints are also saved in the background


def _lacks(folder: Path, what: str, error: OSError | ImportError, so: str) -> None:
    """Say once what is missing in a folder."""
    key = os.path.realpath(folder), what
    with _telling:
        known = key in _told
        _told.add(key)
    if not known:
        logger.warning("%s in %r: %s; %s", what, str(folder), error, so)


def try_lock(handle: int, folder: Path, so: str, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed, or its process ends.

    Args:
        folder: the one that a warning names, here and below.
        so: what follows where there are no locks.
        wait: until whoever holds it lets go.

    Returns:
        Whether it is locked now; ``None`` where there are no locks.
    """
    try:
        import fcntl  # POSIX only

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except ImportError as error:
        _lacks(folder, "files can't be locked", error, so)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _lacks(folder, "files can't be locked", error, so)
        return None
    return True


@contextmanager
def locked(path: Path, so: str) -> Iterator[bool]:
    """Alone in the block, where there are locks; says whether there are. A dead holder's lock is gone."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held = None
    try:
        held = try_lock(handle, path.parent, so, wait=True)
        yield bool(held)
    finally:
        if held:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold the handle too
        os.close(handle)


def sync(path: Path, folder: Path) -> None:
    """A file or a folder is on the disk."""
    is_folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # CIFS syncs nothing that is open read-only
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        what = "folders" if is_folder else "files"
        so = "after a power failure the newest checkpoints may be missing; what is there is verified when it is loaded"
        _lacks(folder, f"{what} can't be synced to the disk", error, so)
    finally:
        os.close(handle)


def set_mode(path: Path, mode: int, folder: Path) -> None:
    """As :func:`os.chmod`."""
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise
        so = f"files keep the modes that they are made with: others may not be able to read them (wanted: {mode:o})"
        _lacks(folder, "modes can't be changed", error, so)
