import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import modules, moved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interpolate import WeightMismatchError, average_files, patch, patch_files, uniform_soup
from interpolate.checkpoints import CHUNK
from interpolate.files import diff, inspect, mix_files, verify
from interpolate.patching import mix


def identical_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


ANCHOR_DTYPES = [torch.float64, torch.float32, torch.bfloat16]
OPERATIONS = [
    {"operation": "patch", "anchor_weight": 0.3},
    {"operation": "slerp", "anchor_weight": 0.3},
    {"operation": "average"},
    {"operation": "task_arithmetic", "scales": [-0.7]},
]


@given(modules(), st.floats(0, 1), st.sampled_from(ANCHOR_DTYPES))
def test_streaming_equals_in_memory_bit_for_bit(tmp_path_factory, model: nn.Module, anchor_weight: float, dtype):
    folder = tmp_path_factory.mktemp("streaming")
    theta = state(moved(model))
    anchor = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state(model).items()}
    save_file(anchor, folder / "anchor.safetensors")
    torch.save(theta, folder / "theta.pt")
    patch_files(
        folder / "anchor.safetensors", folder / "theta.pt", folder / "out.safetensors", anchor_weight=anchor_weight
    )
    in_memory = patch(anchor, theta, anchor_weight=anchor_weight)
    assert identical_bits(load_file(folder / "out.safetensors"), in_memory)
    from_paths = patch(folder / "anchor.safetensors", folder / "theta.pt", anchor_weight=anchor_weight)
    assert identical_bits(from_paths, in_memory)


@pytest.mark.parametrize("recipe", OPERATIONS, ids=lambda recipe: recipe["operation"])
def test_every_operation_streams_large_tensors_bit_for_bit(recipe: dict, tmp_path: Path):
    sources = [{"w": torch.randn(3, CHUNK // 2 + 7), "mask": torch.tensor([0.0, -torch.inf])} for _ in range(2)]
    for i, source in enumerate(sources):
        save_file(source, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    report = mix_files(paths, recipe, tmp_path / "out.safetensors")
    assert identical_bits(load_file(tmp_path / "out.safetensors"), mix(sources, recipe))
    found = {t.name: t for t in report.tensors}
    assert found["w"].distance == pytest.approx((sources[0]["w"] - sources[1]["w"]).norm().item(), rel=1e-5)
    assert found["mask"].not_finite == 2
    assert verify(tmp_path / "out.safetensors") == []


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """anchor.safetensors and theta.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("anchor", "theta")):
        torch.manual_seed(seed)
        save_file({"a.w": torch.randn(4), "b.w": torch.randn(2), "n": torch.tensor(seed)}, f"{name}.safetensors")
    return tmp_path


def test_metadata_holds_the_recipe_and_the_hashes_of_the_inputs(pair: Path):
    ratios = {"a.*": 0.2, "*": 0.5}
    report = patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=ratios)
    with safe_open("out.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["interpolate"])
    assert recipe == report.recipe
    assert recipe["inputs"] == ["theta.safetensors", "anchor.safetensors"]
    assert recipe["anchor_weight"] == ratios
    assert recipe["sha256"] == [hashlib.sha256((pair / name).read_bytes()).hexdigest() for name in recipe["inputs"]]


def test_verify_finds_changed_inputs_and_changed_outputs(pair: Path):
    patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    assert verify("out.safetensors") == []
    content = bytearray((pair / "out.safetensors").read_bytes())
    content[-1] ^= 1
    (pair / "out.safetensors").write_bytes(content)
    assert len(verify("out.safetensors")) == 1
    assert "is not what the recipe gives" in verify("out.safetensors")[0]
    save_file({**load_file("anchor.safetensors"), "b.w": torch.zeros(2)}, "anchor.safetensors")
    assert any("anchor.safetensors is not the file that was mixed" in problem for problem in verify("out.safetensors"))
    assert "holds no recipe" in verify("theta.safetensors")[0]


def test_a_dry_run_reports_and_writes_nothing(pair: Path):
    before = sorted(path.name for path in pair.iterdir())
    report = patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5, dry_run=True)
    assert sorted(path.name for path in pair.iterdir()) == before
    assert {t.name: (t.shape, t.dtype, t.mixed) for t in report.tensors} == {
        "a.w": ((4,), "float32", True),
        "b.w": ((2,), "float32", True),
        "n": ((), "int64", False),
    }
    assert "3 tensors, 2 of them weights" in str(report)


def test_nan_in_an_input_stops_before_anything_is_written(pair: Path):
    save_file({**load_file("theta.safetensors"), "b.w": torch.tensor([torch.nan, 1.0])}, "theta.safetensors")
    with pytest.raises(ValueError, match=r"b\.w has 1 values that are not finite"):
        patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    assert not (pair / "out.safetensors").exists()
    assert {t.name: t.not_finite for t in inspect("theta.safetensors").tensors} == {"a.w": 0, "b.w": 1, "n": 0}


def test_other_names_are_listed_before_anything_is_written(pair: Path):
    save_file({"other": torch.ones(1)}, "other.safetensors")
    with pytest.raises(WeightMismatchError, match=r"3 of 3 weights missing .*1 of 1 weights unexpected \(other\)"):
        patch_files("other.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)


def test_prefixes_of_wrappers_do_not_keep_files_apart(pair: Path):
    save_file({f"model.{n}": t for n, t in load_file("theta.safetensors").items()}, "prefixed.safetensors")
    patch_files("anchor.safetensors", "prefixed.safetensors", "out.safetensors", anchor_weight=0)
    assert identical_bits(load_file("out.safetensors"), load_file("prefixed.safetensors"))


def test_ties_and_progress_are_reported(pair: Path):
    weight = torch.randn(3)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, "tied.pt")
    assert inspect("tied.pt").tied == [("a", "b")]
    assert "tied: a, b" in str(inspect("tied.pt"))
    seen = []
    average_files(["tied.pt"], "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (36, 36)


def test_averaging_files_is_the_uniform_soup(pair: Path):
    average_files(["anchor.safetensors", "theta.safetensors"], "out.safetensors")
    assert identical_bits(load_file("out.safetensors"), uniform_soup(["anchor.safetensors", "theta.safetensors"]))


def test_diff_tells_what_differs(pair: Path):
    assert {t.name for t in diff("anchor.safetensors", "theta.safetensors").tensors if t.differs} == {"a.w", "b.w", "n"}
    masked = {"mask": torch.tensor([0.0, -torch.inf]), "w": torch.ones(1)}
    save_file(masked, "a.safetensors")
    save_file({**masked, "w": torch.zeros(1)}, "b.safetensors")
    assert [t.name for t in diff("a.safetensors", "b.safetensors").tensors if t.differs] == ["w"]
