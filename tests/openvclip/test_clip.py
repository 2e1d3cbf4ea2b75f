"""`PlainCLIP` and the classifier out of class names are open_clip's, bit for bit."""

import open_clip
import pytest
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg

from applications.openvclip.miniature import tiny_clip, world
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.clip import PlainCLIP
from applications.openvclip.model.prompts import OBJECT_TEMPLATES
from applications.openvclip.model.video_encoder import VideoEncoder


@pytest.fixture(scope="module")
def theirs() -> open_clip.CLIP:
    """With fresh weights; the tiny CLIP's architecture as open_clip builds it."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=4, width=128, head_width=32, patch_size=8, image_size=world.SIZE)
    vocab_size = tiny_clip.WordTokenizer().vocab_size
    text = CLIPTextCfg(tiny_clip.CONTEXT_LENGTH, vocab_size, width=128, heads=4, layers=2)
    return open_clip.CLIP(128, vision, text).eval()


@pytest.fixture(scope="module")
def ours() -> PlainCLIP:
    torch.manual_seed(0)
    return tiny_clip.build().eval()


def test_fresh_weights_are_those_of_open_clip_by_name_and_in_their_order(ours: PlainCLIP, theirs) -> None:
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_images_texts_and_videos_are_encoded_as_open_clip_does(ours: PlainCLIP, theirs, precision: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, world.SIZE, world.SIZE, generator=generator)
    videos = torch.randn(2, 3, 4, world.SIZE, world.SIZE, generator=generator)
    tokens = tiny_clip.WordTokenizer()(["a cloud", "a red square hopping on blue"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        for mine, other in zip(ours(images, tokens), theirs(images, tokens), strict=True):
            assert torch.equal(mine, other)
        for edge in ("mask", "zero"):
            mine, other = (VideoEncoder(clip, edge=edge).eval().encode(videos) for clip in (ours, theirs))
            assert torch.equal(mine, other)


def test_a_classifier_out_of_class_names_is_that_of_open_clip(ours: PlainCLIP, theirs) -> None:
    tokenizer, names = tiny_clip.WordTokenizer(), world.vocabulary()[:70]  # more than pass the text tower together
    expected = open_clip.build_zero_shot_classifier(theirs, tokenizer, names, OBJECT_TEMPLATES, 64).T
    assert torch.equal(class_embeddings(ours, tokenizer, names, OBJECT_TEMPLATES), expected)
