import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from applications.openvclip.zeroshot.plot import drawn_from
from applications.openvclip.zeroshot.results import read_results
from benchmarks import costs, quoted
from interpolate.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str, word: str) -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in block]


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python", "from interpolate import"), ids=lambda code: str(len(code)))
def test_examples_run(code: str, tmp_path: Path):
    (tmp_path / "train.py").write_text(code)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "distributed" in code else []
    command = [sys.executable, *ranks, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for value, path in enumerate(("anchor.safetensors", "theta.safetensors")):
        names = "visual.h.0.fc.w", "visual.h.1.fc.w", "text.w"
        save_file({name: torch.full([1], float(value)) for name in names}, path)
    Path("scoring.py").write_text(
        "def accuracy(weights):\n    return weights['text.w'].item()\n"
        "def both(weights):\n    return {'new': accuracy(weights), 'kept': -weights['visual.h.0.fc.w'].norm().item()}\n"
    )
    Path("snapshots").mkdir()
    for step in (100, 200, 300):
        shutil.copy("theta.safetensors", f"snapshots/step-{step}.safetensors")
    (commands,) = blocks("bash", "python -m interpolate")
    for command in commands.splitlines():
        python, module, name, *arguments = shlex.split(command)
        assert (python, module, name) == ("python", "-m", "interpolate")
        assert main(arguments) == 0, command
    assert capsys.readouterr().out.endswith("as its recipe says\n")


def test_what_things_cost_is_what_was_measured():
    assert quoted.cost_table() in README
    assert quoted.PERFORMANCE.read_text() == costs.page()


def test_the_table_and_the_plot_of_the_miniature_are_those_of_the_results_that_are_shipped():
    results = read_results(quoted.SHIPPED)
    assert quoted.table(results) in README
    assert f"]({quoted.PLOT.relative_to(quoted.ROOT)})" in README
    with Image.open(quoted.PLOT) as image:
        assert image.info["Description"] == drawn_from(results)
    assert results.config["recipe"] == "miniature"
    assert results.config["seed"] == 0
