"""The pages, and the blocks of code in them. The language of a fence says what becomes of the block:

python      it runs as it stands; on two processes, where it is distributed
bash        its commands run, in a folder with what the pages speak of
sh          its commands need what is not everywhere: weights, GPUs, data sets, a hub; names and options are checked
console     what a terminal showed: commands after $ as in sh, and their output
json, text  shown only; {…} is for the site, notebooks included
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("[!_]*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
SHOWN_ONLY = "json", "text"

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: Path
    heading: str
    language: str
    text: str

    def commands(self) -> list[list[str]]:
        """The words of each command, without comments."""
        text = self.text
        if self.language == "console":
            text = "\n".join(re.findall(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE))
        lines = text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    @property
    def name(self) -> str:
        return f"{self.page.stem}: {self.heading}"


def blocks(*languages: str) -> Iterator[Block]:
    """The blocks of all pages in these languages, or of any where none is given."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in _FENCE.finditer(text):
            language = fence[1].strip()
            if not languages or language in languages:
                headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text[: fence.start()]), re.MULTILINE)
                yield Block(page, headings[-1], language, fence[2])


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What `#…` may follow a link to a page: its headings, in lower case, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
