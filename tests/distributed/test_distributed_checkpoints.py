"""What `torch.distributed.checkpoint` writes on two processes, read without it."""

import os
import shutil
import warnings
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from two_ranks import outcomes

from interpolate import CheckpointError, Snapshots, average_files, average_snapshots, patch_files, snapshot_paths
from interpolate.checkpoints import Checkpoint
from interpolate.inspection import inspect, verify

pytestmark = pytest.mark.slow


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.BatchNorm1d(3))  # 7 rows and 3 are uneven on two ranks


def save(rank: int) -> None:
    folder = Path(os.environ["SAVED_TO"])
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(network(), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    snapshots = Snapshots(folder / "snapshots")
    for step in (1, 2, 2):
        snapshots.update(model, step)
    weights = get_model_state_dict(model)
    dcp.save(weights, checkpoint_id=folder / "bare")
    state = {
        "model": weights,
        "optim": get_optimizer_state_dict(model, optimizer),
        "step": 7,
        "ema": {"w": torch.ones(2)},
    }
    dcp.save(state, checkpoint_id=folder / "run" / "pytorch_model_fsdp_0")
    torch.manual_seed(1)
    tensors = {
        "rows": torch.randn(5, 4),
        "columns": torch.randn(4, 5),
        "both": torch.randn(3, 3),
        "scalar": torch.tensor(2.0),
    }
    tensors |= {"turned": torch.randn(4, 6).t().contiguous().t(), "half": torch.randn(9).bfloat16()}
    tensors["eighth"] = torch.randn(6).to(torch.float8_e4m3fn)
    places = {"rows": Shard(0), "columns": Shard(1), "both": Replicate()}
    sharded = {n: distribute_tensor(t, mesh, [places[n]]) if n in places else t for n, t in tensors.items()}
    dcp.save(sharded, checkpoint_id=folder / "tensors")
    sharded = {n: t.contiguous() for n, t in sharded.items() if n != "eighth"}
    dcp.save(sharded, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "ranks"), save_distributed=True))
    if rank == 0:
        save_file(whole, folder / "whole.safetensors")
        torch.save(tensors, folder / "tensors.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAVED_TO", str(folder))
        assert outcomes([save], tmp_path_factory.mktemp("ranks")) == {"save": ""}
    return folder


def contents(path: str | Path) -> dict[str, torch.Tensor]:
    with Checkpoint(path) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n].double(), b[n].double()) for n in a
    )


@pytest.mark.parametrize("path", ["bare", "bare/.metadata", "run::model", "run/pytorch_model_fsdp_0::model"])
def test_uneven_shards_of_two_ranks_are_the_whole_weights(saved: Path, path: str):
    assert identical(contents(f"{saved}/{path}"), load_file(saved / "whole.safetensors"))


def test_every_kind_of_tensor_is_read_bit_for_bit(saved: Path):
    assert identical(contents(saved / "tensors"), torch.load(saved / "tensors.pt"))


def test_safetensors_of_every_rank_are_one_checkpoint(saved: Path):
    expected = {n: t for n, t in torch.load(saved / "tensors.pt").items() if n != "eighth"}
    assert identical(contents(saved / "ranks"), expected)
    assert identical(contents(saved / "ranks" / "shard-00002-model-00001-of-00001.safetensors"), expected)


def test_a_folder_behind_a_url_is_read_where_it_lies(saved: Path):
    fs = fsspec.filesystem("memory")
    fs.put(f"{saved}/bare/", "/bare/", recursive=True)
    assert identical(contents("memory://bare"), load_file(saved / "whole.safetensors"))


def test_folders_are_mixed_and_verified_like_files(saved: Path, tmp_path: Path):
    for output in (tmp_path / "out.safetensors", tmp_path / "out.pt"):
        patch_files(saved / "whole.safetensors", saved / "bare", output, anchor_weight=0.5)
        assert identical(contents(output), load_file(saved / "whole.safetensors"))
        assert verify(output) == []
    average_files([f"{saved}/run::model", saved / "bare"], tmp_path / "mean.safetensors", weights=[3, 1])
    assert identical(contents(tmp_path / "mean.safetensors"), load_file(saved / "whole.safetensors"))


def test_snapshots_of_sharded_weights_are_averaged_as_a_whole(saved: Path, tmp_path: Path):
    assert snapshot_paths(saved / "snapshots") == [f"{saved}/snapshots/step-0000000{step}" for step in (1, 2)]
    assert (inspect(f"{saved}/snapshots/step-00000002").recipe or {})["step"] == 2
    average_snapshots(saved / "snapshots", tmp_path / "mean.safetensors", kernel="power:0.1")
    assert identical(contents(tmp_path / "mean.safetensors"), load_file(saved / "whole.safetensors"))
    assert verify(tmp_path / "mean.safetensors") == []


def test_what_else_is_in_a_folder_has_to_be_chosen_from(saved: Path):
    with pytest.raises(CheckpointError, match=r"several sets of weights \(model, ema\); pick one, as in .*::model"):
        Checkpoint(saved / "run")
    with pytest.raises(CheckpointError, match="no weights under 'raw'"):
        Checkpoint(f"{saved}/run::raw")
    with Checkpoint(f"{saved}/run::model") as checkpoint:
        assert "step" in checkpoint.rest
        assert len(checkpoint.files) == 3


@pytest.mark.parametrize("folder", ["bare", "ranks", "tensors"])
def test_a_missing_or_cut_file_is_said(saved: Path, folder: str, tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(saved / folder, damaged)
    first, *_ = sorted(damaged.glob("[!.]*"))
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut off|not a whole"):
        contents(damaged)
    first.unlink()
    with pytest.raises((CheckpointError, FileNotFoundError), match=r"there is no file|some are missing"):
        contents(damaged)
