import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from two_ranks import DEVICE, WORLD_SIZE, on_two_ranks

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.precision import Precision
from applications.openvclip.model.sharding import shard
from applications.openvclip.model.video_encoder import VideoEncoder
from interpolate import InterpolatedWeightRegularizer, SWAAverager

pytestmark = pytest.mark.slow
FRAMES, CLASSES = 3, 5


def tuned() -> CLIP:
    """Weights that are not the anchor's, in float64: what differs is then no rounding."""
    clip = tiny_clip.load().double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in clip.visual.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return clip


def anchor() -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in VideoEncoder(tiny_clip.load()).named_parameters()}


def sharded(clip: CLIP, **options) -> VideoEncoder:
    return shard(VideoEncoder(clip, **options).train(), init_device_mesh(DEVICE, (WORLD_SIZE,)))


def batch_of(rank: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(10 * step + rank)
    clips, labels = torch.randn(2, 3, FRAMES, 32, 32).double(), torch.randint(CLASSES, (2,))
    torch.manual_seed(0)
    return clips, labels, F.normalize(torch.randn(CLASSES, 128), dim=-1).double()


def joined(step: int) -> tuple[Tensor, Tensor, Tensor]:
    clips, labels, classes = zip(*(batch_of(rank, step) for rank in range(WORLD_SIZE)), strict=True)
    return torch.cat(clips), torch.cat(labels), classes[0]


def loss_of(model: nn.Module, clips: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(clips, classes), labels)


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return full({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def check_same_as_whole(rank: int, **options) -> None:
    """Steps with everything that a trainer does, on shards and in one process on the joined batch."""
    models = [VideoEncoder(tuned()).train(), sharded(tuned(), **options)]
    batches = [joined, lambda step: batch_of(rank, step)]
    norms, weights, averages = [], [], []
    for model, batch in zip(models, batches, strict=True):
        regularizer = InterpolatedWeightRegularizer(model, 0.6, 0.5, anchor=anchor(), alpha_per_rank=False)
        averager = SWAAverager(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            regularizer.backward(loss_of, *batch(step))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            averager.update()
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        weights.append(full({n: p.detach() for n, p in model.named_parameters()}))
        averages.append(full(dict(averager.weights)))
    torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
    # float64; AdamW divides by roots of squares, which enlarges what rounding leaves in gradients near zero
    torch.testing.assert_close(*weights, rtol=0, atol=1e-8)
    torch.testing.assert_close(*averages, rtol=0, atol=1e-7)


def sharded_training_is_that_of_a_whole_encoder_on_the_joined_batch(rank: int) -> None:
    check_same_as_whole(rank)


def so_is_sharded_training_with_activation_checkpointing(rank: int) -> None:
    check_same_as_whole(rank, activation_checkpointing=True)


def gradients_of_shards_are_those_of_a_whole_encoder(rank: int) -> None:
    whole, shards = VideoEncoder(tuned(), edge="zero").train(), sharded(tuned(), edge="zero")
    loss_of(whole, *joined(0)).backward()
    for part in range(2):  # accumulated without reduction, then with it
        shards.set_requires_gradient_sync(part == 1)
        (loss_of(shards, *batch_of(rank, 0)) / 2).backward()
    assert gradients(shards).keys() == dict(whole.named_parameters()).keys()
    torch.testing.assert_close(gradients(shards), gradients(whole), rtol=1e-7, atol=1e-12)


def all_ranks_leave_out_a_step_that_overflows_on_one(rank: int) -> None:
    encoder, precision = sharded(tuned().float()), Precision("fp16", torch.device(DEVICE))
    before = full({n: p.detach().clone() for n, p in encoder.named_parameters()})
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    clips, labels, classes = batch_of(rank, 0)
    for step in range(2):
        optimizer.zero_grad()
        with precision.autocast():
            loss = loss_of(encoder, clips.float(), labels, classes.float())
        precision.scaler.scale(loss).backward()
        if step == 0 and rank == 1:
            encoder.visual.proj.grad.to_local()[0, 0] = torch.inf
        precision.scaler.unscale_(optimizer)
        gradient = gradients(encoder)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        after = full({n: p.detach().clone() for n, p in encoder.named_parameters()})
        assert all(torch.equal(after[n], before[n]) for n in before) == (step == 0)
    assert precision.scaler.get_scale() == 2**15
    expected = {n: before[n] - 1e-3 * gradient[n] for n in before}
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-7)  # float32


def every_block_gathers_its_own_weights(rank: int) -> None:
    encoder = sharded(tuned())
    blocks = encoder.visual.transformer.resblocks
    assert all(isinstance(block, FSDPModule) for block in blocks)
    assert all(isinstance(p, DTensor) for p in encoder.parameters())
    seen = []
    for block in blocks:
        block.mlp.register_forward_pre_hook(
            lambda *_: seen.append([not isinstance(block.mlp.c_fc.weight, DTensor) for block in blocks])
        )
    clips, _, classes = batch_of(rank, 0)
    with torch.no_grad():
        encoder(clips, classes)
    assert seen == [[own == other for other in blocks] for own in blocks]


def whole_weights_are_evaluated_with_the_clip_of_a_sharded_encoder(rank: int) -> None:
    clip, (clips, _, classes) = tuned(), batch_of(rank, 0)
    encoder = sharded(clip)
    for temporal in (True, False):
        expected = VideoEncoder(tuned(), temporal=temporal).eval()(clips, classes)
        found = functional_call(
            VideoEncoder(clip, temporal=temporal).eval(), full(dict(encoder.named_parameters())), (clips, classes)
        )
        torch.testing.assert_close(found, expected)


def what_gathers_nothing_says_so(rank: int) -> None:
    clip = tuned()
    sharded(clip)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        clip.encode_image(torch.zeros(1, 3, 32, 32).double())


test_two_ranks = on_two_ranks(__name__)
