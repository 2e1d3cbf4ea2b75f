"""Exported files compute what the model computes, without this package; one that does not is never written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from applications.openvclip.__main__ import main
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.inference import export as exporting
from applications.openvclip.inference.classifier import Classifier
from applications.openvclip.inference.export import export
from tests.openvclip.files import write_theta

LABELS = ["square", "cloud", "subset of", "hollow flag"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "classify_exported.py"


@pytest.fixture(scope="module")
def theta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theta(tmp_path_factory.mktemp("weights") / "theta.safetensors")


@pytest.fixture
def classifier(theta: Path) -> Classifier:
    return Classifier.load(theta, model="miniature", anchor_weight=0.3, sampling=Sampling(frames=4))


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (5, 3, 4, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.mark.slow  # tracing takes some seconds, and for ONNX half a minute
def test_a_program_of_torch_export_has_the_logits_of_the_model(
    classifier: Classifier, clips: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "model.pt2"
    assert export(classifier, path, labels=LABELS) <= 1e-4
    facts = json.loads((path.parent / "labels.json").read_text())
    assert facts["labels"] == LABELS
    assert facts["anchor_weight"] == 0.3
    classes = torch.tensor(facts["class_embeddings"])
    program = torch.export.load(path).module()
    for n in (1, 5):  # a number of videos that it was not traced with
        expected = classifier.logits(classifier.embed(clips[:n]), classifier.embeddings_of(LABELS))
        torch.testing.assert_close(program(clips[:n], classes), expected, rtol=0, atol=1e-4)
    assert sorted(p.name for p in path.parent.iterdir()) == ["labels.json", "model.pt2"]


@pytest.mark.slow  # the same
def test_onnx_takes_any_number_of_videos_and_classes_and_the_anchor_weight(
    classifier: Classifier, clips: torch.Tensor, tmp_path: Path
) -> None:
    import onnxruntime

    path = tmp_path / "model.onnx"
    assert export(classifier, path, labels=LABELS, anchor_weight_as_input=True) <= 1e-4
    session = onnxruntime.InferenceSession(path)
    assert [i.name for i in session.get_inputs()] == ["video", "class_embeddings", "anchor_weight"]
    for n, k, weight in ((1, 1, 0.0), (5, 4, 0.7), (2, 3, 1.0)):
        classes = classifier.embeddings_of(LABELS[:k])
        with classifier.at(weight):
            expected = classifier.logits(classifier.embed(clips[:n]), classes)
        inputs = {
            "video": clips[:n].numpy(),
            "class_embeddings": classes.numpy(),
            "anchor_weight": np.array(weight, np.float32),
        }
        (found,) = session.run(["logits"], inputs)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "labels.json").read_text())["anchor_weight"] == "input"


@pytest.mark.slow  # the same
def test_the_example_runs_a_file_without_this_package(
    theta: Path, small_world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(small_world["zs_object"])
    labels = ",".join(manifest.classes)
    command = ["export", str(theta), "-o", str(tmp_path / "model.onnx"), "--labels", labels, "--anchor-weight", "0.3"]
    main([*command, "--model.name", "miniature"])
    assert "within" in capsys.readouterr().out
    own = {"PYTHONPATH": "", "PATH": os.environ["PATH"]}
    sampling = Sampling(frames=8, sampler="segment", views=1)
    classifier = Classifier.load(theta, model="miniature", anchor_weight=0.3, sampling=sampling)
    for i in (0, 9):
        video = manifest.location(i)
        run = subprocess.run(
            [sys.executable, "-P", str(EXAMPLE), str(tmp_path / "model.onnx"), video],
            cwd=tmp_path, env=own, capture_output=True, text=True, check=True,
        )  # fmt: skip
        shown = {line[8:]: float(line[:6].rstrip("%")) / 100 for line in run.stdout.splitlines()}
        expected = classifier.classify(video, manifest.classes)
        assert next(iter(shown)) == next(iter(expected))
        for label, probability in shown.items():  # colours of neighbouring pixels are put together another way
            assert probability == pytest.approx(expected[label], abs=0.05)


@pytest.mark.slow  # the same
def test_a_file_that_computes_something_else_is_not_written(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(path: Path) -> exporting._Run:
        program = torch.export.load(path).module()
        return lambda *inputs: program(*inputs) + 2e-4

    write, _ = exporting._FORMS[".pt2"]
    monkeypatch.setitem(exporting._FORMS, ".pt2", (write, off))
    before = tmp_path / "model.pt2"
    before.write_text("what was there")
    with pytest.raises(FloatingPointError, match=r"model\.pt2 was not written.*differ.* by 2\.0e-04"):
        export(classifier, before, labels=LABELS)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert before.read_text() == "what was there"


def test_another_suffix_and_an_input_without_a_meaning_are_refused(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.onnx or \.pt2; got 'model\.pth'"):
        export(classifier, tmp_path / "model.pth", labels=LABELS)
    alone = Classifier.load(model="miniature")
    with pytest.raises(ValueError, match="no fine-tuned weights that the anchor mixes with"):
        export(alone, tmp_path / "model.pt2", labels=LABELS, anchor_weight_as_input=True)
