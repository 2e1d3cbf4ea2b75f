"""What README and the pages of docs show: it runs, or is understood where it needs what is not everywhere."""

import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from applications.openvclip import recipes
from applications.openvclip.__main__ import main as openvclip
from applications.openvclip.commands import train
from applications.openvclip.config import to_dict
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.zeroshot.plot import drawn_from
from applications.openvclip.zeroshot.results import read_results
from benchmarks import costs, quoted
from interpolate import __main__ as library
from tests.integration.runs import arguments as of_small_run
from tests.openvclip.conftest import small_world as small_world
from tests.openvclip.files import numbered, write_manifest, write_video
from tests.pages import ROOT, Block, blocks

MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()
HEAVY = "distributed", "accelerate", "transformers", "lightning", "peft", "open_clip", "applications"
LEAVES = {
    "A CLIP fine-tuned on classes": "patched.pt",
    "The Trainer of transformers": "average/model.safetensors",
    "Lightning": "patched.ckpt",
    "LoRA, by PEFT": "mixed/adapter_config.json",
    "accelerate": "average/model.safetensors",
    "torchrun": "patched.pt",
}


def marked(shown: Sequence[Block], heavy: Callable[[Block], bool]) -> list[Any]:
    return [pytest.param(b, id=f"{b.name} {i}", marks=[pytest.mark.slow] * heavy(b)) for i, b in enumerate(shown)]


@pytest.mark.parametrize("block", marked(list(blocks("python")), lambda b: any(word in b.text for word in HEAVY)))
def test_code_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    if "applications" in block.text:
        tmp_path = request.getfixturevalue("desk")
    monkeypatch.chdir(tmp_path)
    if not any(word in block.text for word in HEAVY):
        exec(compile(block.text, block.name, "exec"), {})  # noqa: S102 - it is ours
        return
    (tmp_path / "train.py").write_text(block.text)
    n_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = n_ranks if "init_process_group" in block.text or "torch.distributed" in block.text else []
    done = subprocess.run([sys.executable, *ranks, "train.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if block.page.stem == "recipes":
        assert (tmp_path / LEAVES[block.heading]).exists()


def test_there_is_a_recipe_for_each_library_of_at_most_40_lines():
    shown = [block for block in blocks("python") if block.page.stem == "recipes"]
    assert {block.heading for block in shown} == {*LEAVES}
    assert all(block.text.count("\n") <= 40 for block in shown)


@pytest.fixture(scope="module")
def desk(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: checkpoints, snapshots, a finished run, videos, labels."""
    folder = tmp_path_factory.mktemp("desk")
    write_checkpoints(folder)
    openvclip(["train", *of_small_run(small_world, folder / "runs" / "mine"), "--optimization.epochs", "2"])
    held_out = read_manifest(small_world["zs_object"])
    (folder / "labels.txt").write_text("\n".join(held_out.classes) + "\n")
    labels = [label - (i % 4 == 0) for i, label in enumerate(held_out.labels)]  # where all is right, nothing calibrates
    named = zip(held_out.paths, (held_out.classes[label] for label in labels), strict=True)
    write_manifest(folder / "held_out.csv", list(named))
    for i in range(len(held_out)):
        target = folder / os.path.relpath(held_out.location(i), small_world["zs_object"].parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(held_out.location(i), target)
    (folder / "videos").mkdir()
    shutil.copy(held_out.location(0), folder / "videos")
    shutil.copy(held_out.location(0), folder / "clip.mp4")
    write_video(folder / "long.mp4", numbered(240), "mpeg4")
    return folder


def write_checkpoints(folder: Path) -> None:
    for value, name in enumerate(("anchor", "theta")):
        weights = "visual.h.0.fc.w", "visual.h.1.fc.w", "text.w"
        save_file({weight: torch.full([1], float(value)) for weight in weights}, folder / f"{name}.safetensors")
    (folder / "scoring.py").write_text(
        "def accuracy(weights):\n    return weights['text.w'].item()\n"
        "def both(weights):\n    return {'new': accuracy(weights), 'kept': -weights['visual.h.0.fc.w'].norm().item()}\n"
    )
    (folder / "snapshots").mkdir()
    for step in (100, 200, 300):
        shutil.copy(folder / "theta.safetensors", folder / "snapshots" / f"step-{step}.safetensors")


def run_commands(block: Block) -> None:
    for words in block.commands():
        words, _, file = (words[: words.index(">")], ">", words[-1]) if ">" in words else (words, "", os.devnull)
        with Path(file).open("w") as printed, redirect_stdout(printed):
            if words[:3] == ["python", "-m", "interpolate"]:
                assert library.main(words[3:]) == 0, words
            else:
                assert words[0] == "openvclip", words
                openvclip(words[1:])


@pytest.mark.parametrize("block", marked(list(blocks("bash")), lambda block: "openvclip" in block.text))
def test_commands_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "openvclip" in block.text:
        tmp_path = request.getfixturevalue("desk")
    else:
        write_checkpoints(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run_commands(block)


class UnderstoodError(Exception):
    """The words of a command are what it expects."""


def understand(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take in a command up to where its work would begin."""
    match words:
        case ["make", *targets]:
            assert all(f"\n{target}:" in MAKEFILE or "=" in target for target in targets), words
        case ["pip", "install", what]:
            extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            assert {*re.findall(r"[\w-]+", what)} <= {*extras}, words
        case ["torchrun", "--nproc-per-node", _, "-m", module, *rest]:
            understand(["openvclip", module.removeprefix("applications.openvclip."), *rest], monkeypatch)
        case ["python", "-m", "applications.openvclip", *rest]:
            understand(["openvclip", *rest], monkeypatch)
        case ["python", "-m", "interpolate", *rest]:
            library._parser().parse_args(library.ratios_last(rest))
        case ["python", script, *_] if (ROOT / script).is_file():
            pass
        case ["python", "-m", module, *_] if module.startswith("benchmarks"):
            assert (ROOT / module.replace(".", "/")).is_dir(), words
        case ["openvclip", _, "--help"] | ["openvclip", _, _, "--help"]:
            with pytest.raises(SystemExit, match="0"):
                openvclip(words[1:])
        case ["openvclip", "train", *rest]:
            train.parse(rest)
        case ["openvclip", *rest]:
            parse = tyro.cli

            def cli(what: Any, **options: Any) -> None:
                parse(functools.wraps(what)(lambda *_, **__: None) if inspect.isfunction(what) else what, **options)
                raise UnderstoodError

            monkeypatch.setattr(tyro, "cli", cli)
            with pytest.raises(UnderstoodError):
                openvclip(rest)
            monkeypatch.setattr(tyro, "cli", parse)
        case _:
            pytest.fail(f"nobody knows what this is: {words}")


@pytest.mark.parametrize("block", marked(list(blocks("sh", "console")), lambda block: False))
def test_what_can_not_run_everywhere_is_understood(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    RunFolder(Path("runs/mine")).write_settings(to_dict(recipes.miniature()))
    for words in block.commands():
        understand(words, monkeypatch)


def test_what_things_cost_is_what_was_measured():
    assert quoted.PERFORMANCE.read_text() == costs.page()


def test_the_table_and_the_plot_of_the_miniature_are_those_of_the_results_that_are_shipped():
    results = read_results(quoted.SHIPPED)
    assert quoted.table(results) in README
    assert f"]({quoted.PLOT.relative_to(quoted.ROOT)})" in README
    with Image.open(quoted.PLOT) as image:
        assert image.info["Description"] == drawn_from(results)
    assert results.config["recipe"] == "miniature"
    assert results.config["seed"] == 0
