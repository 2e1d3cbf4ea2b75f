"""README and the pages of docs: what they name is there. That what they show runs is tests/test_examples.py."""

import re
from pathlib import Path

import pytest

from applications.openvclip.__main__ import VERBS
from tests.pages import NOTEBOOKS, PAGES, ROOT, SHOWN_ONLY, anchors, blocks, prose

MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()


def test_readme_and_pages_are_short():
    assert README.count("\n") <= 150
    assert all(page.read_text().count("\n") < 400 for page in PAGES + NOTEBOOKS)


def test_every_block_has_a_language_that_says_what_becomes_of_it():
    known = {"python", "bash", "sh", "console", *SHOWN_ONLY}
    assert not [(b.name, b.language) for b in blocks() if b.language not in known and not b.language.startswith("{")]


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_are_there(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_verbs_options_and_targets_in_the_text_are_there(page: Path):
    options = {"--nproc-per-node", "--max-restarts", "--hook-type"}  # of torchrun and pre-commit
    options |= {line for file in (ROOT / "tests/openvclip/options").glob("*.txt") for line in file.read_text().split()}
    for file in ("interpolate/__main__.py", "applications/openvclip/commands/train.py", "benchmarks/study/__main__.py"):
        options |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        assert not {*re.findall(r"(?<![\w-])--[a-z][\w.-]+", code)} - options, code
        for verb in re.findall(r"^openvclip (\w+)", code):
            assert verb in {*VERBS, "VERB"}, code
        for target in re.findall(r"^make (\S+)", code):
            assert f"\n{target}:" in MAKEFILE, code
