import pickle
from pathlib import Path

import pytest
import torch

from interpolate import CheckpointError, EMAAverager, InterpolatedWeightRegularizer, LAWAAverager, SWAAverager
from interpolate.state import load_state, save_state


def trained(make):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    averager = make(model)
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        averager.update()
    return model, averager


@pytest.mark.parametrize("make", [SWAAverager, EMAAverager, LAWAAverager])
def test_an_averager_comes_back_bit_for_bit(make, tmp_path: Path):
    model, averager = trained(make)
    save_state(str(tmp_path), averager.state_dict())
    fresh = make(model)
    state = fresh.state_dict()
    load_state(str(tmp_path), state)
    fresh.load_state_dict(state)
    assert (fresh.step, fresh.n_averaged) == (5, 5)
    for name, tensor in averager.weights.items():
        assert torch.equal(fresh.weights[name], tensor)
    for name, buffer in averager.buffers.items():
        assert torch.equal(fresh.buffers[name], buffer)


def test_a_regularizer_comes_back(tmp_path: Path):
    model = torch.nn.Linear(2, 2)
    regularizer = InterpolatedWeightRegularizer(model, seed=3)
    regularizer.backward(lambda model: model(torch.ones(1, 2)).sum())
    save_state(str(tmp_path), regularizer.state_dict())
    fresh = InterpolatedWeightRegularizer(torch.nn.Linear(2, 2))
    state = fresh.state_dict()
    load_state(str(tmp_path), state)
    fresh.load_state_dict(state)
    assert fresh.alpha == regularizer.alpha
    assert torch.equal(fresh.anchor["weight"], regularizer.anchor["weight"])


def test_the_state_of_something_else_is_refused_and_changes_nothing(tmp_path: Path):
    save_state(str(tmp_path), {"a": {"w": torch.ones(2)}, "step": 3})
    for state in (
        {"a": {"w": torch.zeros(3)}, "step": 0},
        {"a": {"v": torch.zeros(2)}, "step": 0},
        {"a": {"w": torch.zeros(2)}, "steps": 0},
        {"a": {"w": torch.zeros(2)}, "step": 0, "b": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match="is the state of another training"):
            load_state(str(tmp_path), state)
        assert not any(tensor.any() for tensor in state["a"].values())
    with pytest.raises(CheckpointError, match="no whole state"):
        load_state(str(tmp_path / "nothing"), {})


def test_there_is_no_pickle_in_it(tmp_path: Path):
    save_state(str(tmp_path), {"w": torch.ones(2), "step": 3})
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    load_state(str(tmp_path), {"w": torch.zeros(2), "step": 0})
    assert not (tmp_path / "was-run").exists()
