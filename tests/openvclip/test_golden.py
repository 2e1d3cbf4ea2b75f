"""The published code's tensors: the encoder and the training step reproduce them."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.model import CLIP
from safetensors import safe_open

from applications.openvclip.model.video_encoder import VideoEncoder
from interpolate import InterpolatedWeightRegularizer, patch

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 through two layers, in another order of operations


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"golden_official_{name}.safetensors", framework="pt") as file:
            self.config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 safe_open is no mapping
        self.tensors = tensors
        self.theta, self.anchor, self.grad = (
            {f"visual.{key.removeprefix(part)}": value for key, value in tensors.items() if key.startswith(part)}
            for part in ("theta.", "anchor.", "grad.")
        )
        c = self.config
        vision = CLIPVisionCfg(
            layers=c["layers"],
            width=c["width"],
            head_width=c["width"] // c["heads"],
            patch_size=c["patch_size"],
            image_size=c["image_size"],
        )
        text = CLIPTextCfg(context_length=4, vocab_size=8, width=32, heads=2, layers=1)
        clip = CLIP(embed_dim=c["embed_dim"], vision_cfg=vision, text_cfg=text, quick_gelu=True)
        self.model = VideoEncoder(clip, temporal=c["temporal"] == "expand_temporal_view", edge="zero")
        with torch.no_grad():
            self.model.logit_scale.fill_(c["logit_scale"]).log_()
        self.model.logit_scale.requires_grad_(False)
        missing, unexpected = self.model.load_state_dict(self.theta, strict=False)
        assert missing == ["logit_scale"]
        assert unexpected == []

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        return model(self.tensors["video"], self.tensors["text"])


@pytest.fixture(params=["a", "plain"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_encoder_matches_the_published_features_and_logits(golden: Golden) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            golden.model.encode(golden.tensors["video"]), golden.tensors["frame_features"], **CLOSE
        )
        torch.testing.assert_close(golden.logits(golden.model), golden.tensors["logits"], **CLOSE)


def test_patched_weights_match_the_published_interpolation(golden: Golden) -> None:
    weights = patch(golden.anchor, golden.theta, anchor_weight=golden.config["alpha"])
    golden.model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(golden.logits(golden.model), golden.tensors["logits_interpolated"], **CLOSE)


class FixedAlpha(InterpolatedWeightRegularizer):
    """The regularizer at the alpha that the published step had drawn."""

    ALPHA = 0.3

    def alpha_of(self, index: int | None = None) -> float:
        return self.ALPHA


def test_regularizer_hands_the_published_gradients_to_the_optimizer(golden: Golden) -> None:
    assert golden.config["alpha"] == FixedAlpha.ALPHA
    regularizer = FixedAlpha(golden.model, strength=golden.config["C"], anchor=golden.anchor)
    loss = regularizer.backward(lambda model: F.cross_entropy(golden.logits(model), golden.tensors["labels"]))
    torch.testing.assert_close(loss, golden.tensors["loss"], **CLOSE)
    torch.testing.assert_close(regularizer.interpolated_loss, golden.tensors["loss_interpolated"], **CLOSE)
    gradients = {name: p.grad for name, p in golden.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == golden.grad.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, golden.grad[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_written_out_terms_give_the_published_gradients_too(golden: Golden) -> None:
    regularizer = FixedAlpha(golden.model, strength=golden.config["C"], anchor=golden.anchor)
    video, text, labels = (golden.tensors[key] for key in ("video", "text", "labels"))
    loss = F.cross_entropy(golden.model(video, text), labels)
    (loss + regularizer.beta * F.cross_entropy(regularizer(video, text), labels)).backward()
    for name, parameter in golden.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, golden.grad[name], **CLOSE)
