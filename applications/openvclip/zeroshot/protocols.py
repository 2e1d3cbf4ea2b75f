"""Evaluation protocols as data: which videos, which classes compete, in which splits, which sentences and views."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from applications.openvclip.data import layouts, storage
from applications.openvclip.data.class_names import tidy
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.model.prompts import ACTION_TEMPLATES, TEMPLATES
from applications.openvclip.runs.strict import structured
from applications.openvclip.runs.texts import json_object

Unreadable = Literal["wrong", "left-out"]
BuiltIn = Callable[[str], Manifest | None]
"""A data set that is no file, by the source that stands for it; None where it is a file."""


@dataclass(frozen=True)
class Protocol:
    """What an accuracy is measured on. Its parts are measured one by one; their mean and deviation are the result."""

    name: str
    parts: tuple[Manifest, ...]
    """Videos, and the classes that compete for them."""
    templates: tuple[str, ...] = ACTION_TEMPLATES
    """Sentences that class names are put into."""
    sampling: Sampling = field(default_factory=Sampling)
    top_k: tuple[int, ...] = (1,)
    unreadable: Unreadable = "wrong"
    """What a video is that can't be read: a wrong answer, or no part of the set."""
    closed: bool = False
    """Whether the classes are those of training; no part of the hash."""
    multi_label: bool = False
    """Whether a video may show several classes and have several rows: the figure is the mean average precision."""

    def __post_init__(self) -> None:
        if not self.name or not self.parts:
            raise ValueError(f"a protocol has a name and at least one part, got {self.name!r} and {len(self.parts)}.")
        if not self.top_k or min(self.top_k) < 1:
            raise ValueError(f"{self.name}: top_k must be numbers from 1, got {list(self.top_k)}.")
        if self.multi_label and self.top_k != (1,):
            raise ValueError(f"{self.name}: top_k {list(self.top_k)} says nothing where a video has several labels.")
        for part in self.parts:
            if not len(part):
                raise ValueError(f"{self.name}: {part.name} has no video of its classes, {', '.join(part.classes)}.")
            if max(self.top_k) > len(part.classes):
                raise ValueError(
                    f"{self.name}: top-{max(self.top_k)} says nothing of {len(part.classes)} classes ({part.name})."
                )

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of everything that decides the result: equal hashes, comparable figures.

        A video counts by its file name without suffix and its class, wherever it is stored.
        """
        content = {
            "parts": [
                {
                    "classes": sorted(part.classes),
                    "videos": sorted(
                        (PurePosixPath(path).stem, part.classes[label])
                        for path, label in zip(part.paths, part.labels, strict=True)
                    ),
                }
                for part in self.parts
            ],
            "templates": self.templates,
            "sampling": self.sampling.as_dict(),
            "top_k": self.top_k,
            "unreadable": self.unreadable,
            **({"multi_label": True} if self.multi_label else {}),  # what others were measured on keeps its hash
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sources:
    """Where the videos and the lists of a data set are, as paths or URLs."""

    videos: str
    """Folder of the videos."""
    lists: str | None = None
    """Folder of lists: those of the Open-VCLIP release (`ucf101_full`, `hmdb_split1`, …), or the official ones."""
    seed: int = 0
    """Of the halves of EP1, where no list gives them."""


def no_file(source: str) -> None:
    """Every source is a file or folder."""


def named(
    name: str, sources: Mapping[str, Sources], unreadable: Unreadable = "wrong", built_in: BuiltIn = no_file
) -> Protocol:
    """A protocol of the registry, or from a file.

    Args:
        name: Such as "ucf101/EP1"; or a `.json` file (`read_protocol`).
        sources: Of each data set, by the name before the slash.
        unreadable: What a video is that can't be read.
        built_in: Gives the sets that are no files, by the sources that stand for them in files of protocols.

    Raises:
        ValueError: There is no such protocol, or its data set is not among the sources.
        FileNotFoundError: A list that it needs is missing.
    """
    if name.endswith(".json"):
        return read_protocol(name, unreadable, built_in)
    if name not in REGISTRY:
        raise ValueError(f"{name!r} is not a protocol; there are {', '.join(REGISTRY)}, and files ending in .json.")
    data_set = name.partition("/")[0]
    if data_set not in sources:
        raise ValueError(f"{name} needs to know where its videos are: --videos {data_set} FOLDER.")
    top_k = (1, 5) if name == "kinetics600/zero-shot" else (1,)
    parts = REGISTRY[name](sources[data_set])
    return Protocol(name, parts, top_k=top_k, unreadable=unreadable, closed=name.endswith("/closed"))


@dataclass(frozen=True)
class _PartOfFile:
    source: str
    root: str | None = None
    names: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _File:
    name: str
    parts: tuple[_PartOfFile, ...]
    templates: Literal["actions", "objects"] | tuple[str, ...] = "actions"
    sampling: Sampling = field(default_factory=Sampling)
    top_k: tuple[int, ...] = (1,)
    closed: bool = False
    multi_label: bool = False


def read_protocol(source: str, unreadable: Unreadable = "wrong", built_in: BuiltIn = no_file) -> Protocol:
    """Your own protocol, as JSON.

    `{"name": …, "parts": [{"source": …, "root": …, "names": …, "classes": […]}], "templates": "actions",
    "sampling": {"frames": 8, …}, "top_k": [1, 5], "closed": true, "multi_label": false}`. A part's source and names are
    read as by `applications.openvclip.data.layouts.read_dataset`, relative to the file, unless `built_in` gives the
    set, such as `miniature:train`. Only `name` and `parts` are required; `closed` says that the classes are those of
    training, which of a run's own training classes is found out anyway. With `multi_label` a video may have several
    rows, of a label each, and the figure is the mean average precision; a video of which no label is asked for is no
    part of the set.

    Raises:
        ValueError: A field is unknown or of another kind, or a part has no class that is asked for.
    """
    file = structured(json_object(storage.read_text(source), source), _File, source)
    folder = storage.parent(source)
    parts = []
    for i, part in enumerate(file.parts):
        root, names = (value and storage.join(folder, value) for value in (part.root, part.names))
        name_of_part = f"{file.name}/{i}"
        manifest = built_in(part.source)
        if manifest is None:
            manifest = layouts.read_dataset(
                storage.join(folder, part.source), root, names, name=name_of_part, multi_label=file.multi_label
            )
        asked = manifest.classes if part.classes is None else part.classes
        classes = [c if c in manifest.classes else tidy(c) for c in asked]
        not_asked = [c for c in manifest.classes if c not in classes]
        for name in classes:  # one without a video competes as the others do, unless it is a slip of the pen
            if name not in manifest.classes and (near := difflib.get_close_matches(name, not_asked, 1, cutoff=0.7)):
                raise ValueError(f"{source}: {name!r} is not a class of {part.source}; is {near[0]!r} meant?")
        parts.append(manifest.of_classes(classes, name_of_part))
    templates = TEMPLATES[file.templates] if isinstance(file.templates, str) else file.templates
    return Protocol(
        file.name, tuple(parts), templates, file.sampling, file.top_k, unreadable, file.closed, file.multi_label
    )


def halves(manifest: Manifest, *, seed: int, n: int = 10) -> tuple[Manifest, ...]:
    """EP1: n times, half of the classes (rounded down) at random, a function of the seed."""
    parts = []
    for i in range(n):
        classes = np.random.default_rng([seed, i]).permutation(manifest.classes)[: len(manifest.classes) // 2]
        parts.append(manifest.of_classes(set(classes.tolist()), f"{manifest.name}/half {i}"))
    return tuple(parts)


def _release(sources: Sources, folder: str) -> Manifest | None:
    """A list of the release, if there is one."""
    if sources.lists is None:
        return None
    source = f"{sources.lists.rstrip('/')}/{folder}/test.csv"
    return layouts.read_list(source, sources.videos) if storage.exists(source) else None


def _published_halves(
    folder: str, whole: Callable[[Sources], tuple[Manifest, ...]]
) -> Callable[[Sources], tuple[Manifest, ...]]:
    def parts(sources: Sources) -> tuple[Manifest, ...]:
        published = [_release(sources, f"{folder}/{i}") for i in range(10)]
        found = tuple(part for part in published if part)
        return found if len(found) == len(published) else halves(whole(sources)[0], seed=sources.seed)

    return parts


def _ucf_full(sources: Sources) -> tuple[Manifest, ...]:
    return (_release(sources, "ucf101_full") or layouts.class_folders(sources.videos),)


def _ucf_splits(sources: Sources) -> tuple[Manifest, ...]:
    lists = _lists(sources, "ucf101/EP3")
    return tuple(
        _release(sources, f"ucf101_split{i}") or layouts.read_list(f"{lists}/testlist0{i}.txt", sources.videos)
        for i in (1, 2, 3)
    )


def _hmdb_full(sources: Sources) -> tuple[Manifest, ...]:
    """As published: the 5,100 training and test videos of the first split, not all 6,766."""
    lists = _lists(sources, "hmdb51/EP2")
    return (_release(sources, "hmdb_full") or layouts.hmdb_lists(lists, sources.videos, split=1, kinds=(1, 2)),)


def _hmdb_splits(sources: Sources) -> tuple[Manifest, ...]:
    lists = _lists(sources, "hmdb51/EP3")
    return tuple(
        _release(sources, f"hmdb_split{i}") or layouts.hmdb_lists(lists, sources.videos, split=i, kinds=(2,))
        for i in (1, 2, 3)
    )


def _kinetics600_splits(sources: Sources) -> tuple[Manifest, ...]:
    lists = _lists(sources, "kinetics600/zero-shot")
    return tuple(layouts.read_list(f"{lists}/k600_split{i}/test.csv", sources.videos) for i in (1, 2, 3))


def _kinetics400(sources: Sources) -> tuple[Manifest, ...]:
    return (layouts.read_dataset(sources.lists or sources.videos, sources.videos),)


def _lists(sources: Sources, name: str) -> str:
    if sources.lists is None:
        raise ValueError(f"{name} needs lists of its videos: --lists {name.partition('/')[0]} FOLDER.")
    return sources.lists.rstrip("/")


REGISTRY: dict[str, Callable[[Sources], tuple[Manifest, ...]]] = {
    "ucf101/EP1": _published_halves("ucf101_half_test", _ucf_full),
    "ucf101/EP2": _ucf_full,
    "ucf101/EP3": _ucf_splits,
    "hmdb51/EP1": _published_halves("hmdb_half_test", _hmdb_full),
    "hmdb51/EP2": _hmdb_full,
    "hmdb51/EP3": _hmdb_splits,
    "kinetics600/zero-shot": _kinetics600_splits,
    "kinetics400/closed": _kinetics400,
}
"""The protocols of the paper, by name: what makes their parts out of the sources of a data set."""
