"""Data sets as they lie on disk."""

import json
from pathlib import Path

import pytest

from applications.openvclip.commands import inspect
from applications.openvclip.data.class_names import tidy
from applications.openvclip.data.layouts import hmdb_lists, read_dataset
from applications.openvclip.data.manifest import Manifest, read_manifest
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
    (tmp_path / "hmdb_full" / "k2-index2cls.json").write_text('{"0": "clapping"}')
    with pytest.raises(ValueError, match=r"may be named by any of .*k-index2cls\.json, .*k2-index2cls\.json"):
        read_dataset(source)


def test_json_lines_and_csv_say_the_same(tmp_path: Path) -> None:
    videos = [("a, b.mp4", "surfing"), ("/c.mp4", "archery")]
    write_manifest(tmp_path / "m.csv", videos)
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"path": p, "label": c, "fps": 3}) for p, c in videos))
    assert read_dataset(str(tmp_path / "m.jsonl")) == read_dataset(str(tmp_path / "m.csv"))
    assert read_dataset(str(tmp_path / "m.csv")).location(1) == "/c.mp4"
    (tmp_path / "bad.jsonl").write_text('{"path": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r'line 1: an object with path and label is expected, got \{"path"'):
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
    (tmp_path / "names.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="an object from class or number to name is expected"):
        read_dataset(str(tmp_path / "tree"), names=str(tmp_path / "names.json"))


# lists as other people's tools write them


def listed(tmp_path: Path, text: str | bytes, name: str = "list.txt", **more: str) -> Manifest:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dataset(str(tmp_path / name), **more)


TWO = [("archery/a b.mp4", "archery"), ("surfing/c, d.MP4", "surfing")]


@pytest.mark.parametrize(
    "text",
    [
        "archery/a b.mp4 0\nsurfing/c, d.MP4 1\n",  # mmaction2, VideoMAE, SlowFast
        "archery/a b.mp4,0\nsurfing/c, d.MP4,1\n",  # SlowFast with another separator, the Open-VCLIP release
        "archery/a b.mp4\t0\r\nsurfing/c, d.MP4\t1\r\n",
        "archery/a b.mp4;0\rsurfing/c, d.MP4;1",
        'archery/a b.mp4,0\n"surfing/c, d.MP4",1\n',  # csv quotes what holds a comma
        "\ufeffarchery/a b.mp4 archery\n\nsurfing/c, d.MP4 surfing\n",
        "archery/a b.mp4\nsurfing/c, d.MP4\n",  # UCF-101's test lists
        "path;label\narchery/a b.mp4;archery\nsurfing/c, d.MP4;surfing\n",
        "\ufeffid\tLabel\tPath\r\n1\tarchery\tarchery/a b.mp4\r\n2\tsurfing\tsurfing/c, d.MP4\r\n",
        'path,label\narchery/a b.mp4,archery\n"surfing/c, d.MP4",surfing\n',
        "archery/a b.mp4 0\nsurfing/c, d.MP4 1\n".encode("utf-16"),  # what Notepad calls Unicode
    ],
)
def test_a_list_is_read_whatever_parts_its_columns(tmp_path: Path, text: str | bytes) -> None:
    manifest = listed(tmp_path, text, "list.csv", root="/videos")
    assert rows(manifest) == TWO
    assert manifest.location(1) == "/videos/surfing/c, d.MP4"


def test_the_number_of_a_video_decides_its_class_not_its_folder(tmp_path: Path) -> None:
    """mmaction2's lists of Kinetics in flat folders: the class is the number, and the folder is the set."""
    text = "train/a.mp4 10\ntrain/b.mp4 2\nval/c.mp4 10\n"
    with pytest.raises(ValueError, match=r"labels are numbers \(2, as 10 of train/a.mp4\).*folders \(2, as 'train'\)"):
        listed(tmp_path, text)
    (tmp_path / "label_map.txt").write_text("\n".join(f"class {i}" for i in range(11)))
    manifest = listed(tmp_path, text, names=str(tmp_path / "label_map.txt"))
    assert rows(manifest) == [("train/a.mp4", "class 10"), ("train/b.mp4", "class 2"), ("val/c.mp4", "class 10")]
    assert manifest.classes[2] == "class 2"  # by their value, not as text
    assert len(manifest.classes) == 11  # also those that have no video here


def test_numbered_folders_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    text = "".join(f"{folder}/x.mp4 {number}\n" for folder, number in (("b_b", 10), ("a", 2), ("TaiChi", 1)))
    assert listed(tmp_path, text).classes == ("Tai Chi", "a", "b b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.json", '{"1": "one", "2": "two", "10": "ten"}'),
        ("names.json", '{"10": "ten", "2": "two", "1": "one"}'),
        ("classids.json", '{"\\"ten\\"": 10, "one": 1, "two": 2}'),  # SlowFast's, with quotation marks in the names
        ("classInd.txt", "1 one\r\n2 two\r\n10 ten\r\n"),
        ("labels.csv", "id,name\n1,one\n2,two\n10,ten\n"),
    ],
)
def test_names_of_numbers_are_given_in_any_of_the_usual_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / name).write_text(content)
    manifest = listed(tmp_path, "a.mp4,10\nb.mp4,2\n", "list.csv", names=str(tmp_path / "names" / name))
    assert manifest.classes == ("one", "two", "ten")
    assert [label for _, label in rows(manifest)] == ["ten", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a/x.mp4 163 1\n",
            r"line 1: after a/x\.mp4 stand several numbers, '163 1': .*or all may be labels",
        ),
        ("a/x.mp4 0 -1\n", r"line 1: after a/x\.mp4 stand several numbers, '0 -1'"),
        ("some/directory-1 163 1\n", r"line 1: 'some/directory-1 163 1' is not understood.*folders of frames"),
        ("a/x.mp4 0\nb/y.mp4\n", r"line 2: b/y\.mp4 has no label, others have one"),
        ("path,label\na.mp4,x\nb.mp4,\n", r"line 3: 'b\.mp4' has no label"),
        ("path,label\na.mp4,x\nb, c.mp4,y\n", r"line 3: 3 fields, and 2 columns: 'b, c\.mp4,y'.*quotation marks"),
        ("a/x.mp4 0\nb/y.mp4 wave\n", r"label in line 1 is a number, 0, and in line 2 a name, 'wave'"),
        ("a/x.mp4 0\nb/y.mp4 1\n./a/x.mp4 1\n", r"\./a/x\.mp4 is '0' in line 1 and '1' in line 3; a video has one"),
        ("x.mp4\n", r"line 1: 'x\.mp4' has no label and no folder that names its class"),
        (b"a/x.mp4 0\ncaf\xe9/y.mp4 1\n", r"line 2: byte 0xe9 is not utf-8\. Save the file as UTF-8"),
        ("a/x.mp4,wave,train\n", r"line 1: after a/x\.mp4 stand several fields, 'wave,train'.*quotation marks"),
        ("a/x.mp4\twave\t7.5\n", r"line 1: after a/x\.mp4 stand several fields"),
        ("", r"there is no video in it"),
    ],
)
def test_what_can_be_read_in_two_ways_or_none_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, text)


def test_rows_that_repeat_another_count_once_and_are_reported(tmp_path: Path) -> None:
    manifest = listed(tmp_path, "a/x.mp4 0\nb/y.mp4 1\na/x.mp4 0\na//x.mp4 0\n")
    assert rows(manifest) == [("a/x.mp4", "a"), ("b/y.mp4", "b")]
    assert "2 of 4 rows repeat another and are left out" in manifest.reading


def test_folders_and_a_table_of_the_same_videos_are_the_same_set(tmp_path: Path) -> None:
    touch(tmp_path / "tree", "kin_a/x.mp4", "TaiChi/y.mp4")
    folders = read_dataset(str(tmp_path / "tree"))
    table = listed(
        tmp_path, "path,label\nkin_a/x.mp4,kin_a\nTaiChi/y.mp4,TaiChi\n", "t.csv", root=str(tmp_path / "tree")
    )
    assert sorted(rows(table)) == sorted(rows(folders))
    assert table.classes == folders.classes == ("kin a", "Tai Chi")


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"0": "sit", "1": "sit"}')
    with pytest.raises(ValueError, match="two classes have the same name, 'sit'"):
        listed(tmp_path, "a.mp4 0\nb.mp4 1\n", names=str(tmp_path / "names.json"))


# folders


def test_linked_folders_and_odd_names_are_read(tmp_path: Path) -> None:
    tree = touch(tmp_path / "tree", "a#b/12:30:00.mp4", "a#b/x::y.mp4", "100%/~z.MP4", "über/é.mp4")
    touch(tmp_path / "elsewhere", "v.mp4", "deeper.txt")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "linked" / "loop").symlink_to(tree / "linked")
    (tree / "100%" / "gone.mp4").symlink_to(tmp_path / "nothing")  # kept: it counts as a video that can't be read
    manifest = read_dataset(str(tree))
    assert set(manifest.paths) == {
        "a#b/12:30:00.mp4", "a#b/x::y.mp4", "100%/~z.MP4", "100%/gone.mp4", "über/é.mp4", "linked/v.mp4"
    }  # fmt: skip
    assert set(manifest.classes) == {"a#b", "100%", "über", "linked"}


def test_videos_of_every_suffix_count_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    tree = touch(
        tmp_path / "tree", "wave/00001.MTS", "jump/b.m2ts", "spin/c.gif", "walk/d.mp4", "walk/d.json", "readme"
    )
    manifest = read_dataset(str(tree))
    assert set(manifest.classes) == {"wave", "jump", "spin", "walk"}
    assert "without 2 files that are no videos by their suffix, as readme" in manifest.reading
    assert rows(listed(tmp_path, "a/x.mts,wave\nb/y.gif,spin\n")) == [("a/x.mts", "wave"), ("b/y.gif", "spin")]


def test_training_and_test_sets_that_are_read_together_are_said_to_be(tmp_path: Path) -> None:
    manifest = read_dataset(str(touch(tmp_path / "k400", "train/wave/a.mp4", "val/wave/b.mp4")))
    assert "of the sets train, val together" in manifest.reading


def test_a_set_in_the_working_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "mine", "wave/a.mp4", "jump/b.mp4")
    (tmp_path / "mine" / "list.csv").write_text("wave/a.mp4,wave\n")
    monkeypatch.chdir(tmp_path / "mine")
    assert [read_dataset(source).name for source in ("list.csv", "./list.csv", ".", "../mine")] == ["mine"] * 4


def test_folders_that_may_be_groups_or_classes_are_refused(tmp_path: Path) -> None:
    grouped = touch(tmp_path / "grouped", "Archery/g01/a.avi", "Archery/g02/b.avi", "Diving/g01/c.avi")
    with pytest.raises(ValueError, match=r"Archery/g01/a\.avi may be of class 'g01', its own folder, or of 'Archery'"):
        read_dataset(str(grouped))
    mixed = touch(tmp_path / "mixed", "Archery/a.avi", "Diving/g01/c.avi")
    with pytest.raises(ValueError, match=r"Diving/g01/c\.avi may be of class 'g01', its own folder, or of 'Diving'"):
        read_dataset(str(mixed))
    sets = touch(tmp_path / "sets", "train/Archery/a.avi", "val/Archery/b.avi", "val/Diving/c.avi")
    assert read_dataset(str(sets)).classes == ("Archery", "Diving")


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
    assert "read as: folders named after their classes" in out
    assert "classes: Apply Lipstick, Archery" in out
    assert "  ApplyLipstick/a.mp4: Apply Lipstick" in out
    assert "tree: 3 videos of 2 classes" in out
    assert "videos of a class: 1 to 2, median 1.5" in out
    assert "unreadable: 1" in out
    assert "Archery/empty.mp4: 0 bytes, not a readable video" in out
    assert "frames: 20 to 30, median 25" in out
    assert "frame rates: 25 (1), 10 (1)" in out
    assert "cut off, and used as far as they go: 0" in out
    written = read_manifest(tmp_path / "m.csv")
    assert rows(written) == [
        (str(root / "ApplyLipstick" / "a.mp4"), "Apply Lipstick"),
        (str(root / "ApplyLipstick" / "b.avi"), "Apply Lipstick"),
    ]
