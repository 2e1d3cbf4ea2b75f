"""The options of every command are those written down beside this file: one that goes or changes its name is a change
for users, and is to be seen in a change."""

import re
from pathlib import Path

import pytest

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
