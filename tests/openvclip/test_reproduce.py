"""The paper's figures beside one's own: under every protocol of the data at hand, never under another's name."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from applications.openvclip.__main__ import main
from applications.openvclip.commands import reproduce
from applications.openvclip.config import ModelConfig
from applications.openvclip.recipes import vit_b_16
from applications.openvclip.zeroshot import published, tables
from applications.openvclip.zeroshot.results import read_results

VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}


@pytest.fixture(scope="module")
def measured(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP in the form of the published checkpoints, on a small world in the place of UCF-101."""
    folder = tmp_path_factory.mktemp("reproduction")
    (folder / "ViT-small-quickgelu.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "ViT-small-quickgelu.json")
    torch.manual_seed(0)
    weights = open_clip.create_model("ViT-small-quickgelu").state_dict()
    torch.save(weights, folder / "clip.pt")
    weights = {f"model.{n}": w + 0.01 if "visual." in n else w for n, w in weights.items()}
    torch.save({"model_state": weights}, folder / "swa_2_22.pth")
    options = ["--pretrained", str(folder / "clip.pt"), "--weights", str(folder / "swa_2_22.pth")]
    options += ["--output", str(folder / "out")]
    options += ["--videos", "ucf101", str(small_world["zs_object"].parent), "--workers", "1", "--batch-size", "4"]
    rows = small_world["zs_object"].read_text().splitlines()[1:]
    for name in ("ucf101_full", *(f"ucf101_split{i}" for i in (1, 2, 3))):
        (folder / "lists" / name).mkdir(parents=True)
        (folder / "lists" / name / "test.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        small = replace(vit_b_16(), model=ModelConfig(name="ViT-small-quickgelu"))
        patch.setitem(reproduce.RECIPE_OF, "B/16", lambda: small)
        main(["reproduce", "B/16", *options, "--lists", "ucf101", str(folder / "lists")])
    return folder / "out"


def test_every_protocol_of_the_videos_at_hand_is_measured(measured: Path) -> None:
    results = read_results(measured / "results.json")
    assert list(results.protocols) == ["ucf101/EP1", "ucf101/EP2", "ucf101/EP3"]
    assert results.config["model"]["edge"] == "zero"  # of the published code
    text = (measured / "reproduction.md").read_text()
    for protocol, r in results.protocols.items():
        assert f"| {protocol}, top-1 | CLIP* | - | {r.text('CLIP*')} | - | `{r.hash}` |" in text
        assert f"| {protocol}, top-1 | Open-VCLIP | - | {r.text('0.5')} | - |" in text


def test_a_difference_under_another_protocol_is_marked(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((measured / "results.json").read_text()) | {"model": "ViT-B-16-quickgelu"}
    content["protocols"]["ucf101/EP2"]["accuracy"]["0.5"]["top-1"] = [0.825]
    (tmp_path / "results.json").write_text(json.dumps(content))
    results = read_results(tmp_path / "results.json")
    row = "| ucf101/EP2, top-1 | Open-VCLIP | 83.5 | 82.5 | -1.0{} | `" + results.protocols["ucf101/EP2"].hash
    text = tables.beside_the_published(results)
    assert row.format(" ?") in text
    assert "? The hash is not that of the published protocol" in text
    assert "| TACO (arXiv 2606.25478), names of classes rephrased | 85.6±1.2 / 60.0±0.5 / 77.0±0.9 |" in text
    monkeypatch.setattr(published, "_HASHES", {name: r.hash for name, r in results.protocols.items()})
    text = tables.beside_the_published(results)
    assert row.format("") in text
    assert "?" not in text


def test_videos_of_an_unknown_data_set_are_refused(capsys: pytest.CaptureFixture) -> None:
    for options in ([], ["--videos", "ucf", "UCF-101"]):
        with pytest.raises(SystemExit):
            main(["reproduce", "B/16", *options])
        assert "of ucf101, hmdb51, kinetics600, kinetics400; it names " in capsys.readouterr().err
