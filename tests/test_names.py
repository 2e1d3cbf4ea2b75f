import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from interpolate import SWAAverager, WeightMismatchError, load_weights, patch, patch_files
from interpolate._names import renamed
from interpolate.patching import Source


class Net(nn.Module):
    """With a float buffer, which is not to be mixed, and with names that could be taken for a wrapper's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Linear(2, 2)
        self.model = nn.ModuleDict({"model": nn.Linear(2, 2)})
        self.register_buffer("scale", torch.full((2,), float(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["model"](self.module(x)) * self.scale


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "compile of DDP of compile": lambda m: torch.compile(
        DistributedDataParallel(torch.compile(m, backend="eager")), backend="eager"
    ),
    "AveragedModel of DDP": lambda m: AveragedModel(DistributedDataParallel(m)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_modules_are_patched_as_bare_ones(kind: str):
    wrap, a, b = WRAPPERS[kind], Net(0), Net(1)
    expected = patch(a, b, anchor_weight=0.5)
    assert torch.equal(expected["scale"], b.scale)
    for anchor, theta in ((wrap(a), wrap(b)), (wrap(a), b), (a, wrap(b))):
        patched = patch(anchor, theta, anchor_weight=0.5)
        assert list(patched) == list(expected)
        assert all(torch.equal(patched[name], expected[name]) for name in expected)
    b.load_state_dict(expected)
    wrapped = wrap(Net(2))
    load_weights(wrapped, expected)
    averager = SWAAverager(wrapped)
    averager.update()
    assert averager.weights.keys() == dict(b.named_parameters()).keys()
    assert all(torch.equal(averager.weights[name], p) for name, p in b.named_parameters())
    assert averager.buffers.keys() == {"scale"}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_state_dicts_and_files_of_wrapped_modules_match_bare_ones(kind: str, tmp_path: Path):
    models = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    expected = patch(*(dict(m.state_dict()) for m in models), anchor_weight=0.5)
    states = [WRAPPERS[kind](m).state_dict() for m in models]
    for state, name in zip(states, "ab", strict=True):
        torch.save(state, tmp_path / f"{name}.pt")
    for anchor, theta in (
        states,
        (states[0], models[1]),
        (tmp_path / "a.pt", tmp_path / "b.pt"),
        (models[0], tmp_path / "b.pt"),
    ):
        sources: tuple[Source, Source] = (anchor, theta)
        patched = patch(*sources, anchor_weight=0.5)
        assert list(patched) == list(expected)
        assert all(torch.equal(patched[name], expected[name]) for name in expected)
    patch_files(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt", anchor_weight=0.5)
    assert torch.load(tmp_path / "c.pt").keys() == states[1].keys()


def test_a_partly_wrapped_model_is_patched_under_the_names_of_the_bare_one(tmp_path: Path):
    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    wrapped = copy.deepcopy(bare)
    wrapped[0] = torch.compile(wrapped[0], backend="eager")
    wrapped[1][0] = checkpoint_wrapper(wrapped[1][0])
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    names = {name.replace("_checkpoint_wrapped_module.", "") for name in wrapped.state_dict()}
    assert "0._orig_mod.weight" in names
    for source in (wrapped, dict(wrapped.state_dict()), tmp_path / "wrapped.pt"):
        bare.load_state_dict(patch(bare, source, anchor_weight=0.5))
        bare.load_state_dict(patch(source, bare, anchor_weight=0.5))
    patch_files(tmp_path / "wrapped.pt", tmp_path / "wrapped.pt", tmp_path / "out.pt", anchor_weight=0.5)
    wrapped.load_state_dict(torch.load(tmp_path / "out.pt"))


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path):
    llama = nn.ModuleDict({"model": nn.Sequential(nn.Linear(2, 2))})  # as in all that is headless
    save_file(dict(llama.state_dict()), tmp_path / "a.safetensors")
    llama.load_state_dict(patch(tmp_path / "a.safetensors", tmp_path / "a.safetensors", anchor_weight=0.5))
    llama.load_state_dict(patch(llama, tmp_path / "a.safetensors", anchor_weight=0.5))


def test_one_prefix_before_all_names_of_one_input_is_ignored_and_said(tmp_path: Path):
    weights = {"a.weight": torch.zeros(2), "b": torch.zeros(1)}
    save_file(weights, tmp_path / "anchor.safetensors")
    save_file({f"net.clip.{n}": t + 2 for n, t in weights.items()}, tmp_path / "theta.safetensors")
    paths = tmp_path / "anchor.safetensors", tmp_path / "theta.safetensors", tmp_path / "out.safetensors"
    report = patch_files(*paths, anchor_weight=0.5)
    assert str(report).endswith("anchor.safetensors matches apart from 'net.clip.' before all names")
    expected = {"net.clip.a.weight": torch.ones(2), "net.clip.b": torch.ones(1)}
    for found in (load_file(paths[2]), patch(weights, load_file(paths[1]), anchor_weight=0.5)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], t) for n, t in expected.items())
    back = patch_files(paths[1], paths[0], paths[2], anchor_weight=0.5)
    assert load_file(paths[2]).keys() == weights.keys()
    assert [*back.prefixes.values()] == ["net.clip."]
    assert patch_files(paths[0], paths[0], paths[2], anchor_weight=0.5).prefixes == {}


def test_a_prefix_before_some_of_the_names_is_a_difference():
    weights = {"m.b": torch.zeros(1), "a": torch.zeros(1)}
    with pytest.raises(WeightMismatchError, match=r"missing \(b\), 1 of 2 weights unexpected \(m\.b\)"):
        patch(weights, {"b": torch.zeros(1), "a": torch.zeros(1)}, anchor_weight=0.5)
    assert renamed(["m.x", "m.y"], ["n.x", "n.y"]) == {"m.x": "m.x", "m.y": "m.y"}
    assert renamed(["x"], ["am.x"]) == {"x": "am.x"}
    assert renamed(["x"], ["ax"]) == {"x": "x"}


def test_two_weights_of_one_bare_name_are_refused():
    weights = {"a.weight": torch.zeros(1), "a._orig_mod.weight": torch.ones(1)}
    with pytest.raises(WeightMismatchError, match=r"two weights are named 'a\.weight' without wrappers"):
        patch(weights, weights, anchor_weight=0.5)


@pytest.mark.parametrize("extra", [{"step": 1}, torch.ones(3)], ids=["a dictionary", "a tensor"])
def test_extra_state_of_modules_is_no_weight(extra, tmp_path: Path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return extra

        def set_extra_state(self, state):
            raise AssertionError("load_weights leaves it alone")

    anchor, theta = nn.Sequential(Counting(2, 2)), nn.Sequential(Counting(2, 2))
    torch.save(theta.state_dict(), tmp_path / "theta.pt")
    for source in (theta, theta.state_dict(), tmp_path / "theta.pt"):
        patched = patch(anchor, source, anchor_weight=1)
        assert patched.keys() == {"0.weight", "0.bias"}
    load_weights(theta, patched)
    assert torch.equal(theta[0].weight, anchor[0].weight)


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match="'epoch' of anchor is int, not a tensor; give the weights alone"):
        patch({"w": torch.zeros(1), "epoch": 3}, {"w": torch.zeros(1)}, anchor_weight=0.5)
