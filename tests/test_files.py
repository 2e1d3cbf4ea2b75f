import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import modules, moved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interpolate import CheckpointError, WeightMismatchError, average_files, patch, patch_files, uniform_soup
from interpolate.checkpoints import CHUNK, Checkpoint
from interpolate.files import mix_files
from interpolate.inspection import diff, inspect, verify
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
    report = diff("a.safetensors", "b.safetensors")
    assert {t.name: (t.differs, t.distance) for t in report.tensors} == {"mask": (False, 0.0), "w": (True, 1.0)}


def saved(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        torch.save({"w": tensor}, f"{name}.pt")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([1.0]).double(), torch.tensor([1.0]).double() + 1e-12),
        (torch.tensor([2**53]), torch.tensor([2**53 + 1])),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j])),
        (torch.tensor([1.0]), torch.tensor([1.0]).half()),
        (torch.tensor([0.0]), torch.tensor([torch.nan])),
        (torch.tensor([1], dtype=torch.uint8), torch.tensor([True])),
    ],
)
def test_diff_is_exact(pair: Path, a: Tensor, b: Tensor):
    saved(a=a, b=b)
    assert diff("a.pt", "b.pt").differs
    assert diff("b.pt", "a.pt").tensors[0].differs
    assert not diff("a.pt", "a.pt").differs


@pytest.mark.parametrize("size", [0, 1, 3])
def test_slices_are_compared(pair: Path, size: int):
    saved(a=torch.arange(2 * size)[::2], b=torch.arange(2 * size)[::2] + 1)
    assert not diff("a.pt", "a.pt").differs
    assert diff("a.pt", "b.pt").differs == bool(size)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([2**53]), torch.tensor([2**53 + 1])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.ones(1), torch.ones(1).half()),
    ],
)
def test_the_text_names_what_differs_at_no_distance_of_weights(pair: Path, a: Tensor, b: Tensor):
    save_file({"w": a, "v": torch.ones(1)}, "a.safetensors")
    save_file({"w": b, "v": torch.ones(1)}, "b.safetensors")
    assert "1 tensors differ in dtype or bits: w" in str(diff("a.safetensors", "b.safetensors"))
    assert "differ in" not in str(diff("a.safetensors", "a.safetensors"))


def test_distances_beyond_what_can_be_squared_are_told(pair: Path):
    save_file({"w": torch.tensor([1e200], dtype=torch.float64)}, "a.safetensors")
    save_file({"w": torch.tensor([-1e200], dtype=torch.float64)}, "b.safetensors")
    assert diff("a.safetensors", "b.safetensors").tensors[0].distance == 2e200
    patch_files("a.safetensors", "b.safetensors", "out.safetensors", anchor_weight=0.5)
    assert load_file("out.safetensors")["w"] == 0


def test_the_same_nan_does_not_differ(pair: Path):
    saved(a=torch.tensor([torch.nan, torch.inf]), b=torch.tensor([torch.nan, torch.inf]))
    (found,) = diff("a.pt", "b.pt").tensors
    assert (found.differs, found.distance, found.not_finite) == (False, None, 4)
    assert json.loads(diff("a.pt", "b.pt").as_json(), parse_constant=pytest.fail)["tensors"][0]["distance"] is None


def test_the_distance_of_complex_numbers_has_both_parts(pair: Path):
    saved(a=torch.tensor([0j]), b=torch.tensor([3 + 4j]), c=torch.tensor([complex(0, torch.nan)]))
    assert diff("a.pt", "b.pt").tensors[0].distance == 5
    assert diff("a.pt", "c.pt").tensors[0].not_finite == 1


def test_diff_lists_names_and_shapes_that_only_one_of_them_has(pair: Path):
    torch.save({"w": torch.ones(2), "v": torch.ones(1)}, "a.pt")
    torch.save({"w": torch.ones(3), "u": torch.ones(1)}, "b.pt")
    report = diff("a.pt", "b.pt")
    assert report.differs
    assert report.unmatched == ["v is only in a.pt.", "u is only in b.pt.", "w is (2,) in a.pt and (3,) in b.pt."]


def test_the_distance_is_that_of_the_furthest_input(pair: Path):
    far = torch.zeros(CHUNK + 1)
    near = [far.clone(), far.clone()]
    near[0][0], near[1][-1] = 3.0, 4.0  # in different pieces
    saved(a=far, b=near[0], c=near[1])
    assert average_files(["a.pt", "b.pt", "c.pt"], "out.pt").tensors[0].distance == 4


def test_nothing_is_hashed_before_names_match_nor_in_a_dry_run(pair: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Checkpoint, "sha256", lambda self: pytest.fail("hashed"))
    save_file({"other": torch.ones(1)}, "other.safetensors")
    with pytest.raises(WeightMismatchError, match=r"anchor other\.safetensors does not match theta theta\.safetensors"):
        patch_files("other.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5, dry_run=True)
    diff("anchor.safetensors", "theta.safetensors")


def test_inspect_opens_a_checkpoint_once(pair: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    make = Checkpoint.__init__
    monkeypatch.setattr(Checkpoint, "__init__", lambda self, path: opened.append(path) or make(self, path))
    patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    assert opened == ["theta.safetensors", "anchor.safetensors"]
    report = inspect("out.safetensors")
    assert opened[2:] == ["out.safetensors"]
    assert (report.inputs, report.recipe and report.recipe["operation"]) == (["out.safetensors"], "patch")


def test_a_weight_that_numpy_or_torch_computed_is_written_as_a_number(pair: Path):
    computed: list[Any] = [np.float32(0.25), torch.tensor(0.25), {"*": np.float32(0.25)}]
    for weight in computed:
        report = patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=weight)
        assert report.recipe is not None
        assert report.recipe["anchor_weight"] == (0.25 if not isinstance(weight, dict) else {"*": 0.25})
        assert verify("out.safetensors") == []
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got None"):
        patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=None)  # type: ignore[arg-type] # a user's mistake


def test_one_path_is_no_list_of_checkpoints(pair: Path):
    with pytest.raises(ValueError, match=r"a list of checkpoints is expected, got the one path 'theta\.safetensors'"):
        average_files("theta.safetensors", "out.safetensors")


def test_no_files_are_nothing_to_mix(pair: Path):
    with pytest.raises(ValueError, match="nothing to mix: no checkpoint was given"):
        average_files([], "out.safetensors")


@pytest.mark.parametrize(("output", "key"), [("out.ckpt", "::ema"), ("out.safetensors", "")])
def test_verify_works_for_a_key_and_from_any_folder(pair: Path, output: str, key: str, monkeypatch: pytest.MonkeyPatch):
    (pair / "runs").mkdir()
    for seed, name in enumerate(("anchor", "theta")):
        torch.manual_seed(seed)
        torch.save({"ema": {"w": torch.randn(3)}, "live": {"w": torch.randn(3)}}, f"runs/{name}.ckpt")
    (pair / "mixed").mkdir()
    patch_files("runs/anchor.ckpt::ema", pair / "runs/theta.ckpt::ema", f"mixed/{output}", anchor_weight=0.5)
    monkeypatch.chdir("/")
    assert verify(f"{pair}/mixed/{output}{key}") == []
    (pair / "mixed").rename(pair / "elsewhere")
    assert verify(f"{pair}/elsewhere/{output}{key}") == []
    torch.save({"ema": {"w": torch.ones(3)}}, pair / "runs" / "anchor.ckpt")
    assert len(verify(f"{pair}/elsewhere/{output}{key}")) == 2


def test_verify_finds_other_names_shapes_and_dtypes(pair: Path):
    patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    made = load_file("out.safetensors")
    for tampered, problem in (
        ({**made, "a.w": made["a.w"].reshape(2, 2)}, r"a\.w is \(4,\) in .* and \(2, 2\) in out\.safetensors"),
        ({"a.w": made["a.w"], "n": made["n"]}, r"b\.w is only in .*theta\.safetensors"),
        ({**made, "b.w": made["b.w"].view(torch.int32)}, r"b\.w is not what the recipe gives"),
        ({**made, "c": made["n"]}, r"c is only in out\.safetensors"),
    ):
        save_file({name: tensor.clone() for name, tensor in tampered.items()}, "out.safetensors", metadata)
        (found,) = verify("out.safetensors")
        assert re.search(problem, found)


@pytest.mark.parametrize(
    "recipe",
    [
        '{"operation": "patch"}',
        "{",
        "5",
        '{"operation": "patch", "inputs": ["theta.safetensors"], "sha256": ["0"]}',
        '{"operation": "average", "inputs": 5, "sha256": []}',
        '{"operation": "average", "inputs": ["theta.safetensors"], "sha256": []}',
        '{"operation": ["average"], "inputs": [], "sha256": []}',
    ],
)
def test_verify_says_what_is_no_recipe(recipe: str, pair: Path):
    save_file(load_file("theta.safetensors"), "out.safetensors", {"interpolate": recipe})
    with pytest.raises(CheckpointError, match=r"out\.safetensors holds a recipe that is none"):
        verify("out.safetensors")


def test_an_input_with_other_names_than_it_had_is_a_problem(pair: Path):
    patch_files("anchor.safetensors", "theta.safetensors", "out.safetensors", anchor_weight=0.5)
    save_file({"other": torch.ones(1)}, "anchor.safetensors")
    assert "does not match" in verify("out.safetensors")[1]


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5).filter(lambda w: abs(sum(w)) > 0.1))
def test_weighted_means_are_those_of_float64(weights: list[float]):
    sources = [{"w": torch.randn(5)} for _ in weights]
    found = mix(sources, {"operation": "average", "weights": weights})["w"]
    exact: Any = sum(w * s["w"].double() for w, s in zip(weights, sources, strict=True)) / sum(weights)
    torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=1e-6)


def test_equal_weights_are_the_plain_mean_and_a_single_one_its_checkpoint_bit_for_bit(pair: Path):
    sources: list[Any] = [{"w": torch.randn(999, dtype=torch.float64)} for _ in range(3)]
    equal = mix(sources, {"operation": "average", "weights": [0.3, 0.3, 0.3]})
    assert identical_bits(equal, uniform_soup(sources))
    sources[2]["w"][0] = torch.nan  # what weighs nothing may be anything
    single = mix(sources, {"operation": "average", "weights": [0.0, 0.3, 0.0]})
    assert identical_bits(single, sources[1])
    average_files(["anchor.safetensors", "theta.safetensors"], "out.safetensors", weights=[1, 3])
    expected = mix(["anchor.safetensors", "theta.safetensors"], {"operation": "average", "weights": [1, 3]})
    assert identical_bits(load_file("out.safetensors"), expected)
    assert inspect("out.safetensors").recipe == {
        "operation": "average",
        "weights": [1.0, 3.0],
        "inputs": ["anchor.safetensors", "theta.safetensors"],
        "sha256": [
            hashlib.sha256((pair / name).read_bytes()).hexdigest()
            for name in ("anchor.safetensors", "theta.safetensors")
        ],
    }
    assert verify("out.safetensors") == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one number for each of 2 checkpoints, got 1"),
        ([1.0, -1.0], r"a sum that is not 0, got \[1\.0, -1\.0\]"),
        ([1.0, float("nan")], r"finite numbers .* got \[1\.0, nan\]"),
        ([0.0, 0.0], r"a sum that is not 0, got \[0\.0, 0\.0\]"),
    ],
)
def test_weights_that_give_no_mean_are_refused(pair: Path, weights: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        average_files(["anchor.safetensors", "theta.safetensors"], "out.safetensors", weights=weights)


def test_an_input_is_not_written_over(pair: Path):
    theta = pair / "theta.safetensors"
    before = theta.read_bytes()
    (pair / "link.safetensors").symlink_to(theta)
    for output in (theta, pair / "." / "theta.safetensors", pair / "link.safetensors"):
        with pytest.raises(ValueError, match=r"is one of the inputs, and would be lost"):
            patch_files(pair / "anchor.safetensors", theta, output, anchor_weight=0.5)
    assert theta.read_bytes() == before


@pytest.mark.parametrize("weights", [[1e308, 1e308], [3, 1]])
def test_only_ratios_of_weights_matter_however_large(pair: Path, weights: list[float]):
    for output, shares in (("large", weights), ("small", [w / max(weights) for w in weights])):
        average_files(["anchor.safetensors", "theta.safetensors"], f"{output}.safetensors", weights=shares)
    assert identical_bits(load_file("large.safetensors"), load_file("small.safetensors"))
