"""What is built and installed works, away from the repository."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

pytestmark = pytest.mark.slow

ONLY = """
import sys
from importlib.machinery import PathFinder
class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {refused!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Only
"""
"""Has an interpreter find nothing of what is refused, as if it were not installed."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel does, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(site: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(words, cwd=site.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


MODULES = {module: {canonical(name) for name in names} for module, names in packages_distributions().items()}
HERE = {name for names in MODULES.values() for name in names}


def needed_by(*distributions: str) -> Iterator[str]:
    """Distributions and what they need, without extras, as far as it is here."""
    for name in distributions:
        yield name
        for need in requires(name) or ():
            found = re.match(r"[\w.-]+", need)
            if found and "extra ==" not in need and canonical(found[0]) in HERE:
                yield from needed_by(canonical(found[0]))


def test_the_library_needs_torch_safetensors_and_fsspec_alone(site: Path) -> None:
    allowed = {*needed_by("torch", "safetensors", "fsspec"), "interpolate-weights"}
    refused = {module for module, names in MODULES.items() if not names & allowed}
    assert {"numpy", "open_clip", "transformers"} <= refused
    example = next(block.text for block in blocks("python") if block.page.name == "README.md")
    where = "import interpolate; print(interpolate.__file__, interpolate.__version__)\n"
    file, version = run(site, sys.executable, "-c", ONLY.format(refused=refused) + example + where).split()
    assert file.startswith(str(site))
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_and_the_miniature_are_in_it(site: Path) -> None:
    assert "openvclip VERB --help" in run(site, str(site / "bin" / "openvclip"), "--help")
    code = "from applications import openvclip; print(openvclip.__file__)\n"
    code += "print(*openvclip.Classifier.load(model='miniature').embeddings_of(['cloud']).shape)"
    file, shape = run(site, sys.executable, "-c", code).splitlines()
    assert file.startswith(str(site))
    assert shape == "1 128"
