"""The classifier: what it says is what an evaluation says, from wherever it is loaded and at any anchor weight."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from applications.openvclip import Classifier, evaluate, train
from applications.openvclip.__main__ import main
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.sampling import SAMPLERS, Sampling
from applications.openvclip.inference.labels import label_set
from applications.openvclip.miniature import tiny_clip
from applications.openvclip.model.classifier import class_embeddings
from applications.openvclip.model.prompts import OBJECT_TEMPLATES
from applications.openvclip.zeroshot.confidence import calibration_error
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.results import read_results
from interpolate import WeightMismatchError, load_weights, patch, patch_files
from tests.openvclip.files import write_manifest, write_theta

SAMPLING = {"frames": 4, "stride": 2, "target_fps": 8, "views": 3, "crops": 3}


@pytest.fixture(scope="module")
def theta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theta(tmp_path_factory.mktemp("weights") / "theta.safetensors", scale=-0.3)


@pytest.fixture
def classifier(theta: Path) -> Classifier:
    return Classifier.load(theta, model="miniature")


@pytest.fixture(scope="module")
def video(small_world: dict[str, Path]) -> str:
    return read_manifest(small_world["zs_object"]).location(5)


@pytest.fixture(scope="module")
def labels(small_world: dict[str, Path]) -> list[str]:
    return list(read_manifest(small_world["zs_object"]).classes)


@pytest.fixture(scope="module")
def evaluated(small_world: dict[str, Path], theta: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LogitFiles]:
    """The logits of three videos under every sampler."""
    folder = tmp_path_factory.mktemp("evaluated")
    manifest = read_manifest(small_world["zs_object"])
    few = [(manifest.location(i), manifest.classes[manifest.labels[i]]) for i in (0, 7, 23)]
    part = {"source": str(write_manifest(folder / "few.csv", few)), "classes": list(manifest.classes)}
    for sampler in SAMPLERS:
        content = {"name": sampler, "parts": [part], "templates": "objects"}
        content |= {"sampling": SAMPLING | {"sampler": sampler}}
        (folder / f"{sampler}.json").write_text(json.dumps(content))
    protocols = ["--protocols", *(str(folder / f"{sampler}.json") for sampler in SAMPLERS)]
    model = ["--weights", str(theta), "--model.name", "miniature", "--output", str(folder)]
    evaluate.main([*model, *protocols, "--anchor-weights", "0", "0.3", "1", "--workers", "1"])
    found = [LogitFiles(folder / "logits", json.loads(p.read_text())) for p in folder.glob("logits/*/pass.json")]
    assert {files.content["sampling"]["sampler"] for files in found} == set(SAMPLERS)
    return found


@pytest.mark.parametrize("scorer", ["0.3", "0", "1", "CLIP*"])
def test_predictions_have_the_logits_of_an_evaluation(scorer: str, evaluated: list[LogitFiles], theta: Path) -> None:
    """Under every sampler; products of the same numbers, over matrices of another shape."""
    weights = {} if scorer == "CLIP*" else {"source": theta, "anchor_weight": float(scorer)}
    for files in evaluated:
        sampling = Sampling(**SAMPLING, sampler=files.content["sampling"]["sampler"])
        classifier = Classifier.load(**weights, model="miniature", sampling=sampling)
        classes = files.content["classes"]
        column = files.content["scorers"].index(scorer)
        for indices, logits in files.chunks():
            assert logits.shape[2:] == (9, 6)
            for i, expected in zip(indices, torch.from_numpy(logits[:, column]), strict=True):
                video = files.content["videos"][i]
                views = classifier.embed(classifier.read(video))
                found = classifier.logits(views, classifier.embeddings_of(classes))
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
                assert next(iter(classifier.classify(video, classes))) == classes[int(expected.sum(dim=0).argmax())]


def test_probabilities_are_those_of_the_mean_of_the_views_best_first(
    classifier: Classifier, video: str, labels: list[str]
) -> None:
    found = classifier.classify(video, labels)
    logits = classifier.logits(classifier.embed(classifier.read(video)), classifier.embeddings_of(labels))
    expected = logits.double().mean(dim=0).softmax(dim=0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert {label: found[label] for label in labels} == dict(zip(labels, expected.tolist(), strict=True))


def test_features_have_unit_length_and_the_cosines_of_the_logits(
    classifier: Classifier, video: str, labels: list[str]
) -> None:
    features = classifier.features(video)
    assert features.shape == (128,)
    assert features.norm().item() == pytest.approx(1, abs=1e-6)
    cosines = classifier.embeddings_of(labels) @ features
    ranking = list(classifier.classify(video, labels))
    assert [labels[i] for i in cosines.argsort(descending=True).tolist()] == ranking


@pytest.mark.parametrize("anchor_weight", [0.0, 0.3, 1.0])
def test_another_anchor_weight_in_memory_equals_a_load(
    classifier: Classifier, theta: Path, video: str, anchor_weight: float
) -> None:
    classifier.anchor_weight = 0.9
    classifier.anchor_weight = anchor_weight
    loaded = Classifier.load(theta, model="miniature", anchor_weight=anchor_weight)
    views = classifier.read(video)
    assert torch.equal(classifier.embed(views), loaded.embed(views))
    clip = tiny_clip.load()
    load_weights(clip, patch(tiny_clip.load(), load_file(theta), anchor_weight=anchor_weight))
    state = classifier.loaded.source.clip.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.state_dict().items())


def test_threads_at_other_anchor_weights_do_not_meet(classifier: Classifier, video: str) -> None:
    views = classifier.read(video)
    weights = [0.0, 0.25, 0.5, 0.75, 1.0]
    alone = {}
    for weight in weights:
        classifier.anchor_weight = weight
        alone[weight] = classifier.embed(views)
    classifier.anchor_weight = 0.1
    wrong = []

    def ask(weight: float) -> None:
        for _ in range(5):
            with classifier.at(weight):
                if not torch.equal(classifier.embed(views), alone[weight]):
                    wrong.append(weight)

    threads = [threading.Thread(target=ask, args=(weight,)) for weight in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert classifier.anchor_weight == 0.1


def test_the_anchor_weight_is_what_it_was_after_one_that_is_none(classifier: Classifier, video: str) -> None:
    views = classifier.read(video)
    before = classifier.embed(views)
    for bad in (1.5, float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\], got (1\.5|nan)"):
            classifier.anchor_weight = bad
    assert classifier.anchor_weight == 0.5
    assert torch.equal(classifier.embed(views), before)


def test_texts_are_embedded_once_for_a_label_set(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    first = classifier.embeddings_of(["cloud", "square"])
    with monkeypatch.context() as patched:
        patched.setattr(classifier.loaded.source, "tokenizer", lambda _: pytest.fail("a text was read again"))
        assert classifier.embeddings_of(("cloud", "square")) is first
    classifier.templates = ("a {}",)
    assert not torch.equal(classifier.embeddings_of(["cloud", "square"]), first)


def test_a_class_of_several_names_is_their_mean(classifier: Classifier, source) -> None:
    found = classifier.embeddings_of({"sky": ["cloud", "sun"], "square": ["square"]})
    cloud, sun, square = class_embeddings(source.clip, source.tokenizer, ["cloud", "sun", "square"], OBJECT_TEMPLATES)
    torch.testing.assert_close(found[0], F.normalize(cloud + sun, dim=0))
    assert torch.equal(found[1], square)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one is needed"),
        ("cloud", r"for one label, give \['cloud'\]"),
        (["cloud", "cloud"], "'cloud': there more than once"),
        (["cloud", " "], "needs a name, got ' '"),
        ({"sky": []}, "needs a name, got 'sky'"),
        ({"sky": ["sun", "sun"]}, "'sky' has a name twice: sun, sun"),
    ],
)
def test_what_is_no_label_set_is_refused(labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_set(labels)


def test_without_fine_tuned_weights_it_is_the_image_model_on_every_frame(video: str, source) -> None:
    classifier = Classifier.load(model="miniature")
    views = classifier.read(video)
    frames = (views[0].float() / 255 - 0.5).div(0.25).transpose(0, 1)
    with torch.no_grad():
        expected = source.clip.encode_image(frames, normalize=True).mean(dim=0)
    torch.testing.assert_close(classifier.embed(views)[0], expected)
    with pytest.raises(ValueError, match=r"there are no fine-tuned weights, so it is 1, got 0\.5"):
        classifier.anchor_weight = 0.5


@pytest.fixture(scope="module")
def run(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose settings are not the recipe's."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.main(
        [
            *("miniature", "--output", str(folder), "--data.train", str(small_world["train"])),
            *("--data.test", str(small_world["closed"]), "--evaluation.anchor-weight", "0.3"),
            *("--optimization.batch-size", "8", "--optimization.epochs", "1", "--averager.start-epoch", "0"),
            *("--data.workers", "1", "--sampling.views", "2", "--evaluation.anchor-weights", "0.3"),
        ]
    )
    return folder


def test_a_run_is_loaded_with_its_own_settings(run: Path, tmp_path: Path, video: str) -> None:
    classifier = Classifier.load(run)
    assert classifier.anchor_weight == 0.3
    assert classifier.read(video).shape == (2, 3, 4, 32, 32)
    clip = tiny_clip.load()
    clip.load_state_dict(load_file(run / "patched.safetensors"))
    state = classifier.loaded.source.clip.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.state_dict().items())
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="nothing is learnt"):
        Classifier.load(tmp_path)


def test_weights_that_are_patched_are_not_patched_again(run: Path, tmp_path: Path) -> None:
    as_in_run = Classifier.load(run).encoder.state_dict()
    anchor = tmp_path / "anchor.safetensors"
    save_file(tiny_clip.load().state_dict(), anchor)
    patch_files(anchor, run / "averaged.safetensors", tmp_path / "patched.safetensors", anchor_weight=0.3)
    for patched in (run / "patched.safetensors", tmp_path / "patched.safetensors"):
        classifier = Classifier.load(patched, model="miniature")
        assert classifier.anchor_weight == 0
        for name, weight in classifier.encoder.state_dict().items():
            torch.testing.assert_close(weight, as_in_run[name])
        with pytest.warns(UserWarning, match=r"patched\.safetensors is patched: an anchor is in it"):
            Classifier.load(patched, model="miniature", anchor_weight=0.3)
    assert Classifier.load(run / "averaged.safetensors", model="miniature").anchor_weight == 0.5


def test_what_is_no_model_is_named(theta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a source or a model"):
        Classifier.load()
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        Classifier.load(tmp_path / "absent.pth", model="miniature")
    with pytest.raises(ValueError, match="the anchor is needed, too, by model"):
        Classifier.load(theta)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match=r"someone/open-vclip is no folder here, and no model of the"):
        Classifier.load("someone/open-vclip")
    other = load_file(theta) | {"visual.conv1.weight": torch.zeros(128, 3, 16, 16)}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightMismatchError, match=r"visual\.conv1\.weight: theta \(128, 3, 16, 16\)"):
        Classifier.load(tmp_path / "other.safetensors", model="miniature")


def test_weights_with_a_text_tower_of_their_own_are_refused(theta: Path, tmp_path: Path, source) -> None:
    whole = load_file(theta)
    for kept in (torch.float16, torch.bfloat16):  # is no change of it
        save_file({name: tensor.to(kept) for name, tensor in whole.items()}, tmp_path / "kept.safetensors")
        assert Classifier.load(tmp_path / "kept.safetensors", model="miniature").loaded.theta is not None
    whole["text_projection"] = whole["text_projection"] + 1e-4
    save_file(whole, tmp_path / "tuned.safetensors")
    with pytest.raises(WeightMismatchError, match=r"another text tower than miniature .*: 1 .* such as text_proj"):
        Classifier.load(tmp_path / "tuned.safetensors", model="miniature")


def test_weights_that_are_not_finite_are_no_answer(theta: Path, tmp_path: Path, video: str) -> None:
    broken = load_file(theta)
    broken["visual.proj"] = torch.full_like(broken["visual.proj"], np.nan)
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises((ValueError, FloatingPointError), match="not finite"):
        Classifier.load(tmp_path / "nan.safetensors", model="miniature", anchor_weight=0).features(video)


def test_an_unreadable_video_is_named(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoReadError, match=r"text\.mp4: 8 bytes, not a readable video"):
        classifier.classify(tmp_path / "text.mp4", ["cloud"])


def test_none_of_these_takes_a_calibration_and_wins_where_no_logit_is_above_the_threshold(
    run: Path, small_world: dict[str, Path], tmp_path: Path, video: str, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    labels = ["cloud", "square"]
    with pytest.raises(ValueError, match=r"at anchor weight 0\.3 there is no calibration .*with one: none"):
        Classifier.load(folder).classify(video, labels, none_of_these=True)
    main(["calibrate", str(folder), "--data", str(small_world["zs_object"]), "--workers", "1"])
    assert "expected calibration error" in capsys.readouterr().out
    found = json.loads((folder / "calibration.json").read_text())["0.3"]
    assert (found["videos"], found["classes"]) == (24, 6)
    classifier = Classifier.load(folder)
    embeddings = classifier.embed(classifier.read(video))
    logits = classifier.logits(embeddings, classifier.embeddings_of(labels)).mean(dim=0)
    for shift, wins in ((-0.01, False), (0.01, True)):
        found["threshold"] = logits.max().item() + shift
        (folder / "calibration.json").write_text(json.dumps({"0.3": found}))
        answers = Classifier.load(folder).classify(video, labels, none_of_these=True)
        assert set(answers) == {"cloud", "square", "none of these"}
        assert sum(answers.values()) == pytest.approx(1)
        assert (next(iter(answers)) == "none of these") is wins
    several = Classifier.load(folder).classify(video, labels, multi_label=True)
    for label in labels:  # each on its own, whatever the others are
        alone = Classifier.load(folder).classify(video, [label], none_of_these=True)
        assert several[label] == pytest.approx(alone[label], rel=1e-6)
    assert list(several) == sorted(labels, key=lambda label: -several[label])
    with pytest.raises(ValueError, match="none of these and multi-label: give one"):
        Classifier.load(folder).classify(video, labels, none_of_these=True, multi_label=True)
    ratio = answers["cloud"] / answers["square"]
    assert np.log(ratio) == pytest.approx(float(logits[0] - logits[1]) / found["temperature"], rel=1e-4)
    with pytest.raises(ValueError, match="'none of these' is the answer where no label fits"):
        Classifier.load(folder).classify(video, ["none of these"], none_of_these=True)
    for other in ({"anchor_weight": 0.4}, {"templates": ["a {}"]}, {"sampling": Sampling(views=1)}):
        with pytest.raises(ValueError, match="there is no calibration of this model, its sampling and templates"):
            Classifier.load(folder, **other).classify(video, labels, none_of_these=True)


def test_an_evaluation_says_how_sure_the_answers_are_before_and_after(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    plain = read_results(folder / "results.json").protocols["closed"].confidence["0.3"]
    assert plain.keys() == {"ece", "accuracy_at_95", "auroc"}
    values = {"data": "x", "videos": 30, "classes": 3, "accuracy": 0.5, "ece_before": 0.2, "ece_after": 0.1}
    values |= {"temperature": 5.0, "threshold": 20.0, "auroc": 0.8, "accuracy_at_95": 0.6}
    (folder / "calibration.json").write_text(json.dumps({"0.3": values}))
    evaluate.main([str(folder)])
    found = read_results(folder / "results.json").protocols["closed"]
    assert found.confidence["0.3"].keys() == {*plain, "ece_calibrated"}
    assert found.confidence["0.3"]["ece"] == plain["ece"] != found.confidence["0.3"]["ece_calibrated"]
    assert "ece_calibrated" not in found.confidence["0"]
    (passed,) = (folder / "logits").iterdir()  # whose logits the second evaluation has used again
    files = LogitFiles(folder / "logits", json.loads((passed / "pass.json").read_text()))
    manifest = read_manifest(json.loads((folder / "config.json").read_text())["data"]["test"][0])
    label_of = {manifest.location(i): label for i, label in enumerate(manifest.labels)}
    labels, logits = [], []
    for videos, part in files.chunks():
        labels += [label_of[files.content["videos"][i]] for i in videos]
        logits.append(part[:, files.content["scorers"].index("0.3")].mean(axis=1))
    scores = torch.from_numpy(np.concatenate(logits)).double()
    correct = (scores.argmax(dim=1) == torch.tensor(labels)).numpy()
    for name, temperature in (("ece", 1.0), ("ece_calibrated", 5.0)):
        sure = (scores / temperature).softmax(dim=1).amax(dim=1).numpy()
        assert found.confidence["0.3"][name][0] == pytest.approx(calibration_error(sure, correct), abs=1e-5)
    assert "## Confidence at anchor weight 0.3" in (folder / "results.md").read_text()
