"""What the page shows, as HTML that holds its pictures itself. Every text in it is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from applications.openvclip.page.confusions import Confusion
from applications.openvclip.zeroshot.results import BASELINE, Results

CSS = """
.heading { font-size: 1.6rem; font-weight: 700; margin: .2rem 0; }
h2.heading { font-size: 1.1rem; }
.heading small { font-size: .95rem; font-weight: 400; opacity: .65; margin-left: .6rem; }
.answers { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr 3.5rem; gap: .45rem .8rem;
  align-items: center; font-size: 1rem; }
.answers .track { height: 1.15rem; border-radius: .35rem; background: rgba(128, 128, 128, .16); overflow: hidden; }
.answers .bar { height: 100%; background: #8ab4dc; border-radius: .35rem; }
.answers .best { background: #e8590c; }
.answers .figure { text-align: right; font-variant-numeric: tabular-nums; }
.answers strong { font-weight: 650; }
.told { padding: .8rem 1rem; border-radius: .5rem; background: rgba(128, 128, 128, .12); line-height: 1.45; }
.fault { background: #fff0e6; color: #8a2f00; border-left: 4px solid #e8590c; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .8rem; }
.pair { border: 1px solid rgba(128, 128, 128, .3); border-radius: .6rem; padding: .7rem .8rem; line-height: 1.4; }
.pair img { display: inline-block; width: 64px; height: 64px; border-radius: .3rem; margin: 0 .35rem .35rem 0; }
.pair small { opacity: .7; }
.wide img { width: 100%; height: auto; border-radius: .5rem; }
"""

_SHOWN = 12


def bars(probabilities: Mapping[str, float]) -> str:
    """A bar for each label, in the order given, so that they stay where they are while they move."""
    best = max(probabilities, key=lambda label: probabilities[label])
    shown = sorted(probabilities, key=lambda label: -probabilities[label])[:_SHOWN]
    rows = []
    for label, p in probabilities.items():
        if label not in shown:
            continue
        name = f"<strong>{escape(label)}</strong>" if label == best else escape(label)
        width = f'<div class="bar{" best" * (label == best)}" style="width: {100 * p:.1f}%"></div>'
        rows.append(f'<div>{name}</div><div class="track">{width}</div><div class="figure">{100 * p:.1f}%</div>')
    hidden = len(probabilities) - len(rows)
    more = f'<p class="told">and {hidden} labels with less</p>' if hidden else ""
    return f'<div class="answers">{"".join(rows)}</div>{more}'


def told(text: str, *, fault: bool = False) -> str:
    """A message."""
    return f'<div class="told{" fault" * fault}">{escape(text)}</div>'


def heading(name: str, about: str = "", *, level: int = 1) -> str:
    """The head of the page, or of a part of it."""
    return f'<h{level} class="heading">{escape(name)} <small>{escape(about)}</small></h{level}>'


def picture(content: bytes, kind: str, alt: str) -> str:
    """An image that is part of the page."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def animation(clip: np.ndarray) -> bytes:
    """A clip (3, T, H, W) uint8 as an animated WebP."""
    stills = [Image.fromarray(still).resize((128, 128)) for still in clip.transpose(1, 2, 3, 0)]
    file = io.BytesIO()
    stills[0].save(file, "webp", save_all=True, append_images=stills[1:], duration=300, loop=0)
    return file.getvalue()


def confusions(found: Sequence[Confusion], clips: Mapping[str, bytes]) -> str:
    """What was mixed up, with moving pictures of it."""
    cards = []
    for c in found:
        moving = "".join(picture(clips[v], "webp", f"a clip of {c.shown}") for v in c.videos if v in clips)
        cards.append(
            f'<div class="pair">{moving}<div><strong>{escape(c.shown)}</strong> taken for '
            f"<strong>{escape(c.taken_for)}</strong></div>"
            f"<small>{len(c.videos)} of {c.of} videos · {escape(c.protocol)}</small></div>"
        )
    return f'<div class="pairs">{"".join(cards)}</div>'


class Tradeoff:
    """The trade-off of a run along the anchor weight: what it was trained on, against what it never saw.

    Raises:
        ValueError: The results have no set with the classes of training, or no other.
    """

    def __init__(self, results: Results) -> None:
        top_1 = [r for r in results.protocols.values() if not r.multi_label]  # no mean with another metric
        closed = [r for r in top_1 if r.closed]
        others = [r for r in top_1 if not r.closed]
        if not closed or not others:
            raise ValueError("a trade-off needs a set with the classes of training and one with others.")
        self.x_label = f"{closed[0].protocol}, trained on"
        self.y_label = others[0].protocol if len(others) == 1 else f"zero-shot, mean of {len(others)} sets"
        names = [name for name in closed[0].accuracy if all(name in r.accuracy for r in others)]

        def place(scorer: str) -> tuple[float, float]:
            y = [r.mean_std(scorer)[0] for r in others]
            return 100 * closed[0].mean_std(scorer)[0], 100 * sum(y) / len(y)

        self.weights = sorted((name for name in names if name != BASELINE), key=float)
        self.places = np.array([place(name) for name in self.weights])
        self.baseline = place(BASELINE)

    def at(self, anchor_weight: float) -> tuple[float, float]:
        """Both accuracies in percent, between two measured weights in a straight line."""
        weights = [float(name) for name in self.weights]
        x, y = (float(np.interp(anchor_weight, weights, axis)) for axis in self.places.T)
        return x, y

    def svg(self, anchor_weight: float) -> str:
        """The curve, with the present point on it."""
        everything = np.vstack([self.places, self.baseline])
        low, high = everything.min(axis=0), everything.max(axis=0)
        margin = 0.12 * np.maximum(high - low, 1)
        low, high = low - margin, high + margin
        width, height, left, top, bottom = 480, 300, 52, 14, 44

        def pixel(place: Sequence[float]) -> tuple[float, float]:
            x, y = (np.asarray(place) - low) / (high - low)
            return left + x * (width - left - 14), top + (1 - y) * (height - top - bottom)

        def ticks(axis: int) -> list[float]:
            step = next(s for s in (1, 2, 5, 10, 20, 50) if (high[axis] - low[axis]) / s <= 6)
            return np.arange(np.ceil(low[axis] / step) * step, high[axis], step).tolist()

        parts = []
        for x in ticks(0):
            at, _ = pixel((x, low[1]))
            parts.append(f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{height - bottom}" class="grid"/>')
            parts.append(f'<text x="{at:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
        for y in ticks(1):
            _, at = pixel((low[0], y))
            parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - 14}" y2="{at:.1f}" class="grid"/>')
            parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
        curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(pixel, self.places.tolist()))
        parts.append(f'<polyline points="{curve}" fill="none" stroke="#4c86bd" stroke-width="2"/>')
        for name, place in zip(self.weights, self.places.tolist(), strict=True):
            x, y = pixel(place)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#4c86bd"/>')
            parts.append(f'<text x="{x + 7:.1f}" y="{y - 6:.1f}">{escape(name)}</text>')
        x, y = pixel(self.baseline)
        parts.append(f'<text x="{x:.1f}" y="{y + 6:.1f}" text-anchor="middle" font-size="19">★</text>')
        parts.append(f'<text x="{x + 11:.1f}" y="{y + 16:.1f}">{escape(BASELINE)}</text>')
        x, y = pixel(self.at(anchor_weight))
        parts.append(f'<circle class="here" cx="{x:.1f}" cy="{y:.1f}" r="8" fill="#e8590c"/>')
        below = f'x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle"'
        parts.append(f"<text {below}>{escape(self.x_label)} (top-1, %)</text>")
        turned = f'transform="translate(14 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle"'
        parts.append(f"<text {turned}>{escape(self.y_label)} (%)</text>")
        style = "<style>.grid{stroke:currentColor;opacity:.12} text{fill:currentColor}</style>"
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="trade-off" font-size="11.5" '
            f'style="width:100%;height:auto">{style}{"".join(parts)}</svg>'
        )
