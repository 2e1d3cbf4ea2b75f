"""How training clips are varied. Nothing heavy is imported here: it is part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training clip, the same for all its frames. The defaults change nothing."""

    max_short_side: float = 1.0
    """The short side is drawn between the crop's side and this many times it; published: 256 / 224."""
    horizontal_flip: bool = False
    """Whether half of the clips are mirrored."""
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by factors drawn from 1 - this to 1 + this."""

    def short_side(self, size: int, rng: np.random.Generator) -> int:
        """The short side of a clip before cropping, in pixels."""
        return round(size * rng.uniform(1.0, self.max_short_side))
