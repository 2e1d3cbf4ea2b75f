"""Finding videos by words or by a video, how well that works where captions are known, and what was found as a page."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from applications.openvclip.data import storage
from applications.openvclip.data.storage import Cache
from applications.openvclip.data.views import opened
from applications.openvclip.inference.features import Features
from applications.openvclip.runs.texts import write_text

RANKS = (1, 5, 10)
_VIDEO_COLUMNS = ("video_id", "video", "path")
_CAPTION_COLUMNS = ("sentence", "caption", "text")


def best(query: Tensor, features: Features, n: int) -> list[tuple[str, float]]:
    """The n videos nearest to a unit vector (E,), each with its cosine, best first."""
    cosines = features.embeddings @ query.to(features.embeddings)
    values, indices = cosines.topk(min(n, len(cosines)))
    return [(features.videos[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


@dataclass(frozen=True)
class Caption:
    video: str
    text: str


def read_captions(source: str) -> list[Caption]:
    """A table of videos and their captions, as MSR-VTT's test list: columns `video_id` and `sentence`.

    The columns may be called `video` or `path`, and `caption` or `text`, too.

    Raises:
        ValueError: There are no such columns, or no row.
    """
    reader = csv.DictReader(io.StringIO(storage.read_text(source), newline=""))
    names = list(reader.fieldnames or [])
    video = next((name for name in _VIDEO_COLUMNS if name in names), None)
    caption = next((name for name in _CAPTION_COLUMNS if name in names), None)
    if video is None or caption is None:
        raise ValueError(f"{source}: columns video_id and sentence are expected, got {', '.join(names) or 'none'}.")
    found = []
    for row in reader:
        if None in row or not row[video] or not row[caption]:
            raise ValueError(f"{source}, line {reader.line_num}: a video and a caption are expected, got {row}.")
        found.append(Caption(row[video].strip(), row[caption].strip()))
    if not found:
        raise ValueError(f"{source}: there is no caption in it.")
    return found


def videos_of(captions: Sequence[Caption], features: Features) -> list[int]:
    """The row of each caption's video, found by its path, its name, or its name without suffix.

    Raises:
        ValueError: One is not among the features, or several fit; a recall without it would be of another set.
    """
    rows: dict[str, set[int]] = {}
    for i, video in enumerate(features.videos):
        path = PurePosixPath(video)
        for key in {video, path.name, path.stem}:
            rows.setdefault(key, set()).add(i)
    absent = [c.video for c in captions if c.video not in rows]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(captions)} captions are of videos without features, {absent[0]} the first; extract "
            "theirs, or leave them out of the captions."
        )
    several = [c.video for c in captions if len(rows[c.video]) > 1]
    if several:
        raise ValueError(f"{several[0]}: several videos have this name; give their paths in the captions.")
    return [next(iter(rows[c.video])) for c in captions]


def recall(texts: Tensor, rows: Sequence[int], features: Features) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10, and the median rank, of text → video and video → text.

    Candidates are the videos that have a caption. A video of several captions is found by the best of them. Of equal
    cosines the wrong one is taken first, so that an embedding that is the same for all finds nothing.

    Args:
        texts: (C, E), of unit length.
        rows: The video of each, as an index of the features.
        features: Of the videos.
    """
    candidates = sorted(set(rows))
    own = torch.tensor([candidates.index(row) for row in rows])
    cosines = texts @ features.embeddings[candidates].to(texts).T  # (C, V)
    of_text = _rank(cosines, cosines.gather(1, own.unsqueeze(1)))
    is_own = own.unsqueeze(0) == torch.arange(len(candidates)).unsqueeze(1)  # (V, C)
    right = cosines.T.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
    of_video = 1 + (cosines.T.masked_fill(is_own, -torch.inf) >= right).sum(dim=1)
    return {"text → video": _figures(of_text), "video → text": _figures(of_video)}


def _rank(scores: Tensor, right: Tensor) -> Tensor:
    """The rank of the right one, from 1: behind all that are above it or level with it."""
    return (scores >= right).sum(dim=1)


def _figures(ranks: Tensor) -> dict[str, float]:
    at = {f"recall@{k}": float((ranks <= k).double().mean()) for k in RANKS}
    return at | {"median rank": float(ranks.double().quantile(0.5))}


@dataclass(frozen=True)
class Still:
    """The middle frame of a video as a JPEG: what a reading process does for a location."""

    cache: Cache
    short_side: int = 180

    def __call__(self, location: str) -> bytes:
        with opened(location, self.cache, self.short_side) as video:
            (frame,) = video.chosen(lambda n, _: [n // 2])
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=85)
        return file.getvalue()


def write_page(path: Path, title: str, found: Sequence[tuple[str, float]], stills: Mapping[str, bytes | str]) -> None:
    """What was found as one HTML file that needs nothing beside it.

    Args:
        path: Where to.
        title: What was looked for.
        found: Videos and their cosines, best first.
        stills: A JPEG of each video, or the reason why there is none.
    """
    figures = []
    for rank, (video, cosine) in enumerate(found, 1):
        still, name = stills[video], html.escape(video)
        link = html.escape(video if storage.is_url(video) else Path(video).absolute().as_uri(), quote=True)
        picture = (
            f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(still).decode()}">'
            if isinstance(still, bytes)
            else f"<p>{html.escape(still)}</p>"
        )
        caption = f"<figcaption><b>{rank}</b> {cosine:.3f}<br>{html.escape(PurePosixPath(video).name)}</figcaption>"
        figures.append(f'<figure><a href="{link}" title="{name}">{picture}</a>{caption}</figure>')
    write_text(path, _PAGE.format(title=html.escape(title), figures="\n".join(figures)))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.2rem }}
figure {{ margin: 0 }}
img {{ width: 100%; height: 9rem; object-fit: cover; border-radius: 6px; background: #eee }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere; color: #555 }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{figures}
</main>
</body>
</html>
"""
