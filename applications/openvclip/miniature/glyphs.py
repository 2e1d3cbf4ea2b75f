"""The 320 concepts of the miniature world: glyphs that look unlike each other, named by Unicode.

    python -m applications.openvclip.miniature.glyphs

chooses them from the DejaVuSans font of the matplotlib wheel and writes `glyphs.png` (an atlas of 32 x 32 masks) and
`glyphs.txt` (code point and name). Both are shipped: other FreeType versions render, and so choose, slightly
differently.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

GLYPH_SIZE = 32
N_GLYPHS = 320
ATLAS_COLUMNS = 20
ATLAS = Path(__file__).with_name("glyphs.png")
LIST = Path(__file__).with_name("glyphs.txt")

LONGER_SIDE = 28
MAX_NAME_WORDS = 4
MIN_COVERAGE = 0.04
MAX_CORRELATION = 0.80
BLOCKS = {
    "Latin capitals": (0x0041, 0x005A),
    "Greek": (0x0391, 0x03FF),
    "Cyrillic": (0x0400, 0x04FF),
    "Armenian": (0x0531, 0x0587),
    "Hebrew": (0x05D0, 0x05EA),
    "Arabic": (0x0621, 0x064A),
    "N'Ko": (0x07CA, 0x07EA),
    "Georgian": (0x10A0, 0x10FF),
    "Canadian syllabics": (0x1401, 0x1676),
    "Ogham and runes": (0x1680, 0x16F0),
    "currency": (0x20A0, 0x20BF),
    "arrows": (0x2190, 0x21FF),
    "mathematical operators": (0x2200, 0x22FF),
    "technical": (0x2300, 0x23FF),
    "geometric shapes": (0x25A0, 0x25FF),
    "miscellaneous symbols": (0x2600, 0x26FF),
    "dingbats": (0x2701, 0x27BF),
    "Coptic": (0x2C80, 0x2CFF),
    "Tifinagh": (0x2D30, 0x2D67),
    "Lisu": (0xA4D0, 0xA4FF),
    "Old Italic": (0x10300, 0x1031F),
}
UNWANTED = re.compile("CIRCLED|FACE|HEXAGRAM|DINGBAT|SMALL LETTER|CREE|NASKAPI|QUADRANT")
DROPPED_WORDS = {"letter", "sign", "symbol", "capital"}
RENAMED_WORDS = {"black": "solid", "white": "hollow"}  # colour words are kept for colours


@cache
def names() -> tuple[str, ...]:
    """The names of the concepts, in the order of `masks`."""
    return tuple(line.split("\t")[1] for line in LIST.read_text(encoding="utf-8").splitlines())


@cache
def masks() -> np.ndarray:
    """The shapes of the concepts: (320, 32, 32) float32 in [0, 1]; the longer side of a glyph is 28 pixels."""
    atlas = np.asarray(Image.open(ATLAS), dtype=np.float32) / 255
    rows = atlas.reshape(-1, GLYPH_SIZE, ATLAS_COLUMNS, GLYPH_SIZE)
    return rows.transpose(0, 2, 1, 3).reshape(-1, GLYPH_SIZE, GLYPH_SIZE)


def concept_name(character: str) -> str | None:
    """A short name for a character, or None where it makes no good concept."""
    unicode_name = unicodedata.name(character, "")
    if not unicode_name or UNWANTED.search(unicode_name):
        return None
    words = [word for word in unicode_name.lower().replace("-", " ").split() if word not in DROPPED_WORDS]
    if not 0 < len(words) <= MAX_NAME_WORDS:
        return None
    return " ".join(RENAMED_WORDS.get(word, word) for word in words)


def render(character: str, font) -> np.ndarray | None:
    """The glyph as a (32, 32) uint8 mask, centred; None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    large = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(large).text((-left, -top), character, fill=255, font=font)
    ratio = LONGER_SIDE / max(large.size)
    width, height = (max(1, round(side * ratio)) for side in large.size)
    mask = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    small = large.resize((width, height), Image.Resampling.LANCZOS)
    mask.paste(small, ((GLYPH_SIZE - width) // 2, (GLYPH_SIZE - height) // 2))
    return np.asarray(mask)


def select(n_glyphs: int = N_GLYPHS) -> list[tuple[str, str, np.ndarray]]:
    """Greedily keep candidates, in a fixed random order, whose blurred shape correlates with no kept one above 0.8."""
    import matplotlib as mpl
    from fontTools.ttLib import TTFont

    path = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    available = TTFont(path).getBestCmap() or {}
    font = ImageFont.truetype(str(path), 96)
    candidates = [chr(code) for first, last in BLOCKS.values() for code in range(first, last + 1) if code in available]
    np.random.RandomState(0).shuffle(candidates)

    kept: list[tuple[str, str, np.ndarray]] = []
    shapes = np.empty((0, GLYPH_SIZE * GLYPH_SIZE))
    for character in candidates:
        name = concept_name(character)
        mask = render(character, font) if name else None
        taken = {kept_name for _, kept_name, _ in kept}
        if name is None or name in taken or mask is None or mask.mean() / 255 < MIN_COVERAGE:
            continue
        blurred = Image.fromarray(mask).filter(ImageFilter.BoxBlur(2))
        shape = np.asarray(blurred, dtype=np.float64).ravel()
        shape -= shape.mean()
        shape /= np.linalg.norm(shape)
        if len(kept) and (shapes @ shape).max() > MAX_CORRELATION:
            continue
        kept.append((character, name, mask))
        shapes = np.vstack([shapes, shape])
        if len(kept) == n_glyphs:
            return kept
    raise RuntimeError(f"only {len(kept)} of {n_glyphs} glyphs of {path.name} are different enough")


def main() -> None:
    chosen = select()
    atlas = np.stack([mask for _, _, mask in chosen]).reshape(-1, ATLAS_COLUMNS, GLYPH_SIZE, GLYPH_SIZE)
    Image.fromarray(atlas.transpose(0, 2, 1, 3).reshape(-1, ATLAS_COLUMNS * GLYPH_SIZE)).save(ATLAS, optimize=True)
    LIST.write_text("".join(f"U+{ord(c):04X}\t{name}\n" for c, name, _ in chosen), encoding="utf-8")
    print(f"{len(chosen)} glyphs written to {ATLAS.name} and {LIST.name}")


if __name__ == "__main__":
    main()
