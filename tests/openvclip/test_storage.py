"""Remote files through a bounded cache, from a server, from S3 and from memory."""

import functools
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from applications.openvclip.data import layouts, storage
from applications.openvclip.data.decode import VideoReadError
from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.data.sampling import Sampling
from applications.openvclip.data.storage import Cache, FetchError
from applications.openvclip.data.views import EvaluationViews, opened
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
    assert not list((tmp_path / "cache").glob(".use-*"))


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
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("[!.]*")) <= 2.5 * size
    assert requests.count("/ApplyLipstick/a.mp4") == 1
    assert requests.count("/ApplyLipstick/b.mp4") == 2


def test_a_file_in_use_survives_its_eviction(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    cache = Cache(tmp_path / "cache", max_bytes=1)
    with cache.local(f"{address}/Archery/c.mp4") as first, cache.local(f"{address}/ApplyLipstick/a.mp4"):
        assert first.read_bytes()


def test_a_cache_is_not_walked_at_each_fetch(
    server: tuple[str, list[str]], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    evict = Cache._evict
    monkeypatch.setattr(Cache, "_evict", lambda cache, n: walks.append(n) or evict(cache, n))
    size = (tree / "Archery" / "c.mp4").stat().st_size
    cache = Cache(tmp_path / "cache", max_bytes=5 * size)
    for i in range(20):
        write_video(tree / f"{i}.mp4", ramp(8))
        with Cache(cache.folder, cache.max_bytes).local(f"{server[0]}/{i}.mp4"):  # also of another process
            pass
        kept = [file.stat().st_size for file in cache.folder.glob("[!.]*")]
        assert sum(kept) <= cache.max_bytes
        assert sum(kept) <= int((cache.folder / ".total").read_text()) <= cache.max_bytes
        if i == 3:
            assert len(walks) == 1  # the first fetch counts what is there
    assert len(kept) >= 4


def test_what_killed_processes_left_in_the_cache_is_removed(server: tuple[str, list[str]], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for name, age in ((".use-old", 2 * 24 * 3600), (".use-new", 60)):
        (cache.folder / name).mkdir(parents=True)
        (cache.folder / name / "video.mp4").write_bytes(b"left over")
        then = time.time() - age
        os.utime(cache.folder / name, (then, then))
    with cache.local(f"{server[0]}/Archery/c.mp4"):
        pass
    assert [path.name for path in cache.folder.glob(".use-*")] == [".use-new"]


def test_a_cache_that_cannot_be_written_costs_the_video_and_not_the_run(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    location = f"{server[0]}/Archery/c.mp4"
    with pytest.raises(VideoReadError, match=rf"{location}: could not be kept in .*cache\. .*File exists"):
        opened(location, Cache(tmp_path / "cache")).__enter__()
    with pytest.raises(ZeroDivisionError), Cache(tmp_path / "other").local(location):
        raise ZeroDivisionError  # what goes wrong while the file is used is no fault of the cache
    with pytest.raises(OSError, match="mine"), Cache(tmp_path / "other").local(location):
        raise OSError("mine")


def test_a_full_disk_costs_the_video_and_not_the_run(server: tuple[str, list[str]], tmp_path: Path) -> None:
    """Files of a process are limited to 100 bytes: the kernel refuses the rest, as on a full disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from applications.openvclip.data.storage import Cache, FetchError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: Cache(Path(sys.argv[1])).local(sys.argv[2]).__enter__()\n"
        "except FetchError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), f"{server[0]}/Archery/c.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "c.mp4: could not be fetched. OSError: [Errno 27] File too large" in done.stdout, done.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_a_remote_file_that_is_missing_is_named_by_its_url(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    cache = Cache(tmp_path / "cache")
    with pytest.raises(FetchError, match=r"absent\.mp4: could not be fetched\. FileNotFoundError"):
        cache.local(f"{address}/absent.mp4").__enter__()
    views = EvaluationViews(Sampling(frames=4, views=1), 32, cache)
    with Workers(views, 2, 30) as pool:
        good, bad = pool.map([f"{address}/Archery/c.mp4", f"{address}/absent.mp4"])
    assert not isinstance(good, VideoReadError)
    assert good[0].shape == (1, 3, 4, 32, 32)
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


@pytest.mark.parametrize("name", ["12:30:00.mp4", "a::b.mp4", "~x.mp4", "a#b.mp4", "50%.mp4", "x?y=1.mp4", "a://b.mp4"])
def test_names_of_local_files_are_not_read_as_urls(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "videos" / name, ramp(8))
    monkeypatch.chdir(tmp_path)
    assert storage.exists(f"videos/{name}")
    assert storage.list_files("videos") == ([name] if "/" not in name else ["a:/b.mp4"])
    with opened(storage.join("videos", name) if "/" not in name else f"videos/{name}", Cache()) as video:
        assert len(video) == 8


@pytest.mark.parametrize("url", ["nowhere://a/b.csv", "zip://a::nowhere://b.zip"])
def test_a_url_of_an_unknown_kind_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=rf"{url} can't be opened by fsspec: Protocol not known: nowhere\."):
        storage.read_text(url)


def test_a_url_whose_package_is_not_installed_says_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"gs://a can't be opened by fsspec: Please install gcsfs"):
        storage.list_files("gs://a")
