"""Evaluation: one pass equals many, by any number of processes, with or without interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from applications.openvclip import compare, evaluate
from applications.openvclip.data.decode import Video
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.miniature import glyphs, tasks, tiny_clip
from applications.openvclip.miniature import world as world_of_glyphs
from applications.openvclip.zeroshot.logits import LogitFiles
from applications.openvclip.zeroshot.protocols import halves
from applications.openvclip.zeroshot.published import published
from applications.openvclip.zeroshot.results import read_results
from tests.openvclip.files import cut_off

SAMPLING = {"frames": 4, "stride": 4, "target_fps": None, "sampler": "dense", "views": 2}


@pytest.fixture(scope="module")
def world(small_world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned weights, protocols like EP1 to EP3 on one set of videos, and two with unreadable and cut videos."""
    folder = tmp_path_factory.mktemp("world")
    generator = torch.Generator().manual_seed(0)
    weights = {name: tensor for name, tensor in tiny_clip.load().state_dict().items() if name.startswith("visual.")}
    weights = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(weights | {"logit_scale": tiny_clip.load().logit_scale.detach()}, folder / "theta.safetensors")
    source = str(small_world["zs_object"])
    whole = read_manifest(source)
    third = len(whole) // 3
    for i in range(3):
        rows = [f"{whole.location(j)},{whole.classes[whole.labels[j]]}\n" for j in range(len(whole)) if j % 3 == i]
        (folder / f"split{i}.csv").write_text("path,label\n" + "".join(rows))
    assert third == 8

    def protocol(name: str, parts: list[dict]) -> None:
        content = {"name": name, "parts": parts, "templates": "objects", "sampling": SAMPLING, "top_k": [1, 2]}
        (folder / f"{name}.json").write_text(json.dumps(content))

    parts = [{"source": source, "classes": list(half.classes)} for half in halves(whole, seed=0, n=4)]
    protocol("EP1", parts)
    for i, part in enumerate(parts):
        protocol(f"EP1-{i}", [part])
    protocol("EP2", [{"source": source}])
    protocol("EP3", [{"source": str(folder / f"split{i}.csv")} for i in range(3)])
    (folder / "empty.mp4").write_bytes(b"")
    bad = f"{folder}/empty.mp4,{whole.classes[0]}\n{folder}/absent.mp4,{whole.classes[1]}\n"
    (folder / "bad.csv").write_text((folder / "split0.csv").read_text() + bad)
    protocol("bad", [{"source": str(folder / "bad.csv")}])
    cut = cut_off(folder / "cut.avi")
    (folder / "cut.csv").write_text((folder / "split0.csv").read_text() + f"{cut},{whole.classes[0]}\n")
    protocol("cut", [{"source": str(folder / "cut.csv")}])
    return folder


def command(world: Path, output: Path, *names: str, weights: tuple[str, ...] = ("0", "0.5", "1")) -> list[str]:
    return [
        *("--weights", str(world / "theta.safetensors"), "--model.name", "miniature", "--output", str(output)),
        *("--protocols", *(str(world / f"{name}.json") for name in names), "--anchor-weights", *weights),
        *("--workers", "1", "--batch-size", "5"),
    ]


def accuracies(output: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    protocols = json.loads((output / "results.json").read_text())["protocols"]
    return {name: result["accuracy"] for name, result in protocols.items()}


def stored(output: Path) -> np.ndarray:
    """The logits of the only pass there."""
    (folder,) = (output / "logits").iterdir()
    files = LogitFiles(output / "logits", json.loads((folder / "pass.json").read_text()))
    logits = np.full((len(files.content["videos"]), *files.record["logits"].shape), np.nan, np.float32)
    for videos, part in files.chunks():
        logits[videos] = part
    return logits


@pytest.fixture(scope="module")
def once(world: Path) -> Path:
    evaluate.main(command(world, world / "once", "EP1", "EP2", "EP3"))
    return world / "once"


def test_protocols_from_one_pass_equal_separate_evaluations(world: Path, once: Path) -> None:
    together = accuracies(once)
    apart = {}
    for name in ("EP1-0", "EP1-1", "EP1-2", "EP1-3", "EP2", "EP3"):
        evaluate.main(command(world, world / "apart" / name, name))
        apart |= accuracies(world / "apart" / name)
    assert together["EP2"] == apart["EP2"]
    assert together["EP3"] == apart["EP3"]
    for scorer, top in together["EP1"].items():
        for k, parts in top.items():
            assert parts == [apart[f"EP1-{i}"][scorer][k][0] for i in range(4)]
    assert len({tuple(map(str, top.values())) for top in together["EP1"].values()}) > 1  # scorers differ


def test_anchor_weights_in_one_pass_equal_one_by_one(world: Path, once: Path) -> None:
    together = accuracies(once)["EP2"]
    for weight in ("0", "0.5", "1"):
        evaluate.main(command(world, world / "single" / weight, "EP2", weights=(weight,)))
        assert accuracies(world / "single" / weight)["EP2"][weight] == together[weight]
    # 0.5 and 0 are always evaluated; a pass of other weights is another pass
    assert len(json.loads((world / "single" / "1" / "results.json").read_text())["protocols"]["EP2"]["accuracy"]) == 4


def test_one_pass_reads_each_video_once(once: Path, small_world: dict[str, Path]) -> None:
    logits = stored(once)
    assert logits.shape == (24, 4, 2, 6)  # videos, scorers, views, classes
    assert np.isfinite(logits).all()
    assert (logits[:, :, 0] != logits[:, :, 1]).any()
    records = sum(path.stat().st_size for path in (once / "logits").glob("*/*.logits"))
    assert records == 24 * (8 + 4 * 4 * 2 * 6)


def test_an_evaluation_that_is_complete_decodes_nothing_again(
    world: Path, once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = accuracies(once)
    monkeypatch.setattr(Video, "__init__", lambda *args: pytest.fail("a video was opened"))
    stamps = {path: path.stat().st_mtime_ns for path in (once / "logits").glob("*/*.logits")}
    evaluate.main(command(world, once, "EP1", "EP2", "EP3"))
    assert accuracies(once) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in (once / "logits").glob("*/*.logits")}


def test_logits_of_another_precision_are_not_gone_on_with(world: Path, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        evaluate.main([*command(world, tmp_path, "EP2"), "--precision", precision])
        (folder,) = (f for f in (tmp_path / "logits").iterdir() if f not in found)
        found[folder] = json.loads((folder / "pass.json").read_text())
    assert [content["precision"] for content in found.values()] == ["fp32", "bf16"]
    fp32, bf16 = (next(LogitFiles(tmp_path / "logits", content).chunks())[1] for content in found.values())
    assert 1e-4 < np.abs(bf16 - fp32).max() < 0.5


def test_a_killed_evaluation_goes_on_where_it_was(world: Path, once: Path, tmp_path: Path) -> None:
    arguments = command(world, tmp_path, "EP1", "EP2", "EP3")
    process = subprocess.Popen(
        [sys.executable, "-m", "applications.openvclip.evaluate", *arguments, "--batch-size", "1"]
    )
    while not any(path.stat().st_size for path in tmp_path.glob("logits/*/*.logits")):
        assert process.poll() is None, "the evaluation ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "results.json").exists()
    (partial,) = tmp_path.glob("logits/*/*.logits")
    record = 8 + 4 * 4 * 2 * 6
    done = partial.stat().st_size // record
    assert 0 < done < 24
    with partial.open("ab") as file:
        file.write(b"\x00" * (record // 2))  # what a crash in the middle of writing leaves
    evaluate.main(arguments)
    assert accuracies(tmp_path) == accuracies(once)
    np.testing.assert_allclose(stored(tmp_path), stored(once), rtol=1e-5, atol=1e-5)  # other batches, other rounding


@pytest.mark.slow
def test_processes_share_the_videos_and_count_each_once(world: Path, once: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    arguments = command(world, tmp_path, "EP1", "EP2", "EP3", "bad")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, "-m", "applications.openvclip.evaluate", *arguments], check=True, env=environment)
    found = accuracies(tmp_path)
    assert {name: found[name] for name in ("EP1", "EP2", "EP3")} == accuracies(once)
    shares = [path.stat().st_size // (8 + 4 * 4 * 2 * 6) for path in sorted(tmp_path.glob("logits/*/*.logits"))]
    assert sorted(shares) == [8, 8, 8]  # the 2 that can't be read are no shares
    assert len(json.loads((tmp_path / "results.json").read_text())["protocols"]["bad"]["unreadable"]) == 2


def test_unreadable_videos_count_as_wrong_unless_left_out(world: Path, tmp_path: Path, capsys) -> None:
    evaluate.main(command(world, tmp_path / "wrong", "bad"))
    assert "bad: 2 unreadable videos, counted as wrong" in capsys.readouterr().out
    evaluate.main([*command(world, tmp_path / "left-out", "bad"), "--unreadable", "left-out"])
    wrong, left_out = (read_results(tmp_path / name / "results.json") for name in ("wrong", "left-out"))
    for results in (wrong, left_out):
        assert set(results.protocols["bad"].unreadable) == {f"{world}/empty.mp4", f"{world}/absent.mp4"}
        assert "absent.mp4: no such file" in results.protocols["bad"].unreadable[f"{world}/absent.mp4"]
    for scorer, top in wrong.protocols["bad"].accuracy.items():
        for k in ("top-1", "top-2"):
            assert top[k][0] * 10 == pytest.approx(left_out.protocols["bad"].accuracy[scorer][k][0] * 8)
    assert wrong.protocols["bad"].hash != left_out.protocols["bad"].hash
    assert "2, counted as wrong" in (tmp_path / "wrong" / "results.md").read_text()


def test_videos_that_are_cut_off_are_scored_and_told_also_by_a_run_that_goes_on(world, tmp_path: Path, capsys) -> None:
    for _ in range(2):  # the second time, nothing is read
        evaluate.main(command(world, tmp_path, "cut"))
        assert "cut: 1 videos are cut off, scored as far as they go" in capsys.readouterr().out
        result = read_results(tmp_path / "results.json").protocols["cut"]
        assert (result.videos, result.unreadable) == (9, {})
        assert list(result.cut_off) == [f"{world}/cut.avi"]
        assert re.fullmatch(r"\d+ of the 60 frames that it announces are there", result.cut_off[f"{world}/cut.avi"])
    assert "| unreadable | cut off |" in (tmp_path / "results.md").read_text()


def test_unlike_protocols_do_not_share_a_table(world: Path, once: Path, tmp_path: Path, capsys) -> None:
    evaluate.main(command(world, tmp_path / "again", "EP2", weights=("0.25",)))
    capsys.readouterr()
    compare.main([str(once / "results.json"), str(tmp_path / "again" / "results.json")])
    table = capsys.readouterr().out
    assert "| EP1, top-1 | EP1, top-2 | EP2, top-1 |" in table
    assert "| miniature | 0.25 | - | - |" in table
    content = json.loads((world / "EP2.json").read_text())
    (tmp_path / "EP2.json").write_text(json.dumps(content | {"sampling": SAMPLING | {"views": 1}}))
    evaluate.main(
        [*command(world, tmp_path / "unlike")[:-4], "--protocols", str(tmp_path / "EP2.json"), "--workers", "1"]
    )
    with pytest.raises(ValueError, match=r"EP2 is not the same in .*once and .*unlike: sampling .*'views': 2"):
        compare.main([str(once / "results.json"), str(tmp_path / "unlike" / "results.json")])


def test_a_report_has_means_deviations_and_classes(once: Path) -> None:
    results = read_results(once / "results.json")
    ep3 = results.protocols["EP3"]
    values = ep3.accuracy["0.5"]["top-1"]
    assert ep3.text("0.5") == f"{100 * np.mean(values):.1f}±{100 * np.std(values):.1f}"
    assert "±" not in results.protocols["EP2"].text("0.5")
    text = (once / "results.md").read_text()
    assert ep3.text("0.5") in text
    assert f"`{ep3.hash}`" in text
    per_class = results.protocols["EP2"].per_class["0.5"]
    assert len(per_class) == 6
    assert np.mean(list(per_class.values())) == pytest.approx(results.protocols["EP2"].accuracy["0.5"]["top-1"][0])
    assert results.provenance["versions"]["torch"]


def test_published_figures_stand_beside_the_published_protocol_only(once: Path) -> None:
    result = replace(read_results(once / "results.json").protocols["EP2"], protocol="ucf101/EP2")
    assert published(result, "ViT-B-16", "Open-VCLIP") is None
    from applications.openvclip.zeroshot.published import _HASHES

    result = replace(result, hash=_HASHES["ucf101/EP2"])
    assert published(result, "ViT-B-16-quickgelu", "Open-VCLIP") == "83.5"
    assert published(result, "ViT-L-14", "CLIP*") == "80.5"
    assert published(result, "miniature", "CLIP*") is None


def test_published_checkpoints_are_evaluated_with_zeros_at_the_edges(world: Path, tmp_path: Path, capsys) -> None:
    theta = load_file(world / "theta.safetensors")
    torch.save({"model_state": {f"model.{name}": w for name, w in theta.items()}}, tmp_path / "swa_2_22.pth")
    options = command(world, tmp_path / "published", "EP2")[2:]
    evaluate.main(["--weights", str(tmp_path / "swa_2_22.pth"), *options])
    assert "swa_2_22.pth is a checkpoint of the published code" in capsys.readouterr().out
    evaluate.main([*command(world, tmp_path / "zero", "EP2"), "--model.edge", "zero"])
    assert np.array_equal(stored(tmp_path / "published"), stored(tmp_path / "zero"))
    config = json.loads((tmp_path / "published" / "results.json").read_text())["config"]
    assert config["model"]["edge"] == "zero"


def test_without_weights_the_image_model_is_evaluated(world: Path, tmp_path: Path) -> None:
    evaluate.main(command(world, tmp_path, "EP2")[2:])
    assert accuracies(tmp_path)["EP2"].keys() == {"CLIP*"}


def test_scores_that_are_not_finite_stop_the_evaluation(world: Path, tmp_path: Path) -> None:
    weights = tiny_clip.load().state_dict()
    weights = {name: w for name, w in weights.items() if name.startswith("visual.") or name == "logit_scale"}
    weights["visual.proj"] = torch.full_like(weights["visual.proj"], 1e38)
    save_file(weights, tmp_path / "theta.safetensors")
    with pytest.raises(FloatingPointError, match="the scores of 0 are not finite"):
        evaluate.main(["--weights", str(tmp_path / "theta.safetensors"), *command(world, tmp_path, "EP2")[2:]])


def test_what_evaluate_lacks_is_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--protocols says what to evaluate on"):
        evaluate.main(["--model.name", "miniature"])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.pth"):
        evaluate.main(["--weights", str(tmp_path / "absent.pth"), *command(world, tmp_path, "EP2")[2:]])


def test_every_layout_of_the_same_videos_is_the_same_evaluation(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    rows = [(f"{name}/{name}_{i}.mp4", name) for name in ("capricorn", "cloud") for i in range(2)]
    for seed, (path, name) in enumerate(rows):
        (videos / path).parent.mkdir(parents=True, exist_ok=True)
        frames = world_of_glyphs.clip(np.random.default_rng(seed), glyphs.names().index(name), "still", None, 0.3)
        tasks.write_video(videos / path, frames)

    def write(file: str, lines: list[str]) -> str:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("\n".join(lines) + "\n")
        return file

    write("release/x-index2cls.json", ['{"0": "capricorn", "1": "cloud"}'])
    for name in ("capricorn", "cloud"):
        write(f"hmdb/{name}_test_split1.txt", [f"{name}_{i}.mp4 2" for i in range(2)])
    sources = {
        "folders": "videos",
        "ucf": write("testlist01.txt", [path for path, _ in rows]),
        "hmdb": "hmdb",
        "kinetics": write(
            "val.csv",
            ["label,youtube_id,time_start,time_end,split", *(f"{c},{Path(p).stem},0,10,val" for p, c in rows)],
        ),
        "release": write("release/test.csv", [f"{path},{int(name == 'cloud')}" for path, name in rows]),
        "csv": write("m.csv", ["path,label", *(f"videos/{path},{name}" for path, name in rows)]),
        "jsonl": write("m.jsonl", [json.dumps({"path": f"videos/{path}", "label": name}) for path, name in rows]),
    }
    for name, source in sources.items():
        root = {} if name in ("folders", "csv", "jsonl") else {"root": "videos"}
        part = {"source": source, **root}
        content = {"name": name, "parts": [part], "templates": "objects", "sampling": SAMPLING}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    evaluate.main(
        [
            *("--model.name", "miniature", "--output", str(output), "--workers", "1"),
            *("--protocols", *(str(tmp_path / f"{name}.json") for name in sources)),
        ]
    )
    results = json.loads((output / "results.json").read_text())["protocols"]
    assert results.keys() == sources.keys()
    assert {result["videos"] for result in results.values()} == {4}
    assert all(result["unreadable"] == {} for result in results.values())
    assert len({result["hash"] for result in results.values()}) == 1
    assert len({json.dumps(result["accuracy"]) for result in results.values()}) == 1
