"""LoRA adapters, as PEFT keeps them in folders, mixed by their updates of the weights: `sum of w * s * B @ A`.

A mean of factors is not the factor of a mean. The sum of products is a product of stacked factors, of the sum of the
ranks: nothing is lost. An SVD brings it back to a rank, at an error that is told.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from interpolate._adapters import INITS_ON_THE_BASE
from interpolate._places import opened
from interpolate._unmixable import adapter_factors
from interpolate.atomic import flushed, replaced_path
from interpolate.checkpoints import Checkpoint
from interpolate.weights import listed, whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<kind>lora_|lora_embedding_)(?P<side>[AB])(?:\.weight)?")
_PREFIX = "base_model.model."
_PLACES = "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"
_COMMON = "base_model_name_or_path", "task_type", "fan_in_fan_out", "bias", "modules_to_save"
_UNKNOWN = (  # what makes the update another one than s B A, or moves the base
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication",
    "velora_config", "target_parameters", "monteclora_config", "kasa_config", "arrow_config",
    "trainable_token_indices", "megatron_config",
)  # fmt: skip


@dataclass
class Adapter:
    """One LoRA adapter: its configuration and weights, as the files of PEFT have them."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read a folder of PEFT's `save_pretrained`, or its URL.

        Raises:
            ValueError: The adapter is not one whose update is `s * B @ A` on an unchanged base.
            CheckpointError, OSError: It can't be read.
        """
        folder = os.fspath(folder).rstrip("/")
        with opened(f"{folder}/{CONFIG}") as file:
            config = json.load(file)
        with Checkpoint(folder) as checkpoint:
            adapter = cls(config, {name: checkpoint.tensor(name) for name in checkpoint.entries})
        adapter._check(folder)
        return adapter

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that PEFT's `from_pretrained` reads, as a whole; one that is there is an error."""
        if os.path.exists(folder):
            raise FileExistsError(f"{os.fspath(folder)} exists; give a folder that does not.")
        with replaced_path(os.fspath(folder), folder=True) as path:
            with flushed(os.path.join(path, CONFIG)) as file:
                file.write(json.dumps(self.config, indent=2, sort_keys=True).encode())
            with flushed(os.path.join(path, WEIGHTS)) as file:
                file.write(save({n: t.contiguous() for n, t in self.weights.items()}, {"format": "pt"}))

    def layers(self) -> dict[str, tuple[float, Tensor, Tensor, str]]:
        """Name of a layer → scale s, A of shape (r, in), B of shape (out, r), and what is before A and B in names."""
        found = {}
        for name in self.weights:
            if (match := _FACTOR.fullmatch(name)) and match["side"] == "A":
                a, b = self.weights[name], self.weights[_other(name)]
                found[match["layer"]] = self._scale(match["layer"], a.shape[0]), a, b, match["kind"]
        return found

    def _scale(self, layer: str, r: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        own = layer.removeprefix(_PREFIX)
        fitting = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", own)]  # as PEFT does
        alpha = fitting[0] if fitting else self.config["lora_alpha"]
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def _check(self, side: str) -> None:
        if self.config.get("peft_type") != "LORA":
            raise ValueError(f"{side} is an adapter of type {self.config.get('peft_type')}; only LORA can be mixed.")
        if wrong := [key for key in _UNKNOWN if self.config.get(key)]:
            raise ValueError(f"{side} has {listed(wrong)}: its update is not s B A of whole weights. Merge it first.")
        if (init := self.config.get("init_lora_weights", True)) not in INITS_ON_THE_BASE:
            raise ValueError(
                f"{side} was begun by init_lora_weights={init!r}, which changes the base: save it by PEFT's "
                "path_initial_model_for_weight_conversion, or merge it first."
            )
        factors = adapter_factors(self.weights)
        if wrong := [n for n in factors if not _FACTOR.fullmatch(n) or _other(n) not in self.weights]:
            raise ValueError(f"{side} has weights that are no pair of LoRA's factors: {listed(wrong)}.")
        if wrong := [f"{n}: {tuple(self.weights[n].shape)}" for n in factors if self.weights[n].ndim != 2]:
            raise ValueError(
                f"{side} has factors that are no matrices ({listed(wrong)}), of convolutions; merge first."
            )
        if not factors:
            raise ValueError(f"{side} holds no factor of LoRA.")


def mix_adapters(
    adapters: Sequence[Adapter], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> tuple[Adapter, dict[str, float]]:
    """The adapter whose update of the base is the weighted sum of those of others; by default their mean.

    By stacking, of the sum of the ranks and exact; or of a given rank, the nearest there is, by SVD. Layers that an
    adapter does not have are those of its base. The weight of an adapter alone is `1 - anchor_weight` of a patch.

    Source: stacking as in Wang et al. 2024 (arXiv 2409.05976), "FLoRA"; Eckart and Young 1936.

    Args:
        adapters: On one base; the first gives the dtype and what else is in the configuration.
        weights: One finite number for each.
        rank: At most this rank in every layer. None: all of it.

    Returns:
        The adapter, and for each layer by how much its update is off, relative to it, in the Frobenius norm; 0 where
        factors were stacked.

    Raises:
        ValueError: They can't be mixed.

    Example:
        >>> config = {"peft_type": "LORA", "lora_alpha": 1, "r": 1, "target_modules": ["q"]}
        >>> def adapter(a, b):
        ...     a, b = torch.tensor([[a]]), torch.tensor([[b]])
        ...     return Adapter(config, {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b})
        >>> mean, errors = mix_adapters([adapter(1.0, 2.0), adapter(3.0, 4.0)])
        >>> [(s * b @ a).item() for s, a, b, _ in mean.layers().values()], mean.config["r"]
        ([7.0], 2)
    """
    if not adapters:
        raise ValueError("there is nothing to mix: no adapter was given.")
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, one for each adapter, got {weights}.")
    if rank is not None:
        rank = whole("rank", rank, at_least=1)
    for i, adapter in enumerate(adapters):
        adapter._check(f"adapter {i}")
    for key in _COMMON:
        if len(values := {json.dumps(adapter.config.get(key)) for adapter in adapters}) > 1:
            raise ValueError(f"the adapters differ in {key}: {listed(sorted(values))}; they can't be mixed.")
    mixed, scales, errors = _mixed_whole(adapters, weights), {}, {}
    layers = [adapter.layers() for adapter in adapters]
    for name in dict.fromkeys(name for own in layers for name in own):
        terms = [(w * own[name][0], *own[name][1:]) for w, own in zip(weights, layers, strict=True) if name in own]
        scale, a, b = _stacked([(s, a, b) for s, a, b, _ in terms])
        errors[name] = 0.0
        if rank is not None and rank < a.shape[0]:
            scale, a, b, errors[name] = _truncated(scale, a, b, rank)
        kind, suffix = terms[0][3], "" if terms[0][3] == "lora_embedding_" else ".weight"
        for side, factor, like in (("A", a, terms[0][1]), ("B", b, terms[0][2])):
            mixed[f"{name}.{kind}{side}{suffix}"] = factor.to(like.dtype)
        scales[name.removeprefix(_PREFIX)] = scale * a.shape[0], a.shape[0]
    return Adapter(_configured(adapters, scales), mixed), errors


def _mixed_whole(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """What adapters hold beside factors: biases and heads, whole, of which only a mean can be made without the base."""
    names = [[n for n in adapter.weights if not _FACTOR.fullmatch(n)] for adapter in adapters]
    if any({*own} != {*names[0]} for own in names):
        raise ValueError(f"the adapters hold unlike whole weights: {listed({n for own in names for n in own})}.")
    if names[0] and abs(sum(weights) - 1) > 1e-9:
        raise ValueError(
            f"whole weights ({listed(names[0])}) can be averaged only, the weights' sum is {sum(weights)}."
        )
    first = adapters[0].weights
    pairs = [*zip(weights, adapters, strict=True)]
    return {n: sum(w * a.weights[n].double() for w, a in pairs).to(first[n].dtype) for n in names[0]}  # pyright: ignore[reportAttributeAccessIssue] # not 0


def _stacked(terms: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
    """Scale, A and B of a sum; where the scales are one, no factor is rounded."""
    scale = max((s for s, _, _ in terms), key=abs) or 1.0
    a = torch.cat([a for _, a, _ in terms])
    return scale, a, torch.cat([b if s == scale else (b.double() * (s / scale)).to(b) for s, _, b in terms], dim=1)


def _truncated(scale: float, a: Tensor, b: Tensor, rank: int) -> tuple[float, Tensor, Tensor, float]:
    """The nearest of a rank, and how far it is, relative; the SVD is that of a matrix as small as the ranks."""
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double())
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    total = torch.linalg.vector_norm(values)
    error = (torch.linalg.vector_norm(values[rank:]) / total).item() if total else 0.0
    root = values[:rank].sqrt()
    return scale, root[:, None] * (q_a @ v.T[:, :rank]).T, (q_b @ u[:, :rank]) * root, error


def _configured(adapters: Sequence[Adapter], scales: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """The configuration of a mix: alpha and rank of each layer as they are; layers by name where the mixed differ."""
    config = dict(adapters[0].config)
    if any(adapter.config.get(key) != config.get(key) for adapter in adapters for key in _PLACES):
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config["target_modules"] = list(scales)
    (alpha, r), *_ = scales.values()
    config |= {"r": r, "lora_alpha": alpha, "use_rslora": False, "init_lora_weights": True}
    config["rank_pattern"] = {f"^{re.escape(n)}": own for n, (_, own) in scales.items() if own != r}
    config["alpha_pattern"] = {f"^{re.escape(n)}": own for n, (own, _) in scales.items() if own != alpha}
    return config


def _other(name: str) -> str:
    """B's name for A's, and the other way round."""
    match = _FACTOR.fullmatch(name)
    assert match
    at, side = match.start("side"), {"A": "B", "B": "A"}[match["side"]]
    return name[:at] + side + name[at + 1 :]
