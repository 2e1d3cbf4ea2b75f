"""Random state dicts, written the ways that torch, Lightning, safetensors and Hugging Face write them, through every
operation on files: equal to plain torch in float64, bit for bit where nothing is mixed, whatever wrote them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from interpolate import average_files, patch, patch_files
from interpolate.inspection import diff, inspect, verify

Weights = dict[str, Tensor]

FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
OTHERS = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64
SHAPES = (), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 4)
PREFIXES = "", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.model."
NAMES = "weight", "bias", "layers.0.weight", "layers.0.bias", "layers.1.norm.weight", "embed", "a.b.c.d", "class_token"


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype)
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 100, shape).to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with another memory behind them, as slices, transposed and expanded tensors have."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "slice" and tensor.ndim:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.zeros(3).to(tensor.dtype), tensor.flatten()])[3:].view(tensor.shape)
    return tensor


@st.composite
def sets_of_weights(draw: st.DrawFn, n: int) -> list[Weights]:
    """n sets with the same names and shapes; what is floating in one is so in all, in any precision."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    sets: list[Weights] = [{} for _ in range(n)]
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        shape, floating = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 3)) > 0
        other = None if floating else draw(st.sampled_from(OTHERS))
        name = name if floating else f"{name}.index"  # an integer called weight is a code
        for weights in sets:
            layout = draw(st.sampled_from(["plain", "transposed", "slice", "offset"]))
            weights[name] = laid_out(random(shape, other or draw(st.sampled_from(FLOATS))), layout)
    if draw(st.booleans()):
        name = next(iter(sets[0]))
        for weights in sets:
            weights["tied"] = weights[name]
    if len(sets[0]) > 1 and draw(st.booleans()):
        for weights in sets:
            weights["norm.running_mean"] = torch.randn(3)
            weights["norm.num_batches_tracked"] = torch.tensor(7)
    return sets


def separate(weights: Weights) -> Weights:
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def write_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(separate(weights), folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def write_sharded(weights: Weights, folder: Path) -> Path:
    names = list(weights)
    shards = [names[::2], names[1::2]]
    weight_map = {}
    for i, shard in enumerate(filter(None, shards)):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(separate({name: weights[name] for name in shard}), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write_torch(weights: Weights, folder: Path) -> Path:
    torch.save(weights, folder / "weights.pt")
    return folder / "weights.pt"


def write_lightning(weights: Weights, folder: Path) -> Path:
    content = {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"width": 3, "names": ["a", "b"]},
    }
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def write_training_script(weights: Weights, folder: Path) -> Path:
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 1}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


WRITERS: list[Callable[[Weights, Path], Path]] = [
    write_safetensors,
    write_sharded,
    write_torch,
    write_lightning,
    write_training_script,
]


def written(path: Path) -> Weights:
    """What is in an output, read without this library."""
    if path.is_dir():
        return {name: t for shard in path.glob("*.safetensors") for name, t in load_file(shard).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict") or content.get("model") or content


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0:
        return a.dtype is b.dtype and a.shape == b.shape
    a, b = (tensor.flatten().clone(memory_format=torch.contiguous_format) for tensor in (a, b))
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_is(found: Tensor, exact: Tensor, like: Tensor, size: Tensor) -> None:
    """As far from the exact value as one rounding to the dtype, after arithmetic in float32, can be."""
    assert (found.dtype, found.shape) == (like.dtype, like.shape)
    kind = torch.finfo(like.dtype)
    bound = kind.eps * exact.abs() + kind.smallest_normal * kind.eps + 4 * torch.finfo(torch.float32).eps * size
    assert bool(((found.double() - exact).abs() <= bound).all())


def is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not name.endswith("running_mean")


def check(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3))
    sets = data.draw(sets_of_weights(n + 1))
    prefix = data.draw(st.sampled_from(PREFIXES))
    folder = Path(tempfile.mkdtemp())
    try:
        paths = []
        for i, weights in enumerate(sets):
            (folder / str(i)).mkdir()
            named = {prefix + name: tensor for name, tensor in weights.items()}
            paths.append(data.draw(st.sampled_from(WRITERS))(named, folder / str(i)))
        theta, anchor = sets[:2]
        ratio = data.draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
        outputs = ["folder"] if paths[0].name.endswith(".json") else ["out.safetensors", "out.pt"]
        output = folder / data.draw(st.sampled_from(outputs))
        index = output / paths[0].name if output.name == "folder" else output

        patch_files(paths[1], paths[0], output, anchor_weight=ratio)
        found = {name.removeprefix(prefix): tensor for name, tensor in written(output).items()}
        assert found.keys() == theta.keys()
        in_memory = {n.removeprefix(prefix): t for n, t in patch(paths[1], paths[0], anchor_weight=ratio).items()}
        for name, tensor in theta.items():
            if not is_weight(name, tensor) or ratio == 0:
                assert same_bits(found[name], tensor)
            else:
                a, t = anchor[name].double(), tensor.double()
                assert_is(found[name], ratio * a + (1 - ratio) * t, tensor, a.abs() + t.abs())
        assert in_memory.keys() == found.keys()
        assert all(same_bits(in_memory[name], tensor) for name, tensor in found.items())
        assert verify(index) == []

        mean = folder / f"mean{output.suffix}"
        average_files(paths, mean)
        for name, tensor in written(mean).items():
            values = [weights[name.removeprefix(prefix)] for weights in sets]
            if is_weight(name, values[0]):
                exact = torch.stack([v.double() for v in values])
                assert_is(tensor, exact.mean(0), values[0], exact.abs().sum(0))
            else:
                assert same_bits(tensor, values[0])

        for path, weights in zip(paths, sets, strict=True):
            report = inspect(path)
            shapes = {t.name: (t.shape, f"torch.{t.dtype}") for t in report.tensors}
            assert sorted(shapes.values()) == sorted((tuple(t.shape), str(t.dtype)) for t in weights.values())
            assert not diff(path, path).differs
        differing = sum(not same_bits(tensor, anchor[name]) for name, tensor in theta.items())
        assert sum(t.differs for t in diff(paths[0], paths[1]).tensors) == differing
    finally:
        shutil.rmtree(folder)


@given(st.data())
def test_operations_on_files_equal_plain_torch(data: st.DataObject):
    check(data)


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=list(hypothesis.HealthCheck))
@given(st.data())
def test_operations_on_files_equal_plain_torch_at_length(data: st.DataObject):
    check(data)
