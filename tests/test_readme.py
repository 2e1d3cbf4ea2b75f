import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str, word: str) -> list[str]:
    return [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in block]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("code", blocks("python", "from interpolate import"), ids=lambda code: str(len(code)))
def test_examples_run(code: str, tmp_path: Path):
    (tmp_path / "train.py").write_text(code)
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "distributed" in code else []
    command = [sys.executable, *ranks, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands_run(tmp_path: Path):
    save_file({"visual.w": torch.zeros(2), "text.w": torch.zeros(1)}, tmp_path / "anchor.safetensors")
    save_file({"visual.w": torch.ones(2), "text.w": torch.ones(1)}, tmp_path / "theta.safetensors")
    (tmp_path / "scoring.py").write_text("def accuracy(weights):\n    return weights['text.w'].item()\n")
    (commands,) = blocks("bash", "python -m interpolate")
    script = "set -e\n" + commands.replace("python ", f"{sys.executable} ")
    done = subprocess.run(["/bin/bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "as its recipe says" in done.stdout
