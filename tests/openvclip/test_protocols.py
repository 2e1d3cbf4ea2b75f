"""Protocols as data: the published ones, your own, and what makes two of them the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from applications.openvclip.data.manifest import Manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.zeroshot.protocols import REGISTRY, Protocol, Sources, halves, named
from applications.openvclip.zeroshot.published import _HASHES
from tests.openvclip.files import write_manifest


def published_sources(lists: Path) -> dict[str, Sources]:
    return {name: Sources(f"/data/{name}", str(lists / "zs_label_db")) for name in ("ucf101", "hmdb51", "kinetics600")}


@pytest.mark.parametrize(
    ("name", "parts", "videos", "classes"),
    [
        ("ucf101/EP1", 10, (6483, 6696), 50),
        ("ucf101/EP2", 1, (13320, 13320), 101),
        ("ucf101/EP3", 3, (3696, 3783), 101),
        ("hmdb51/EP1", 10, (2500, 2500), 25),
        ("hmdb51/EP2", 1, (5100, 5100), 51),
        ("hmdb51/EP3", 3, (1530, 1530), 51),
        ("kinetics600/zero-shot", 3, (7226, 7276), 160),
    ],
)
def test_published_protocols_have_their_counts(label_lists: Path, name, parts, videos, classes) -> None:
    protocol = named(name, published_sources(label_lists))
    assert len(protocol.parts) == parts
    assert (min(map(len, protocol.parts)), max(map(len, protocol.parts))) == videos
    assert {len(part.classes) for part in protocol.parts} == {classes}
    assert protocol.hash == _HASHES[name]
    assert protocol.sampling == Sampling(8, 16, 30, "slowfast-offset", 3, 1)
    assert len(protocol.templates) == 28


def test_published_halves_and_splits_belong_to_the_full_sets(label_lists: Path) -> None:
    sources = published_sources(label_lists)
    for data_set in ("ucf101", "hmdb51"):
        (full,) = named(f"{data_set}/EP2", sources).parts
        for half in named(f"{data_set}/EP1", sources).parts:
            assert set(half.paths) < set(full.paths)
            assert set(half.classes) < set(full.classes)
            assert half.paths == full.of_classes(half.classes, "").paths
    splits = named("kinetics600/zero-shot", sources).parts
    kinetics400 = json.loads((label_lists / "label_db" / "k400-index2cls.json").read_text())
    assert not set().union(*(part.classes for part in splits)) & set(kinetics400.values())


def test_official_lists_make_the_very_protocol_that_was_published(label_lists: Path) -> None:
    official = {"hmdb51": Sources("/elsewhere", str(label_lists / "hmdb51_official"))}
    assert named("hmdb51/EP2", official).hash == _HASHES["hmdb51/EP2"]


def test_halves_are_drawn_by_seed(label_lists: Path) -> None:
    (full,) = named("hmdb51/EP2", published_sources(label_lists)).parts
    first, again, other = (halves(full, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len(first) == 10
    assert len({half.classes for half in first}) == 10
    for half in first:
        assert len(half.classes) == 25
        assert len(half) == 2500
        assert list(half.classes) == [name for name in full.classes if name in half.classes]
        assert set(half.labels) == set(range(25))


def manifest(root: str = "/data") -> Manifest:
    return Manifest("m", root, ("a/x.mp4", "b/y.mp4", "b/z.mp4"), (0, 1, 1), ("a", "b"))


def test_a_hash_tells_what_decides_the_result() -> None:
    protocol = Protocol("p", (manifest(),), ("a {}",))
    stored_elsewhere = replace(manifest("s3://bucket"), paths=("a/x.avi", "deep/b/y.avi", "b/z.avi"))
    assert replace(protocol, parts=(stored_elsewhere,)).hash == protocol.hash
    assert replace(protocol, name="q", closed=True).hash == protocol.hash
    assert (
        replace(protocol, sampling=Sampling(stride=16.0)).hash == replace(protocol, sampling=Sampling(stride=16)).hash
    )
    unlike = [
        replace(protocol, parts=(manifest(), manifest())),
        replace(protocol, parts=(replace(manifest(), labels=(0, 1, 0)),)),
        replace(protocol, parts=(replace(manifest(), classes=("a", "bee")),)),
        replace(protocol, parts=(manifest().only([0, 1]),)),
        replace(protocol, templates=("the {}",)),
        replace(protocol, sampling=Sampling(views=1)),
        replace(protocol, top_k=(1, 2)),
        replace(protocol, unreadable="left-out"),
        replace(protocol, multi_label=True),
    ]
    assert len({protocol.hash, *(other.hash for other in unlike)}) == 10


def test_your_own_protocol_comes_from_a_file(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [("a.mp4", "surfing"), ("b.mp4", "archery"), ("c.mp4", "yoga")])
    content = {
        "name": "mine",
        "parts": [{"source": "m.csv", "classes": ["archery", "yoga"]}, {"source": "m.csv"}],
        "templates": ["a {}"],
        "sampling": {"frames": 4, "views": 1},
        "top_k": [1, 2],
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    protocol = named(str(path), {}, "left-out")
    assert [part.classes for part in protocol.parts] == [("archery", "yoga"), ("archery", "surfing", "yoga")]
    assert protocol.parts[0].location(0) == str(tmp_path / "b.mp4")
    assert (protocol.sampling.frames, protocol.sampling.views, protocol.sampling.stride) == (4, 1, 16)
    assert (protocol.templates, protocol.top_k, protocol.unreadable) == (("a {}",), (1, 2), "left-out")
    for change, message in (
        ({"parts": [{"source": "m.csv", "classes": ["yogi"]}]}, "'yogi' is not a class of m.csv; is 'yoga' meant"),
        ({"top_k": [5]}, "top-5 says nothing of 2 classes"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            named(str(path), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": []}, r"extra fields found \(part\) @ \$"),
        ({"parts": [{"source": "m.csv", "class": ["yoga"]}]}, r"extra fields found \(class\) @ \$\.parts"),
        ({"parts": [{"source": "m.csv", "classes": "yoga"}]}, r"list is expected, got 'yoga' @ \$\.parts\.classes"),
        ({"parts": [{"source": "m.csv", "classes": [1]}]}, "str is expected, got 1"),
        ({"parts": [{"source": "m.csv", "classes": ["dancing"]}]}, "has no video of its classes, dancing"),
        ({"parts": [{}]}, r"required field missing @ \$\.parts\.source"),
        ({"parts": ["m.csv"]}, "dict is expected, got 'm.csv'"),
        ({"parts": {}}, "list is expected"),
        ({"parts": []}, "at least one part, got 'mine' and 0"),
        ({"name": 1}, r"str is expected, got 1 @ \$\.name"),
        ({"name": ""}, "has a name and at least one part, got ''"),
        ({"templates": "sports"}, "sports"),
        ({"templates": 5}, "5"),
        ({"sampling": {"frame": 8}}, r"extra fields found \(frame\) @ \$\.sampling"),
        ({"sampling": {"frames": "8"}}, r"int is expected, got '8' @ \$\.sampling\.frames"),
        ({"sampling": {"frames": 0}}, "frames, views and stride must be positive and finite, got 0"),
        ({"sampling": []}, r"dict is expected, got \[\] @ \$\.sampling"),
        ({"top_k": 5}, r"list is expected, got 5 @ \$\.top_k"),
        ({"top_k": ["1"]}, "int is expected, got '1'"),
        ({"top_k": [0]}, r"top_k must be numbers from 1, got \[0\]"),
        ({"top_k": []}, r"top_k must be numbers from 1, got \[\]"),
        ({"multi_label": True, "top_k": [1, 2]}, r"mine: top_k \[1, 2\] says nothing where a video has several labels"),
        ({"closed": "no"}, r"bool is expected, got 'no' @ \$\.closed"),
    ],
)
def test_a_protocols_file_is_taken_as_it_is_or_refused_with_the_field(
    tmp_path: Path, change: dict, message: str
) -> None:
    write_manifest(tmp_path / "m.csv", [("a.mp4", "surfing"), ("b.mp4", "archery"), ("c.mp4", "yoga")])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "parts": [{"source": "m.csv"}]} | change))
    with pytest.raises(ValueError, match=message) as refused:
        named(str(path), {})
    assert str(refused.value).count("\n") == 0


def test_a_video_has_a_row_for_each_label_where_a_protocol_says_multi_label(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\na.mp4,yoga\nb.mp4,yoga\n./a.mp4,surfing\na.mp4,yoga\n")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "parts": [{"source": "m.csv"}]}))
    with pytest.raises(ValueError, match=r"a\.mp4 is 'yoga' in line 2 and 'surfing' in line 4; a video has one label"):
        named(str(path), {})
    path.write_text(json.dumps({"name": "mine", "parts": [{"source": "m.csv"}], "multi_label": True}))
    protocol = named(str(path), {})
    (part,) = protocol.parts
    shown = [(part.location(i), part.classes[label]) for i, label in enumerate(part.labels)]
    a, b = str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")
    assert shown == [(a, "yoga"), (b, "yoga"), (a, "surfing")]
    assert "1 of 4 rows repeat another" in part.reading


def test_a_class_without_a_video_competes(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [("a.mp4", "kin_a"), ("b.mp4", "yoga")])
    content = {"name": "mine", "parts": [{"source": "m.csv", "classes": ["surfing", "kin_a"]}]}
    (tmp_path / "p.json").write_text(json.dumps(content))
    (part,) = named(str(tmp_path / "p.json"), {}).parts
    assert part.classes == ("kin a", "surfing")
    assert (part.paths, part.labels) == (("a.mp4",), (0,))


def test_what_a_protocol_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="'ucf101/EP4' is not a protocol; there are ucf101/EP1"):
        named("ucf101/EP4", {})
    with pytest.raises(ValueError, match="--videos ucf101 FOLDER"):
        named("ucf101/EP2", {})
    for name in ("ucf101/EP3", "hmdb51/EP2", "hmdb51/EP3", "kinetics600/zero-shot"):
        data_set = name.partition("/")[0]
        with pytest.raises(ValueError, match=f"--lists {data_set} FOLDER"):
            named(name, {data_set: Sources("/data")})


def test_the_registry_has_the_papers_protocols() -> None:
    per_set = [f"{data_set}/EP{i}" for data_set in ("ucf101", "hmdb51") for i in (1, 2, 3)]
    assert set(REGISTRY) == {*per_set, "kinetics600/zero-shot", "kinetics400/closed"}


def test_a_part_may_be_a_set_that_is_no_file(tmp_path: Path) -> None:
    built_in = {"miniature:a": Manifest("miniature/a", "", ("a.mp4", "b.mp4"), (0, 1), ("cloud", "sun"))}
    path = tmp_path / "p.json"
    path.write_text('{"name": "mine", "parts": [{"source": "miniature:a", "classes": ["sun"]}]}')
    (part,) = named(str(path), {}, built_in=built_in.get).parts
    assert (part.name, part.paths, part.classes) == ("mine/0", ("b.mp4",), ("sun",))
