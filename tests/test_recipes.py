"""The recipes of the documentation run as they stand, in a process of their own, and are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
LEAVES = {
    "A CLIP fine-tuned on classes": "patched.pt",
    "The Trainer of transformers": "average/model.safetensors",
    "Lightning": "patched.ckpt",
    "LoRA, by PEFT": "mixed/adapter_config.json",
    "accelerate": "average/model.safetensors",
    "torchrun": "patched.pt",
}


def test_the_page_has_a_recipe_for_each_library_of_at_most_40_lines():
    assert {*RECIPES} == {*LEAVES}
    assert all(code.count("\n") <= 40 for code in RECIPES.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_leaves_what_it_says(name: str, tmp_path: Path):
    (tmp_path / "train.py").write_text(RECIPES[name])
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *ranks, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / LEAVES[name]).exists()
