"""Everything that is worth knowing on the day a GPU is there: one command, one file. `make gpu-check` runs it.

Without a GPU it runs on the CPU with gloo and a small model, and the file says so: then it proves that the check itself
works, and nothing about GPUs.

1. The distributed tests, on NCCL where there are two GPUs.
2. A step of ViT-B/16 in bf16: peak memory beside what is counted (`openvclip train --dry-run` prints the same count),
   and clips a second; the same compiled.
3. The step with interpolated weight regularization over the floor of two passes.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import open_clip
import torch
import torch.nn.functional as F
from iwr_memory import kilobytes
from open_clip.model import CLIP
from torch import Tensor, nn

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.training.memory import peak_of_step
from interpolate import InterpolatedWeightRegularizer, SWAAverager

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CLIPS, FRAMES, RUNS = (8, 8, 20) if ON_GPU else (2, 4, 3)
COMPILER = "inductor" if ON_GPU else "aot_eager"
TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "distributed").glob("test_*.py"))


def main() -> None:
    record: dict[str, Any] = {
        "what": "a check on GPUs" if ON_GPU else "NO GPU HERE: the check itself, scaled down, on the CPU with gloo",
        "machine": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if ON_GPU else None,
        "distributed tests": distributed_tests(),
        "model": "ViT-B-16-quickgelu" if ON_GPU else "the miniature's tiny CLIP",
        "clips at once": CLIPS,
        "frames": FRAMES,
        "compiler": COMPILER,
    }
    record["a step in bf16"] = measured_step()
    record["a step in bf16, the anchor in main memory"] = measured_step(anchor_device="cpu")
    record["a compiled step in bf16"] = measured_step(compiled=True)
    measuring.save("gpu_check", record)


def distributed_tests() -> dict[str, Any]:
    """What pytest says of them; all of them on GPUs, the quickest file on the CPU."""
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    tests = TESTS if ON_GPU else ["tests/distributed/test_fsdp2.py"]
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    device = "cuda" if backend == "nccl" else "cpu"
    environment = os.environ | {"INTERPOLATE_TEST_DEVICE": device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    lines = done.stdout.strip().splitlines()
    return {
        "backend": backend,
        "tests": tests,
        "passed": done.returncode == 0,
        "summary": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(time.monotonic() - began),
    }


def build() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**(open_clip.get_model_config("ViT-B-16-quickgelu") or {})) if ON_GPU else tiny_clip.build()


def measured_step(*, compiled: bool = False, anchor_device: str | None = None) -> dict[str, Any]:
    """Peak memory, clips a second, and the ratio to the floor, of steps with everything that training does."""
    clip = build().to(DEVICE)
    counted = peak_of_step(clip, CLIPS, frames=FRAMES, precision="bf16")
    before = kilobytes("VmRSS") * 1024
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    model, precision = VideoEncoder(clip).train(), Precision("bf16", DEVICE)
    if compiled:
        model.compile(backend=COMPILER)
    regularizer = InterpolatedWeightRegularizer(model, anchor_device=anchor_device)
    averager = SWAAverager(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    video = torch.randn(CLIPS, 3, FRAMES, *model.visual.image_size, device=DEVICE)
    classes = F.normalize(torch.randn(400, clip.text_projection.shape[1], device=DEVICE), dim=-1)
    labels = torch.arange(CLIPS, device=DEVICE)

    def loss_of(model: nn.Module) -> Tensor:
        with precision.autocast():
            return F.cross_entropy(model(video, classes), labels)

    def passes(n: int) -> None:
        for _ in range(n):
            loss_of(model).backward()

    def stepped(backward: Callable[[], object]) -> Callable[[], None]:
        def step() -> None:
            for _ in range(2):  # micro-batches
                backward()
            optimizer.step()
            optimizer.zero_grad()
            if ON_GPU:
                torch.cuda.synchronize()

        return step

    contenders = {
        "plain": stepped(lambda: passes(1)),
        "floor": stepped(lambda: passes(2)),
        "regularized": stepped(lambda: regularizer.backward(loss_of)),
    }
    averager.update()
    began = time.monotonic()
    contenders["regularized"]()
    first_s = time.monotonic() - began
    seconds = measuring.interleaved(contenders, RUNS)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else kilobytes("VmHWM") * 1024 - before
    return {
        "first step, compilation included, s": round(first_s, 2),
        "clips a second": round(2 * CLIPS / statistics.median(seconds["regularized"]), 2),
        "time over the floor": measuring.ratios(seconds, "floor")["regularized"],
        "peak memory, GB": round(peak / 1e9, 3),
        "peak memory counted beforehand, GB": round(counted / 1e9, 3),
        "the peak is of": "tensors on the GPU" if ON_GPU else "the process, beyond what it was before; libraries too",
    }


if __name__ == "__main__":
    main()
