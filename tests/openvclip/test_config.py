import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from applications.openvclip.__main__ import VERBS
from applications.openvclip.commands.train import continuation, parse
from applications.openvclip.config import FREE, Config, DataConfig, EvaluationConfig, from_dict, to_dict
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.recipes import RECIPES
from applications.openvclip.runs.folder import RunFolder, differences, flat, new_path


def test_a_configuration_survives_json() -> None:
    config = Config("miniature", output=Path("a/b"), data=DataConfig(train="x.csv", test=("y.csv",)))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_unknown_fields_and_other_types_in_a_configuration_are_named() -> None:
    settings = to_dict(Config("miniature")) | {"sead": 1}
    with pytest.raises(ValueError, match=r"config\.json: extra fields found \(sead\)"):
        from_dict(settings)
    settings = to_dict(Config("miniature")) | {"machine": {"precision": "fp8"}, "seed": "1"}
    with pytest.raises(ValueError, match=r"config\.json: .*fp8 not in .*machine\.precision") as error:
        from_dict(settings)
    assert "int is expected, got '1' @ $.seed" in str(error.value)


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


@pytest.mark.parametrize(
    "arguments", [*([verb] for verb in VERBS), ["evaluate", "RUN"], ["train", "miniature"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'open_clip', 'av', 'matplotlib'} & set(sys.modules)"
    code = f"""
import sys
from applications.openvclip.__main__ import main
try:
    main({[*arguments, "--help"]})
except SystemExit:
    assert not {heavy}, {heavy}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def test_a_run_goes_on_only_in_its_own_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    config = Config("miniature", output=folder.path)
    folder.open_for_training(to_dict(replace(config, seed=1)))
    folder.write_settings(to_dict(replace(config, seed=1)))
    folder.open_for_training(to_dict(config))  # nothing has been learnt there yet
    folder.write_settings(to_dict(config))
    folder.checkpoints.mkdir()
    folder.open_for_training(to_dict(config))
    with pytest.raises(FileExistsError, match="another configuration \\(seed: 0, now 1\\)"):
        folder.open_for_training(to_dict(replace(config, seed=1)), FREE)
    folder.results.write_text("{}")
    with pytest.raises(FileExistsError, match=r"finished run; more --optimization\.epochs train it further"):
        folder.open_for_training(to_dict(config))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        RunFolder(tmp_path / "other").open_for_training(to_dict(config))


def test_what_changes_nothing_of_what_is_learnt_may_differ_and_is_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = Config("miniature", output=tmp_path, data=DataConfig(train="videos"))
    folder.write_settings(to_dict(config))
    folder.checkpoints.mkdir()
    data = replace(config.data, workers=7, train="/moved/videos", test=("more",))
    machine = replace(config.machine, profile=True, tensorboard=True)
    changed = replace(config, output=Path("elsewhere"), data=data, evaluation=EvaluationConfig(anchor_weight=0.3))
    changed = replace(changed, machine=machine)
    told = folder.open_for_training(to_dict(changed), FREE)
    assert {text.partition(":")[0] for text in told} == {
        *("output", "data.workers", "data.train", "data.test", "evaluation.anchor_weight"),
        *("machine.profile", "machine.tensorboard"),
    }
    assert folder.read_settings() == to_dict(config), "what goes on has not been seen yet"
    with pytest.raises(FileExistsError, match=r"sampling\.frames: 8, now 4"):
        folder.open_for_training(to_dict(replace(changed, sampling=Sampling(frames=4))), FREE)


def test_every_free_setting_is_one() -> None:
    names = flat(to_dict(Config("miniature")))
    assert all(any(name.startswith(free) for name in names) for free in FREE)


def test_differences_name_what_is_in_one_of_both() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"c": 2}, "d": {}}) == [
        *("a.b: 1, now not there", "a.c: not there, now 2", "d: not there, now {}")
    ]


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [new_path("miniature") for _ in range(20)]
    assert len(set(paths)) == 20
    assert all(path.is_dir() for path in paths)


def test_a_run_is_not_resumed_in_another_folder(tmp_path: Path) -> None:
    was = Config("miniature", output=Path("former/place"))
    RunFolder(tmp_path).write_settings(to_dict(was))
    for output in ("former/place", str(tmp_path)):
        assert parse(["--resume", str(tmp_path), "--output", output]) == replace(was, output=tmp_path)
    with pytest.raises(ValueError, match=f"--output elsewhere: a run goes on in its own folder, {tmp_path}"):
        parse(["--resume", str(tmp_path), "--output", "elsewhere"])


def test_the_command_that_goes_on_is_one_for_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert continuation(Path("my runs/a"), finish=False) == "openvclip train --resume 'my runs/a'"
    assert continuation(Path("a"), finish=True) == "openvclip train --resume a --finish"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    expected = "torchrun --nproc-per-node 8 -m applications.openvclip.train --resume a"
    assert continuation(Path("a"), finish=False) == expected
