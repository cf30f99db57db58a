"""Moving averages of weights (EMA, SWA) of a model whose layers change their form while it trains.

An average of U, S and V one by one is no average of the weight U diag(S) V^T, as the bases turn: averages are of the
products, and so an averaged model is dense. :class:`AveragedModel` takes the place of torch's class of that name:

    averaged = svd_optim.factors.AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    ...
    optimizer.step()
    averaged.update_parameters(model)  # through every switch and back

For any other library, and for averages kept by name, :func:`dense_view` is the model to read from, and
``svd_optim.export_dense(model)`` the one to begin with:

    shadow = {name: p.detach().clone() for name, p in dense_view(model).named_parameters()}
    ...
    for name, p in dense_view(model).named_parameters():
        shadow[name].lerp_(p.detach(), 1 - decay)
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ..linalg import full_precision, to_compute_dtype
from .linear import OF_THE_OPTIMIZER, FactorizedLinear
from .readonly import ReadOnlyWeight
from .surgery import merge_


def dense_view(model: nn.Module) -> nn.Module:
    """``model`` with a dense ``nn.Linear`` for each factorized layer, to read parameters and state dicts from.

    Names, order, shapes and dtypes are those of the dense model. All other parameters, and all buffers, are the
    model's own. A factorized layer's weight is the product U diag(S) V^T (m, n) as of now, formed in this call; it
    refuses writes, as they would not reach the layer. A model without factorized layers is returned itself.
    """
    views: dict[nn.Module, nn.Module] = {}

    def view(module: nn.Module) -> nn.Module:
        if module not in views:
            if isinstance(module, FactorizedLinear):
                weight = _product(module, ReadOnlyWeight)
                views[module] = _shallow(module, nn.Linear, _parameters={"weight": weight, "bias": module.bias})
            else:
                children = {name: None if child is None else view(child) for name, child in module._modules.items()}
                same = all(child is children[name] for name, child in module._modules.items())
                views[module] = module if same else _shallow(module, type(module), _modules=children)
        return views[module]

    return view(model)


@full_precision()
def _product(module: FactorizedLinear, kind: type[Tensor] = Tensor) -> Tensor:
    with torch.no_grad():
        U, S, V = (to_compute_dtype(p) for p in (module.U, module.S, module.V))
        W = ((U * S) @ V.mT).to(module.U.dtype)
    with torch.enable_grad():  # some averages leave out what does not require a gradient
        return W.requires_grad_(module.U.requires_grad).as_subclass(kind)


def _shallow(module: nn.Module, kind: type[nn.Module], **changed: dict[str, Any]) -> nn.Module:
    """A module of the given class with the attributes of another one, but for those ``changed``."""
    new: nn.Module = object.__new__(kind)
    new.__dict__.update({name: value for name, value in vars(module).items() if name not in OF_THE_OPTIMIZER})
    new.__dict__.update(changed)
    return new


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` whose averages are of weights, factorized or not at the time.

    Arguments and methods are torch's. ``module`` is always dense, and so is the state dict, which loads whatever
    form the layers had when it was saved. An update forms the products of all factorized layers: they take, for its
    time, the memory of the dense weights.

    torch's own class refuses models with factorized layers once this library is imported.
    """

    module: nn.Module

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for module in self.module.modules():
            if isinstance(module, FactorizedLinear):
                merge_(module)

    def update_parameters(self, model: nn.Module) -> None:
        """Take the present weights of ``model`` into the average."""
        super().update_parameters(dense_view(model))

    def swap_(self, model: nn.Module) -> None:
        """Exchange weights and buffers with ``model``, for an evaluation; once more puts them back.

        Whole tensors change places, and so do dense and factorized layers: nothing is copied or rounded. In between
        no optimizer may step.

        Raises:
            ValueError: the models differ in modules or device. Nothing was changed.
        """
        pairs = self._pairs(model)
        devices = [
            {p.device for module in side for p in module.parameters(recurse=False)} for side in zip(*pairs, strict=True)
        ]
        if devices[0] != devices[1]:
            raise ValueError(
                f"swap_: the average is on {devices[0]}, the model on {devices[1]}; move one of them first"
            )
        for mine, other in pairs:
            mine.__class__, other.__class__ = other.__class__, mine.__class__
            for name in ("_parameters", "_buffers", *OF_THE_OPTIMIZER):
                a, b = (vars(module).pop(name, None) for module in (mine, other))
                for module, value in ((mine, b), (other, a)):
                    if value is not None:
                        module.__dict__[name] = value

    @torch.no_grad()
    def copy_to_(self, model: nn.Module) -> dict[str, float]:
        """Give ``model`` the averages; its layers keep their form.

        A factorized layer takes the best approximation of its rank (:meth:`FactorizedLinear.set_weight_`).

        Returns:
            By the names of factorized layers: ||W - W_k||_F / ||W||_F, what of the average W the rank can't hold.

        Raises:
            ValueError: the models differ in modules, or an average holds NaN or Inf. Nothing was changed.
        """
        pairs = self._pairs(model)
        averages = {other: to_compute_dtype(cast(nn.Linear, mine).weight)
                    for mine, other in pairs if isinstance(other, FactorizedLinear)}  # fmt: skip
        if not all(bool(torch.isfinite(W).all()) for W in averages.values()):
            raise ValueError("copy_to_: an average holds NaN or Inf")
        errors = {}
        for name, module in model.named_modules():
            if isinstance(module, FactorizedLinear):
                W = averages[module]
                module.set_weight_(W)
                lost = torch.linalg.matrix_norm(W.to(module.U.device) - _product(module))
                errors[name] = float(lost / torch.linalg.matrix_norm(W))
        for mine, other in pairs:
            for target, value in ((other._parameters, mine._parameters), (other._buffers, mine._buffers)):
                for name, tensor in target.items():
                    if tensor is not None and (average := value.get(name)) is not None:
                        tensor.copy_(average)
        return errors

    def _pairs(self, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """Modules of the average and of ``model`` that belong together."""
        mine, others = (dict(root.named_modules()) for root in (self.module, model))
        if differ := sorted(mine.keys() ^ others.keys()):
            raise ValueError(f"the averaged model and this one differ in modules: {', '.join(differ[:5])}")
        return [(mine[name], other) for name, other in others.items()]


def _refuse_factors() -> None:
    """Make torch's own class refuse what it would average wrongly, and without an error."""
    update = swa_utils.AveragedModel.update_parameters
    if getattr(update, "refuses_factors", False):
        return

    @functools.wraps(update)
    def checked(self: swa_utils.AveragedModel, model: nn.Module) -> None:
        for name, module in itertools.chain(model.named_modules(), self.module.named_modules()):
            if isinstance(module, FactorizedLinear):
                raise RuntimeError(
                    f"AveragedModel: layer {name!r} is factorized, and an average of its U, S and V one by one is "
                    f"none of its weight. Use svd_optim.factors.AveragedModel, with the same arguments, from the "
                    f"start of the training; or keep this one and call update_parameters(dense_view(model)), with "
                    f"svd_optim.factors.dense_view, if it was made from a dense model"
                )
        update(self, model)

    checked.refuses_factors = True  # type: ignore[attr-defined]
    swa_utils.AveragedModel.update_parameters = checked  # type: ignore[method-assign]


_refuse_factors()
