"""The campaign of faults: real runs, what can happen to them, and what was lost.

    python benchmarks/faults.py                         # all of it: six minutes on one core
    python benchmarks/faults.py --only kills writers    # some of it
    python benchmarks/faults.py --smoke                 # a few of each

With ``--json`` every fault is kept as soon as it is done, and none that is there is tried again.

A small network goes through its whole life (dense, descending, factorized) in 120 steps, and saves
checkpoints. Whatever ends otherwise than it should counts as lost, is printed, and makes the exit
status 1. Needs a POSIX system: children are really killed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from public_reports import REPORTS
from results_file import about_line, open_results, output_file
from situations import OWN, REFUSED, RIGHT, WRONG
from small_run import END, KINDS, STAGES, Run, expect, same
from svd_optim import (
    load_checkpoint,
    load_model,
)
from svd_optim.factors import FactorizedLinear
from svd_optim.records import LayerState
from svd_optim.storage import CheckpointError

# ---- the straight run --------------------------------------------------------------------------------


def digest(checkpoint: Path) -> str:
    """Equal for equal states."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


@functools.cache
def straight(kind: str, dtype: torch.dtype, until: int, dropout: float = 0.1, runs: type[Run] = Run) -> str:
    """The digest of an uninterrupted run's state at a step."""
    with tempfile.TemporaryDirectory() as folder:
        return digest(runs.new(kind, dtype, dropout=dropout).train(until).save(Path(folder)))


# ---- what happened -----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How often a fault was made, and each time that something was lost."""

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    notes: str = ""
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)  # of situations: source, title, verdict

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One try; what is raised inside counts as lost."""
        self.tried += 1
        try:
            yield
        except Exception as error:
            self.lost.append(f"{what}: {type(error).__name__}: {error}")


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".tmp-")]


# ---- children ----------------------------------------------------------------------------------------


def children() -> Any:
    """Processes that start fast, torch loaded, and share nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "svd_optim"])
    return context


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)


def save_for_ever(folder: str, kind: str, sender: Any, runs: type[Run] = Run) -> None:
    """Train on from the latest checkpoint and save after every step, until killed."""
    _quiet()
    run = runs.new(kind, seed=7)
    if any(Path(folder).glob("checkpoint-*")):
        run.load(Path(folder))
    else:
        run = runs.new(kind)
    while True:
        run.train(run.step + 1).save(Path(folder), keep=3)
        sender.send(run.step)


def save_some(folder: str, count: int, sender: Any, runs: type[Run] = Run) -> None:
    _quiet()
    run = runs.new("adamw")
    sender.send([run.train(run.step + 1).save(Path(folder)).name for _ in range(count)])


def save_when_interrupted(folder: str, kind: str, sender: Any) -> None:
    """Train; at Ctrl-C save, wherever it struck."""
    _quiet()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run.new(kind, dropout=0.0)
    try:
        sender.send("ready")
        while True:
            run.train(END + 1000)
    except KeyboardInterrupt:
        run.step = run.wrapper.steps
        run.model.zero_grad()
        run.save(Path(folder))
        sender.send(run.step)


def resume(folder: str, kind: str, dtype: torch.dtype, until: int, sender: Any) -> None:
    """Load, train on, save: the digest."""
    _quiet()
    sender.send(digest(Run.new(kind, dtype, seed=7).load(Path(folder)).train(until).save(Path(folder))))


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """(process, what it sends); killed at the end if it still runs."""
    context = children()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        yield process, receiver
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def received(receiver: Any) -> list[Any]:
    """All that was sent before the end."""
    messages = []
    with suppress(EOFError, OSError):
        while True:
            messages.append(receiver.recv())
    return messages


# ---- the faults --------------------------------------------------------------------------------------


def resumes(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Stop, and go on in another process: before, during and after a switch, and during protection."""
    outcome = Outcome("resume in a new process")
    cases = [(k, d, s) for k in KINDS for d in (torch.float32, torch.bfloat16) for s in (*STAGES, "protected")]
    rng.shuffle(cases)
    for kind, dtype, stage in cases[:count]:
        with outcome.attempt(f"{kind}, {dtype}, {stage}"):
            run = Run.new(kind, dtype).train(STAGES.get(stage, STAGES["descending"]))
            if stage == "protected":
                run.wrapper.protect_("*", rank=4)
            else:
                states = {row.state for row in run.wrapper.why()}
                expect(LayerState(stage) in states or stage == "dense", f"not {stage} at {run.step}")
            where = folder / f"{kind}-{dtype}-{stage}"
            run.save(where)
            with child(resume, str(where), kind, dtype, END) as (_, receiver):
                [resumed] = received(receiver)
            expect(resumed == digest(run.train(END).save(where)), "the resumed run is another one")
    outcome.notes = f"{', '.join(KINDS)}; two types; every stage: after {END} steps the straight run's bytes"
    return outcome


def kills(count: int, rng: random.Random, folder: Path) -> Outcome:
    """kill -9 of a process that trains and saves after each step; the next one goes on."""
    outcome = Outcome("kill -9")
    torn = 0
    for i in range(count):
        with outcome.attempt(f"kill {i}"), child(save_for_ever, str(folder), "adamw") as (process, receiver):
            first = receiver.recv()
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.join()
            reported = max([first, *received(receiver)])
            torn += bool(leftovers(folder))
            loaded = Run.new("adamw", seed=7).load(folder).step
            expect(loaded in (reported, reported + 1), f"step {reported} was saved, {loaded} is loaded")
    with outcome.attempt("the whole run"):
        run = Run.new("adamw", seed=7).load(folder)
        expect(digest(run.save(folder)) == straight("adamw", torch.float32, run.step), "not the straight run")
        expect(not leftovers(folder), "leftovers after a save")
        outcome.notes = f"{torn} in the middle of a save; after {run.step} steps the straight run's bytes"
    return outcome


def full_disks(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Files may not grow beyond a random size: saving fails, says so, and loses nothing."""
    outcome = Outcome("full disk")
    run = Run.new("adamw").train(60)
    wanted = digest(run.save(folder))
    largest = max(file.stat().st_size for file in (folder / "checkpoint-000001").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i in range(count):
        with outcome.attempt(f"limit {i}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(largest), hard))
            try:
                run.save(folder)
            except CheckpointError:
                failed = True
            else:
                failed = False
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            expect(failed, "a checkpoint that does not fit was saved")
            expect(not leftovers(folder), "leftovers")
            fresh = Run.new("adamw", seed=7).load(folder)
            expect(digest(fresh.save(folder, keep=1)) == wanted, "the last checkpoint is another one")
    outcome.notes = "an error that says so; the last checkpoint still loads"
    return outcome


def bad_folders(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Paths that are files, that can't be made or written, that are not there or empty."""
    outcome = Outcome("bad folders")
    file = folder / "file"
    file.write_text("what was there")
    (folder / "empty").mkdir()
    (folder / "locked").mkdir(mode=0o500)
    run = Run.new("adamw").train(3)
    before = run.state()
    saves = [file, file / "below", Path("/dev/null/x"), Path("/proc/svd_optim")]
    saves += [folder / "locked"] if os.geteuid() else []  # nothing is locked for root
    for path in saves:
        with outcome.attempt(f"save to {path}"):
            error = _error(lambda path=path: run.save(path))
            expect(str(path) in error, f"the error does not name the path: {error}")
    for path in (file, folder / "missing", folder / "empty", Path("/dev/null")):
        for load in (run.load, lambda path: load_model(path, run.model)):
            with outcome.attempt(f"load from {path}"):
                error = _error(lambda path=path, load=load: load(path))
                expect(str(path) in error, f"the error does not name the path: {error}")
    with outcome.attempt("afterwards"):
        expect(same(before, run.state()), "something was changed")
        expect(file.read_text() == "what was there", "the file was changed")
    return outcome


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    raise RuntimeError("no CheckpointError")


def writers(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Several processes save into one folder at the same time."""
    outcome = Outcome("four writers at once")
    with ExitStack() as all_of_them:
        receivers = [all_of_them.enter_context(child(save_some, str(folder), count))[1] for _ in range(4)]
        sent = [received(receiver) for receiver in receivers]
    with outcome.attempt("names"):
        names = [name for messages in sent for name in messages[0]]
        expect(len(set(names)) == 4 * count, f"{4 * count} saves made {len(set(names))} checkpoints")
        expect((folder / "latest").read_text().strip() == max(names), "latest is not the last")
        expect(not leftovers(folder), "leftovers")
    for path in sorted(folder.glob("checkpoint-*")):
        with outcome.attempt(path.name):
            Run.new("adamw", seed=7).load(path)
    return outcome


def corruptions(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Mutated checkpoints, half of them signed as if somebody meant it: only CheckpointError, nothing touched."""
    outcome = Outcome("corrupted checkpoints")
    fuzzer = Fuzzer(folder)
    refused = 0
    for _ in range(count):
        what: list[str] = []
        with outcome.attempt("a mutation"):
            try:
                refused += fuzzer.one(rng, what)
            except Exception as error:
                raise RuntimeError(f"{', '.join(what)}: {error!r}") from error
    outcome.notes = f"{refused:,} refused, the rest harmless or signed and plausible"
    return outcome


def nonfinite(count: int, rng: random.Random, folder: Path) -> Outcome:
    """NaN or Inf in a gradient, a basis, a moment or a weight, at every stage: training goes on, and says so."""
    outcome = Outcome("NaN and Inf in training")
    cases = [(k, s, t, v) for k in ("adamw", "muon") for s in STAGES
             for t in ("gradient", "basis", "moment", "weight") for v in (math.nan, math.inf)]  # fmt: skip
    rng.shuffle(cases)
    for kind, stage, target, value in cases[:count]:
        with outcome.attempt(f"{kind}, {stage}, {value} in a {target}"):
            run = Run.new(kind, dropout=0.0).train(STAGES[stage])
            layer = run.wrapper.layers["mid"]
            poisoned = _poison(run, target, value)
            run.train(run.step + 50)
            reported = {event.layer for event in run.wrapper.events if event.kind == "nonfinite"}
            if target == "basis" or (target == "gradient" and poisoned is FactorizedLinear):
                expect(run.finite(), "a weight is no longer finite")  # the bare optimizer's would be
                expect(layer.history[-1].measured > 0, "not measured any more")
            else:
                expect("mid" in reported, "nobody said so")
    outcome.notes = "a factorized layer skips such a step; a dense weight is the base optimizer's"
    return outcome


def _poison(run: Run, target: str, value: float) -> type:
    layer = run.wrapper.layers["mid"]
    if target == "gradient":
        run.backward()
        assert layer.weight.grad is not None
        layer.weight.grad[0, 0] = value
        for optimizer in run.optimizers:
            optimizer.step()
        run.step += 1
    elif target == "basis":
        if layer.cached is not None:
            layer.cached.U[0, 0] = value
    elif target == "moment":
        state = run.wrapper.state[layer.weight]
        next(v for v in state.values() if v.ndim == 2)[0, 0] = value
    else:
        with torch.no_grad():
            layer.weight[0, 0] = value
    return type(layer.module)


def failing_decompositions(count: int, rng: random.Random, folder: Path) -> Outcome:
    """svd, eigh, qr and their like raise, or return NaN, at random, for the whole of a run."""
    outcome = Outcome("failing decompositions")
    failures = warnings = 0
    functions = {name: getattr(torch.linalg, name) for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr")}

    def flaky(name: str, share: float) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failures
            result = functions[name](*args, **kwargs)
            if rng.random() >= share:
                return result
            failures += 1
            if rng.random() < 0.5:
                raise torch.linalg.LinAlgError(f"{name} did not converge")
            if isinstance(result, Tensor):
                return result * math.nan
            return type(result)([t * math.nan if t.is_floating_point() else t for t in result])

        return call

    for i in range(count):
        share = rng.choice([0.02, 0.2, 1.0])
        with outcome.attempt(f"run {i}, {share} of all fail"):
            run = Run.new(rng.choice(KINDS), rng.choice([torch.float32, torch.bfloat16])).train(rng.randrange(140))
            with mock.patch.multiple(torch.linalg, **{name: flaky(name, share) for name in functions}):
                run.train(run.step + 60)
            expect(run.finite(), "a weight is no longer finite")
            warnings += sum(event.kind == "decomposition_failed" for event in run.wrapper.events)
            run.train(run.step + 60)
            expect(run.finite(), "a weight is no longer finite afterwards")
            expect(all(layer.failures == 0 for layer in run.wrapper.layers.values()), "not over when it was over")
    outcome.notes = f"{failures:,} failures, {warnings} warnings"
    return outcome


def interrupts(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Ctrl-C at random moments: what is saved then goes on as if nothing had happened."""
    outcome = Outcome("Ctrl-C")
    for i in range(count):
        kind = rng.choice(("adamw", "muon"))
        where = folder / str(i)
        with outcome.attempt(f"{kind}, {i}"), child(save_when_interrupted, str(where), kind) as (process, receiver):
            receiver.recv()
            time.sleep(rng.uniform(0, 0.5))
            os.kill(process.pid, signal.SIGINT)
            [step] = received(receiver)
            resumed = Run.new(kind, seed=7, dropout=0.0).load(where)
            until = step + 15
            expect(
                digest(resumed.train(until).save(where)) == straight(kind, torch.float32, until, 0.0),
                f"interrupted at step {step}, and another run since",
            )
    outcome.notes = "saved then, resumed, 15 steps later the straight run's bytes"
    return outcome


def long_run(count: int, rng: random.Random, folder: Path) -> Outcome:
    """Many steps of one run: memory, time and checkpoints don't grow."""
    outcome = Outcome(f"{count:,} steps")
    with outcome.attempt("long run"):
        run = Run.new("adamw").train(count // 10)
        early = _footprint(run, folder)
        times = []
        for _ in range(count // 10, count, count // 100):
            start = time.perf_counter()
            run.train(run.step + count // 100)
            times.append(time.perf_counter() - start)
        late = _footprint(run, folder)
        quarter = len(times) // 4
        ratio = statistics.median(times[-quarter:]) / statistics.median(times[:quarter])
        outcome.notes = (
            f"resident {early[0] / 2**20:.1f} → {late[0] / 2**20:.1f} MiB, checkpoint {early[1] / 1e3:.0f} → "
            f"{late[1] / 1e3:.0f} kB, seconds a step × {ratio:.2f}"
        )
        expect(run.finite(), "a weight is no longer finite")
        expect(late[0] - early[0] < max(8 * 2**20, early[0] // 50), "memory grows")
        expect(late[1] < 1.5 * early[1], "checkpoints grow")
    return outcome


def _footprint(run: Run, folder: Path) -> tuple[int, int]:
    """(resident bytes, bytes of a checkpoint)"""
    path = run.save(folder, keep=1)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, sum(file.stat().st_size for file in path.iterdir())


def tried_situations(count: int, rng: random.Random, folder: Path) -> Outcome:
    """What goes wrong elsewhere: as without the wrapper, or refused in words that say why."""
    outcome = Outcome("situations")
    every = [*OWN, *REPORTS]
    for i in sorted(rng.sample(range(len(every)), min(count, len(every)))):
        situation, verdict, where = every[i], WRONG, folder / str(i)
        where.mkdir()
        with outcome.attempt(situation.name):
            verdict = situation.attempt(where)
        outcome.verdicts.append((situation.source, situation.title, verdict))
    found = Counter(verdict for *_, verdict in outcome.verdicts)
    outcome.notes = f"{found[RIGHT]} right, {found[REFUSED]} refused clearly, {found[WRONG]} wrong"
    return outcome


# ---- mutations ---------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**70, -(2**63), 0.5, 1e308, "", "nan", "../../x", "/etc/passwd", "\x1b[31mred",
    "__metadata__", "[/x]", "a" * 5000, [], {}, [[[[]]]], [None], {"": None}, {"$": "tensor"}, {"$": "x"}, {"$": []},
    {"$": "tuple", "v": [1]}, {"$": "float", "v": "nan"}, {"$": "float", "v": "inf"}, {"$": "dict", "v": [[{}, 1]]},
)  # fmt: skip

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError)


class Fuzzer:
    """Mutates checkpoints of a factorized and of a dense run and loads them.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.originals = []
        for kind, stop in (("both", 130), ("adamw", 70), ("muon", 30)):
            run = Run.new(kind).train(stop)
            if stop == 70:
                run.wrapper.protect_("up", rank=4)
            self.originals.append((kind, run.save(folder / kind)))
        self.targets: dict[tuple[str, bool], Run] = {}  # (kind, running or new)

    def one(self, rng: random.Random, what: list[str]) -> bool:
        """Mutate and load one checkpoint. Returns whether it was refused; ``what`` tells what was done."""
        kind, original = rng.choice(self.originals)
        path = self.folder / "mutated"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(original, path)
        for _ in range(rng.choice((1, 1, 1, 2))):
            with suppress(*UNREADABLE):  # after another mutation
                rng.choice((mutate_bytes, mutate_tree, mutate_tree, mutate_tensor, mutate_tensor))(path, rng, what)
        running = rng.random() < 0.5
        run = self.targets.pop((kind, running), None) or Run.new(kind, seed=7)
        if running and run.step == 0:
            run.load(original)
        before = run.state()
        try:
            if rng.random() < 0.1:
                load_model(path, run.model)
            else:
                load_checkpoint(path, run.model, run.optimizers)
        except CheckpointError:
            expect(same(before, run.state()), "refused, and yet something was changed")
            self.targets[kind, running] = run
            return True
        return False


def contents(file: Path) -> bytes:
    """Of a regular file: an earlier mutation may have left a pipe, or a link to /dev/zero."""
    if not stat.S_ISREG(file.lstat().st_mode):
        raise OSError("no regular file")
    return file.read_bytes()


def mutate_bytes(path: Path, rng: random.Random, what: list[str]) -> None:
    """Damage: what disks, networks and people do to files."""
    file = path / rng.choice(("manifest.json", "model.safetensors", "state.safetensors"))
    data = bytearray(contents(file))
    how = rng.choice(("flip", "truncate", "append", "delete", "swap", "header", "link", "folder", "pipe", "deep"))
    what.append(f"{how} {file.name}")
    if how == "flip":
        for _ in range(rng.choice((1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif how == "truncate":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif how == "append":
        file.write_bytes(data + bytes(rng.randrange(1, 100)))
    elif how == "swap":
        other = path / rng.choice(("model.safetensors", "state.safetensors"))
        file.write_bytes(contents(other))
    elif how == "header":
        length = rng.choice((0, 1, len(data), 2**31, 2**63, 2**64 - 1))
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
    elif how == "deep":
        (path / "manifest.json").write_text(rng.choice('[{"') * rng.choice((10, 100_000)))
    else:
        file.unlink()
        if how == "link":
            file.symlink_to("/dev/zero")
        elif how == "folder":
            file.mkdir()
        elif how == "pipe":
            os.mkfifo(file)


def mutate_tree(path: Path, rng: random.Random, what: list[str]) -> None:
    """Another value, or none, somewhere in the manifest; signed again."""
    body = json.loads(contents(path / "manifest.json"))["body"]
    at, key = body, "files"
    while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.9:
        at, key = at[key], rng.choice(list(at[key]) if isinstance(at[key], dict) else range(len(at[key])))
    how = rng.choice(("replace", "replace", "delete", "add", "copy"))
    what.append(f"{how} {key!r} in the manifest")
    value = rng.choice(HOSTILE)
    if how == "replace":
        at[key] = value
    elif how == "delete":
        del at[key]
    elif isinstance(at, dict):
        at[rng.choice(("../../x", "\x1b]0;x\x07", "__metadata__", "[/x]", "$"))] = value if how == "add" else at[key]
    else:
        at.append(value if how == "add" else at[key])
    sign(path, body)


def mutate_tensor(path: Path, rng: random.Random, what: list[str]) -> None:
    """Other numbers, another shape, type or name; described and signed again."""
    name = rng.choice(("model.safetensors", "state.safetensors"))
    tensors = safetensors.torch.load(contents(path / name))
    key = rng.choice(sorted(tensors))
    X = tensors[key]
    changes: dict[str, Callable[[], Tensor]] = {
        "nan": lambda: torch.full_like(X.float(), math.nan).to(X.dtype),
        "inf": lambda: _with_one(X, math.inf),
        "zero": lambda: torch.zeros_like(X),
        "huge": lambda: (X.double() * 1e20).to(X.dtype),
        "one more": lambda: torch.cat([X.flatten(), X.flatten()[:1]]),
        "flat": lambda: X.flatten(),
        "transposed": lambda: X.mT.contiguous() if X.ndim > 1 else X[None],
        "empty": lambda: X.flatten()[:0],
        "float64": lambda: X.double(),
        "integers": lambda: X.to(torch.int64),
        "booleans": lambda: X.bool(),
        "another": lambda: tensors[rng.choice(sorted(tensors))].clone(),
    }
    how = rng.choice((*changes, "dropped", "renamed", "added"))
    what.append(f"{key!r} {how}")
    if how == "dropped":
        del tensors[key]
    elif how == "renamed":
        tensors[rng.choice(("../../x", "/extra", "\x1b[2J", "[/x]", key + ".U"))] = tensors.pop(key)
    elif how == "added":
        tensors[rng.choice(("../../x", "/extra", "\x1b[2J", "[/x]", key + ".U"))] = X.clone()
    else:
        tensors[key] = changes[how]()
    safetensors.torch.save_file(tensors, path / name)
    body = json.loads(contents(path / "manifest.json"))["body"]
    body["files"][name]["bytes"] = (path / name).stat().st_size
    body["files"][name]["tensors"] = {
        key: {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "sha256": hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        }
        for key, value in tensors.items()
    }
    sign(path, body)


def _with_one(X: Tensor, value: float) -> Tensor:
    changed = X.clone().flatten()
    if X.is_floating_point():
        changed[:1] = value
    return changed.reshape(X.shape)


def sign(path: Path, body: Any) -> None:
    """A manifest as the library writes it."""
    canonical = json.dumps(body, separators=(",", ":"))
    sha256 = hashlib.sha256(canonical.encode()).hexdigest()
    (path / "manifest.json").write_text(f'{{"sha256":"{sha256}","body":{canonical}}}\n')


# ---- the campaign ------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[int, random.Random, Path], Outcome], int, int]] = {  # with counts, full and smoke
    "resumes": (resumes, 24, 2),
    "kills": (kills, 200, 3),
    "disks": (full_disks, 200, 3),
    "folders": (bad_folders, 1, 1),
    "writers": (writers, 25, 2),
    "corruptions": (corruptions, 10_000, 30),
    "nonfinite": (nonfinite, 48, 4),
    "decompositions": (failing_decompositions, 60, 2),
    "interrupts": (interrupts, 200, 2),
    "situations": (tried_situations, 1000, 6),  # as many as there are
    "long": (long_run, 20_000, 200),
}


def situations_table(verdicts: Iterable[Sequence[str]]) -> Table:
    """How many of each verdict, of this repository's own situations and of public reports."""
    table = Table("situations", "tried", "right", "refused clearly", "wrong")
    kinds = (("this repository's own", False), ("public reports", True), ("all", None))
    for kind, public in kinds:
        found = Counter(verdict for source, _, verdict in verdicts if public is None or bool(source) == public)
        table.add_row(kind, *(str(n) for n in (found.total(), found[RIGHT], found[REFUSED], found[WRONG])))
    return table


def main() -> int:
    """Try what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = tuple(FAULTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="FAULT", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few of each")
    parser.add_argument("--json", type=output_file, help="keep the figures here, and go on from those that are there")
    args = parser.parse_args()
    _quiet()
    console = Console()
    store = open_results(parser, args.json, {"seed": args.seed, "counts": "a few" if args.smoke else "full"})
    for name in args.only:
        if not store.has(name=name):
            fault, full, few = FAULTS[name]
            console.print(f"{name} ...")
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                outcome = fault(few if args.smoke else full, random.Random(args.seed), Path(folder))
            store.add({"name": name, "seconds": time.perf_counter() - start, **asdict(outcome)})
    table = Table("fault", "tried", "survived", "lost", "notes")
    for row in store.records:
        tried, lost = row["tried"], len(row["lost"])
        table.add_row(row["fault"], f"{tried:,}", f"{tried - lost:,}", f"{lost:,}", row["notes"])
    console.print(table)
    for row in store.records:
        if row["verdicts"]:
            console.print(situations_table(row["verdicts"]))
    console.print(f"{sum(row['seconds'] for row in store.records):.0f} s; {about_line(store.about)}", highlight=False)
    for row in store.records:
        for line in row["lost"][:10]:
            console.print(Text(f"lost: {row['fault']}: {line}"))
    return int(any(row["lost"] for row in store.records))


if __name__ == "__main__":
    sys.exit(main())
