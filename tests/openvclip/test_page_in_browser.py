"""The page in a real browser: uploads good and bad, the slider moved, and not a request to anywhere else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from applications.openvclip.data.manifest import read_manifest
from applications.openvclip.inference.classifier import Classifier
from benchmarks.page_under_load import load
from tests.openvclip.bad_uploads import BAD, write_bad, write_clip
from tests.openvclip.files import write_theta

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the extra e2e is not installed")

BROWSER = os.environ.get("OPENVCLIP_TEST_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]

pytestmark = [
    pytest.mark.slow,  # a server, a browser
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium; OPENVCLIP_TEST_BROWSER names one elsewhere"),
]


@pytest.fixture(scope="module")
def theta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # bars that are neither 0 nor 100
    return write_theta(tmp_path_factory.mktemp("weights") / "theta.safetensors", change=0.05, scale=-3)


@pytest.fixture(scope="module")
def classes(small_world: dict[str, Path]) -> list[str]:
    return list(read_manifest(small_world["zs_object"]).classes)


@pytest.fixture(scope="module")
def address(theta: Path, classes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page that is served by a process of its own, and leaves nothing behind."""
    own = tmp_path_factory.mktemp("uploads")
    command = [sys.executable, "-m", "applications.openvclip", "serve", "--weights", str(theta)]
    options = ["--model.name", "miniature", "--labels", ",".join(classes), "--max-mb", "4", "--time-limit-s", "120"]
    with (own.parent / "served.txt").open("w") as said:
        server = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, "TMPDIR": str(own)}
        )
    assert server.stdout is not None
    found = (re.match(r"(http://127\.0\.0\.1:\d+)/", line) for line in server.stdout)
    yield next(match[1] for match in found if match)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 130
    server.stdout.close()
    assert not list(own.glob("openvclip-uploads-*"))  # deleted with all that was sent


@pytest.fixture
def page(address: str) -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", *OFFLINE])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        browser.close()
        elsewhere = {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))}
        assert not elsewhere


def upload(page, path: str | Path) -> None:
    clear = page.locator('#video button[aria-label="Clear"]')
    if clear.count():
        clear.first.click()
        playwright.expect(page.locator("#answers")).to_contain_text("Drop a video")
    page.set_input_files("#video input[type=file]", str(path))


def shown(page) -> list[float]:
    """The bars, once they are there."""
    page.wait_for_selector("#answers .figure")
    return [float(text.rstrip("%")) for text in page.locator("#answers .figure").all_inner_texts()]


def test_uploads_are_answered_and_bad_ones_told_of_and_the_slider_moves_the_bars(
    page, theta: Path, classes: list[str], small_world: dict[str, Path], tmp_path: Path
) -> None:
    classifier = Classifier.load(theta, model="miniature")
    manifest = read_manifest(small_world["zs_object"])

    def expected(video: str, anchor_weight: float) -> list[float]:
        classifier.anchor_weight = anchor_weight
        found = classifier.classify(video, classes)
        return [round(100 * found[name], 1) for name in classes]

    for i in (0, 9, 20):
        upload(page, manifest.location(i))
        assert shown(page) == pytest.approx(expected(manifest.location(i), 0.5), abs=0.11)
        if i == 0:
            before = shown(page)
            page.locator("#weight input[type=range]").focus()
            for _ in range(6):
                page.keyboard.press("ArrowRight")
            after = expected(manifest.location(i), 0.8)
            assert after != before
            best = page.locator("#answers .figure").nth(after.index(max(after)))
            playwright.expect(best).to_have_text(f"{max(after)}%")
            for _ in range(6):
                page.keyboard.press("ArrowLeft")
            playwright.expect(best).to_have_text(f"{before[after.index(max(after))]}%")
    for name, reason in BAD.items():
        upload(page, write_bad(name, tmp_path))
        playwright.expect(page.locator("#answers .fault")).to_contain_text(re.compile(reason))
    upload(page, write_clip(tmp_path / "half_a_minute.mp4", seconds=30))
    page.wait_for_selector("#timeline img")
    assert len(shown(page)) == len(classes)


def asking(address: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> urllib.request.Request:
    return urllib.request.Request(address, body, headers or {})  # noqa: S310 an address of this machine


def answer(request: urllib.request.Request | str) -> int:
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 an address of this machine
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_path_or_url_of_a_client_is_read(address: str, tmp_path: Path) -> None:
    private = tmp_path / "private.mp4"
    write_clip(private, seconds=1)
    for path in (private, Path("/etc/hostname"), Path(tempfile.gettempdir()) / "x", "http://127.0.0.1:9/a.mp4"):
        assert answer(f"{address}/gradio_api/file={path}") == 403
    assert answer(asking(address, headers={"Host": "elsewhere.example"})) == 400
    for path, refused in ((str(private), False), ("http://127.0.0.1:9/a.mp4", True)):
        file = f'{{"path": "{path}", "meta": {{"_type": "gradio.FileData"}}}}'
        body = f'{{"data": [{file}, "a", 0.5]}}'.encode()
        request = asking(f"{address}/gradio_api/call/look", body, {"Content-Type": "application/json"})
        if refused:
            assert answer(request) == 403
            continue
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 likewise
            event = response.read().decode().split('"')[3]
        with urllib.request.urlopen(f"{address}/gradio_api/call/look/{event}", timeout=60) as response:  # noqa: S310
            assert "event: error" in response.read().decode()


def test_clients_at_the_same_time_are_all_answered(
    address: str, classes: list[str], small_world: dict[str, Path]
) -> None:
    manifest = read_manifest(small_world["zs_object"])
    videos = [Path(manifest.location(i)) for i in range(0, len(manifest), 5)]
    found = load(address, os.getpid(), videos, ", ".join(classes), clients=6, seconds=5)
    assert found["failures"] == []
    assert found["requests"] >= 6


def test_an_upload_that_is_too_large_is_refused(address: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    for size, status in ((1_000_000, 200), (4_100_000, 413)):
        body = head + bytes(size) + b"\r\n--b--\r\n"
        request = asking(f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"})
        assert answer(request) == status
