import math

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from applications.openvclip.model.temporal_attention import neighbourhoods, temporal_attention
from applications.openvclip.model.video_encoder import VideoEncoder


def small_clip(**vision: object) -> CLIP:
    torch.manual_seed(0)
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=32, heads=2, layers=1)
    settings = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, **vision}
    return CLIP(embed_dim=24, vision_cfg=CLIPVisionCfg(**settings), text_cfg=text)


def reference(attention: nn.MultiheadAttention, x: Tensor, frames: int, edge: str) -> Tensor:
    """Equation 3 with loops, one clip, one head and one frame at a time."""
    projected = x @ attention.in_proj_weight.T + attention.in_proj_bias
    clips = projected.unflatten(0, (-1, frames))
    width = x.shape[-1] // attention.num_heads
    outputs = torch.empty_like(x).unflatten(0, (-1, frames))
    for clip, output in zip(clips, outputs, strict=True):
        for t in range(frames):
            for head in range(attention.num_heads):
                part = slice(head * width, (head + 1) * width)
                q, k, v = clip.chunk(3, dim=-1)
                keys, values = [], []
                for neighbour in (t - 1, t, t + 1):
                    inside = 0 <= neighbour < frames
                    if inside or edge == "zero":
                        keys.append(k[neighbour, :, part] if inside else torch.zeros_like(k[t, :, part]))
                        values.append(v[neighbour, :, part] if inside else torch.zeros_like(v[t, :, part]))
                logits = q[t, :, part] @ torch.cat(keys).T / math.sqrt(width)
                output[t, :, part] = logits.softmax(dim=-1) @ torch.cat(values)
    return attention.out_proj(outputs.flatten(0, 1))


@settings(max_examples=25, deadline=None)
@given(
    clips=st.integers(1, 3),
    frames=st.integers(1, 5),
    tokens=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 4]),
    edge=st.sampled_from(["mask", "zero"]),
    seed=st.integers(0, 99),
)
def test_temporal_attention_is_equation_3(clips, frames, tokens, heads, edge, seed) -> None:
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(16, heads, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(clips * frames, tokens, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            temporal_attention(attention, x, frames=frames, edge=edge), reference(attention, x, frames, edge)
        )


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_gradient_of_what_frames_see_is_that_of_the_slices(frames: int) -> None:
    z = torch.randn(2, 2, 3 * frames, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: neighbourhoods(z, frames), z)
    assert torch.autograd.gradgradcheck(lambda z: neighbourhoods(z, frames), z)
    alone = neighbourhoods(z.detach(), frames)  # without a gradient they are slices
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(alone, neighbourhoods(z, frames), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, neighbourhoods(z, frames), strict=True))


@settings(max_examples=15, deadline=None)
@given(frames=st.integers(1, 6), clips=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_static_video_gives_the_image_model(frames, clips, seed) -> None:
    clip = small_clip()
    torch.manual_seed(seed)
    images = torch.randn(clips, 3, 16, 16)
    video = images.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    with torch.no_grad():
        features = VideoEncoder(clip).encode(video)
        expected = clip.encode_image(images)
    # the same keys and values twice or three times over leave a softmax as it is, up to float32 rounding
    torch.testing.assert_close(features, expected.unsqueeze(1).expand(-1, frames, -1), rtol=1e-4, atol=1e-5)


def test_a_static_video_is_not_the_image_model_where_zeros_enter_the_softmax() -> None:
    clip = small_clip()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = VideoEncoder(clip, edge="zero").encode(images.unsqueeze(2).expand(-1, -1, 4, -1, -1))
    assert not torch.allclose(features[:, 0], clip.encode_image(images), rtol=1e-2)


def test_frame_by_frame_is_open_clip_on_every_frame() -> None:
    clip = small_clip()
    video = torch.randn(2, 3, 5, 16, 16)
    with torch.no_grad():
        features = VideoEncoder(clip, temporal=False, edge="zero").encode(video)
        for t in range(5):
            torch.testing.assert_close(features[:, t], clip.encode_image(video[:, :, t]), rtol=1e-4, atol=1e-5)


def test_tokens_see_their_neighbouring_frames_and_no_others() -> None:
    clip = small_clip(layers=1)
    video = torch.randn(1, 3, 5, 16, 16)
    changed = video.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        encoder = VideoEncoder(clip)
        difference = (encoder.encode(video) - encoder.encode(changed)).abs().amax(dim=(0, 2))
    assert (difference[:2] > 1e-4).all()
    assert (difference[2:] == 0).all()


def test_parameters_are_those_of_open_clip() -> None:
    clip = small_clip()
    own = dict(VideoEncoder(clip).named_parameters())
    theirs = {n: p for n, p in clip.named_parameters() if n.startswith("visual.") or n == "logit_scale"}
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)


def test_the_clip_keeps_its_own_image_tower() -> None:
    clip = small_clip()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        before = clip.encode_image(images)
        video = images.unsqueeze(0).transpose(1, 2)
        temporal, per_frame = VideoEncoder(clip), VideoEncoder(clip, temporal=False)
        features = [encoder.encode(video) for encoder in (temporal, per_frame, temporal)]
        assert torch.equal(clip.encode_image(images), before)
    assert torch.equal(features[0], features[2])
    torch.testing.assert_close(features[1][0], before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(features[0], features[1], rtol=1e-2)


def test_logits_are_the_mean_over_frames_of_scaled_cosines() -> None:
    clip = small_clip()
    encoder = VideoEncoder(clip)
    video, classes = torch.randn(2, 3, 4, 16, 16), nn.functional.normalize(torch.randn(7, 24), dim=-1)
    with torch.no_grad():
        cosines = nn.functional.cosine_similarity(encoder.encode(video).unsqueeze(2), classes, dim=-1)
        torch.testing.assert_close(encoder(video, classes), clip.logit_scale.exp() * cosines.mean(dim=1))


def test_activation_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    clip = small_clip()
    video, classes = torch.randn(2, 3, 3, 16, 16), torch.randn(7, 24)
    gradients, kept = [], []
    for activation_checkpointing in (False, True):
        encoder = VideoEncoder(clip, activation_checkpointing=activation_checkpointing).train()
        saved: list[int] = []
        encoder.zero_grad()
        with saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            encoder(video, classes).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
        kept.append(sum(saved))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    ("model", "named"),
    [("RN50", "ModifiedResNet"), ("ViT-B-16-SigLIP", "TimmModel")],
)
def test_a_tower_that_cannot_be_extended_is_named(model: str, named: str) -> None:
    settings = open_clip.get_model_config(model)
    if named == "ModifiedResNet":
        clip = small_clip(layers=(1, 1, 1, 1), width=8, image_size=32)
    else:
        clip = nn.Module()
        clip.visual = open_clip.timm_model.TimmModel("vit_tiny_patch16_224", settings["embed_dim"], pretrained=False)
    with pytest.raises(TypeError, match=named):
        VideoEncoder(clip)


def test_a_block_with_other_attention_is_named() -> None:
    with pytest.raises(TypeError, match="block 0 of the image tower is a CustomResidualAttentionBlock"):
        VideoEncoder(small_clip(block_type="custom"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"\(2, 3, 16, 16\)"),
        ((2, 4, 3, 16, 16), r"\(2, 4, 3, 16, 16\)"),
        ((1, 3, 2, 8, 16), r"\(8, 16\)"),
    ],
)
def test_a_video_of_another_shape_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoEncoder(small_clip()).encode(torch.zeros(shape))


def test_an_unknown_edge_is_refused() -> None:
    with pytest.raises(ValueError, match="'wrap'"):
        VideoEncoder(small_clip(), edge="wrap")
