"""Many videos: found in files, folders and URLs, read side by side, and looked at one after another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch import Tensor

from applications.openvclip.data import storage
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.lists import VIDEO_SUFFIXES
from applications.openvclip.data.workers import Workers
from applications.openvclip.inference.classifier import Classifier


@dataclass(frozen=True)
class Seen:
    """A video that was looked at, or why it could not be."""

    video: str
    embeddings: Tensor | None
    """Of its views (V, E), as `Classifier.embed` gives them; None if it could not be read."""
    fault: str = ""
    """Why it could not be read; or what is missing of a file that was cut off and is used as far as it goes."""


def is_video(name: str) -> bool:
    """Whether a file is one by its name."""
    return PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES


def whole(location: str) -> str:
    """A path that is the same from any folder; a URL stays what it is."""
    return location if storage.is_url(location) else os.path.abspath(location)


def find_videos(sources: Iterable[str]) -> list[str]:
    """Files and URLs as they are given, and the videos in folders, each once.

    Raises:
        ValueError: There is nothing, or no video in a folder.
    """
    found: dict[str, None] = {}
    for source in sources:
        if not _is_folder(source):
            found[source] = None
            continue
        files = [path for path in storage.list_files(source) if is_video(path)]
        if not files:
            raise ValueError(f"{source}: there is no video in this folder.")
        found |= dict.fromkeys(storage.join(source, path) for path in files)
    if not found:
        raise ValueError("at least one video is needed, a file, a folder or a URL; got none.")
    return list(found)


def _is_folder(source: str) -> bool:
    try:
        return storage.is_folder(source)
    except Exception:  # noqa: BLE001 no server or credentials, say; reading it says so, and costs no other video anything
        return False


def look_at(classifier: Classifier, videos: Iterable[str], *, workers: int, time_limit_s: float) -> Iterator[Seen]:
    """Look at videos, in their order; one that can't be read, or hangs its reader, costs nothing but itself.

    Args:
        classifier: The model.
        videos: Paths or URLs.
        workers: Processes that decode.
        time_limit_s: Seconds that reading one may take.
    """
    videos = list(videos)
    with Workers(classifier.views, min(workers, max(1, len(videos))), time_limit_s) as pool:
        for video, read in zip(videos, pool.map(videos), strict=True):
            if isinstance(read, VideoReadError):
                yield Seen(video, None, str(read).removeprefix(f"{video}: "))
            else:
                views, shortfall = read
                yield Seen(video, classifier.embed(torch.from_numpy(views)), shortfall)
