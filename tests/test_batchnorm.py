import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_modules import identical, snapshot
from torch import Tensor, nn

from interpolate import reestimate_batchnorm


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)).double()


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4))
def test_statistics_are_those_of_all_samples_whatever_the_batches(sizes: list[int]):
    model, x = network(), torch.randn(sum(sizes), 3).double()
    reestimate_batchnorm(model, x.split(sizes))
    hidden = model[0](x).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[1].running_var, hidden.var(0))


def test_images_are_estimated_over_their_pixels():
    model, x = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    reestimate_batchnorm(model, [x])
    torch.testing.assert_close(model.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_layers_after_an_estimated_one_see_normalized_values():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    reestimate_batchnorm(model, [torch.tensor([[10.0], [20.0]])])
    torch.testing.assert_close(model[1].running_mean, torch.zeros(1))


@pytest.mark.parametrize("frozen_by", ["mode", "affine"])
def test_frozen_layers_stay_frozen(frozen_by: str):
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).train()
    model[0].eval() if frozen_by == "mode" else model[0].requires_grad_(False)
    reestimate_batchnorm(model, [torch.tensor([[10.0], [20.0]])])
    assert model[0].running_mean == 0
    assert model[1].running_mean.item() == pytest.approx(15, rel=1e-4)  # eps of the first
    assert model[0].training == (frozen_by == "affine")


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_momentum_come_back_even_after_an_exception(training: bool):
    model = network().train(training)
    model[1].momentum = 0.3
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [torch.randn(4, 7).double()])
    assert model[1].momentum == 0.3
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([torch.randn(4, 3).double(), torch.randn(4, 7).double()], RuntimeError),  # the second batch does not fit
        ([torch.randn(4, 3).double()], ValueError),  # one layer is never called
    ],
)
def test_after_an_error_every_layer_is_as_before(batches: list[Tensor], error: type[Exception]):
    model = network()
    model[3].unused = nn.BatchNorm1d(1)  # the second to be stored, after one that was called
    model(torch.randn(4, 3).double())
    own = snapshot(model)
    with pytest.raises(error):
        reestimate_batchnorm(model, batches)
    assert identical(snapshot(model), own)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.norm(x)


def test_batches_may_be_tensors_pairs_or_mappings():
    x = torch.tensor([[1.0], [3.0]])
    for model, batch in ((nn.BatchNorm1d(1), x), (nn.BatchNorm1d(1), (x, "label")), (Keywords(), {"x": x})):
        reestimate_batchnorm(model, [batch])
        (buffer, *_) = model.buffers()
        assert buffer == 2


def test_no_batches_are_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match=r"BatchNorm '1' was given 0 values a channel"):
        reestimate_batchnorm(network(), [])


def test_a_layer_without_statistics_is_left_alone():
    reestimate_batchnorm(nn.BatchNorm1d(1, track_running_stats=False), [torch.randn(4, 1)])
