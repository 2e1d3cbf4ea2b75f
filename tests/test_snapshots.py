import json
import os
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from interpolate import CheckpointError, Snapshots, average_snapshots, snapshot_paths
from interpolate.averaging import KernelAverager
from interpolate.inspection import inspect, verify
from interpolate.kernels import Beta, Power, Uniform, parse_kernel
from interpolate.snapshots import as_record, kernel_from, with_folders_opened
from interpolate.synthesis import nearest, weights_by_kernel


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_at(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    for p in model.parameters():
        nn.init.constant_(p, value)
    model[1].running_mean.fill_(value)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return model


def written(*values: float) -> list[str]:
    snapshots = Snapshots("snapshots", every=10)
    for i, value in enumerate(values, 1):
        snapshots.update(model_at(value), 10 * i)
        snapshots.update(model_at(99.0), 10 * i + 1)  # not due
    return snapshot_paths("snapshots")


def test_snapshots_are_written_when_they_are_due_and_say_so():
    first, last = written(1.0, 2.0)
    assert (first, last) == ("snapshots/step-00000010.safetensors", "snapshots/step-00000020.safetensors")
    assert load_file(last).keys() == model_at(0.0).state_dict().keys()
    assert load_file(last)["0.weight"].tolist() == [[2.0], [2.0]]
    recipe = inspect(last).recipe
    assert recipe is not None
    assert (recipe["operation"], recipe["step"]) == ("snapshot", 20)
    assert "written in training, at step 20" in verify(last)[0]


def test_a_step_that_is_there_is_written_anew():
    written(1.0, 2.0)
    written(3.0)
    assert [load_file(path)["0.bias"][0].item() for path in snapshot_paths("snapshots")] == [3.0, 2.0]


@pytest.mark.parametrize("kernel", ["uniform", "power:0.1", "exponential:1", "beta:0.5,0.5"])
def test_an_average_by_a_kernel_is_that_of_float64(kernel: str):
    values = [1.0, 5.0, 2.0, 7.0]
    written(*values)
    report = average_snapshots("snapshots", "out.safetensors", kernel=kernel)
    exact = (parse_kernel(kernel).weights(4) * torch.tensor(values)).sum()
    found = load_file("out.safetensors")
    torch.testing.assert_close(found["0.weight"].double(), exact.expand(2, 1), rtol=1e-7, atol=0)
    assert found["1.running_mean"].tolist() == [7.0, 7.0]  # what is not averaged is the latest's
    assert report.recipe is not None
    assert (report.recipe["kernel"], report.recipe["error"]) == (kernel, 0.0)
    assert verify("out.safetensors") == []
    assert (inspect("out.safetensors").recipe or {})["operation"] == "average"


def test_the_latest_alone_may_be_averaged():
    written(1.0, 5.0, 2.0, 7.0)
    average_snapshots("snapshots", "out.safetensors", last=2)
    assert load_file("out.safetensors")["0.bias"].tolist() == [4.5, 4.5]
    for last, message in ((0, "at least 1, got 0"), (5, "only 4 snapshots")):
        with pytest.raises(ValueError, match=message):
            average_snapshots("snapshots", "out.safetensors", last=last)


def test_snapshots_behind_a_url_are_written_and_read_there():
    Snapshots("memory://bucket/run").update(model_at(3.0), 1)
    assert snapshot_paths("memory://bucket/run/") == ["memory://bucket/run/step-00000001.safetensors"]
    average_snapshots("memory://bucket/run", "out.safetensors")
    assert load_file("out.safetensors")["0.bias"].tolist() == [3.0, 3.0]
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["step_9.pt", "step_10.pt", "last.pt"], ["step_9.pt", "step_10.pt"]),
        (["epoch=0-step=90-loss=0.3.ckpt", "epoch=0-step=100-loss=0.2.ckpt"], None),
        (["loss=0.9-epoch=9.ckpt", "loss=0.1-epoch=10.ckpt"], None),
        (
            ["checkpoint-500/model.safetensors", "checkpoint-1000/a.pt", "model.safetensors"],
            ["checkpoint-500", "checkpoint-1000"],
        ),
        (["2026-11-25.pt", "2026-12-01.pt"], None),
        (["checkpoint-5/model.safetensors", "checkpoint-10/optimizer.txt", "runs-2/events.1"], ["checkpoint-5"]),
    ],
)
def test_the_order_is_told_by_the_names_that_trainers_give(names: list[str], expected: list[str] | None):
    for name in names:
        path = Path("run", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert snapshot_paths("run") == [f"run/{name}" for name in expected or names]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["last.pt"], "run holds no snapshots"),
        (["step-1.pt", "epoch-1.pt"], r"several kinds \(epoch-#\.pt, step-#\.pt\)"),
        (["step-1-rank-0.pt", "step-1-rank-1.pt"], "can't be told"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "run holds no snapshots"),
    ],
)
def test_what_is_no_series_is_said(names: list[str], message: str):
    Path("run").mkdir()
    for name in names:
        Path("run", name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        snapshot_paths("run")
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        snapshot_paths("nowhere")


def test_one_folder_is_of_snapshots_and_several_may_be_checkpoints():
    for run in ("a", "b"):
        for name in ("checkpoint-5", "checkpoint-10", "."):
            Path(run, name).mkdir(parents=True, exist_ok=True)
            save_file({"w": torch.ones(1)}, Path(run, name, "model.safetensors"))
    assert with_folders_opened(["a/"]) == ["a/checkpoint-5", "a/checkpoint-10"]
    assert with_folders_opened(["a", "b"]) == ["a", "b"]
    os.remove("a/model.safetensors")
    assert with_folders_opened(["a", "b"]) == ["a/checkpoint-5", "a/checkpoint-10", "b"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_that_was_not_finished_is_no_snapshot():
    for step in (1, 2):
        dcp.save({"w": torch.full((2,), float(step))}, checkpoint_id=f"run/step-{step}", no_dist=True)
    assert snapshot_paths("run") == ["run/step-1", "run/step-2"]
    os.remove("run/step-2/.metadata")
    assert snapshot_paths("run") == ["run/step-1"]


def test_every_kernel_comes_back_from_its_record():
    for text in ("uniform", "exponential:20", "ema:0.9", "power:0.1", "gaussian:3,2"):
        record = json.loads(json.dumps(as_record(parse_kernel(text))))
        assert kernel_from(record) == parse_kernel(text)
    assert kernel_from(as_record(Beta(0.5, 0.5).over(9))) == Beta(0.5, 0.5).over(9)
    for record in ({"name": "Kernel"}, {"name": "math"}, {"name": "Power", "width": 1}, {}):
        with pytest.raises(CheckpointError, match="not a kernel of this version"):
            kernel_from(record)


def test_two_averages_along_the_run_give_those_of_other_lengths():
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    short, long = (KernelAverager(model, Power.of_width(width)) for width in (0.05, 0.1))
    folders = Snapshots("short", every=8), Snapshots("long", every=8)
    course = []
    for step in range(1, 65):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3) / 8)
        course.append(model.weight.detach().clone())
        for averager, snapshots in zip((short, long), folders, strict=True):
            averager.update()
            snapshots.update(averager, step)
    for kernel in ("power:0.07", "power:0.14", "power:0.05"):
        report = average_snapshots(["short", "long"], "out.safetensors", kernel=kernel)
        weights = parse_kernel(kernel).weights(64)
        exact = sum(w * theta for w, theta in zip(weights, course, strict=True))
        assert report.recipe is not None
        missed = (load_file("out.safetensors")["weight"] - exact).norm()
        spread = torch.stack(course).sub(torch.stack(course).mean(0)).norm()
        assert missed <= report.recipe["error"] * weights.norm() * spread + 1e-9  # Cauchy and Schwarz
        assert report.recipe["error"] < (1e-9 if kernel == "power:0.05" else 0.05)
        assert sum(report.recipe["weights"]) == pytest.approx(1)
        assert verify("out.safetensors") == []
    with pytest.raises(ValueError, match=r"16 averages give is off by .* of it; at most 0\.25"):
        average_snapshots(["short", "long"], "out.safetensors", kernel="uniform")
    Snapshots("short", every=8).update(model, 72)
    with pytest.raises(CheckpointError, match=r"short/step-00000072.* is no average by a kernel"):
        average_snapshots(["short", "long"], "out.safetensors", kernel="power:0.07")


def test_the_average_of_an_averager_is_written_with_what_is_not_averaged():
    model = model_at(1.0)
    dict(model.named_parameters())["0.bias"].requires_grad_(False)
    averager = KernelAverager(model, Uniform())
    averager.update()
    Snapshots("averages").update(averager, 1)
    (path,) = snapshot_paths("averages")
    assert load_file(path).keys() == model.state_dict().keys()
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["interpolate"])
    assert (recipe["kernel"], recipe["n_averaged"]) == ({"name": "Uniform"}, 1)
    assert weights_by_kernel([path], Uniform()) == ([1.0], 0.0)


def test_the_nearest_combination_has_the_sum_of_one():
    columns = torch.tensor([[1.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    coefficients, distance = nearest(torch.tensor([0.25, 0.75], dtype=torch.float64), columns)
    assert coefficients == pytest.approx([-0.5, 1.5])
    assert distance == pytest.approx(0, abs=1e-12)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Snapshots("x", every=0)

    class FullyShardedDataParallel(nn.Linear):
        pass

    with pytest.raises(ValueError, match="can't be seen through FullyShardedDataParallel"):
        Snapshots("x").update(FullyShardedDataParallel(1, 1), 1)
