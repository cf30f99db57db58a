"""Checkpoints where the file system lacks locks, syncing of folders or modes, and behind links."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import slow_except
from helpers_runs import Run, child, digest, leftovers, received, save_for_ever, save_some, straight

from svd_optim.storage import CheckpointError, export_safetensors
from svd_optim.storage import files as storage

LACKS = {"flock": "can't be locked", "fsync": "folders can't be synced", "chmod": "modes can't be changed"}
ERRORS = {
    "flock": (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK),
    "fsync": (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS),
    "chmod": (errno.EPERM, errno.ENOTSUP, errno.ENOSYS),
}
CASES = [(lack, number) for lack, numbers in ERRORS.items() for number in sorted(set(numbers))]


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def failing(number: int) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise error(number)

    return call


def failing_on_folders(number: int) -> Callable[[int], None]:
    fsync = os.fsync

    def call(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise error(number)
        fsync(handle)

    return call


@contextmanager
def lacking(**numbers: int) -> Iterator[None]:
    """A file system that fails so: flock, fsync of folders, chmod."""
    calls = {"flock": (fcntl, failing), "fsync": (os, failing_on_folders), "chmod": (os, failing)}
    with ExitStack() as stack:
        for name, number in numbers.items():
            module, how = calls[name]
            stack.enter_context(mock.patch.object(module, name, how(number)))
        yield


ALL = {"flock": errno.ENOSYS, "fsync": errno.EINVAL, "chmod": errno.EPERM}


def goes_on(folder: Path, tmp_path: Path) -> None:
    """What was saved there at step 60 is loaded, and the run goes on as if nothing had been."""
    run = Run.new("adamw", seed=7).load(folder).train(70)
    assert digest(run.save(tmp_path / "elsewhere")) == straight("adamw", 70)


@pytest.mark.parametrize(
    ("lack", "number"),
    slow_except(("flock", errno.ENOSYS), of=CASES),
    ids=[f"{a}-{errno.errorcode[b]}" for a, b in CASES],
)
def test_what_a_file_system_lacks_is_done_without_and_said_once(
    lack: str, number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.new("adamw").train(59)
    folder, other = tmp_path / "run", tmp_path / "other"
    with caplog.at_level(logging.WARNING), lacking(**{lack: number}):
        run.save(folder)
        run.train(60).save(folder)
        path = run.save(folder, keep=2)
        [said] = [message for message in caplog.messages if repr(str(folder)) in message]
        assert LACKS[lack] in said and os.strerror(number) in said
        run.save(other)
    assert len([message for message in caplog.messages if repr(str(other)) in message]) == 1
    assert sorted(entry.name for entry in folder.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]
    assert (folder / "latest").read_text() == f"{path.name}\n" and not leftovers(folder)
    goes_on(folder, tmp_path)


@pytest.mark.slow
def test_a_file_system_that_lacks_everything_still_keeps_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.new("adamw").train(60)
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING), lacking(**ALL):
        for _ in range(3):
            run.save(folder, keep=2)
        run.save(folder, keep=1, background=True).result()
        export_safetensors(run.model, tmp_path / "model.safetensors")
    said = [message for message in caplog.messages if repr(str(folder)) in message]
    assert len(said) == 3 and all(any(text in message for message in said) for text in LACKS.values())
    goes_on(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("flock", errno.EIO), ("fsync", errno.EIO), ("fsync", errno.ENOSPC), ("chmod", errno.EIO)],
)
def test_other_errors_of_a_file_system_fail_the_save(name: str, number: int, tmp_path: Path) -> None:
    run = Run.new("adamw").train(60)
    run.save(tmp_path / "run")
    with lacking(**{name: number}), pytest.raises(CheckpointError, match=os.strerror(number)):
        run.save(tmp_path / "run")
    goes_on(tmp_path / "run", tmp_path)


def test_without_locks_a_temporary_folder_is_left_alone_while_somebody_may_be_writing(tmp_path: Path) -> None:
    run = Run.new("adamw").train(1)
    living, dead = tmp_path / ".tmp-1-a", tmp_path / ".tmp-2-b"
    for folder in (living, dead):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-3-c").write_text("checkpoint-000009")  # on its way to latest
    hour_ago = time.time() - 1.1 * storage.STALE_SECONDS
    for path in (living, dead, dead / "model.safetensors"):  # of the living one a file was written to lately
        os.utime(path, (hour_ago, hour_ago))
    with lacking(**ALL):
        run.save(tmp_path)
    assert leftovers(tmp_path) and set(leftovers(tmp_path)) == {living.name, ".tmp-3-c"}
    run.save(tmp_path)  # with locks it is known that nobody lives
    assert not leftovers(tmp_path)


def save_for_ever_without(folder: str, kind: str, sender: Any) -> None:
    with lacking(**ALL):
        save_for_ever(folder, kind, sender)


def save_some_without(folder: str, count: int, sender: Any) -> None:
    with lacking(**ALL):
        save_some(folder, count, sender)


@pytest.mark.slow
def test_killed_at_any_moment_without_locks_syncing_and_modes(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(8):
        with child(save_for_ever_without, str(tmp_path), "adamw") as (process, receiver):
            first = receiver.recv()
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.join()
            reported = max([first, *received(receiver)])
        assert Run.new("adamw", seed=7).load(tmp_path).step in (reported, reported + 1)
    run = Run.new("adamw", seed=7).load(tmp_path)
    with lacking(**ALL):
        assert digest(run.save(tmp_path)) == straight("adamw", run.step)


@pytest.mark.slow
def test_writers_without_locks_take_no_checkpoint_from_each_other(tmp_path: Path) -> None:
    with ExitStack() as all_of_them:
        children = [all_of_them.enter_context(child(save_some_without, str(tmp_path), 10)) for _ in range(3)]
        sent = [received(receiver) for _, receiver in children]
    names = [name for messages in sent for name in messages[0]]
    assert len(set(names)) == 30
    assert (tmp_path / "latest").read_text().strip() == max(names)
    assert not leftovers(tmp_path)
    for name in names:
        assert 1 <= Run.new("adamw", seed=7).load(tmp_path / name).step <= 10


# ---- links -----------------------------------------------------------------------------------------


def linked_files(checkpoint: Path, elsewhere: Path) -> None:
    """As a model hub keeps them: a folder of links to blobs."""
    elsewhere.mkdir()
    for i, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(file, elsewhere / str(i))
        file.symlink_to(Path("..", "..", elsewhere.name, str(i)))


def linked_folder(checkpoint: Path, elsewhere: Path) -> None:
    shutil.move(checkpoint, elsewhere)
    checkpoint.symlink_to(elsewhere)


def linked_latest(checkpoint: Path, elsewhere: Path) -> None:
    latest = checkpoint.parent / "latest"
    shutil.move(latest, elsewhere)
    latest.symlink_to(elsewhere)


def latest_is_a_link_to_the_folder(checkpoint: Path, elsewhere: Path) -> None:
    (checkpoint.parent / "latest").unlink()
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)


@pytest.mark.slow
@pytest.mark.parametrize("link", [linked_files, linked_folder, linked_latest, latest_is_a_link_to_the_folder])
def test_links_are_followed_and_saving_there_goes_on(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run.new("adamw").train(60)
    link(run.save(folder), tmp_path / "blobs")
    goes_on(folder, tmp_path)
    goes_on(folder / "checkpoint-000001", tmp_path)
    target = run.save(folder, keep=2)
    assert (folder / "latest").read_text().strip() == target.name == "checkpoint-000002"
    assert not (folder / "latest").is_symlink()
    goes_on(folder / "checkpoint-000001", tmp_path)


@pytest.mark.parametrize("target", ["nothing", "/dev/zero", "pipe", "a folder", "itself"])
def test_links_to_what_is_no_file_are_refused(target: str, tmp_path: Path) -> None:
    path = Run.new("adamw").train(1).save(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a folder").mkdir()
    for name in ("model.safetensors", "manifest.json"):
        (path / name).unlink()
        (path / name).symlink_to(path / name if target == "itself" else tmp_path / target)
        with pytest.raises(
            CheckpointError, match=name.replace(".", r"\.") if name[:3] == "mod" else "manifest|no check"
        ):
            Run.new("adamw").load(path)
