"""Data sets as they lie on disk."""

import json
from pathlib import Path

import pytest

from applications.openvclip.commands import inspect
from applications.openvclip.data.layouts import hmdb_lists, read_dataset, tidy
from applications.openvclip.data.manifest import read_manifest
from tests.openvclip.files import ramp, write_manifest, write_video


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def rows(manifest) -> list[tuple[str, str]]:
    return [(path, manifest.classes[label]) for path, label in zip(manifest.paths, manifest.labels, strict=True)]


def test_folders_of_classes(tmp_path: Path) -> None:
    touch(tmp_path / "UCF-101", "YoYo/v_1.avi", "ApplyEyeMakeup/v_2.avi", "ApplyEyeMakeup/notes.txt", ".git/x.mp4")
    manifest = read_dataset(str(tmp_path / "UCF-101"))
    assert manifest.name == "UCF-101"
    assert rows(manifest) == [("ApplyEyeMakeup/v_2.avi", "Apply Eye Makeup"), ("YoYo/v_1.avi", "Yoyo")]
    kinetics = touch(tmp_path / "k400" / "train", "riding mule/a.mp4", "playing_guitar/b.mkv")
    assert set(read_dataset(str(kinetics.parent)).classes) == {"riding mule", "playing guitar"}


def test_videos_outside_of_class_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "tree", "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4 lies in no folder that names its class"):
        read_dataset(str(tmp_path / "tree"))
    touch(tmp_path / "empty", "readme.txt")
    with pytest.raises(ValueError, match="there is no video in it"):
        read_dataset(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        read_dataset(str(tmp_path / "absent"))
    touch(tmp_path / "twice", "a_b/x.mp4", "a b/y.mp4")
    with pytest.raises(ValueError, match="two classes have the same name when tidied"):
        read_dataset(str(tmp_path / "twice"))


def test_ucf_lists_with_and_without_numbers(tmp_path: Path) -> None:
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n2 YoYo\r\n")
    (tmp_path / "trainlist01.txt").write_text("YoYo/v_1.avi 2\r\nApplyEyeMakeup/v_2.avi 1\r\n")
    (tmp_path / "testlist01.txt").write_text("YoYo/v_3.avi\nApplyEyeMakeup/v_4.avi\n")
    manifest = read_dataset(str(tmp_path / "trainlist01.txt"), root="/videos")
    assert rows(manifest) == [("YoYo/v_1.avi", "Yoyo"), ("ApplyEyeMakeup/v_2.avi", "Apply Eye Makeup")]
    assert manifest.location(0) == "/videos/YoYo/v_1.avi"
    assert read_dataset(str(tmp_path / "testlist01.txt")).labels == (1, 0)
    (tmp_path / "trainlist02.txt").write_text("YoYo/v_1.avi 1\n")
    with pytest.raises(ValueError, match=r"YoYo/v_1\.avi has the number 1, which is ApplyEyeMakeup"):
        read_dataset(str(tmp_path / "trainlist02.txt"))


def test_hmdb_lists_by_split_and_kind(tmp_path: Path) -> None:
    (tmp_path / "brush_hair_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (tmp_path / "wave_test_split1.txt").write_text("d.avi 2 \n")
    (tmp_path / "wave_test_split2.txt").write_text("e.avi 2 \n")
    manifest = read_dataset(str(tmp_path), root="/videos")
    assert rows(manifest) == [("brush_hair/b.avi", "brush hair"), ("wave/d.avi", "wave")]
    trained = hmdb_lists(str(tmp_path), "/videos", split=1, kinds=(1, 2))
    assert [path for path, _ in rows(trained)] == ["brush_hair/a.avi", "brush_hair/b.avi", "wave/d.avi"]
    with pytest.raises(FileNotFoundError, match=r"no list \*_test_split3\.txt"):
        hmdb_lists(str(tmp_path), "/videos", split=3, kinds=(2,))


def test_kinetics_annotations_find_their_videos(tmp_path: Path) -> None:
    touch(tmp_path / "k", "val/riding mule/--a_b_000012_000022.mp4", "val/x/cccc.mkv")
    (tmp_path / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "riding mule,--a_b,12,22,val\nriding mule,cccc,0,10,val\nyoga,dddd,5,15,val\n"
    )
    manifest = read_dataset(str(tmp_path / "val.csv"), root=str(tmp_path / "k"))
    assert rows(manifest) == [
        ("val/riding mule/--a_b_000012_000022.mp4", "riding mule"),
        ("val/x/cccc.mkv", "riding mule"),
        ("yoga/dddd_000005_000015.mp4", "yoga"),  # not there: an evaluation will count it
    ]


def test_release_lists_find_their_names_beside_or_above(tmp_path: Path) -> None:
    (tmp_path / "hmdb_full").mkdir()
    (tmp_path / "hmdb_full" / "test.csv").write_text("wave/a, b.avi,1\nclap/c.avi,0\n")
    (tmp_path / "hmdb-index2cls.json").write_text('{"0": "clap", "1": "wave"}')
    (tmp_path / "hmdb-detail-index2cls.json").write_text('{"0": "clap your hands", "1": "wave a hand"}')
    (tmp_path / "ucf101-index2cls.json").write_text('{"0": "Archery"}')
    source = str(tmp_path / "hmdb_full" / "test.csv")
    manifest = read_dataset(source, root="/videos")
    assert rows(manifest) == [("wave/a, b.avi", "wave"), ("clap/c.avi", "clap")]
    assert manifest.name == "hmdb_full"
    rephrased = read_dataset(source, names=str(tmp_path / "hmdb-detail-index2cls.json"))
    assert rephrased.classes == ("clap your hands", "wave a hand")
    (tmp_path / "hmdb_full" / "k-index2cls.json").write_text('{"0": "clapping"}')
    with pytest.raises(ValueError, match=r"wave/a, b\.avi has the number '1', which is not in .*k-index2cls"):
        read_dataset(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.csv").write_text("a.avi,0\n")
    with pytest.raises(FileNotFoundError, match=r"0 files .*index2cls\.json beside or above it fit its name"):
        read_dataset(str(tmp_path / "other" / "test.csv"))


def test_json_lines_and_csv_say_the_same(tmp_path: Path) -> None:
    videos = [("a, b.mp4", "surfing"), ("/c.mp4", "archery")]
    write_manifest(tmp_path / "m.csv", videos)
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"path": p, "label": c, "fps": 3}) for p, c in videos))
    assert read_dataset(str(tmp_path / "m.jsonl")) == read_dataset(str(tmp_path / "m.csv"))
    assert read_dataset(str(tmp_path / "m.csv")).location(1) == "/c.mp4"
    (tmp_path / "bad.jsonl").write_text('{"path": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"every row needs the columns path and label, got \['path'\]"):
        read_dataset(str(tmp_path / "bad.jsonl"))


def test_names_may_be_given_by_class_or_by_number(tmp_path: Path) -> None:
    touch(tmp_path / "tree", "YoYo/a.avi", "TaiChi/b.avi")
    for names in ({"YoYo": "playing with a yo-yo", "Tai Chi": "doing tai chi"}, {"0": "doing tai chi", "1": "yo-yo"}):
        (tmp_path / "names.json").write_text(json.dumps(names))
        classes = read_dataset(str(tmp_path / "tree"), names=str(tmp_path / "names.json")).classes
        assert classes[0] == "doing tai chi"
    (tmp_path / "names.json").write_text('{"YoYo": "yo-yo"}')
    with pytest.raises(ValueError, match="1 of 2 classes have no name in the file: 'Tai Chi'"):
        read_dataset(str(tmp_path / "tree"), names=str(tmp_path / "names.json"))
    (tmp_path / "names.json").write_text('["yo-yo"]')
    with pytest.raises(ValueError, match="an object from class or number to name is expected"):
        read_dataset(str(tmp_path / "tree"), names=str(tmp_path / "names.json"))


@pytest.mark.parametrize(
    ("folder", "videos", "classes"),
    [
        ("ucf101_full", 13320, 101),
        ("ucf101_split1", 3783, 101),
        ("ucf101_split2", 3734, 101),
        ("ucf101_split3", 3696, 101),
        ("hmdb_full", 5100, 51),
        ("hmdb_split1", 1530, 51),
        ("hmdb_split2", 1530, 51),
        ("hmdb_split3", 1530, 51),
        ("k600_split1", 7276, 160),
        ("k600_split2", 7226, 160),
        ("k600_split3", 7261, 160),
    ],
)
def test_the_release_has_the_counts_of_its_readme(label_lists: Path, folder: str, videos: int, classes: int) -> None:
    manifest = read_dataset(str(label_lists / "zs_label_db" / folder / "test.csv"))
    assert (len(manifest), len(manifest.classes)) == (videos, classes)
    assert len(set(manifest.paths)) == videos
    assert set(manifest.labels) == set(range(classes))


def test_the_rule_makes_the_published_names(label_lists: Path) -> None:
    for folder in ("ucf101_full", "hmdb_full", "k600_split1"):
        for path, name in rows(read_dataset(str(label_lists / "zs_label_db" / folder / "test.csv"))):
            if folder.startswith("k600"):  # folders of Kinetics have no brackets, apostrophes, …
                continue
            assert tidy(Path(path).parent.name) == name


def test_official_hmdb_lists_are_the_published_sets(label_lists: Path) -> None:
    official = str(label_lists / "hmdb51_official")
    test_set = read_dataset(official)
    published = read_dataset(str(label_lists / "zs_label_db" / "hmdb_split1" / "test.csv"))
    assert sorted(rows(test_set)) == sorted(rows(published))
    assert test_set.classes == published.classes
    sizes = [len(hmdb_lists(official, "", split=1, kinds=(kind,))) for kind in (0, 1, 2)]
    assert sizes == [1666, 3570, 1530]


def test_official_ucf_lists_are_the_published_sets(label_lists: Path) -> None:
    folder = label_lists / "zs_label_db" / "ucf101_split2"
    official, published = (read_dataset(str(folder / name)) for name in ("testlist02.txt", "test.csv"))
    assert sorted(rows(official)) == sorted(rows(published))
    assert official.classes == published.classes


def test_inspect_counts_and_writes_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "tree"
    write_video(root / "ApplyLipstick" / "a.mp4", ramp(20, 48, 64))
    write_video(root / "ApplyLipstick" / "b.avi", ramp(30, 96, 128), "mpeg4", rate=10)
    touch(root, "Archery/empty.mp4")
    inspect.main([str(root), "--write", str(tmp_path / "m.csv"), "--workers", "1"])
    out = capsys.readouterr().out
    assert "tree: 3 videos of 2 classes" in out
    assert "videos of a class: 1 to 2, median 1.5" in out
    assert "unreadable: 1" in out
    assert "Archery/empty.mp4: 0 bytes, not a readable video" in out
    assert "frames: 20 to 30, median 25" in out
    assert "frame rates: 25 (1), 10 (1)" in out
    assert "readers: decord (1), PyAV (1)" in out
    written = read_manifest(tmp_path / "m.csv")
    assert rows(written) == [
        (str(root / "ApplyLipstick" / "a.mp4"), "Apply Lipstick"),
        (str(root / "ApplyLipstick" / "b.avi"), "Apply Lipstick"),
    ]
