"""What stands for weights but can't be mixed value by value: the factors of adapters, and quantised weights.

A mean of two products is not the product of two means, and a code is no number: such tensors mixed one by one give
weights that belong to neither model. They are recognised by their names and dtypes, in whatever wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from interpolate.errors import WeightMismatchError
from interpolate.weights import listed

_FACTORS = re.compile(
    r"(?:^|\.)(?:"
    # PEFT's LoRA, AdaLoRA and DoRA, loralib, and kohya's names for the same
    r"lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector|diag|up|down|mid)|dora_scale"
    # diffusers before it used PEFT, xlabs
    r"|(?:\w+_)?lora\d*\.(?:up|down)|lora_linear_layer\.(?:up|down)"
    # LoHa, LoKr (LyCORIS and PEFT), and PEFT's others whose update is a product or a rotation of what is trained
    r"|hada_\w+|lokr_\w+|p?vera_lambda_\w+|randlora_(?:lambda|gamma|A|B)|vblora_\w+|(?:poly|supertuning)_lora_[AB]"
    r"|b?oft_(?:R|s|blocks|diag|embedding_R)|hra_u|adamss_[AB]|delora_\w+|gralora_[AB](?:_general)?"
    r"|hira_(?:embedding_)?[AB]|lily_[AB]|glora_[A-E]|psoft_\w+|peanut_\w+|road_(?:theta|alpha)|unilora_theta_d"
    r"|deft_[PR]|frod_lambda_\w+|osf_svd_params"
    r")(?:\.|$)"
)
"""Factors of adapters. Not IA3, FourierFT and others whose update is linear in what is trained: those can be mixed."""

_CODES = re.compile(
    r"(?:^|\.)(?:"
    r"qweight|qzeros|g_idx"  # GPTQ, AWQ
    r"|q_weight|q_perm|q_invperm|q_groups"  # EXL2
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format"  # bitsandbytes
    r"|weight_(?:packed|zero_point)|scale_weight|scaled_fp8"  # compressed-tensors, ComfyUI
    r"|W_q|weight\._(?:data|scale|shift)|codebooks"  # HQQ, Quanto, AQLM
    r"|_packed_params(?:\..+)?|_all_weight_values\..+"  # torch.ao.quantization
    r")$"
)
"""Names that only quantised layers have."""

_NAMED_WEIGHT = re.compile(r"(?:^|[._])weight(?:_\w+)?$")
"""Integers of such a name are codes; other integers (counters, positions, indices) are buffers."""

_FLOAT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz
_WIDE = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex32, torch.complex64, torch.complex128
_INTEGERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8


def adapter_factors(names: Iterable[str]) -> list[str]:
    """Those names that are factors of low-rank and similar adapters, whose product is what acts on the model.

    Example:
        >>> adapter_factors(["q_proj.weight", "q_proj.lora_A.weight", "q_proj.ia3_l"])
        ['q_proj.lora_A.weight']
    """
    return [name for name in names if _FACTORS.search(name)]


def layer_of_factor(name: str) -> str:
    """The module that an adapter's factor belongs to; empty if that is the whole.

    Example:
        >>> layer_of_factor("model.q_proj.lora_A.default.weight")
        'model.q_proj'
    """
    found = _FACTORS.search(name)
    return name[: found.start()] if found else name


def quantised(weights: Mapping[str, Any]) -> list[str]:
    """Those names of quantised weights and what belongs to them; `weights` are tensors, or anything with a `dtype`.

    Plain float8 is not quantised: it can be mixed, in float32. With a scale beside it, it is.

    Example:
        >>> quantised({"fc.weight": torch.ones(2, dtype=torch.int8), "positions": torch.arange(3)})
        ['fc.weight']
    """
    return [name for name, tensor in weights.items() if _is_quantised(name, _dtype(tensor), weights)]


def _dtype(tensor: Any) -> torch.dtype | None:
    """That of a tensor; arrays of NumPy have dtypes of another kind."""
    dtype = getattr(tensor, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_quantised(name: str, dtype: torch.dtype | None, weights: Mapping[str, Any]) -> bool:
    if _CODES.search(name):
        return True
    module, _, last = name.rpartition(".")

    def beside(*lasts: str) -> list[torch.dtype | None]:
        names = [f"{module}.{last}" if module else last for last in lasts]
        return [_dtype(weights[name]) for name in names if name in weights]

    if last == "zero_point":  # torch.ao's layers; its fake quantisers, whose weights are still numbers, have them too
        return bool(beside("scale")) and not beside("fake_quant_enabled")
    if dtype is None or dtype is torch.bool or dtype in _WIDE:
        return False
    scales = beside(f"{last}_scale", f"{last}_scale_inv", f"{last.removesuffix('_blocks')}_scales")
    if dtype in _FLOAT8:
        return any(scale not in _FLOAT8 for scale in (*scales, *beside("scale", "scales")))
    # beyond the integers are float4 in pairs, bare exponents, torch's own quantised tensors
    return dtype not in _INTEGERS or bool(scales) or bool(_NAMED_WEIGHT.search(name))


def check_mixable(first: Mapping[str, Any], *others: Mapping[str, Any]) -> None:
    """Raise an error unless these sets of weights, of the same names, can be mixed value by value.

    Args:
        first: Name → tensor, or anything with a `dtype`; what has none is not mixed and is looked at by name only.
        others: The same for what it is mixed with.

    Raises:
        ValueError: There are factors of adapters or quantised weights; the message names the layers and the way out.
        WeightMismatchError: A tensor has numbers with a fraction in one set and integers or complex ones in another.
    """
    for weights in (first, *others):
        factors, codes = adapter_factors(weights), quantised(weights)
        if factors:
            raise ValueError(
                f"there are factors of an adapter (such as LoRA) in {_layers(factors, _FACTORS)}: mixed one by one, "
                "their product is not the mix of the models. Merge first, in PEFT by model.merge_and_unload(); or mix "
                "the adapters' updates, by interpolate.lora.mix_adapters."
            )
        if codes:
            raise ValueError(
                f"there are quantised weights in {_layers(codes, _CODES)}: codes and scales can't be mixed. Mix the "
                "weights from before quantisation, or dequantise first (in transformers by model.dequantize())."
            )
    for other in others:
        for name, tensor in first.items():
            dtype, others_dtype = _dtype(tensor), _dtype(other.get(name))
            if dtype and others_dtype and _kind(dtype) != _kind(others_dtype):
                raise WeightMismatchError(
                    f"{name} is {_plain(dtype)} in one set of weights and {_plain(others_dtype)} in another: "
                    "they can't be mixed. Convert one of them."
                )


def _layers(names: list[str], pattern: re.Pattern[str]) -> str:
    return listed(dict.fromkeys(_layer(name, pattern) for name in names))


def _layer(name: str, pattern: re.Pattern[str]) -> str:
    found = pattern.search(name)
    return (name[: found.start()] if found else name.rpartition(".")[0]) or name


def _kind(dtype: torch.dtype) -> str:
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
