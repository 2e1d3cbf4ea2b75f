import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cattrs.errors import ForbiddenExtraKeysError

from applications.openvclip.commands.train import parse
from applications.openvclip.config import Config, DataConfig, from_dict, to_dict
from applications.openvclip.recipes import RECIPES
from applications.openvclip.runs.folder import RunFolder, differences


def test_a_configuration_survives_json() -> None:
    config = Config("miniature", output=Path("a/b"), data=DataConfig(train="x.csv", test=("y.csv",)))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_fields_of_a_configuration_are_refused() -> None:
    settings = to_dict(Config("miniature")) | {"sead": 1}
    with pytest.raises(ForbiddenExtraKeysError, match="sead"):
        from_dict(settings)


def test_differences_name_the_field_and_both_values() -> None:
    old = Config("miniature")
    new = replace(old, seed=3, sampling=replace(old.sampling, frames=4))
    assert differences(to_dict(old), to_dict(new)) == ["seed: 0, now 3", "sampling.frames: 8, now 4"]


def test_no_argument_is_the_miniature() -> None:
    assert parse([]) == RECIPES["miniature"]()


def test_options_override_any_field() -> None:
    config = parse(["--optimization.learning-rate", "0.5", "--data.test", "a.csv", "b.csv", "--seed", "7"])
    assert config.optimization.learning_rate == 0.5
    assert config.data.test == ("a.csv", "b.csv")
    assert config.seed == 7
    assert parse(["miniature", "--model.edge", "zero"]).model.edge == "zero"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["minature"], "minature"), (["--optimization.learning-rat", "1"], "learning-rat"), (["--seed", "one"], "one")],
)
def test_what_is_misspelt_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "evaluate", "compare", "inspect"])
def test_help_imports_nothing_heavy(verb: str) -> None:
    heavy = "{'torch', 'open_clip', 'decord', 'matplotlib'} & set(sys.modules)"
    code = f"""
import sys
from applications.openvclip.__main__ import main
try:
    main(['{verb}', '--help'])
except SystemExit:
    assert not {heavy}, {heavy}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def test_the_library_imports_nothing_of_its_application() -> None:
    heavy = "{'open_clip', 'torchvision', 'decord', 'av', 'matplotlib', 'rich', 'tyro'} & set(sys.modules)"
    code = f"import sys, interpolate; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_goes_on_only_in_its_own_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = Config("miniature", output=folder.path)
    folder.open_for_training(to_dict(config))
    folder.open_for_training(to_dict(config))
    with pytest.raises(FileExistsError, match="another configuration \\(seed: 0, now 1\\)"):
        folder.open_for_training(to_dict(replace(config, seed=1)))
    folder.results.write_text("{}")
    with pytest.raises(FileExistsError, match="finished run"):
        folder.open_for_training(to_dict(config))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        RunFolder(tmp_path / "other").open_for_training(to_dict(config))
