"""The state of a training in a folder, each process its own shards: safetensors and JSON, nothing is ever unpickled.

`torch.distributed.checkpoint` by itself keeps its metadata as a pickle, which a tampered folder could use to run code.
Its import takes longer than half of torch's, so that it is imported where it is used.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from interpolate.atomic import replacing
from interpolate.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_VALUES = "values.json"


def save_state(folder: str, state: Mapping[str, Any], process_group: dist.ProcessGroup | None = None) -> None:
    """Write nested dicts of tensors, DTensors, numbers, texts, None and lists of them; all processes call it together.

    Args:
        folder: Made if it is not there.
        state: As `state_dict()` gives it; names are texts without "/".
        process_group: The processes that write, by default all. A thread that writes beside training needs one of its
            own.

    Raises:
        OSError: A process could not write its part; it is raised in all of them.
        ValueError: A name is not a text without "/".
    """
    import torch.distributed.checkpoint as dcp

    tensors, values = _split(state)
    os.makedirs(folder, exist_ok=True)
    with _alone_is_meant(), _raising_what_was_raised(folder):
        writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=process_group, no_dist=not dist.is_initialized())

    def finish() -> None:
        with replacing(os.path.join(folder, _VALUES)) as file:
            file.write(json.dumps(values, indent=1).encode())

    on_first(finish, process_group)


def load_state(
    folder: str, state: dict[str, Any], process_group: dist.ProcessGroup | None = None, *, part: bool = False
) -> None:
    """Read what `save_state` wrote on any number of processes: into the tensors of `state`, and into its dicts.

    Args:
        folder: Where it is.
        state: What to read, in the form of what was saved.
        process_group: The processes that read, by default all.
        part: Whether `state` may be a part of what was saved.

    Raises:
        CheckpointError: The folder holds no state, or that of something else; `state` is unchanged then.
        OSError: A process could not read its part; it is raised in all of them.
    """
    import torch.distributed.checkpoint as dcp

    tensors, values = _split(state)
    try:
        with open(os.path.join(folder, _VALUES), encoding="utf-8") as file:
            saved = json.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no whole state of a training: {error}.") from error
    with _alone_is_meant(), _raising_what_was_raised(folder):
        reader = dcp.HuggingFaceStorageReader(folder)
        shapes = {name: tuple(entry.size) for name, entry in _tensors_in(reader)}
        if part:
            shapes = {name: shape for name, shape in shapes.items() if name in tensors}
            saved = {name: value for name, value in saved.items() if name in values}
        unlike = {name for name in tensors.keys() | shapes.keys() if tuple(_shape(tensors, name)) != shapes.get(name)}
        if unlike := sorted(unlike | (values.keys() ^ saved.keys())):
            raise CheckpointError(
                f"{folder} is the state of another training: {len(unlike)} of its entries are missing, unexpected or "
                f"of another shape, such as {unlike[0]}."
            )
        dcp.load(tensors, storage_reader=reader, process_group=process_group, no_dist=not dist.is_initialized())
    for name, value in saved.items():
        *parents, last = name.split("/")
        place = state
        for parent in parents:
            place = place[parent]
        place[last] = value


def on_first(function: Callable[[], Any], process_group: dist.ProcessGroup | None = None) -> Any:
    """What the function returns or raises in the first process, which alone calls it, in every process."""
    if not dist.is_initialized():
        return function()
    answer: list[Any] = [None, None]
    if dist.get_rank(process_group) == 0:
        try:
            answer = [function(), None]
        except Exception as error:  # noqa: BLE001 # the others wait for an answer; it is raised in all
            answer = [None, error]
    dist.broadcast_object_list(answer, group=process_group, group_src=0)
    value, error = answer
    if error is not None:
        raise error
    return value


def _tensors_in(reader: HuggingFaceStorageReader) -> Iterator[tuple[str, TensorStorageMetadata]]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for name, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # safetensors hold nothing else
        yield name, entry


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and everything else, by names with "/" between the levels."""
    flat = dict(_flat(state, ""))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def _flat(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f'names in a state must be texts without "/", got {name!r} in {prefix or "it"}.')
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _raising_what_was_raised(folder: str) -> Iterator[None]:
    """What went wrong in a process in place of torch's exception around it, which `except Exception` does not catch."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError):
            raise OSError(reason.errno, f"{reason.strerror or reason} (process {rank})", folder) from error
        raise RuntimeError(f"{folder}: process {rank} raised {reason!r}") from error
