"""The options of every command are those written down beside this file: one that goes or changes its name is a change
for users, and is to be seen in a change."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from applications.openvclip import commands
from applications.openvclip.__main__ import main

OPTIONS = Path(__file__).with_name("options")


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("train.txt", ["train", "miniature"]),
        ("evaluate.txt", ["evaluate"]),
        ("evaluate_run.txt", ["evaluate", "runs/mine"]),
        ("reproduce.txt", ["reproduce"]),
        ("predict.txt", ["predict"]),
        ("calibrate.txt", ["calibrate"]),
        ("export.txt", ["export"]),
        ("serve.txt", ["serve"]),
        ("push.txt", ["push"]),
        ("features.txt", ["features"]),
        ("search.txt", ["search"]),
        ("compare.txt", ["compare"]),
        ("inspect.txt", ["inspect"]),
    ],
)
def test_options_are_those_written_down(
    file: str, arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no option is broken at the end of a line
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out.partition(" options ")[2]  # what is before it is the description
    shown = re.findall(r"(?<![\w-])--[a-z][\w.-]+", options)
    assert sorted(set(shown)) == (OPTIONS / file).read_text().splitlines()


SHOWN = [
    (file.stem, line)
    for file in sorted(Path(commands.__path__[0]).glob("*.py"))
    for line in re.findall(r"^\$ torchrun (.*?)(?: +#.*)?$", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("verb", "line"), SHOWN, ids=lambda value: value if " " not in value else "")
def test_torchrun_takes_the_commands_that_are_shown_for_it(verb: str, line: str) -> None:
    """Its parser refuses an option of the program that could be a short form of two of its own."""
    words = [word for word in shlex.split(line) if word != "…"]
    understood = get_args_parser().parse_args(words)
    assert understood.training_script.startswith("applications.openvclip"), verb
    assert understood.training_script_args == words[words.index(understood.training_script) + 1 :]


def test_there_are_such_commands() -> None:
    assert {verb for verb, _ in SHOWN} >= {"evaluate", "features", "reproduce", "train"}
