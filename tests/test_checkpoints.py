import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from interpolate.checkpoints import CHUNK, Checkpoint, CheckpointError
from interpolate.files import average_files, patch_files

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(4), "b.weight": torch.randn(2)}


def read(path: Path | str) -> dict[str, Tensor]:
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> Path:
    """As transformers leaves them: two shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {name: f"model-0000{1 + (i >= 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=5))
def test_what_safetensors_writes_is_read_and_written_alike(tmp_path_factory, described):
    folder = tmp_path_factory.mktemp("formats")
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(described)}
    save_file(tensors, folder / "a.safetensors")
    assert same(read(folder / "a.safetensors"), tensors)
    average_files([folder / "a.safetensors"], folder / "b.safetensors")
    assert same(load_file(folder / "b.safetensors"), tensors)


def test_large_tensors_come_in_pieces(tmp_path: Path):
    tensors = {"w": torch.randn(2 * CHUNK + 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert [len(piece) for piece in checkpoint.chunks("w")] == [CHUNK, CHUNK, 1]
    assert same(read(tmp_path / "a.safetensors"), tensors)


def test_sharded_checkpoints_are_read_through_their_index_and_written_in_the_same_shards(tmp_path: Path):
    index = save_sharded(weights(), tmp_path / "in")
    assert same(read(index), weights())
    average_files([index], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "in"))
    for shard in (tmp_path / "in").glob("*.safetensors"):
        assert same(load_file(tmp_path / "out" / shard.name), load_file(shard))
    assert same(read(tmp_path / "out" / index.name), weights())


def test_a_sharded_checkpoint_is_never_written_over_another(tmp_path: Path):
    index = save_sharded(weights(), tmp_path / "in")
    with pytest.raises(FileExistsError, match="in exists; sharded checkpoints are written to new folders only"):
        average_files([index], tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"the output must be a folder, got .*out\.safetensors"):
        average_files([index], tmp_path / "out.safetensors")


def test_urls_are_read_and_written(tmp_path: Path):
    save_file(weights(), tmp_path / "a.safetensors")
    torch.save(weights(1), tmp_path / "b.pt")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "a.safetensors"), "/in/a.safetensors")
    fs.put(str(tmp_path / "b.pt"), "/in/b.pt")
    patch_files("memory://in/a.safetensors", "memory://in/b.pt", "memory://out/c.safetensors", anchor_weight=1)
    fs.get("/out/c.safetensors", str(tmp_path / "c.safetensors"))
    assert same(load_file(tmp_path / "c.safetensors"), weights())
    assert same(read("simplecache::memory://in/a.safetensors"), weights())
    torch.save({"state_dict": weights(), "state_dict_ema": weights(1)}, tmp_path / "c.pt")
    fs.put(str(tmp_path / "c.pt"), "/in/c.pt")
    assert same(read("simplecache::memory://in/c.pt::state_dict_ema"), weights(1))
    index = save_sharded(weights(), tmp_path / "sharded")
    fs.put(str(index.parent), "/sharded", recursive=True)
    average_files(["memory://sharded/model.safetensors.index.json"], "memory://mean")
    assert same(read("memory://mean/model.safetensors.index.json"), weights())


def averaged_model() -> dict:
    averaged = AveragedModel(nn.Linear(2, 2))
    averaged.update_parameters(nn.Linear(2, 2))
    return averaged.state_dict()


LEFT_ON_DISK = {
    "torch AveragedModel": (averaged_model, "", "module."),
    "timm": (lambda: {"state_dict": weights(1), "state_dict_ema": weights(), "arch": "vit"}, "state_dict_ema", ""),
    "Lightning": (
        lambda: {"state_dict": weights(1), "current_model_state": weights(), "averaging_state": {}},
        "current_model_state",
        "",
    ),
    "Open-VCLIP": (lambda: {"model_state": {f"model.{n}": t for n, t in weights().items()}}, "", ""),
    "DDP of a compiled model": (
        lambda: {f"module._orig_mod.{n}": t for n, t in weights().items()},
        "",
        "module._orig_mod.",
    ),
}


@pytest.mark.parametrize("kind", LEFT_ON_DISK)
def test_what_others_leave_on_disk_is_read_and_written_in_their_layout(kind: str, tmp_path: Path):
    make, key, prefix = LEFT_ON_DISK[kind]
    content = make()
    torch.save(content, tmp_path / "in.pt")
    path = f"{tmp_path}/in.pt" + (f"::{key}" if key else "")
    bare = read(path)
    inside = content[key] if key else content.get("model_state", content)
    assert same(bare, {n.removeprefix(prefix): t for n, t in inside.items() if n != "n_averaged"})
    average_files([path], tmp_path / "out.pt")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    written = written.get(key or "model_state", written)
    assert same(written, dict(inside))


def test_an_averaged_model_loads_what_was_written(tmp_path: Path):
    state = averaged_model()
    torch.save(state, tmp_path / "in.pt")
    patch_files(tmp_path / "in.pt", tmp_path / "in.pt", tmp_path / "out.pt", anchor_weight=0.5)
    AveragedModel(nn.Linear(2, 2)).load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))


def test_one_of_several_sets_of_weights_must_be_picked(tmp_path: Path):
    torch.save({"state_dict": weights(), "state_dict_ema": weights()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"several sets of weights \(state_dict, state_dict_ema\); pick one"):
        read(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no weights under 'ema'; it has \['state_dict', 'state_dict_ema'\]"):
        read(f"{tmp_path / 'a.pth'}::ema")


def test_nothing_but_tensors_is_unpickled(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "owned"),)

    torch.save({"w": torch.ones(1), "evil": Evil()}, tmp_path / "a.pt")
    with pytest.raises(Exception, match=r"it holds a posix\.system, and code of files is never run here"):
        read(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists()


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file: 0 bytes"),
        (b"\xff" * 20, "not a whole safetensors file: 20 bytes"),
        (header({"w": TENSOR}) + bytes(7), "w is cut off or its header is wrong"),
        (header({"w": {**TENSOR, "shape": [3]}}) + bytes(8), "w is cut off or its header is wrong"),
        (header({"w": {**TENSOR, "dtype": "F4"}}) + bytes(8), "w has the dtype F4, which can't be read"),
        ((5).to_bytes(8, "little") + b"{{{{{", "can't be read as JSON"),
        ((2).to_bytes(8, "little") + b"[]", "holds a list where names and values should be"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.safetensors")


def test_a_file_cut_off_while_it_is_read_is_refused(tmp_path: Path):
    save_file({"w": torch.zeros(CHUNK)}, tmp_path / "a.safetensors")
    with Checkpoint(tmp_path / "a.safetensors") as checkpoint:
        os.truncate(tmp_path / "a.safetensors", 10_000)
        with pytest.raises(CheckpointError, match="is cut off; fetch or write the file again"):
            checkpoint.tensor("w")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({"w": "../a.safetensors"}, r"the shard '\.\./a\.safetensors' must stand beside the index"),
        ({"missing": "a.safetensors"}, r"1 tensors are not in their shards \(missing"),
    ],
)
def test_a_damaged_index_is_refused(weight_map, message: str, tmp_path: Path):
    save_file(weights(), tmp_path / "a.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "m.safetensors.index.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "holds a list, not named tensors"), ({"epoch": 1}, r"holds no tensors; its keys are \['epoch'\]")],
)
def test_pickles_without_weights_are_refused(content, message: str, tmp_path: Path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.pt")


def test_an_output_of_unknown_kind_is_refused(tmp_path: Path):
    save_file(weights(), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors, .* got .*out\.onnx"):
        average_files([tmp_path / "a.safetensors"], tmp_path / "out.onnx")


def large(value: float) -> dict[str, Tensor]:
    return {f"w{i}": torch.full((1 << 20,), value) for i in range(8)}


ATTEMPTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt", "sharded"])
def test_a_killed_writer_never_leaves_a_file_that_loads_wrongly(kind: str, tmp_path: Path):
    sharded = kind == "sharded"
    for name, value in (("anchor", 0.0), ("theta", 2.0)):
        if sharded:
            save_sharded(large(value), tmp_path / name)
        else:
            save_file(large(value), tmp_path / f"{name}.safetensors")
    source = "/model.safetensors.index.json" if sharded else ".safetensors"
    output = tmp_path / ("out" if sharded else f"out.{kind}")
    script = (
        "import sys; from interpolate.files import patch_files; print('ready', flush=True); sys.stdin.readline(); "
        f"patch_files('{tmp_path}/anchor{source}', '{tmp_path}/theta{source}', '{output}', anchor_weight=0.5)"
    )
    finished = 0
    for attempt in range(ATTEMPTS):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.04 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        if output.exists():
            finished += 1
            assert same(read(output / "model.safetensors.index.json" if sharded else output), large(1.0))
            output.rename(tmp_path / f"finished-{attempt}")
    # Kills at the start come too early and later ones may come too late; what counts is that no file was half written.
    assert finished < ATTEMPTS


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_full_disk_is_an_error_and_leaves_the_old_file(kind: str, tmp_path: Path):
    save_file(large(1.0), tmp_path / "a.safetensors")
    output = tmp_path / f"out.{kind}"
    output.write_bytes(b"old")
    script = (
        "import resource, signal; from interpolate.files import average_files; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, resource.RLIM_INFINITY)); "
        f"average_files(['{tmp_path}/a.safetensors'], '{output}')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr or "write" in done.stderr
    assert output.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", f"out.{kind}"]


@pytest.mark.slow
def test_patching_files_takes_little_memory(tmp_path: Path):
    for name, value in (("anchor", 0.0), ("theta", 2.0)):
        save_file(
            {f"w{i}": torch.full((1 << 22,), value) for i in range(8)}, tmp_path / f"{name}.safetensors"
        )  # 128 MiB
    script = (
        "import torch; torch.set_num_threads(1); from interpolate.files import patch_files\n"
        "def kb(field): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(field))\n"
        "before = kb('VmRSS'); open('/proc/self/clear_refs', 'w').write('5')\n"  # forget the peak of the imports
        f"patch_files('{tmp_path}/anchor.safetensors', '{tmp_path}/theta.safetensors', '{tmp_path}/out.safetensors', "
        "anchor_weight=0.5)\nprint(kb('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 * 1024  # KiB; each input is 128 MiB, and a little of the library is loaded late
