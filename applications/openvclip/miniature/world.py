"""What there is to see in the miniature world, and how it is drawn.

Two domains show the same 320 concepts: clean stills with captions, on which the tiny CLIP is pre-trained, and cluttered
short videos, on which it is fine-tuned and tested. A motion is visible in stills too, as a long exposure, so that the
text tower knows its word before any video is seen.

Every drawing is a function of the generator it is given. Images are float32 (3, 32, 32) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from applications.openvclip.miniature import glyphs

SIZE = glyphs.GLYPH_SIZE
FOREGROUNDS = {
    "red": (0.95, 0.20, 0.20),
    "green": (0.20, 0.85, 0.25),
    "blue": (0.30, 0.45, 1.00),
    "yellow": (0.95, 0.90, 0.20),
    "magenta": (0.95, 0.25, 0.90),
    "cyan": (0.20, 0.90, 0.95),
    "orange": (1.00, 0.58, 0.15),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS = {
    "black": (0.04, 0.04, 0.04),
    "navy": (0.05, 0.07, 0.30),
    "maroon": (0.30, 0.05, 0.09),
    "olive": (0.22, 0.22, 0.04),
}
MOTIONS = ("still", "sliding", "hopping", "spinning", "zooming")
PREFIXES = ("a", "a photo of a", "a picture of a", "a drawing of a", "an image of a")
CLIP_FRAMES = 16
SAMPLED_FRAMES = 4


@dataclass
class Pose:
    """Where glyphs are drawn: shift in half image sides, scale 1 fills the image, angle in radians; each (n,)."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    scale: np.ndarray


def vocabulary() -> list[str]:
    """All words that captions are made of, in alphabetical order."""
    sentences = [*glyphs.names(), *FOREGROUNDS, *GROUNDS, *MOTIONS, *PREFIXES, "on a background"]
    return sorted({word for sentence in sentences for word in sentence.split()})


def draw(concepts: np.ndarray, pose: Pose) -> Tensor:
    """Coverage, in [0, 1], of each concept drawn in its pose: (n, 1, 32, 32)."""
    masks = torch.from_numpy(glyphs.masks())[torch.as_tensor(concepts)].unsqueeze(1)
    cos, sin = np.cos(pose.angle) / pose.scale, np.sin(pose.angle) / pose.scale
    # grid_sample asks, for each point of the image, where in the glyph it comes from: the inverse of the pose
    rotation = np.stack([cos, sin, -sin, cos], axis=-1).reshape(-1, 2, 2)
    translation = -rotation @ np.stack([pose.x, pose.y], axis=-1)[..., None]
    inverse = torch.from_numpy(np.concatenate([rotation, translation], axis=-1).astype(np.float32))
    return F.grid_sample(masks, F.affine_grid(inverse, list(masks.shape), align_corners=False), align_corners=False)


def smooth_noise(rng: np.random.Generator, n: int, cells: int) -> Tensor:
    """Coloured noise of unit variance on a `cells` x `cells` grid, enlarged to (n, 3, 32, 32)."""
    coarse = torch.from_numpy(rng.standard_normal((n, 3, cells, cells), dtype=np.float32))
    return F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=True)


def stills(
    rng: np.random.Generator, concepts: np.ndarray, *, jitter: float = 1.0, moving: float = 0.0
) -> tuple[Tensor, list[str]]:
    """Clean images of the given concepts and a caption for each.

    Args:
        rng: Source of every random choice.
        concepts: (n,) indices of concepts.
        jitter: Multiplies shift and rotation, in [0, 1]; pre-training starts with upright centred glyphs.
        moving: Share of images that show a motion, as a long exposure of three ghosts.

    Returns:
        Images (n, 3, 32, 32) and n captions.
    """
    n = len(concepts)
    motion = np.where(rng.random(n) < moving, rng.integers(1, len(MOTIONS), n), 0)
    pose = Pose(
        x=jitter * rng.uniform(-0.15, 0.15, n),
        y=jitter * rng.uniform(-0.15, 0.15, n),
        angle=jitter * rng.uniform(-0.25, 0.25, n),
        scale=rng.uniform(0.6, 0.95, n),
    )
    reach = np.choose(
        motion,
        [
            np.zeros(n),
            rng.uniform(0.25, 0.45, n),
            rng.uniform(0.25, 0.45, n),
            rng.uniform(0.35, 0.8, n),
            rng.uniform(0.3, 0.5, n),
        ],
    )
    coverage = torch.zeros(n, 1, SIZE, SIZE)
    for offset, weight in ((-1, 0.5), (0, 1.0), (1, 0.5)):
        coverage = torch.maximum(coverage, weight * draw(concepts, moved(pose, motion, offset * reach)))

    colour = rng.integers(len(FOREGROUNDS), size=n)
    ground = rng.integers(len(GROUNDS), size=n)
    foreground_rgb = palette(FOREGROUNDS, colour, rng)
    texture = torch.from_numpy(rng.uniform(0, 0.10, (n, 1, 1, 1)).astype(np.float32)) * smooth_noise(rng, n, 3)
    background = palette(GROUNDS, ground, rng) + texture
    sigma = torch.from_numpy(rng.uniform(0, 0.05, (n, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal((n, 3, SIZE, SIZE), dtype=np.float32))
    images = background + coverage * (foreground_rgb - background) + sigma * noise

    prefix = np.where(rng.random(n) < 0.5, 0, rng.integers(1, len(PREFIXES), n))
    says_colour, says_ground = rng.random(n) < 0.6, rng.random(n) < 0.3
    says_motion = rng.random(n) < np.where(motion > 0, 0.7, 0.3)
    captions = [
        " ".join(
            [
                PREFIXES[prefix[i]],
                *([list(FOREGROUNDS)[colour[i]]] if says_colour[i] else []),
                *([MOTIONS[motion[i]]] if says_motion[i] else []),
                glyphs.names()[concepts[i]],
                *([f"on a {list(GROUNDS)[ground[i]]} background"] if says_ground[i] else []),
            ]
        )
        for i in range(n)
    ]
    return images.clamp(0, 1), captions


def clip(
    rng: np.random.Generator,
    concept: int,
    motion: str,
    colour: str | None,
    hardness: float,
    behind: int | None = None,
) -> np.ndarray:
    """One video of one concept: (16, 32, 32, 3) uint8.

    Time runs so that every fourth frame (`SAMPLED_FRAMES` of them) spans a range of 2 in the formulas of motion.

    Args:
        rng: Source of every random choice.
        concept: Index of the concept.
        motion: One of `MOTIONS`.
        colour: A key of `FOREGROUNDS`; None draws one.
        hardness: 0 is a clean background; 1 is full clutter, blur, noise and colour cast.
        behind: Index of another concept, which fills the background; by default none does.
    """
    n, h = CLIP_FRAMES, hardness
    stride = n // SAMPLED_FRAMES
    t = (np.arange(n) - (n - 1) / 2) / (stride * (SAMPLED_FRAMES - 1) / 2)
    still = Pose(
        x=np.full(n, rng.uniform(-0.15, 0.15)) + rng.normal(0, 0.03, n),
        y=np.full(n, rng.uniform(-0.15, 0.15)) + rng.normal(0, 0.03, n),
        angle=np.full(n, rng.uniform(-0.25, 0.25)),
        scale=np.full(n, rng.uniform(0.55, 0.85)),
    )
    sign = rng.choice([-1, 1])
    path = {
        "still": np.zeros(n),
        "sliding": sign * rng.uniform(0.45, 0.7) * t,
        "hopping": np.sin(4.7 * t + rng.uniform(0, 2 * np.pi)) * rng.uniform(0.35, 0.5),
        "spinning": sign * rng.uniform(0.9, 1.5) * t,
        "zooming": sign * rng.uniform(0.4, 0.55) * t,
    }[motion]
    coverage = draw(np.full(n, concept), moved(still, np.full(n, MOTIONS.index(motion)), path))

    colour_index = rng.integers(len(FOREGROUNDS)) if colour is None else list(FOREGROUNDS).index(colour)
    foreground = palette(FOREGROUNDS, np.array([colour_index]), rng)
    clutter = 0.6 * smooth_noise(rng, 1, 5) + 0.8 * smooth_noise(rng, 1, 12)
    background = palette(GROUNDS, rng.integers(len(GROUNDS), size=1), rng) + h * rng.uniform(0.12, 0.28) * clutter
    roll = np.round(np.outer(np.arange(n) / stride, rng.integers(-1, 2, 2))).astype(int)
    background = torch.cat([background.roll(tuple(shift), dims=(2, 3)) for shift in roll.tolist()])
    if behind is not None:
        background = with_object(background, rng, behind)
    for _ in range(2):
        background = with_bar(background, rng, t, present=rng.random() < 0.7 * h)
    video = background + coverage * (foreground - background)

    contrast = 1 - h * rng.uniform(0.1, 0.5)
    mean = video.mean()
    video = mean + contrast * (video - mean)
    video = video + h * torch.from_numpy(rng.uniform(-0.1, 0.1, (1, 3, 1, 1)).astype(np.float32))
    binomial = torch.tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(binomial, binomial) / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(video, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    video = torch.lerp(video, blurred, float(h * rng.uniform()))
    noise = torch.from_numpy(rng.standard_normal((n, 3, SIZE, SIZE), dtype=np.float32))
    video = video + h * rng.uniform(0.02, 0.10) * noise
    return (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def moved(pose: Pose, motion: np.ndarray, offset: np.ndarray) -> Pose:
    """The pose displaced along its motion: sliding moves x, hopping y, spinning the angle, zooming log scale."""
    sliding, hopping, spinning, zooming = (offset * (motion == i) for i in range(1, len(MOTIONS)))
    return Pose(pose.x + sliding, pose.y + hopping, pose.angle + spinning, pose.scale * np.exp(zooming))


def palette(colours: dict[str, tuple[float, ...]], index: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The chosen colours, each channel jittered by up to 0.06: (n, 3, 1, 1)."""
    rgb = np.array(list(colours.values()))[index] + rng.uniform(-0.06, 0.06, (len(index), 3))
    return torch.from_numpy(rgb.astype(np.float32))[:, :, None, None]


def with_object(video: Tensor, rng: np.random.Generator, concept: int) -> Tensor:
    """The video with a concept behind everything: as large as the image, half transparent, not moving."""
    x, y = rng.uniform(-0.4, 0.4, (2, 1))
    coverage = draw(np.array([concept]), Pose(x, y, angle=rng.uniform(-0.25, 0.25, 1), scale=np.ones(1)))
    colour = palette(FOREGROUNDS, rng.integers(len(FOREGROUNDS), size=1), rng)
    return video + 0.5 * coverage * (colour - video)


def with_bar(video: Tensor, rng: np.random.Generator, t: np.ndarray, *, present: bool) -> Tensor:
    """The video with a dim coloured bar, 60 % opaque, drifting across it."""
    across = rng.integers(2)
    centre = (rng.uniform(-0.8, 0.8) + rng.uniform(-0.4, 0.4) * t)[:, None]
    half_width = rng.uniform(0.06, 0.16)
    colour = torch.from_numpy(rng.uniform(0, 0.6, (1, 3, 1, 1)).astype(np.float32))
    if not present:
        return video
    position = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    inside = torch.from_numpy((np.abs(position - centre) < half_width).astype(np.float32))
    opacity = 0.6 * (inside[:, None, None, :] if across else inside[:, None, :, None])
    return video + opacity * (colour - video)
