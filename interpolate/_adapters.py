"""Low-rank adapters in a model (LoRA): what is interpolated is their update of the weights, never their factors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from interpolate._names import bare_name, unwrapped
from interpolate._unmixable import adapter_factors, layer_of_factor
from interpolate.weights import listed

_LORA = re.compile(r"(?:^|\.)lora_(?:embedding_)?[AB](?:\.(?P<adapter>[^.]+)|$)")

INITS_ON_THE_BASE = True, False, "gaussian", "eva", "orthogonal"
"""PEFT's `init_lora_weights` that leave the base weights as they are; others (PiSSA, OLoRA) take what the adapter
begins with out of them."""


class Adapters:
    """The LoRA layers of PEFT, and others of that kind, which multiply their update `B A` by an attribute `scaling`.

    The path from the base weights `W` to `W + s B A` is walked by the scale alone: with the anchor's weight alpha it is
    `W + (1 - alpha) s B A`. The base is never copied. Adapters that are frozen belong to it.

    Args:
        model: Wrapped as it may be.
        theta: Its trainable weights.

    Raises:
        ValueError: There are factors of adapters whose update is not linear in a scale, or of which that isn't known,
            or whose base is no longer the pretrained one.
    """

    def __init__(self, model: nn.Module, theta: Mapping[str, nn.Parameter]) -> None:
        self.factors = set(adapter_factors(theta))
        """Names of those trainable weights that are factors of an adapter."""
        modules = {bare_name(name): module for name, module in unwrapped(model).named_modules()}
        layers = {name: modules.get(layer_of_factor(name)) for name in self.factors}
        self._layers: list[Any] = [*{id(layer): layer for layer in layers.values()}.values()]
        self._trained = {found["adapter"] for name in self.factors if (found := _LORA.search(name))}
        wrong = [name for name, layer in layers.items() if not _LORA.search(name) or not hasattr(layer, "scaling")]
        wrong += [name for name, layer in layers.items() if getattr(layer, "lora_variant", None)]  # DoRA and others
        if wrong:
            raise ValueError(
                f"the adapters' weights {listed(sorted(wrong))} can't be regularized: only of LoRA with a scale "
                "(PEFT's without DoRA or another variant, loralib's) is it known how to interpolate the update of the "
                "weights. Train plain LoRA, or all weights."
            )
        _check_base(modules.values(), self._trained)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Let the updates of the weights that are trained be multiplied by a factor: 1 is theta, 0 the base."""
        if merged := [type(layer).__name__ for layer in self._layers if getattr(layer, "merged", False)]:
            raise RuntimeError(f"adapters are merged into the weights of {listed(merged)}; unmerge them to train.")
        own = [layer.scaling for layer in self._layers]
        try:
            for layer, scaling in zip(self._layers, own, strict=True):
                if isinstance(scaling, dict):  # of PEFT: name of an adapter → scale
                    layer.scaling = {k: s * factor if k in self._trained else s for k, s in scaling.items()}
                else:
                    layer.scaling = scaling * factor
            yield
        finally:
            for layer, scaling in zip(self._layers, own, strict=True):
                layer.scaling = scaling

    @contextmanager
    def interpolated(self, alpha: float, theta: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """`scaled` by `1 - alpha` for a pass that leaves gradients at the interpolated weights as they are.

        The gradient of a factor at `W + (1 - alpha) s B A` has a factor `1 - alpha`, as that of any weight would have
        through the interpolation; here it is taken out, as it never is in that of the others.
        """
        before = {name: theta[name].grad for name in self.factors}
        try:
            for name in self.factors:
                theta[name].grad = None
            with self.scaled(1 - alpha):
                yield
        finally:
            for name, gradient in before.items():
                new = theta[name].grad
                if new is not None:
                    new.div_(1 - alpha)
                    theta[name].grad = new if gradient is None else gradient.add_(new)
                else:
                    theta[name].grad = gradient


def _check_base(modules: Iterable[nn.Module], adapters: Collection[str | None]) -> None:
    """Raise `ValueError` where PEFT says that one of the adapters was begun by changing the base."""
    for module in modules:
        configs = getattr(module, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, dict) else ():
            init = getattr(config, "init_lora_weights", True)
            if adapter in adapters and init not in INITS_ON_THE_BASE:
                raise ValueError(
                    f"the adapter {adapter!r} was begun by init_lora_weights={init!r}, which changes the base: that is "
                    "no longer the pretrained model, and can't be the anchor. Begin the adapter otherwise."
                )
