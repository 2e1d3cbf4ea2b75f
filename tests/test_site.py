"""The pages as a site, whose notebooks are run for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import NOTEBOOKS, ROOT


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_its_notebooks_show_what_they_found(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--regularizer.strength" in (tmp_path / "commands.html").read_text()
    assert "interpolate.InterpolatedWeightRegularizer" in (tmp_path / "api.html").read_text()
    for notebook in NOTEBOOKS:
        page = (tmp_path / "notebooks" / f"{notebook.stem}.html").read_text()
        assert page.count("<img") >= 2
