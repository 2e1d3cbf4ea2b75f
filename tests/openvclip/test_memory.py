"""How much memory a step takes: what is counted on tensors without memory is what real ones take."""

import pytest
import torch

from applications.openvclip.miniature import tiny_clip
from applications.openvclip.training.memory import Allocations, Memory, memory_of, peak_of_step


def test_storages_are_counted_once_and_until_they_are_freed() -> None:
    with Allocations("cpu") as allocations:
        x = torch.empty(1000, dtype=torch.uint8)
        views = [x[:500], x.view(10, 100)]
        y = torch.empty(300, dtype=torch.uint8)
        assert allocations.alive == 1300
        del x, y
        assert allocations.alive == 1000  # a view is left
        del views
        assert allocations.alive == 0
        torch.empty(200, dtype=torch.uint8)
    assert allocations.peak == 1300


@pytest.mark.slow
def test_memory_is_a_line_over_the_clips_and_the_clip_is_not_touched() -> None:
    clip = tiny_clip.load()
    weights = sum(p.nbytes for p in clip.visual.parameters()) + clip.logit_scale.nbytes
    text = sum(p.nbytes for p in clip.parameters()) - weights
    counted = memory_of(clip, frames=2)
    assert all(p.grad is None for p in clip.parameters())
    assert counted.sharded == 8 * weights  # theta, its gradient, two moments, anchor, interpolated, a float64 mean
    assert text < counted.fixed < text + weights  # buffers and class embeddings besides
    assert counted.at(4) == pytest.approx(peak_of_step(clip, 4, frames=2), rel=0.01)
    assert counted.at(4) - counted.at(4, shards=8) == pytest.approx(7 * weights, abs=8)
    less = memory_of(clip, frames=2, activation_checkpointing=True)
    assert less.per_clip < counted.per_clip / 2
    assert less.at(0) == pytest.approx(counted.at(0), rel=0.02)


def test_what_has_room_is_as_much_as_fits() -> None:
    memory = Memory(sharded=80, fixed=10, per_clip=7)
    assert [memory.clips_within(budget) for budget in (50, 96, 97, 103, 104)] == [0, 0, 1, 1, 2]
    assert memory.clips_within(36, shards=4) == 0
    assert memory.clips_within(37, shards=4) == 1
