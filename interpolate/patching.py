"""Patching: mix the pretrained weights back into the fine-tuned ones."""

from __future__ import annotations

from torch import Tensor, nn

from interpolate.weights import Weights, check_coefficient, check_match, lerp

_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def patch(anchor: Weights | nn.Module, theta: Weights | nn.Module, *, anchor_weight: float) -> dict[str, Tensor]:
    """Interpolate two sets of weights: `anchor_weight * anchor + (1 - anchor_weight) * theta`.

    Floating-point weights are mixed; everything else (integer tensors, the buffers of a module, BatchNorm statistics in
    a state dict) is theta's. BatchNorm statistics should be re-estimated for the mixed weights. Tensors that are equal
    in both are copied bit for bit, so a causal mask of infinities stays what it is.

    Source: Weng et al. 2023 (arXiv 2302.00624), eq. 6; Ilharco et al. 2022 (PAINT). WiSE-FT and PAINT count the
    coefficient the other way: their alpha is `1 - anchor_weight`.

    Args:
        anchor: The pretrained weights: a state dict, `regularizer.anchor`, or a module.
        theta: The fine-tuned weights: a state dict, `averager.weights`, or a module. Names must be the anchor's.
        anchor_weight: Weight of the anchor, in [0, 1]; 0 returns theta, 1 the anchor, bit for bit.

    Returns:
        New tensors in theta's dtype and on its device, under theta's names; nothing is shared with the inputs, and a
        module's `load_state_dict` takes them.

    Raises:
        WeightMismatchError: Names or shapes differ; the message lists them.
        ValueError: `anchor_weight` is not in [0, 1], or a mixed weight is not finite.

    Example:
        >>> import torch
        >>> patch({"w": torch.ones(1)}, {"w": torch.zeros(1)}, anchor_weight=0.25)["w"]
        tensor([0.2500])
    """
    check_coefficient("anchor_weight", anchor_weight)
    kept = _buffer_names(theta) | _buffer_names(anchor)
    theta, anchor = _tensors(theta), _tensors(anchor)
    check_match(theta, anchor)
    patched = {}
    for name, tensor in theta.items():
        if name in kept or not tensor.is_floating_point():
            patched[name] = tensor.detach().clone()
            continue
        patched[name] = lerp(tensor, anchor[name], anchor_weight)
        if not patched[name].isfinite().all() and not tensor.equal(anchor[name].to(tensor)):
            raise ValueError(
                f"{name} has {int((~patched[name].isfinite()).sum())} values that are not finite after mixing; "
                "look for nan or inf in the anchor and in theta."
            )
    return patched


def _tensors(source: Weights | nn.Module) -> Weights:
    return source.state_dict() if isinstance(source, nn.Module) else source


def _buffer_names(source: Weights | nn.Module) -> set[str]:
    if isinstance(source, nn.Module):
        return {name for name, _ in source.named_buffers(remove_duplicate=False)}
    return {name for name in source if name.rpartition(".")[2] in _BATCH_NORM_BUFFERS}
