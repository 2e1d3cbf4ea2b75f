"""Snapshots of a training in a folder: written along the run, and found again in their order."""

from __future__ import annotations

import json
import os
import posixpath
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from interpolate import kernels
from interpolate._averager import WeightAverager
from interpolate._names import by_bare_name, unwrapped
from interpolate._operations import Recipe, without_extra_state
from interpolate._pickled import METADATA
from interpolate._places import (
    DISTRIBUTED_INDEX,
    INDEX,
    PICKLED,
    RANK_FILE,
    SAFETENSORS,
    file_system,
    in_folder,
    name_of,
    split_key,
)
from interpolate._recipes import RECIPE, Path, recipe_of
from interpolate._safetensors import write_safetensors
from interpolate._sharding import is_sharded
from interpolate._tensors import Entry
from interpolate.atomic import replaced_path
from interpolate.checkpoints import Checkpoint
from interpolate.errors import CheckpointError
from interpolate.kernels import Kernel, RunningKernel
from interpolate.weights import listed, whole


class Snapshots:
    """Writes a model's weights into a folder every so many steps, to be averaged when the training is over.

    What is written is `step-00001000.safetensors`, or a folder of that name by `torch.distributed.checkpoint` where
    weights are sharded; the name says when, and the metadata how. A step that is there already is written anew, so that
    a resumed run leaves one snapshot of each. Call `update` on every process; which writes what is seen to.

    Two averages written at some moments of the run, with kernels of different lengths and a folder for each, take the
    place of many snapshots: averages of other lengths can be made of them.

    Args:
        folder: Where to; a path, or a URL that fsspec opens. Made if it is not there.
        every: Steps from one snapshot to the next.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> snapshots = Snapshots(tempfile.mkdtemp(), every=10)
        >>> for step in range(1, 31):
        ...     snapshots.update(model, step)  # after the optimizer's step
        >>> [path[-25:] for path in snapshot_paths(snapshots.folder)]
        ['step-00000010.safetensors', 'step-00000020.safetensors', 'step-00000030.safetensors']
    """

    def __init__(self, folder: Path, *, every: int = 1) -> None:
        self.folder = os.fspath(folder).rstrip("/")
        self.every = whole("every", every, at_least=1)

    @torch.no_grad()
    def update(self, source: nn.Module | WeightAverager, step: int) -> None:
        """Write a snapshot if one is due.

        Args:
            source: The model, wrapped or sharded as it may be; or an averager, of which the average is written.
            step: How many steps of training there have been.

        Raises:
            ValueError: The model's weights are not to be seen (FSDP1, DeepSpeed).
            OSError: It can't be written; snapshots that are there stay.
        """
        if step % self.every:
            return
        recipe: Recipe = {"operation": "snapshot", "step": step, "written": f"{datetime.now(timezone.utc):%FT%TZ}"}
        weights = _weights(source)
        if isinstance(source, WeightAverager):
            kernel = getattr(source, "kernel", None)
            recipe |= {"n_averaged": source.n_averaged, "kernel": kernel and as_record(kernel)}
        metadata = {RECIPE: json.dumps({**recipe, "inputs": [], "sha256": []})}
        path = f"{self.folder}/step-{step:08d}"
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first:
            fs, target = file_system(self.folder)
            fs.makedirs(target, exist_ok=True)
        if any(map(is_sharded, weights.values())):
            _save_together(path, weights, metadata, is_first)
        elif is_first:
            entries = {name: Entry(t.dtype, tuple(t.shape), "") for name, t in weights.items()}
            with replaced_path(path + SAFETENSORS) as temporary:
                write_safetensors(temporary, entries, lambda name: [weights[name].cpu()], lambda _: metadata)


def _weights(source: nn.Module | WeightAverager) -> dict[str, Tensor]:
    model = source.model if isinstance(source, WeightAverager) else source
    for module in model.modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ValueError(f"weights can't be seen through {type(module).__name__}. Use DDP or FSDP2 (fully_shard).")
    weights = without_extra_state(by_bare_name(unwrapped(model).state_dict().items()))
    return {**weights, **source.weights, **source.buffers} if isinstance(source, WeightAverager) else weights


def _save_together(path: str, weights: dict[str, Tensor], metadata: dict[str, str], is_first: bool) -> None:
    """By all processes; the index comes last, and without it there is no snapshot."""
    import torch.distributed.checkpoint as dcp

    fs, target = file_system(path)
    if is_first:
        if fs.exists(f"{target}/{DISTRIBUTED_INDEX}"):
            fs.rm_file(f"{target}/{DISTRIBUTED_INDEX}")
        fs.makedirs(target, exist_ok=True)
        with fs.open(f"{target}/{METADATA}", "w") as file:
            file.write(json.dumps(metadata))
    if dist.is_initialized():
        dist.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(weights, checkpoint_id=path, no_dist=not dist.is_initialized())


def snapshot_paths(folder: Path) -> list[str]:
    """The snapshots in a folder, the oldest first: `step-100.safetensors`, `checkpoint-500/`, `epoch=3-step=80.ckpt`.

    Their names must differ by numbers alone. A number after "step" tells the order, or else one after "epoch", or else
    all of them. What has no number in its name (`last.ckpt`, logs) and folders that no snapshot was finished in are no
    snapshots.

    Args:
        folder: Path or URL, with `::KEY` for the key of every snapshot.

    Raises:
        CheckpointError: There are none, or they are of several kinds, or their order is not to be told.

    Example:
        >>> import os, tempfile
        >>> os.chdir(tempfile.mkdtemp())
        >>> for name in ("step-9.pt", "step-10.pt", "last.pt"):
        ...     torch.save({"w": torch.ones(1)}, name)
        >>> snapshot_paths(".")
        ['./step-9.pt', './step-10.pt']
    """
    folder, key = split_key(os.fspath(folder).rstrip("/"))
    series = _series(folder)
    if not series:
        raise CheckpointError(f"{folder} holds no snapshots: no checkpoints with a number in their names.")
    if len(series) > 1:
        raise CheckpointError(
            f"{folder} holds snapshots of several kinds ({', '.join(series)}); name them, the oldest first."
        )
    (names,) = series.values()
    moments = {name: _moment(name) for name in names}
    if len(set(moments.values())) < len(moments):
        raise CheckpointError(
            f"{folder}: the order of {listed(names)} can't be told by their names; name them in their order."
        )
    return [f"{folder}/{name}" + (f"::{key}" if key else "") for name in sorted(names, key=lambda name: moments[name])]


def with_folders_opened(paths: Sequence[Path]) -> list[str]:
    """Paths of checkpoints, with the snapshots in it in place of a folder that is no checkpoint itself.

    A single folder is one of snapshots if it holds any, even beside a checkpoint such as the last.
    """
    found: list[str] = []
    for path in paths:
        path = os.fspath(path)
        folder = split_key(path)[0].rstrip("/")
        fs, target = file_system(folder)
        is_series = not folder.endswith((SAFETENSORS, *PICKLED)) and fs.isdir(target) and _series(folder)
        found += snapshot_paths(path) if is_series and (len(paths) == 1 or not _is_checkpoint(folder)) else [path]
    return found


def _is_checkpoint(folder: str) -> bool:
    try:
        return bool(in_folder(folder))
    except CheckpointError:
        return False


def _series(folder: str) -> dict[str, list[str]]:
    """What may be snapshots in a folder, by their names without the numbers; nothing if it is one checkpoint."""
    fs, target = file_system(folder)
    if not fs.isdir(target):
        raise FileNotFoundError(f"there is no folder {folder}.")
    series: dict[str, list[str]] = {}
    for name, is_folder in sorted(_contents(fs, target)):
        if name.endswith(INDEX) or name == DISTRIBUTED_INDEX or re.fullmatch(RANK_FILE, name):
            return {}
        is_whole = _is_finished(fs, f"{target}/{name}") if is_folder else name.endswith((SAFETENSORS, *PICKLED))
        if is_whole and re.search(r"\d", name):
            series.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return series


def _contents(fs: Any, target: str) -> Iterator[tuple[str, bool]]:
    for found in fs.ls(target, detail=True):
        name = posixpath.basename(found["name"].rstrip("/"))
        yield name, found["type"] == "directory" or (found.get("islink", False) and fs.isdir(found["name"]))


def _is_finished(fs: Any, folder: str) -> bool:
    """Whether anything in it is a checkpoint; one of several processes has its index when all have written."""
    names = {posixpath.basename(name.rstrip("/")) for name in fs.ls(folder, detail=False)}
    if any(name.endswith(".distcp") for name in names):
        return DISTRIBUTED_INDEX in names
    return any(
        name.endswith((SAFETENSORS, INDEX, *PICKLED)) or name.startswith("pytorch_model_fsdp_") for name in names
    )


def _moment(name: str) -> tuple[int, ...]:
    for word in ("step", "epoch"):
        if found := re.search(rf"{word}s?[^0-9a-z]{{0,2}}(\d+)", name, re.IGNORECASE):
            return (int(found[1]),)
    return tuple(map(int, re.findall(r"\d+", name.removesuffix(SAFETENSORS))))


def snapshot_recipe(path: str) -> Recipe | None:
    """What `Snapshots` says of a file; files of torch.save are not its, and are not opened for it."""
    if name_of(split_key(path)[0]).endswith(PICKLED):
        return None
    with Checkpoint(path) as checkpoint:
        recipe = recipe_of(checkpoint)
    return recipe if recipe and recipe["operation"] == "snapshot" else None


def as_record(kernel: Kernel) -> dict[str, Any]:
    """A kernel as JSON can keep it."""
    return {"name": type(kernel).__name__, **asdict(kernel)}  # pyright: ignore[reportArgumentType] # all are dataclasses


def kernel_from(record: dict[str, Any]) -> Kernel:
    """The kernel that `as_record` was given."""
    arguments = {name: value for name, value in record.items() if name != "name"}
    kind = getattr(kernels, str(record.get("name")), None)
    try:
        assert isinstance(kind, type)
        assert issubclass(kind, RunningKernel)
        return kind(**arguments)
    except (AssertionError, TypeError) as error:
        raise CheckpointError(f"{record} is not a kernel of this version of the library.") from error
