import inspect
import subprocess
import sys

import pytest

import interpolate

OPTIONAL = "open_clip", "torchvision", "matplotlib", "rich", "lightning", "transformers", "PIL", "av"


def test_importing_the_library_imports_nothing_optional():
    script = f"import sys, interpolate; print([name for name in {OPTIONAL} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", [name for name in interpolate.__all__ if not name.endswith("Error")])
def test_every_public_name_has_an_example(name: str):
    public = getattr(interpolate, name)
    if not inspect.isabstract(public):
        assert ">>>" in (inspect.getdoc(public) or "")


def test_public_names_are_sorted_and_exist():
    assert interpolate.__all__ == sorted(interpolate.__all__)
    assert all(hasattr(interpolate, name) for name in interpolate.__all__)
