"""The miniature world and its tiny CLIP."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open

from applications.openvclip.data.decode import Video
from applications.openvclip.data.manifest import Manifest
from applications.openvclip.miniature import glyphs, pretrain, tasks, tiny_clip, world


def test_there_are_320_concepts_of_different_names_and_shapes() -> None:
    assert len(set(glyphs.names())) == glyphs.N_GLYPHS
    assert glyphs.masks().shape == (320, 32, 32)
    assert len(np.unique(glyphs.masks().reshape(320, -1), axis=0)) == 320
    assert not set(" ".join(glyphs.names()).split()) & {*world.FOREGROUNDS, *world.GROUNDS, *world.MOTIONS}


def test_every_caption_is_made_of_the_vocabulary_and_fits_the_context() -> None:
    _, captions = world.stills(np.random.default_rng(0), np.arange(320), moving=0.5)
    tokens = tiny_clip.WordTokenizer()(captions)
    assert (tokens == tiny_clip.WordTokenizer().end).sum(dim=1).eq(1).all()
    assert max(len(caption.split()) for caption in captions) <= tiny_clip.CONTEXT_LENGTH - 2


def test_drawings_are_a_function_of_their_generator() -> None:
    for draw in (
        lambda seed: world.clip(np.random.default_rng(seed), 7, "spinning", "red", 0.8),
        lambda seed: world.stills(np.random.default_rng(seed), np.array([7]))[0].numpy(),
    ):
        np.testing.assert_array_equal(draw(1), draw(1))
        assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize("motion", world.MOTIONS[1:])
def test_a_motion_moves_the_glyph(motion: str) -> None:
    def change(motion: str) -> float:
        videos = [world.clip(np.random.default_rng(i), i, motion, "white", hardness=0.0) for i in range(10)]
        return float(np.mean([np.abs(video[0].astype(float) - video[-1]).mean() for video in videos]))

    assert change(motion) > 1.5 * change("still")


def test_held_out_concepts_are_not_trained_on() -> None:
    sets = tasks.draw_sets(seed=0, train_videos_per_class=2)
    concepts = {name: {recipe.concept for recipe in recipes} for name, recipes in sets.items()}
    assert concepts["train"] == concepts["closed"]
    for name, count in (("closed", 30), ("zs_object", 100), ("zs_motion", 20), ("zs_colour", 15)):
        assert len(concepts[name]) == count
        assert name == "closed" or not concepts[name] & concepts["train"]
    misleading = sets["out_of_context"]
    assert {recipe.label for recipe in misleading} == {recipe.label for recipe in sets["closed"]}
    assert all(recipe.behind != recipe.concept for recipe in misleading)
    assert {recipe.behind for recipe in misleading} <= concepts["train"]
    keys = [recipe.key for recipes in sets.values() for recipe in recipes]
    assert len(set(keys)) == len(keys)
    assert tasks.draw_sets(0, 2) == sets
    assert tasks.draw_sets(1, 2) != sets


def test_a_clip_survives_its_file(tmp_path: Path) -> None:
    errors = []
    for recipes in tasks.draw_sets(seed=0, train_videos_per_class=1).values():
        frames = tasks.render(recipes[0])
        tasks.write_video(tmp_path / "a.mp4", frames)
        video = Video(tmp_path / "a.mp4", world.SIZE)
        assert len(video) == len(frames)
        errors.append(np.abs(video.frames(range(len(video))).astype(float) - frames).mean())
    # of 255: lossy, and shrunk by a bicubic, that is 3 as a mean and up to 5.5; 7 and 11 with a colour for two pixels
    assert np.mean(errors) < 4
    assert max(errors) < 6


def test_a_clip_is_the_same_file_every_time(tmp_path: Path) -> None:
    frames = tasks.render(tasks.draw_sets(seed=0, train_videos_per_class=1)["closed"][5])
    rng, files, held = np.random.default_rng(0), set(), []
    for _ in range(100):
        held = [*held[-60:], rng.random(int(rng.integers(1000, 200_000)))]  # whatever lies about in memory
        tasks.write_video(tmp_path / "a.mp4", frames)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_sets_are_made_once_and_completed_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drawn = tasks.draw_sets

    def few(seed: int, train_videos_per_class: int) -> dict[str, list[tasks.ClipRecipe]]:
        return {name: recipes[:3] for name, recipes in drawn(seed, train_videos_per_class).items()}

    def files(manifest: Manifest) -> list[Path]:
        return [Path(manifest.location(i)) for i in range(len(manifest))]

    monkeypatch.setattr(tasks, "draw_sets", few)
    first = tasks.prepare(0, 1)
    stamps = {path: path.stat().st_mtime_ns for manifest in first.values() for path in files(manifest)}
    lost = files(first["closed"])[1]
    lost.unlink()
    (lost.parent.parent / "manifest.csv").unlink(missing_ok=True)
    assert tasks.prepare(0, 1) == first
    assert {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp} == {lost}
    assert tasks.cache_folder(0, 1) != tasks.cache_folder(1, 1)


def test_the_shipped_weights_are_what_their_metadata_says() -> None:
    assert tiny_clip.WEIGHTS.stat().st_size < 6_000_000
    with safe_open(tiny_clip.WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["command"] == "python -m applications.openvclip.miniature.pretrain"
    accuracy = pretrain.accuracy(tiny_clip.load(), seed=int(metadata["seed"]))
    assert accuracy == pytest.approx(float(metadata["accuracy"]), abs=0.01)
    assert accuracy > 0.95


def test_weights_of_another_vocabulary_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "vocabulary", lambda: ["a", "cloud"])
    with pytest.raises(ValueError, match="was trained with 432 words that are not the 2 of now"):
        tiny_clip.load()


def test_missing_weights_name_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m applications\.openvclip\.miniature\.pretrain"):
        tiny_clip.load(tmp_path / "absent.safetensors")


def test_pretraining_writes_weights_that_load(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    pretrain.main(["--steps", "2", "--output", str(path)])
    model = tiny_clip.load(path)
    classifier = open_clip.build_zero_shot_classifier(model, tiny_clip.WordTokenizer(), ["cloud"], ["a {}"])
    assert classifier.shape == (128, 1)
    assert torch.isfinite(classifier).all()
