"""In which numbers the model computes: what stays float32, and what the figures of an evaluation are known by."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.zeroshot.evaluation import scorers_of
from interpolate import InterpolatedWeightRegularizer
from interpolate.weights import trainable_weights

CPU = torch.device("cpu")


def gradients_in(name, activation_checkpointing: bool = False) -> tuple[float, torch.Tensor]:
    """The loss of a step with the regularizer, and the gradients of all weights in one vector."""
    precision = Precision(name, CPU)
    encoder = VideoEncoder(tiny_clip.load(), activation_checkpointing=activation_checkpointing).train()
    generator = torch.Generator().manual_seed(0)
    anchor = {n: p + 0.02 * torch.randn(p.shape, generator=generator) for n, p in trainable_weights(encoder).items()}
    clips = torch.randn(2, 3, 3, 32, 32, generator=generator)
    classes = F.normalize(torch.randn(5, 128, generator=generator), dim=-1)

    def loss_of(model: nn.Module) -> torch.Tensor:
        with precision.autocast():
            logits = model(clips, classes)
            assert logits.dtype == torch.float32
            loss = F.cross_entropy(logits, torch.tensor([1, 3]))
            assert loss.dtype == torch.float32
        return precision.scaler.scale(loss)

    optimizer = torch.optim.AdamW(encoder.parameters())
    loss = InterpolatedWeightRegularizer(encoder, anchor=anchor).backward(loss_of)
    loss = loss / precision.scaler.get_scale()
    precision.scaler.unscale_(optimizer)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())
    return float(loss), torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize(("name", "error"), [("bf16", 2e-2), ("fp16", 4e-3)])  # a few roundings: 2^-8 and 2^-11 each
def test_mixed_precision_is_float32_up_to_rounding(name, error) -> None:
    loss, gradient = gradients_in("fp32")
    found_loss, found = gradients_in(name)
    assert found_loss == pytest.approx(loss, rel=error)
    assert 1e-5 < (found - gradient).norm() / gradient.norm() < 3 * error
    _, checkpointed = gradients_in(name, activation_checkpointing=True)
    assert torch.equal(checkpointed, found)  # what is computed again is computed in the same numbers


def test_a_step_that_overflows_in_fp16_is_left_out() -> None:
    precision, weight = Precision("fp16", CPU), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([torch.inf])
    precision.scaler.scale(torch.zeros(()))
    before = precision.scaler.get_scale()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    assert weight.item() == 1
    assert precision.scaler.get_scale() == before / 2


def test_only_fp16_scales_the_loss() -> None:
    scaled = [Precision(name, CPU).scaler.scale(torch.ones(())).item() != 1 for name in ("fp32", "bf16", "fp16")]
    assert scaled == [False, False, True]


@pytest.mark.parametrize(
    ("name", "message"), [("fp8", "got 'fp8'"), ("tf32", "'tf32' is of NVIDIA's GPUs, and the device is cpu")]
)
def test_what_a_device_cannot_compute_in_is_refused(name, message) -> None:
    with pytest.raises(ValueError, match=message):
        Precision(name, CPU)


@pytest.mark.slow
def test_a_compiled_model_scores_alike_at_all_weights_after_one_compilation(source) -> None:
    anchor = {name: p.detach() for name, p in trainable_weights(VideoEncoder(source.clip)).items()}
    theta = {name: p + 0.01 for name, p in anchor.items()}
    clips, classes = torch.randn(2, 3, 4, 32, 32), F.normalize(torch.randn(5, 128), dim=-1)
    both = [scorers_of(source.clip, "mask", anchor, theta, [0.25, 0.5], compiled=how) for how in (False, True)]
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        plain, compiled = ({name: scorer(clips, classes) for name, scorer in scorers.items()} for scorers in both)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # CLIP* looks at frames by themselves
    torch._dynamo.reset()
    assert compiled.keys() == {"CLIP*", "0", "0.25", "0.5"}
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain["0"], plain["0.5"], atol=1e-2)
