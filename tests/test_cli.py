import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file, save_file

from interpolate.__main__ import main
from interpolate._arguments import ratios_last
from interpolate.checkpoints import Checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two checkpoints and something to evaluate with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_file({"a.w": torch.zeros(2), "b.w": torch.zeros(1)}, "anchor.safetensors")
    save_file({"a.w": torch.ones(2), "b.w": torch.ones(1)}, "theta.safetensors")
    Path("judging.py").write_text(
        "def closeness(weights):\n    return -abs(weights['b.w'].item() - 0.25)\n\non_test = closeness\n"
    )
    return tmp_path


PAIR = "anchor.safetensors", "theta.safetensors"


def run(*arguments: str) -> int:
    return main(arguments)


def test_patch_writes_and_reports(capsys: pytest.CaptureFixture[str]):
    assert run("patch", *PAIR, "--anchor-weight", "0.25", "-o", "out.safetensors") == 0
    assert load_file("out.safetensors")["a.w"].tolist() == [0.75, 0.75]
    assert "2 tensors, 2 of them weights; distance of the inputs 1.732" in capsys.readouterr().out


def test_patch_takes_patterns():
    assert run("patch", *PAIR, "--anchor-weight", "a.*=1", "*=0", "-o", "out.safetensors") == 0
    assert {n: t[0].item() for n, t in load_file("out.safetensors").items()} == {"a.w": 0.0, "b.w": 1.0}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--anchor-weight", "0.25", *PAIR, "-o", "out.safetensors"),
        (PAIR[0], "--anchor-weight", "0.25", PAIR[1], "-o", "out.safetensors"),
        ("-o", "out.safetensors", "--anchor-weight", "a.*=0.25", "*=0.25", *PAIR),
        ("--anchor-weight=0.25", "-o", "out.safetensors", *PAIR),
        ("--anchor-weight", "a.*=0.25", "--anchor-weight", "*=0.25", *PAIR, "-o", "out.safetensors"),
        (*PAIR, "-o", "out.safetensors", "--anchor-weight", "0.25"),
    ],
)
def test_options_come_in_any_order(arguments: tuple[str, ...]):
    assert run("patch", *arguments) == 0
    assert {t[0].item() for t in load_file("out.safetensors").values()} == {0.75}


def test_a_checkpoint_whose_name_looks_like_a_pattern_is_one_after_a_single_number():
    os.symlink("anchor.safetensors", "lr=0.1")
    assert ratios_last(["patch", "--anchor-weight", "0.5", "lr=0.1", "b"]) == [
        "patch",
        "lr=0.1",
        "b",
        "--anchor-weight",
        "0.5",
    ]


def test_weights_beyond_the_ends_are_asked_for_and_remembered(capsys: pytest.CaptureFixture[str]):
    assert run("patch", *PAIR, "--anchor-weight", "-0.5", "-o", "out.safetensors") == 2
    assert "must be in [0, 1], got -0.5" in capsys.readouterr().err
    assert run("patch", *PAIR, "--extrapolate", "--anchor-weight", "a.*=-0.5", "*=2", "-o", "out.safetensors") == 0
    assert {n: t[0].item() for n, t in load_file("out.safetensors").items()} == {"a.w": 1.5, "b.w": -1.0}
    assert run("verify", "out.safetensors") == 0


def test_the_depth_that_weights_grow_with_is_said(capsys: pytest.CaptureFixture[str]):
    names = [*(f"h.{i}.fc.w" for i in range(3)), "head.w"]
    for i, path in enumerate(PAIR):
        save_file({name: torch.full([1], float(i)) for name in names}, path)
    assert run("patch", *PAIR, "--by-depth", "0.75", "0.25", "-o", "out.safetensors") == 0
    assert "3 blocks under 'h': h.0 (0.75) to h.2 (0.25)" in capsys.readouterr().err
    patched = load_file("out.safetensors")
    assert [patched[name].item() for name in names] == [0.25, 0.5, 0.75, 0.25]
    assert run("verify", "out.safetensors") == 0


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]):
    assert run("patch", *PAIR, "--anchor-weight", "0.25", "-o", "out.safetensors", "--dry-run", "--json") == 0
    assert not os.path.exists("out.safetensors")
    assert json.loads(capsys.readouterr().out)["tensors"][0]["distance"] == pytest.approx(2**0.5)


def test_average_and_soup(capsys: pytest.CaptureFixture[str]):
    assert run("average", *PAIR, "-o", "mean.safetensors") == 0
    assert load_file("mean.safetensors")["b.w"].item() == 0.5
    evaluate = "--evaluate", "judging:closeness"
    assert run("soup", *PAIR, "mean.safetensors", *evaluate, "-o", "soup.safetensors") == 0
    assert load_file("soup.safetensors")["b.w"].item() == 0.25
    assert "2 of 3 kept, value -0" in capsys.readouterr().err


def test_an_average_may_be_weighted(capsys: pytest.CaptureFixture[str]):
    assert run("average", *PAIR, "--weights", "1,3", "-o", "mean.safetensors") == 0
    assert load_file("mean.safetensors")["b.w"].item() == 0.75
    assert run("average", *PAIR, "--weights=-1,3", "-o", "mean.safetensors") == 0
    assert load_file("mean.safetensors")["b.w"].item() == 1.5


def test_choose_and_repair_write_what_verify_can_check(capsys: pytest.CaptureFixture[str]):
    Path("worth.py").write_text(
        "def closeness(w):\n    return [-abs(w['b.w'].item() - x) for x in (0.2, 0.3, 0.4)]\n"
        "def both(w):\n    return {'new': -abs(w['a.w'][0].item() - 1), 'kept': -abs(w['b.w'].item())}\n"
    )
    data = "--data", "dev"
    save_file({"a.w": torch.zeros(2), "b.w": torch.ones(1) * 0.5}, "step-1.safetensors")
    save_file({"a.w": torch.ones(2), "b.w": torch.ones(1)}, "step-2.safetensors")
    snapshots = "step-1.safetensors", "step-2.safetensors", "--anchor", "anchor.safetensors"
    evaluate = "--evaluate", "worth:closeness"
    assert run("choose", *snapshots, *data, *evaluate, "-o", "chosen.safetensors", "--plot", "chosen.png") == 0
    told = capsys.readouterr().out
    assert "chosen on dev: report on other data" in told
    assert load_file("chosen.safetensors")["b.w"].item() == pytest.approx(0.3)
    assert run("repair", *PAIR, *data, "--evaluate", "worth:both", "-o", "repaired.safetensors", "--plot", "r.png") == 0
    assert {n: t[0].item() for n, t in load_file("repaired.safetensors").items()} == {"a.w": 1.0, "b.w": 0.0}
    assert os.path.getsize("chosen.png") > 1000 < os.path.getsize("r.png")
    for written in ("chosen", "repaired"):
        assert run("verify", f"{written}.safetensors") == 0
    assert run("inspect", "repaired.safetensors", "--json") == 0
    recipe = json.loads(capsys.readouterr().out.rpartition("as its recipe says\n")[2])["recipe"]
    assert (recipe["operation"], recipe["chosen_on"], recipe["values"]) == ("patch", "dev", {"new": 0.0, "kept": 0.0})


def test_without_matplotlib_a_plot_is_refused_before_anything_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("repair", *PAIR, "--data", "dev", "--evaluate", "missing:function", "--plot", "r.png") == 2
    assert capsys.readouterr().err.startswith("interpolate repair: plots need matplotlib: pip install matplotlib")


def test_json_has_null_where_there_is_no_number(capsys: pytest.CaptureFixture[str]):
    Path("numbering.py").write_text("def nothing(w):\n    return {'new': w['b.w'].item() or float('nan'), 'kept': 1}\n")
    assert run("repair", *PAIR, "--evaluate", "numbering:nothing", "--data", "dev", "--points", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [c["values"]["new"] for c in found["candidates"][:2]] == [1.0, None]
    for command in (("inspect", PAIR[0]), ("diff", *PAIR), ("average", PAIR[0], "-o", "out.safetensors")):
        run(*command, "--json")
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


@pytest.mark.parametrize("error", ["ValueError('mine')", "OSError('mine')", "ImportError('mine')"])
@pytest.mark.parametrize("where", ["def score(weights):\n    raise ", "raise ", "import missing_package  # "])
def test_what_the_users_function_or_module_raises_is_not_taken_for_bad_input(error: str, where: str):
    name = f"scoring_{uuid4().hex}"  # modules are imported once
    Path(f"{name}.py").write_text(where + error)
    with pytest.raises((ValueError, OSError, ImportError), match=r"mine|No module named 'missing_package'"):
        run("repair", *PAIR, "--evaluate", f"{name}:score", "--data", "dev")


def test_an_interrupt_is_said_on_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(self: Checkpoint, name: str):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "chunks", interrupted)
    before = sorted(os.listdir())
    assert run("patch", *PAIR, "--anchor-weight", "0.5", "-o", "out.safetensors") == 130
    assert capsys.readouterr().err == "interpolate patch: interrupted; no file was changed\n"
    assert sorted(os.listdir()) == before


def test_inspect_lists_tensors(capsys: pytest.CaptureFixture[str]):
    assert run("inspect", "theta.safetensors") == 0
    assert "float32  (2,)                 a.w" in capsys.readouterr().out
    assert run("inspect", "theta.safetensors", "--json") == 0
    assert [t["name"] for t in json.loads(capsys.readouterr().out)["tensors"]] == ["a.w", "b.w"]


def test_diff_tells_by_its_exit_code():
    assert run("diff", *PAIR) == 1
    assert run("diff", "theta.safetensors", "theta.safetensors") == 0
    assert run("diff", "theta.safetensors", "missing.safetensors") == 2
    save_file({"a.w": torch.ones(3)}, "other.safetensors")
    assert run("diff", "theta.safetensors", "other.safetensors") == 1


def test_verify_tells_by_its_exit_code(capsys: pytest.CaptureFixture[str]):
    run("patch", *PAIR, "--anchor-weight", "0.5", "-o", "out.safetensors")
    capsys.readouterr()
    assert run("verify", "out.safetensors") == 0
    assert capsys.readouterr().out == "as its recipe says\n"
    save_file({"a.w": torch.ones(2), "b.w": torch.zeros(1)}, "theta.safetensors")
    assert run("verify", "out.safetensors", "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("patch", *PAIR, "--anchor-weight", "2", "-o", "o.safetensors"), "must be in [0, 1], got 2.0"),
        (("patch", *PAIR, "--anchor-weight", "much", "-o", "o.safetensors"), "--anchor-weight takes W or PATTERN=W"),
        (
            ("patch", *PAIR, "--anchor-weight", "c.*=1", "*=0", "-o", "o.safetensors"),
            "the pattern 'c.*' in",
        ),
        (("patch", *PAIR, "--anchor-weight", "a.*=1", "-o", "o.safetensors"), "no pattern in anchor_weight fits b.w"),
        (("patch", *PAIR, "--anchor-weight", "*=1", "*=0", "-o", "o.safetensors"), "a pattern is given twice"),
        (("patch", *PAIR, "--anchor-weight", "1", "--anchor-weight", "0", "-o", "o.pt"), "must be the only one"),
        (("inspect", "missing.safetensors"), "missing.safetensors"),
        (("average", *PAIR, "--weights", "1,x", "-o", "o.pt"), "--weights takes numbers with commas between them, got"),
        (("average", *PAIR, "--weights", "1,2,3", "-o", "o.pt"), "one number for each of 2 checkpoints, got 3"),
        (("inspect", "memory://missing.pt"), "there is no file memory://missing.pt"),
        (("inspect", "zip://a.pt::junk.safetensors"), "zip://a.pt::junk.safetensors can't be reached: File is not a z"),
        (("average", *PAIR, "-o", "folder.safetensors"), "folder.safetensors is a folder; give the name of a file"),
        (
            ("repair", *PAIR, "--data", "dev", "--evaluate", "nowhere:none"),
            "got 'nowhere:none': No module named 'nowhere'",
        ),
        (
            ("repair", *PAIR, "--data", "dev", "--evaluate", "judging"),
            "--evaluate takes MODULE:FUNCTION, got 'judging'",
        ),
        (("inspect", "junk.safetensors"), "junk.safetensors"),
        (("repair", *PAIR, "--data", "the test set", "--evaluate", "judging:closeness"), "is that of a test set"),
        (
            ("repair", *PAIR, "--data", "dev", "--evaluate", "judging:on_test"),
            "function of --evaluate 'on_test' is that of",
        ),
        (("repair", *PAIR, "--data", "dev", "--evaluate", "judging:closeness"), "metrics new, kept, got value"),
        (
            ("choose", *PAIR, "--data", "dev", "--evaluate", "judging:closeness", "--kernel", "x"),
            "is no averaging kernel",
        ),
        (
            ("choose", *PAIR, "--data", "dev", "--evaluate", "judging:closeness", "--anchor-weights", "0.5"),
            "--anchor-weights weigh the anchor, and there is no --anchor",
        ),
        (("average", *PAIR, "--kernel", "", "-o", "o.safetensors"), "is no averaging kernel"),
        (("choose", "missing", "--data", "dev", "--evaluate", "judging:closeness"), "missing"),
        (("diff", PAIR[0], "."), ". holds several checkpoints ("),
        (("patch", *PAIR, "--anchor-weight", "*=1", "a.*=0", "-o", "o.safetensors"), "'a.*' in anchor_weight decides"),
        (("patch", *PAIR, "--anchor-weight", "0.5", "-o", "no/folder/o.safetensors"), "no/folder"),
        (
            ("repair", *PAIR, "--data", "dev", "--evaluate", "judging:none"),
            "--evaluate takes MODULE:FUNCTION, got 'judging:none'",
        ),
        (
            ("repair", *PAIR, "--data", "dev", "--evaluate", "judging:closeness", "--points", "1"),
            "points must be at least 2, got 1",
        ),
    ],
)
def test_bad_input_is_said_on_one_line(arguments: tuple, message: str, capsys: pytest.CaptureFixture[str]):
    Path("folder.safetensors").mkdir()
    Path("junk.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"interpolate {arguments[0]}: ")
    assert message in error
    assert error.count("\n") == 1


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    run("average", *PAIR, "-o", "out.safetensors")
    assert "%" not in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run("average", *PAIR, "-o", "out.safetensors")
    assert "100 %" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "interpolate", "diff", *PAIR]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_a_reader_that_has_enough_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "interpolate", "inspect", PAIR[0]]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
