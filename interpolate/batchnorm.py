"""BatchNorm statistics for weights that no training step has seen: averaged or patched ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interpolate._sharding import inner


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of BatchNorm by those of the given batches at the model's present weights.

    The mean and the unbiased variance over all batches of all ranks, whatever their sizes, so momentum plays no part.
    Other layers are in evaluation mode meanwhile. Frozen BatchNorm is left alone: layers in evaluation mode within a
    model in training mode, and those whose affine parameters require no gradient. After an error every layer is as it
    was before.

    Departs from `torch.optim.swa_utils.update_bn`, which averages the statistics of each batch with equal weights,
    takes frozen layers along and keeps dropout on.

    Args:
        model: The model, changed in its BatchNorm buffers only.
        batches: What to call it with: a tensor, a sequence whose first element is the input, or a mapping of keyword
            arguments.

    Raises:
        ValueError: There was no batch on any rank, or a layer to estimate was never called.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> reestimate_batchnorm(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]]).expand(2, 1)])
        >>> model.running_mean
        tensor([3.7500])
    """
    model = inner(model)
    modes = {module: module.training for module in model.modules()}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and not _frozen(m, model)}
    moments = {layer: _Moments(layer) for layer in layers.values()}
    backup = [(buffer, buffer.clone()) for layer in layers.values() for buffer in layer.buffers()]
    hooks = [layer.register_forward_pre_hook(moment.add) for layer, moment in moments.items()]
    try:
        model.eval()
        for layer in layers.values():
            layer.training = True
            layer.momentum, moments[layer].momentum = 0.0, layer.momentum  # the statistics are set below
        for batch in batches:
            _call(model, batch)
        for name, layer in layers.items():
            moments[layer].store(name, layer)
    except BaseException:
        for buffer, own in backup:
            buffer.copy_(own)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, moment in moments.items():
            layer.momentum = moment.momentum
        for module, training in modes.items():
            module.training = training


def _frozen(layer: _BatchNorm, model: nn.Module) -> bool:
    affine = [p for p in (layer.weight, layer.bias) if p is not None]
    return (
        layer.running_mean is None
        or (model.training and not layer.training)
        or (bool(affine) and not any(p.requires_grad for p in affine))
    )


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch if isinstance(batch, Tensor) else batch[0])


class _Moments:
    """Number, sum and sum of squares of what a layer is given, by channel, in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self.momentum = layer.momentum
        self.sums = layer.running_mean.new_zeros(3, layer.num_features, dtype=torch.float64)

    def add(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().transpose(0, 1).flatten(1).double()
        self.sums += torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])

    def store(self, name: str, layer: _BatchNorm) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        n, total, squares = self.sums
        if not (n >= 2).all():
            raise ValueError(
                f"BatchNorm {name!r} was given {int(n[0])} values a channel, at least 2 are needed; "
                "check that there are batches and that the model uses the layer."
            )
        mean = total / n
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / n - mean.square()).clamp_min(0) * n / (n - 1))
