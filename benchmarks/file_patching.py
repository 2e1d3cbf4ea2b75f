"""What does patching two checkpoint files of 600 MB cost in time and memory, against loading both, mixing and saving?

Every run is a fresh process, timed after its imports, with the files in the page cache. Memory is the largest amount of
anonymous memory of a fresh process above that after the imports. The floor reads both files and writes one of the same
size, with the same flush to the disk. `patch_files` hashes its inputs for the recipe, on other threads; it is shown
without that as well. Where mergekit is installed (`pip install mergekit`, 0.1.5 or later), its linear merge of plain
PyTorch files is a contender.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from measuring import alone, ratios, save
from safetensors.torch import load_file, save_file

RUNS = 7
CHUNK = 1 << 22


def write_inputs(folder: str) -> None:
    torch.manual_seed(0)
    for name in ("anchor", "theta"):
        shapes = [(49408, 512), *[(768, 3072)] * 48, *[(768, 768)] * 20, *[(768,)] * 100]
        save_file({f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}, f"{folder}/{name}.safetensors")


def streamed(folder: str) -> None:
    from interpolate import patch_files

    patch_files(
        f"{folder}/anchor.safetensors",
        f"{folder}/theta.safetensors",
        f"{folder}/a.safetensors",
        anchor_weight=0.5,
    )


def streamed_without_hashes(folder: str) -> None:
    from interpolate.checkpoints import Checkpoint

    Checkpoint.sha256 = lambda self, stopped=None: "0" * 64
    streamed(folder)


def in_memory(folder: str) -> None:
    anchor, theta = load_file(f"{folder}/anchor.safetensors"), load_file(f"{folder}/theta.safetensors")
    save_file({n: 0.5 * anchor[n] + 0.5 * t for n, t in theta.items()}, f"{folder}/b.safetensors")
    with open(f"{folder}/b.safetensors", "rb") as file:
        os.fsync(file.fileno())


def floor(folder: str) -> None:
    buffer = bytearray(CHUNK)
    with (
        open(f"{folder}/anchor.safetensors", "rb") as anchor,
        open(f"{folder}/theta.safetensors", "rb") as theta,
        open(f"{folder}/c.safetensors", "wb") as out,
    ):
        while n := theta.readinto(buffer):
            anchor.readinto(buffer)
            out.write(memoryview(buffer)[:n])
        out.flush()
        os.fsync(out.fileno())


def mergekit(folder: str) -> None:
    from mergekit.scripts.merge_raw_pytorch import main

    main([f"{folder}/mergekit.yml", f"{folder}/d"], standalone_mode=False)
    with open(f"{folder}/d/model.safetensors", "rb") as file:
        os.fsync(file.fileno())


def write_config(folder: str) -> None:
    models = "".join(
        f"  - {{model: {folder}/{name}.safetensors, parameters: {{weight: 0.5}}}}\n" for name in ("anchor", "theta")
    )
    Path(folder, "mergekit.yml").write_text(f"merge_method: linear\nmodels:\n{models}")


CONTENDERS = {
    "floor": floor,
    "patch_files": streamed,
    "without hashes": streamed_without_hashes,
    "load, mix, save": in_memory,
}
OTHERS = {}
if find_spec("mergekit"):
    CONTENDERS["mergekit"], OTHERS["mergekit"] = mergekit, version("mergekit")


def loaded(name: str) -> None:
    """Import what a contender needs, which is not counted."""
    if name == "mergekit":
        import mergekit.scripts.merge_raw_pytorch  # noqa: F401
    else:
        import interpolate  # noqa: F401


def seconds_here(folder: str, name: str) -> float:
    loaded(name)
    torch.set_num_threads(1)
    start = time.perf_counter()
    CONTENDERS[name](folder)
    return time.perf_counter() - start


def memory_here(folder: str, name: str) -> float:
    loaded(name)
    torch.set_num_threads(1)
    torch.lerp(torch.zeros(1), torch.ones(1), 0.5)
    before, peak, done = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    CONTENDERS[name](folder)
    done.set()
    watcher.join()
    return peak - before


def anonymous() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder)
        write_config(folder)
        seconds = {name: [] for name in CONTENDERS}
        for _ in range(RUNS):
            for name, values in seconds.items():
                values.append(alone("file_patching", "seconds_here", folder, name))
        results = {
            "runs": RUNS,
            "others": OTHERS,
            "file_mb": round(os.path.getsize(f"{folder}/theta.safetensors") / 1e6),
            "time_over_load_mix_save": ratios(seconds, "load, mix, save"),
            "time_over_floor": ratios(seconds, "floor"),
            "anonymous_memory_mb": {
                name: round(alone("file_patching", "memory_here", folder, name), 1) for name in CONTENDERS
            },
        }
    save("file_patching", results)


if __name__ == "__main__":
    main()
