"""Remote files through a bounded cache, from a server, from S3 and from memory."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from applications.openvclip.data import layouts, storage
from applications.openvclip.data.dataset import EvaluationViews, opened
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache, FetchError
from applications.openvclip.data.workers import Workers
from tests.openvclip.files import ramp, write_manifest, write_video


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("ApplyLipstick/a.mp4", "ApplyLipstick/b.mp4", "Archery/c.mp4"):
        write_video(tmp_path / "tree" / name, ramp(8))
    return tmp_path / "tree"


class Silent(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tree: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of an HTTP server of the tree, and the paths that have been asked of it."""
    requests: list[str] = []
    handler = functools.partial(type("Handler", (Silent,), {"requests": requests}), directory=str(tree))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def test_a_remote_video_is_fetched_once(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, requests = server
    cache = Cache(tmp_path / "cache")
    for _ in range(3):
        with opened(f"{address}/Archery/c.mp4", cache) as video:
            assert len(video) == 8
    assert requests.count("/Archery/c.mp4") == 1
    assert not list((tmp_path / "cache").glob(".*"))


def test_the_cache_keeps_to_its_size_and_loses_the_longest_unused(
    server: tuple[str, list[str]], tree: Path, tmp_path: Path
) -> None:
    address, requests = server
    size = (tree / "Archery" / "c.mp4").stat().st_size
    cache = Cache(tmp_path / "cache", max_bytes=int(2.5 * size))
    paths = ["/ApplyLipstick/a.mp4", "/ApplyLipstick/b.mp4", "/ApplyLipstick/a.mp4", "/Archery/c.mp4"]
    for path in [*paths, "/ApplyLipstick/a.mp4", "/ApplyLipstick/b.mp4"]:
        with cache.local(address + path) as local:
            assert local.read_bytes() == (tree / path[1:]).read_bytes()
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= 2.5 * size
    assert requests.count("/ApplyLipstick/a.mp4") == 1
    assert requests.count("/ApplyLipstick/b.mp4") == 2


def test_a_file_in_use_survives_its_eviction(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    cache = Cache(tmp_path / "cache", max_bytes=1)
    with cache.local(f"{address}/Archery/c.mp4") as first, cache.local(f"{address}/ApplyLipstick/a.mp4"):
        assert first.read_bytes()


def test_a_remote_file_that_is_missing_is_named_by_its_url(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    cache = Cache(tmp_path / "cache")
    with pytest.raises(FetchError, match=r"absent\.mp4: could not be fetched\. FileNotFoundError"):
        cache.local(f"{address}/absent.mp4").__enter__()
    views = EvaluationViews(Sampling(frames=4, views=1), 32, cache)
    with Workers(views, 2, 30) as pool:
        good, bad = pool.map([f"{address}/Archery/c.mp4", f"{address}/absent.mp4"])
    assert not isinstance(good, VideoReadError)
    assert good.shape == (1, 3, 4, 32, 32)
    assert f"{address}/absent.mp4: could not be fetched" in str(bad)


def test_a_remote_file_that_is_no_video_is_named_by_its_url(
    server: tuple[str, list[str]], tree: Path, tmp_path: Path
) -> None:
    (tree / "x.mp4").write_text("no video")
    location = f"{server[0]}/x.mp4"
    with pytest.raises(VideoReadError, match=f"^{location}: 8 bytes, not a readable video"):
        opened(location, Cache(tmp_path / "cache")).__enter__()


def test_manifests_and_trees_in_memory_are_read(tree: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{tree}/", "/data/tree", recursive=True)
    write_manifest(tmp_path / "m.csv", [("tree/Archery/c.mp4", "archery")])
    fsspec.filesystem("memory").put(str(tmp_path / "m.csv"), "/data/m.csv")
    manifest = layouts.read_dataset("memory://data/tree")
    assert manifest.classes == ("Apply Lipstick", "Archery")
    assert manifest.location(2) == "memory://data/tree/Archery/c.mp4"
    listed = read_manifest("memory://data/m.csv")
    for location in (manifest.location(2), listed.location(0)):
        with opened(location, Cache(tmp_path / "cache"), 32) as video:
            assert video.frames([7]).shape == (1, 32, 43, 3)


def test_a_tree_in_s3_is_read(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name, value in (("AWS_ACCESS_KEY_ID", "none"), ("AWS_SECRET_ACCESS_KEY", "none")):
        monkeypatch.setenv(name, value)
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = s3fs.S3FileSystem(skip_instance_cache=True)
        s3.mkdir("videos")
        s3.put(str(tree), "videos/", recursive=True)
        manifest = layouts.read_dataset("s3://videos/tree")
        assert manifest.classes == ("Apply Lipstick", "Archery")
        assert len(manifest) == 3
        with opened(manifest.location(0), Cache(tmp_path / "cache")) as video:
            assert len(video) == 8
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("location", "folder"),
    [("a/b.csv", "a"), ("b.csv", "."), ("/b.csv", "/"), ("memory://b.csv", "memory://"), ("s3://a/b.csv", "s3://a")],
)
def test_the_folder_of_a_location(location: str, folder: str) -> None:
    assert storage.parent(location) == folder


def test_paths_are_joined_unless_they_are_whole() -> None:
    assert storage.join("s3://a/", "b/c.mp4") == "s3://a/b/c.mp4"
    assert storage.join("a", "/b/c.mp4") == "/b/c.mp4"
    assert storage.join("a", "s3://b/c.mp4") == "s3://b/c.mp4"


def test_a_url_of_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        storage.read_text("nowhere://a/b.csv")
