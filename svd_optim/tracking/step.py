"""One step of a wrapped optimizer: what comes before, during and after the base optimizer's own.

What a fault may do to it:

- what a closure or a hook raises leaves weights and measurements as they were;
- Ctrl-C, and what a listener raises, comes when the step is whole: what is saved then is the undisturbed run;
- an error in the middle of a switch undoes all of it (:mod:`.transactions`);
- a factorized layer skips a step that is NaN or Inf, and so do its moments; after ``patience`` intervals in a row that
  had such steps it becomes dense again (:mod:`.guards`);
- a decomposition that fails or gives NaN is tried again in float64; else the old basis stays, and after three failures
  in a row a warning names the layer (:mod:`svd_optim.linalg.fallback`).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

from ..factors.tangent_step import FactorBatch, all_lr_zero
from ..linalg import full_precision
from .controller import Controller
from .fingerprints import require_found
from .transactions import uninterrupted


class StepInProgress:
    """Measures gradients and enters the factors before the base optimizer's update, and leaves the factors after it.

    If anything raises before the factors are left, all of that is undone. In a step without gradients, or with every
    learning rate 0, only the base optimizer acts, and the step does not count.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller
        self.batches: list[FactorBatch] | None = None  # None: this step does not count
        self._factors_left = False
        self._signals_deferred = ExitStack()
        layers = controller.layers.values()
        self._before = [
            (layer, {name: getattr(layer, name) for name in ("cached", "sums", "outside", "loss_metric", "faded")})
            for layer in layers
        ]

    def _counts(self) -> bool:
        return self.controller.has_gradients() and not all_lr_zero(self.controller.base.param_groups)

    def measure(self) -> None:
        """Measure the gradients, as soon as they are there."""
        self.controller.drop_changed()
        if self._counts():
            self.controller.journal.start_clock()
            with torch.no_grad(), full_precision():
                self.controller.measure()

    def enter_factors(self) -> None:
        """Just before the base optimizer's update. From here to the end of the step signals are deferred."""
        if self._counts():
            require_found(self.controller)
            self._signals_deferred.enter_context(uninterrupted())
            with torch.no_grad(), full_precision():
                self.controller.note_moves()
                self.batches = self.controller.enter_factors()

    def leave_factors(self) -> None:
        """Just after the base optimizer's update."""
        if self.batches is not None:
            with torch.no_grad(), full_precision():
                self.controller.leave_factors(self.batches)
        self._factors_left = True
        self._before.clear()  # with it the bases that a refresh replaces

    def advance(self) -> None:
        """Once the layers have their new weights: descend, analyze, act."""
        if self.batches is not None:
            with torch.no_grad(), full_precision():
                self.controller.advance()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._signals_deferred:
            if error is None or self._factors_left:
                return
            for layer, measured in self._before:
                vars(layer).update(measured)
            with torch.no_grad():
                for batch in self.batches or ():
                    batch.restore_()


def _patched_step(base: Optimizer) -> Callable[..., Any] | None:
    """The step that somebody has put on the instance, in place of or around its class's.

    A scheduler that was built on the base has put its own there, which only notes that it was called.
    """
    patched: Callable[..., Any] | None = vars(base).get("step")
    if getattr(patched, "_wrapped_by_lr_sched", False) and getattr(patched, "__wrapped__", None) is type(base).step:
        return None
    return patched


# Of what torch puts around the step of each class, to run hooks. Others may have put something else around that.
_RUNS_HOOKS = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _hooks(base: Optimizer, kind: str) -> list[Callable[..., Any]]:
    """The base's own; none where its class is a wrapper that has never called ``Optimizer.__init__``."""
    return list(getattr(base, f"_optimizer_step_{kind}_hooks", {}).values())


@contextmanager
def _no_hooks(base: Optimizer) -> Iterator[None]:
    """Inside, neither the base's step hooks nor the global ones run."""
    names = [name for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks") if hasattr(base, name)]
    kept = [getattr(base, name) for name in names]
    module: Any = optimizer_module
    everywhere = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
    contents = [OrderedDict(hooks) for hooks in everywhere]
    for name in names:
        setattr(base, name, OrderedDict())
    for hooks in everywhere:
        hooks.clear()
    try:
        yield
    finally:
        for name, hooks in zip(names, kept, strict=True):
            setattr(base, name, hooks)
        for hooks, content in zip(everywhere, contents, strict=True):
            hooks.update(content)


class BaseCall:
    """The base optimizer's own step, with its hooks around it and the user's closure inside.

    Its hooks see weights, and not K and L; global hooks already run around the wrapper's ``step``.
    """

    def __init__(self, step: StepInProgress, closure: Callable[[], Any] | None) -> None:
        self.base: Optimizer = step.controller.base
        self._step = step
        self._closure = closure
        self._evaluations = 0
        self._patched = _patched_step(self.base)
        function = self._patched or type(self.base).step
        self._takes_closure = closure is not None and "closure" in inspect.signature(function).parameters
        self._args: tuple[Any, ...] = (self.base, self.evaluate) if self._takes_closure else (self.base,)
        self._kwargs: dict[str, Any] = {}

    def run_pre_hooks(self) -> None:
        """Run the base optimizer's pre-hooks, which may change the arguments of its step."""
        for hook in _hooks(self.base, "pre"):
            changed = hook(self.base, self._args, self._kwargs)
            if changed is not None:
                self._args, self._kwargs = changed

    def run(self) -> Any:
        """The step without hooks. Returns the loss if there is a closure, else what the base optimizer returns."""
        self.base._opt_called = True  # type: ignore[attr-defined]  # checked by schedulers built on the base
        loss = self.evaluate() if self._closure is not None and not self._takes_closure else None
        controller = self._step.controller
        with controller.journal.clock("base"), controller.attachment.stepping():
            result = self._step_base()
        return result if self._closure is None or self._takes_closure else loss

    def _step_base(self) -> Any:
        function, args = type(self.base).step, self._args
        if self._patched is not None:
            function, args = self._patched, args[1:]
        elif getattr(function, "__code__", None) is _RUNS_HOOKS:
            return vars(function)["__wrapped__"](*args, **self._kwargs)
        with _no_hooks(self.base):  # it calls, at some point, a step that would run hooks, which have run already
            return function(*args, **self._kwargs)

    def run_post_hooks(self) -> None:
        """Run the base optimizer's post-hooks."""
        for hook in _hooks(self.base, "post"):
            hook(self.base, self._args, self._kwargs)

    def evaluate(self) -> Any:
        """Call the user's closure, which runs the backward pass; after the first call, measure and enter the factors.

        Raises:
            RuntimeError: it is called more than once in a step, and a layer is factorized.
        """
        assert self._closure is not None
        self._evaluations += 1
        if self._evaluations > 1:
            self._note_reevaluation()
        with torch.enable_grad():
            loss = self._closure()
        if self._evaluations == 1:
            self._step.measure()
            self._step.enter_factors()
        return loss

    def _note_reevaluation(self) -> None:
        controller = self._step.controller
        controller.reevaluates = True
        if any(layer.factorized for layer in controller.layers.values()):
            raise RuntimeError(
                f"{type(self.base).__name__} evaluated its closure more than once in a step, which can't "
                f"be done inside factors: use SubspaceConfig(mode='observe'), or merge_('all') before such steps"
            )
