"""A run that is given away is the same model elsewhere, and its card says what it is to anybody."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin

from applications.openvclip.__main__ import main
from applications.openvclip.config import from_dict, to_dict
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.inference import loading
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.video_encoder import VideoEncoder
from applications.openvclip.recipes import miniature
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.weights import fingerprint, save_weights
from applications.openvclip.zeroshot.results import ProtocolResult, Results, write_results
from interpolate.weights import trainable_weights


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with weights and results, as training leaves it."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    settings = to_dict(miniature())
    folder.config.write_text(json.dumps(settings))
    clip, generator = tiny_clip.load(), torch.Generator().manual_seed(0)
    anchor = trainable_weights(VideoEncoder(clip))
    theta = {name: w.detach() + 0.02 * torch.randn(w.shape, generator=generator) for name, w in anchor.items()}
    metadata = {"anchor": fingerprint(anchor), "classes": json.dumps(["square", "cloud"]), "seed": "0"}
    save_weights(folder.averaged, clip.state_dict() | theta, metadata)
    accuracy = {name: {"top-1": [0.25]} for name in ("CLIP*", "0", "0.5")}
    result = ProtocolResult(
        "own/set", "1234abcd", False, 8, 2, ["own"], [1], ["a {}"], settings["sampling"] | {"crops": 1}, "wrong", {},
        accuracy, {name: {"square": 0.5} for name in accuracy},
    )  # fmt: skip
    versions = {"provenance": {"versions": {"torch": "2.0"}}, "config": settings}
    write_results(folder.results, Results("miniature", 0.5, {"own/set": result}, **versions))
    (folder.path / "training.pt").write_bytes(b"not for others")
    return folder.path


def test_a_run_that_is_given_away_gives_the_same_answers(
    run: Path, tmp_path: Path, small_world: dict[str, Path]
) -> None:
    given = tmp_path / "given"
    main(["push", str(run), "me/mine", "--folder", str(given)])
    assert {p.name for p in given.iterdir()} == {"config.json", "averaged.safetensors", "results.json", "README.md"}
    manifest = read_manifest(small_world["zs_object"])
    shutil.move(run, tmp_path / "gone")
    assert 'Classifier.from_pretrained("me/mine")' in (given / "README.md").read_text()
    there = Classifier.from_pretrained(given)
    assert there.anchor_weight == 0.5
    expected = Classifier.load(tmp_path / "gone").classify(manifest.location(0), manifest.classes)
    assert there.classify(manifest.location(0), manifest.classes) == expected


def test_a_card_is_made_from_the_run_and_opens_without_this_package(run: Path, tmp_path: Path) -> None:
    Classifier.load(run).save_pretrained(tmp_path / "given")
    card = ModelCard.load(tmp_path / "given" / "README.md")
    assert card.data.to_dict()["license"] == "mit"
    assert card.data.to_dict()["library_name"] == "interpolate-weights"
    for text in ("`1234abcd`", "own/set", "anchor weight 0.5", "open-vclip, alpha up to 0.6", "torch 2.0", "miniature"):
        assert text in card.text
    assert "Classes of" not in card.text  # hundreds of rows


def test_an_upload_is_what_a_folder_would_be(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = {}

    class Hub:
        def __init__(self, token: str | None) -> None: ...

        def create_repo(self, repo_id: str, **options: object) -> "Hub":
            uploaded["private"] = options["private"]
            self.repo_id = repo_id
            return self

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> str:
            uploaded[repo_id] = {path.name for path in folder_path.iterdir()}
            assert f'Classifier.from_pretrained("{repo_id}")' in (folder_path / "README.md").read_text()
            return "https://hub.example/commit/1"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    main(["push", str(run), "me/mine", "--private"])
    files = {"config.json", "averaged.safetensors", "results.json", "README.md"}
    assert uploaded == {"private": True, "me/mine": files}


def test_a_model_of_the_hub_is_asked_for_by_name_and_revision(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return str(run)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda **_: str(run / "config.json"))
    classifier = Classifier.from_pretrained("me/mine", revision="v1")
    assert asked == [("me/mine", "v1")]
    assert classifier.loaded.theta is not None


def test_an_anchor_that_is_a_file_here_goes_along(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature stands for a model of open_clip whose weights are a file."""
    own = tmp_path / "own_anchor.pt"
    torch.save(tiny_clip.load().state_dict(), own)
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["pretrained"] = str(own)
    (run / "config.json").write_text(json.dumps(settings))
    given = tmp_path / "given"
    Classifier.load(run).save_pretrained(given)
    assert from_dict(RunFolder(given).read_settings()).model.pretrained == "anchor.safetensors"
    with torch.no_grad():
        found = loading.load_weights(given / "anchor.safetensors")[0]
    expected = {name: w for name, w in tiny_clip.load().state_dict().items() if name in found}
    assert fingerprint(found) == fingerprint(expected)
    asked = []
    monkeypatch.setattr(
        loading.build, "clip", lambda model: asked.append(model) or tiny_clip.load_pretrained(torch.device("cpu"))
    )
    Classifier.from_pretrained(given)
    assert asked[0].pretrained == str(given / "anchor.safetensors")


def test_a_run_is_not_written_over_itself_and_only_runs_are_given_away(run: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="is the run itself"):
        Classifier.load(run).save_pretrained(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    with pytest.raises(ValueError, match=r"only a run can be given away.*this is miniature"):
        Classifier.load(model="miniature").save_pretrained(tmp_path / "given")


def test_a_run_that_has_not_ended_is_not_given_away(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    loaded = Classifier.load(run).loaded
    RunFolder(run).averaged.unlink()
    monkeypatch.setattr("applications.openvclip.inference.classifier.load", lambda *_: loaded)  # as of a checkpoint
    monkeypatch.setattr(hub_mixin, "HfApi", lambda **_: pytest.fail("the hub was asked"))
    for more in (["--folder", str(tmp_path / "given")], []):
        with pytest.raises(SystemExit, match="2"):
            main(["push", str(run), "me/mine", *more])
        said = capsys.readouterr().err
        assert f"{run} has not ended" in said
        assert f"`openvclip train --resume {run}`" in said
    assert not (tmp_path / "given").exists()
