"""Weights that people have, in each of their forms, made from a tiny model of each."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor

from applications.openvclip import build
from applications.openvclip.config import ModelConfig
from applications.openvclip.inference import loading
from applications.openvclip.model import pretrained
from applications.openvclip.model.video_encoder import VideoEncoder
from interpolate import WeightMismatchError

VISION = {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two tiny models known to open_clip by name, as any model of its own."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "ViT-tiny.json").write_text(json.dumps(CONFIG))
    (folder / "ViT-tiny-quickgelu.json").write_text(json.dumps(CONFIG | {"quick_gelu": True}))
    (folder / "ViT-wide.json").write_text(json.dumps(CONFIG | {"embed_dim": 32}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def clip(tiny_models: None) -> CLIP:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-quickgelu").eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim else None
    return model


def outputs(model: CLIP) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(open_clip.tokenize(["a dog", "surfing"]))


def assert_loads_as(clip: CLIP, path: Path, name: str = "ViT-tiny-quickgelu") -> None:
    loaded = pretrained.load(name, str(path), CPU)
    for got, expected in zip(outputs(loaded.clip), outputs(clip), strict=True):
        torch.testing.assert_close(got, expected)
    assert loaded.image_size == 32
    assert loaded.image_mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


def test_files_of_open_clip(clip: CLIP, tmp_path: Path) -> None:
    save_file({k: v.clone() for k, v in clip.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save(clip.state_dict(), tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert_loads_as(clip, tmp_path / name)
        assert pretrained.read_file(tmp_path / name)[1] == "open_clip"


class Archive(torch.nn.Module):
    """OpenAI's archives hold the weights under these names, beside three numbers."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.visual, self.transformer = torch.nn.Module(), torch.nn.Module()
        for name, value in clip.state_dict().items():
            if name == "attn_mask":
                continue
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(value.clone()))
        for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_archives_of_openai(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "ViT-tiny.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(Archive(clip)).save(path)
    assert pretrained.read_file(path)[1] == "OpenAI"
    assert_loads_as(clip, path)
    with pytest.raises(ValueError, match=r"holds OpenAI weights, which need QuickGELU: use the --model\.name with -q"):
        pretrained.load("ViT-tiny", str(path), CPU)


def test_folders_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    found = pretrained.read_file(tmp_path)
    assert found.form == "Hugging Face"
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    torch.save(theirs.state_dict(), tmp_path / "sharded" / "a.bin")
    for path in (tmp_path / "sharded", f"file://{tmp_path}/sharded", tmp_path / "sharded" / "a.bin"):
        again = pretrained.read_file(path)
        assert again[1:3] == ("Hugging Face", True)
        assert again.weights.keys() == found.weights.keys()
        assert all(torch.equal(again.weights[name], tensor) for name, tensor in found.weights.items())
    ours = pretrained.load("ViT-tiny-quickgelu", str(tmp_path), CPU).clip
    images, texts = outputs(ours)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        found = theirs(pixel_values=pixels, input_ids=open_clip.tokenize(["a dog", "surfing"]))
    torch.testing.assert_close(torch.nn.functional.normalize(images, dim=-1), found.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=-1), found.text_embeds, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds Hugging Face weights, which need QuickGELU"):
        pretrained.load("ViT-tiny", str(tmp_path), CPU)
    settings = tmp_path / "config.json"
    settings.write_text(settings.read_text().replace('"quick_gelu"', '"gelu"'))
    with pytest.raises(ValueError, match="holds Hugging Face weights, which need plain GELU"):
        pretrained.load("ViT-tiny-quickgelu", str(tmp_path), CPU)


def test_checkpoints_of_the_published_code(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "swa_2_22.pth"
    state = {f"model.{name}": value for name, value in clip.state_dict().items()}
    torch.save({"epoch": 22, "model_state": state, "optimizer_state": {"state": {}}, "cfg": "TRAIN: …"}, path)
    found = pretrained.read_file(path)
    assert found.form == "Open-VCLIP"
    own = VideoEncoder(clip).state_dict()
    assert all(torch.equal(found.weights[name], value) for name, value in own.items())
    assert_loads_as(clip, path)
    model = ModelConfig("ViT-tiny-quickgelu", str(path), "zero")
    assert build.clip(model).is_of_video
    with pytest.raises(ValueError, match=r"swa_2_22\.pth is a checkpoint .* --model\.edge is mask: give --model\.edge"):
        build.clip(replace(model, edge="mask"))
    with pytest.raises(ValueError, match=r"swa_2_22\.pth is a checkpoint .* and no image model: give it as --weights"):
        loading.load(None, model)


def test_fine_tuned_weights_of_another_activation_than_the_anchor_are_refused(clip: CLIP, tmp_path: Path) -> None:
    """Nothing else would tell: names and shapes are the same."""
    tower = {name: w for name, w in clip.state_dict().items() if name.startswith("visual.") or name == "logit_scale"}
    torch.save({"model_state": {f"model.{name}": w for name, w in tower.items()}}, tmp_path / "published.pth")
    torch.save(clip.state_dict(), tmp_path / "anchor.pt")
    anchor = ModelConfig("ViT-tiny-quickgelu", str(tmp_path / "anchor.pt"))
    assert loading.load(tmp_path / "published.pth", anchor).model.edge == "zero"
    with pytest.raises(ValueError, match=r"published\.pth holds Open-VCLIP weights, which need QuickGELU"):
        loading.load(tmp_path / "published.pth", replace(anchor, name="ViT-tiny"))


def test_one_of_several_sets_of_weights_is_named(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    ema = {name: torch.zeros_like(value) for name, value in clip.state_dict().items()}
    torch.save({"state_dict": clip.state_dict(), "ema": ema}, path)
    assert_loads_as(clip, Path(f"{path}::state_dict"))
    with pytest.raises(ValueError, match=r"several sets of weights \(state_dict, ema\); pick one, as in "):
        pretrained.load("ViT-tiny", str(path), CPU)


def test_weights_of_another_architecture_are_named(clip: CLIP, tmp_path: Path) -> None:
    torch.save(clip.state_dict(), tmp_path / "a.pt")
    with pytest.raises(WeightMismatchError, match=r"of another shape \("):
        pretrained.load("ViT-wide", str(tmp_path / "a.pt"), CPU)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt holds no weights of a CLIP, but 1 tensors: \['conv.weight'\]"):
        pretrained.load("ViT-tiny", str(tmp_path / "b.pt"), CPU)
    with pytest.raises(ValueError, match=r"is a folder without a checkpoint"):
        pretrained.read_file(tmp_path)


def test_names_and_tags_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match=r"'ViT-B-61' is neither 'miniature' nor a model of open_clip; near: ViT-B-16"):
        pretrained.load("ViT-B-61", "openai", CPU)
    with pytest.raises(ValueError, match=r"'foo' is neither 'miniature' nor a model of open_clip\.$"):
        pretrained.load("foo", "openai", CPU)
    with pytest.raises(ValueError, match=r"ViT-B-16 needs weights, a file or one of open_clip's tags \(openai"):
        pretrained.load("ViT-B-16", None, CPU)
    with pytest.raises(ValueError, match="'opanai' is neither a file nor one of open_clip's tags for ViT-B-16"):
        pretrained.load("ViT-B-16", "opanai", CPU)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_openais_weights_are_put_into_the_quickgelu_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(model: str, **more: object) -> None:
        asked.append((model, more))
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(
        RuntimeError, match=r"'openai' of .*-quickgelu are not in the cache and could not be downloaded"
    ):
        pretrained.load(name, "openai", CPU)
    assert asked == [(f"{name}-quickgelu", {"pretrained": "openai"})]
