"""The tensors of TorchScript archives, such as OpenAI's CLIP; the code in them is neither run nor compiled."""

from __future__ import annotations

import io
import posixpath
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.jit import _pickle

_CODE = "constants.pkl"


def is_torchscript(names: list[str]) -> bool:
    """Whether a zip archive with these records is one."""
    return any(name.endswith(f"/{_CODE}") for name in names)


def torchscript_tensors(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Every tensor that is an attribute of a module in the archive, by its dotted name.

    These are what its `state_dict()` has, and tensors that are plain attributes. `torch.jit.load` would compile the
    code that comes with them. Without that code the archive is one of `torch.save`, which holds objects of classes
    that are known to the code alone; `weights_only` lets objects of a class without any code stand for them.
    """
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as copy:
        for name in archive.namelist():
            if posixpath.basename(name) != _CODE and "/code/" not in name:
                copy.writestr(name, archive.read(name))
    plain.seek(0)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(plain)
    plain.seek(0)
    classes: list[Any] = [(_Attributes, name) for name in unknown if name.startswith("__torch__.")]
    lists = [_pickle.build_boollist, _pickle.build_doublelist, _pickle.build_intlist, _pickle.build_tensorlist]
    with torch.serialization.safe_globals([*classes, *lists, _pickle.restore_type_tag]):
        return dict(_named(torch.load(plain, map_location="cpu", weights_only=True), ""))


class _Attributes:
    """Stands for a module of the archive."""


def _named(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Attributes):
            yield from _named(value, f"{prefix}{name}.")
