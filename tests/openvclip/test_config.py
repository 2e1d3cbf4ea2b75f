import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cattrs.errors import ForbiddenExtraKeysError

from applications.openvclip import train
from applications.openvclip.config import Config, DataConfig, differences, from_json, to_json
from applications.openvclip.recipes import RECIPES
from applications.openvclip.run_folder import open_for_training


def test_a_configuration_survives_json() -> None:
    config = Config("miniature", output=Path("a/b"), data=DataConfig(train="x.csv", test=("y.csv",)))
    assert from_json(to_json(config)) == config


def test_unknown_fields_of_a_configuration_are_refused() -> None:
    text = to_json(Config("miniature")).replace('"seed"', '"sead"')
    with pytest.raises(ForbiddenExtraKeysError, match="sead"):
        from_json(text)


def test_differences_name_the_field_and_both_values() -> None:
    old = Config("miniature")
    new = replace(old, seed=3, data=replace(old.data, frames=8))
    assert differences(old, new) == ["seed: 0, now 3", "data.frames: 4, now 8"]


def test_no_argument_is_the_miniature() -> None:
    assert train.parse([]) == RECIPES["miniature"]()


def test_options_override_any_field() -> None:
    config = train.parse(["--optimization.learning-rate", "0.5", "--data.test", "a.csv", "b.csv", "--seed", "7"])
    assert config.optimization.learning_rate == 0.5
    assert config.data.test == ("a.csv", "b.csv")
    assert config.seed == 7
    assert train.parse(["miniature", "--model.edge", "zero"]).model.edge == "zero"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["minature"], "minature"), (["--optimization.learning-rat", "1"], "learning-rat"), (["--seed", "one"], "one")],
)
def test_what_is_misspelt_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        train.parse(arguments)
    assert error.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("module", ["train", "evaluate", "compare", "data.__main__"])
def test_help_imports_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'open_clip', 'decord', 'matplotlib'} & set(sys.modules)"
    code = f"""
import sys
from applications.openvclip.{module} import main
try:
    main(['--help'])
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
    config = Config("miniature", output=tmp_path / "run")
    folder = open_for_training(config)
    assert open_for_training(config) == folder
    with pytest.raises(FileExistsError, match="another configuration \\(seed: 0, now 1\\)"):
        open_for_training(replace(config, seed=1))
    folder.results.write_text("{}")
    with pytest.raises(FileExistsError, match="finished run"):
        open_for_training(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        open_for_training(replace(config, output=tmp_path / "other"))
