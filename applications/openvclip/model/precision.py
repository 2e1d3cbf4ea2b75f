"""In which numbers a model computes; its weights stay in float32."""

from __future__ import annotations

from typing import Literal

import torch

Name = Literal["fp32", "tf32", "bf16", "fp16"]


class Precision:
    """Mixed precision on a device: what to compute the loss in, and the scaler of its gradients.

    Args:
        name: "fp32" is float32 throughout. "tf32" multiplies matrices of float32 in the tensor cores of a GPU, with
            10 bits of mantissa. "bf16" and "fp16" are autocast, in which matrices are of these numbers; logits, loss,
            weights, gradients and averages remain float32.
        device: Where the model is.

    Raises:
        ValueError: The name is unknown, or the device can't compute so.
    """

    def __init__(self, name: Name, device: torch.device) -> None:
        if name not in ("fp32", "tf32", "bf16", "fp16"):
            raise ValueError(f"precision must be 'fp32', 'tf32', 'bf16' or 'fp16', got {name!r}.")
        if name == "tf32" and device.type != "cuda":
            raise ValueError(f"precision 'tf32' is of NVIDIA's GPUs, and the device is {device}; use 'fp32'.")
        if name in ("tf32", "bf16") and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError(
                f"precision {name!r} needs a GPU of the Ampere generation or later, and {device} is a "
                f"{torch.cuda.get_device_name(device)}; use 'fp16' or 'fp32'."
            )
        self.name: Name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        """Keeps the gradients of fp16 from vanishing; does nothing in other precisions. Shards of FSDP2 are all right:
        every process finds what any of them has found to be infinite."""

    def autocast(self) -> torch.autocast:
        """The context of a forward pass. The backward pass belongs outside of it.

        How float32 is multiplied is a setting of the whole process; from here on it is this one's.
        """
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.name == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = self.name == "tf32"
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.name in ("bf16", "fp16"))
