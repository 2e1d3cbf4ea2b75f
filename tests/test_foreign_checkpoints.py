"""What other people's tools write, and what is no checkpoint at all."""

import argparse
import io
import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interpolate import CheckpointError, average_files, patch_files
from interpolate.checkpoints import Checkpoint
from interpolate.inspection import verify


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(4), "b.weight": torch.randn(2)}


def read(path: Path | str) -> dict[str, Tensor]:
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype is b[n].dtype for n in a)


def test_elements_that_are_not_in_a_row_arrive_in_their_order(tmp_path: Path):
    content = {
        "slice": torch.arange(2000)[::2],
        "transposed": torch.arange(6000).reshape(2, 3000).T,
        "expanded": torch.arange(3).expand(4, 3),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "running_mean": torch.randn(3, 7)[:, 2],
    }
    torch.save(content, tmp_path / "a.pt")
    for output in ("o.safetensors", "o.pt"):
        patch_files(tmp_path / "a.pt", tmp_path / "a.pt", tmp_path / output, anchor_weight=0.5)
        assert same(read(tmp_path / output), {n: t.resolve_conj().contiguous() for n, t in content.items()})
    assert same(torch.load(tmp_path / "o.pt"), {n: t.resolve_conj().contiguous() for n, t in content.items()})


def test_two_readers_of_one_file_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("interpolate._tensors.CHUNK", 5)
    tensors = {"a": torch.arange(23), "b": torch.randn(22)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save({name: t.repeat(2, 1).T[:, 0] for name, t in tensors.items()}, tmp_path / "a.pt")
    for path in ("a.safetensors", "a.pt"):
        with Checkpoint(tmp_path / path) as checkpoint:
            pieces = list(zip(checkpoint.chunks("a"), checkpoint.chunks("b"), strict=True))
        assert torch.equal(torch.cat([a for a, _ in pieces]), tensors["a"])
        assert torch.equal(torch.cat([b for _, b in pieces]), tensors["b"])


DTYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128, torch.float16, torch.bool], ids=str)
def test_every_dtype_is_kept_or_refused_by_name(dtype: torch.dtype, tmp_path: Path):
    tensors = {"w": torch.arange(6).reshape(2, 3).to(dtype), "odd": torch.ones(3, dtype=torch.int8), "f": torch.ones(1)}
    torch.save(tensors, tmp_path / "a.pt")
    average_files([tmp_path / "a.pt"], tmp_path / "o.pt")
    assert torch.equal(torch.load(tmp_path / "o.pt")["w"].view(torch.uint8), tensors["w"].view(torch.uint8))
    if dtype is torch.complex128:
        with pytest.raises(CheckpointError, match=r"w is complex128, which safetensors files can't hold; write a \.pt"):
            average_files([tmp_path / "a.pt"], tmp_path / "o.safetensors")
    else:
        average_files([tmp_path / "a.pt"], tmp_path / "o.safetensors")
        assert torch.equal(load_file(tmp_path / "o.safetensors")["w"].view(torch.uint8), tensors["w"].view(torch.uint8))


def test_a_file_of_torch_save_keeps_all_else_that_it_holds(tmp_path: Path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),  # with its own metadata, of which torch makes versions
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("runs/a")),
        "best": np.float64(0.5),
        "rng": torch.get_rng_state(),
        "epoch": 3,
    }
    content["state_dict"]["0._extra_state"] = {"scale": torch.ones(2)}
    content["state_dict"]["parameter"] = nn.Parameter(torch.ones(3), requires_grad=False)
    torch.save(content, tmp_path / "theta.pth")
    torch.save({"model": {n: t for n, t in content["state_dict"].items() if isinstance(t, Tensor)}}, tmp_path / "a.pt")
    patch_files(tmp_path / "a.pt", tmp_path / "theta.pth", tmp_path / "out.pth", anchor_weight=0.5)
    out = torch.load(tmp_path / "out.pth", weights_only=False)
    assert out.keys() == content.keys()
    assert out["args"] == content["args"]
    assert (out["best"], out["epoch"]) == (0.5, 3)
    assert torch.equal(out["rng"], content["rng"])
    assert torch.equal(out["optimizer"]["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])
    assert isinstance(out["state_dict"]["parameter"], nn.Parameter)
    assert isinstance(out["state_dict"], OrderedDict)
    assert out["state_dict"]._metadata == content["state_dict"]._metadata
    assert torch.equal(out["state_dict"]["0._extra_state"]["scale"], torch.ones(2))
    assert same(*({n: t for n, t in c["state_dict"].items() if isinstance(t, Tensor)} for c in (out, content)))
    assert verify(tmp_path / "out.pth") == []
    report = patch_files(tmp_path / "a.pt", tmp_path / "theta.pth", tmp_path / "out.safetensors", anchor_weight=0.5)
    assert "left behind: 0._extra_state, optimizer, args, best, rng, epoch" in str(report)


def test_written_files_are_what_other_readers_of_the_format_expect(tmp_path: Path):
    save_file({"w": torch.randn(1000), "e": torch.empty(0, 3), "s": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    average_files([tmp_path / "a.safetensors"], tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "o.pt") as archive:
        assert archive.testzip() is None
    mapped = torch.load(tmp_path / "o.pt", mmap=True, weights_only=True)
    assert same(mapped, load_file(tmp_path / "a.safetensors"))
    assert mapped["w"].data_ptr() % 64 == 0
    assert same(torch.load(io.BytesIO((tmp_path / "o.pt").read_bytes())), mapped)


def test_tied_weights_stay_one_and_are_refused_where_they_would_part(tmp_path: Path):
    tied = torch.ones(4)
    torch.save({"a": tied, "b": tied, "c": torch.ones(4)}, tmp_path / "theta.pt")
    torch.save({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}, tmp_path / "same.pt")
    torch.save({"a": torch.zeros(4), "b": torch.ones(4), "c": torch.zeros(4)}, tmp_path / "other.pt")
    patch_files(tmp_path / "same.pt", tmp_path / "theta.pt", tmp_path / "o.pt", anchor_weight=0.5)
    out = torch.load(tmp_path / "o.pt")
    assert out["a"].data_ptr() == out["b"].data_ptr() != out["c"].data_ptr()
    assert all(torch.equal(t, torch.full((4,), 0.5)) for t in out.values())
    with pytest.raises(CheckpointError, match=r"a and b are one tensor in .* Write a \.safetensors file"):
        patch_files(tmp_path / "other.pt", tmp_path / "theta.pt", tmp_path / "o2.pt", anchor_weight=0.5)
    assert sorted(os.listdir(tmp_path)) == ["o.pt", "other.pt", "same.pt", "theta.pt"]


SETS = {"model": weights(0), "ema": weights(1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SETS, r"several sets of weights \(model, ema\); pick one, as in .*::model"),
        ({"state_dict": weights(), "callbacks": {"EMA": {"w": weights()}}}, r"\(state_dict, callbacks\.EMA\.w\)"),
        ({**weights(), "ema": weights()}, r"\(\., ema\)"),
    ],
)
def test_a_choice_among_sets_of_weights_is_asked_for(content: dict, message: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.pt")


def test_any_set_of_weights_can_be_named(tmp_path: Path):
    torch.save({**weights(2), "deep": {"er": SETS}}, tmp_path / "a.pt")
    assert same(read(f"{tmp_path}/a.pt::deep.er.ema"), weights(1))
    assert same(read(f"{tmp_path}/a.pt::."), weights(2))
    torch.save(SETS, tmp_path / "b.pt")
    patch_files(f"{tmp_path}/b.pt::model", f"{tmp_path}/b.pt::ema", tmp_path / "o.pt", anchor_weight=1)
    out = torch.load(tmp_path / "o.pt")
    assert same(out["ema"], weights(0))
    assert same(out["model"], weights(0))
    save_file(weights(), tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="has no 'model'; keys are for files of torch"):
        read(f"{tmp_path}/c.safetensors::model")
    with pytest.raises(CheckpointError, match="ends without the key"):
        read(f"{tmp_path}/b.pt::")


def test_optimizers_and_numbers_are_no_sets_of_weights(tmp_path: Path):
    state = {"state": {"a.weight": {"exp_avg": torch.ones(3, 4)}}, "param_groups": []}
    torch.save({"model": weights(), "optimizer": state, "loss": torch.tensor(0.5)}, tmp_path / "a.pt")
    assert same(read(tmp_path / "a.pt"), weights())


def test_archives_and_odd_names_are_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_file(weights(), "m.safetensors")
    torch.save(SETS, "m.pt")
    with zipfile.ZipFile("archive.zip", "w") as archive:
        archive.write("m.safetensors")
        archive.write("m.pt")
    assert same(read("zip://m.safetensors::archive.zip"), weights())
    assert same(read("zip://m.pt::archive.zip::ema"), weights(1))
    assert same(read("simplecache::zip://m.safetensors::archive.zip"), weights())
    os.rename("m.safetensors", "a::b.safetensors")
    assert same(read("a::b.safetensors"), weights())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folders_of_hugging_face_are_read_and_shards_written_alike(kind: str, tmp_path: Path):
    folder, tensors = tmp_path / "Llama-3.1-8B", weights()
    folder.mkdir()
    weight_map = {name: f"model-{i}.{kind}" for i, name in enumerate(tensors)}
    for name, shard in weight_map.items():
        (save_file if kind == "safetensors" else torch.save)({name: tensors[name]}, folder / shard)
    index = {"metadata": {"total_size": 72, "total_parameters": 18}, "weight_map": weight_map}
    (folder / f"model.{kind}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"")
    assert same(read(folder), tensors)
    patch_files(folder, folder, tmp_path / "Llama-3.1-8B-patched", anchor_weight=0.5)
    assert same(read(tmp_path / "Llama-3.1-8B-patched"), tensors)
    assert json.loads((tmp_path / "Llama-3.1-8B-patched" / f"model.{kind}.index.json").read_text()) == index


def test_a_folder_with_one_file_is_read_and_others_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"is a folder without a checkpoint .* it holds nothing"):
        read(tmp_path)
    save_file(weights(), tmp_path / "model.safetensors")
    assert same(read(tmp_path), weights())
    save_file(weights(), tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(model\.fp16\.safetensors, model\.safetensors\)"):
        read(tmp_path)


def test_shards_and_a_whole_file_in_one_folder_are_a_choice(tmp_path: Path):
    """Readers disagree on which is meant; one is often left from before."""
    save_in_shards(tmp_path / "a", 2, 1.0)
    save_file({"w0": torch.zeros(2), "w1": torch.zeros(2)}, tmp_path / "a" / "model.safetensors")
    both = r"holds several checkpoints \(model\.safetensors\.index\.json, model\.safetensors\); name one of them"
    with pytest.raises(CheckpointError, match=both):
        read(tmp_path / "a")
    assert read(tmp_path / "a" / "model.safetensors.index.json")["w0"].sum() == 2


def test_shards_that_hold_more_than_their_index_are_refused(tmp_path: Path):
    save_file(weights(), tmp_path / "a.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.bias": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"2 tensors in the shards aren't listed \(a\.weight"):
        read(tmp_path / "m.safetensors.index.json")


def test_files_of_before_torch_1_6_are_read(tmp_path: Path):
    torch.save({"state_dict": weights()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "a.pth"), weights())
    average_files([tmp_path / "a.pth"], tmp_path / "o.pth")
    assert same(torch.load(tmp_path / "o.pth")["state_dict"], weights())


class Scripted(nn.Module):
    """What modules of TorchScript keep: half precision, buffers, numbers, lists, tied weights, lists of modules."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scripted(depth - 1) for _ in range(2)] if depth else [])
        self.norm, self.conv = nn.BatchNorm1d(3), nn.Conv2d(3, 4, 2).half()
        self.sizes, self.ratios, self.flags = [1, 2], [0.5], {"a": 1}
        self.tied = self.conv.weight
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_archives_of_torchscript_have_the_weights_of_their_modules(how: str, tmp_path: Path, monkeypatch):
    module, x = Scripted().eval(), torch.randn(2, 3)
    made = torch.jit.script(module) if how == "script" else torch.jit.trace(module, x)
    made.save(tmp_path / "a.pt")
    expected = dict(torch.jit.load(tmp_path / "a.pt").state_dict())
    monkeypatch.delattr(torch.jit, "load")  # it would compile the code
    assert same(read(tmp_path / "a.pt"), expected)
    with Checkpoint(tmp_path / "a.pt") as checkpoint:
        assert {"conv.weight", "tied"} in [set(tied) for tied in checkpoint.tied()]
        checkpoint.close()
        assert torch.equal(checkpoint.tensor("norm.bias"), expected["norm.bias"])
    average_files([tmp_path / "a.pt", tmp_path / "a.pt"], tmp_path / "o.pt")
    assert same(torch.load(tmp_path / "o.pt"), expected)  # the weights alone


def called(path: Path) -> None:
    """An archive that calls what it likes when it is unpickled."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/constants.pkl", "")


def truncated(path: Path) -> None:
    torch.save(weights(), path)
    os.truncate(path, path.stat().st_size // 2)


def sparse(path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse(), "v": torch.ones(2)}, path)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
JUNK = {
    "empty": (written(b""), "is empty; fetch or write it again"),
    "junk": (written(os.urandom(300)), "can't be read as what torch.save writes"),
    "text": (written(b"hello there\n" * 9), "can't be read as what torch.save writes: it is not in that format"),
    "optimizer": (
        lambda path: torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1}]}, path),
        "holds no tensors",
    ),
    "git-lfs": (written(POINTER), "is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`"),
    "pickled": (written(pickle.dumps({"w": [1]})), "holds no tensors|can't be read as what"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "can't be read as what torch.save writes"),
    "truncated": (truncated, "is cut off or damaged"),
    "TorchScript": (called, r"it holds a \w+\.system, and code of files is never run"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"it holds a torch\.nn\.modules\.linear\.Linear, and code",
    ),
    "sparse": (sparse, "w is a sparse_coo tensor, which can't be read here"),
    "meta": (lambda path: torch.save({"w": torch.ones(2, device="meta")}, path), "w is a meta tensor"),
}


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_checkpoint_is_refused_with_the_reason(kind: str, tmp_path: Path):
    make, message = JUNK[kind]
    make(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path / "a.pth")
    assert "a.pth" in str(error.value)
    assert "\n" not in str(error.value)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a pointer of git-lfs"),
        (header({"w": {"shape": [2], "data_offsets": [0, 8]}}) + bytes(8), "of w are None, "),
        (header({"w": {"dtype": "F32", "shape": [2]}}) + bytes(8), r"of w are 'F32', \[2\] and None"),
        (header({"w": {**TENSOR, "shape": [-2]}}) + bytes(8), r"of w are 'F32', \[-2\]"),
        (header({"w": {**TENSOR, "data_offsets": [0.0, 8]}}) + bytes(8), r"and \[0\.0, 8\]"),
        (header({"__metadata__": ["pt"], "w": TENSOR}) + bytes(8), r"__metadata__ must be text by name, got \['pt'\]"),
        (header({"__metadata__": {"interpolate": 5}, "w": TENSOR}) + bytes(8), "__metadata__ must be text by name"),
        (header({"w": 5}), "of w are None, None and None"),
        (header({"w": TENSOR, "v": TENSOR}) + bytes(8), "v is cut off or its header is wrong"),
        (header({"w": {**TENSOR, "data_offsets": [4, 12]}}) + bytes(12), "w is cut off or its header is wrong"),
        (header({"w": TENSOR}) + bytes(9), "has 1 bytes that belong to no tensor"),
        ((1 << 40).to_bytes(8, "little") + bytes(100), "header of 1099511627776"),
        (b"\x00" * 4 + b"PK", "not a whole safetensors file"),
    ],
)
def test_headers_that_the_format_forbids_are_refused(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.safetensors")


def save_in_shards(folder: Path, n: int, value: float) -> None:
    folder.mkdir()
    weight_map = {f"w{i}": f"model-{i:05}.safetensors" for i in range(n)}
    for name, shard in weight_map.items():
        save_file({name: torch.full((2,), value)}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    for name, value in (("anchor", 0.0), ("theta", 2.0)):
        save_in_shards(tmp_path / name, 300, value)
    done = subprocess.run(
        [sys.executable, "-m", "interpolate", "patch", "anchor", "theta", "--anchor-weight", "0.5", "-o", "out"],
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out" / "model-00299.safetensors")["w299"], torch.ones(2))


def test_a_folder_of_one_process_of_torch_distributed_checkpoint_is_read_bit_for_bit(tmp_path: Path):
    turned = torch.randn(3, 5).t()  # its elements are not in order in the file
    weights = {"w": torch.randn(4, 3), "turned": turned, "scalar": torch.tensor(2.0), "part": torch.randn(9)[2:5]}
    state = {"model": weights, "step": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    with Checkpoint(tmp_path / "saved") as checkpoint:
        assert {n: checkpoint.tensor(n).tolist() for n in checkpoint.entries} == {
            n: t.tolist() for n, t in weights.items()
        }
        assert checkpoint.rest == ["step"]


class _Code:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_an_index_is_refused_by_name(tmp_path: Path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(CheckpointError, match=r"holds a builtins\.print, and code of files is never run"):
        Checkpoint(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"can.t be read as the index that torch"):
        Checkpoint(tmp_path)
