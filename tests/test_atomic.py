import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from interpolate.atomic import replaced_path, replacing


def test_a_link_is_written_through(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    for content in (b"first", b"second"):  # the link leads nowhere at first
        with replacing(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_bytes() == content
    assert os.listdir(tmp_path / "real") == ["file"]


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/missing to write .*/missing/a into; make it"):
        replacing(tmp_path / "missing" / "a").__enter__()


HOLDING = (
    "import sys, time; from interpolate.atomic import replacing\n"
    "with replacing(sys.argv[1]) as file: print('ready', flush=True); time.sleep(60)"
)


def holders(*paths: Path) -> list[subprocess.Popen]:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for path in paths
    ]
    assert [process.stdout.readline() for process in processes] == [b"ready\n"] * len(paths)
    return processes


def end(process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)
    process.communicate()


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(tmp_path: Path):
    killed, terminated, alive = holders(*(tmp_path / name for name in "abc"))
    try:
        end(killed, signal.SIGKILL)
        end(terminated, signal.SIGTERM)
        assert len(os.listdir(tmp_path)) == 3
        with replacing(tmp_path / "d") as file:
            file.write(b"d")
        assert len(os.listdir(tmp_path)) == 2  # that of the living one, and the new file
    finally:
        end(alive, signal.SIGINT)
    assert os.listdir(tmp_path) == ["d"]  # an interrupted one clears up itself


def test_the_callers_own_errors_come_through(tmp_path: Path):
    for error in (FileNotFoundError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(tmp_path / "a"):
            raise error
    assert os.listdir(tmp_path) == []


def test_an_upload_is_prepared_where_tmpdir_says_and_its_index_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    fs, uploaded = fsspec.filesystem("memory"), []

    def put_file(self, local: str, remote: str, **_) -> None:
        assert Path(local).is_relative_to(tmp_path)
        if remote.endswith("z"):
            raise ConnectionError("cut off")
        uploaded.append(remote)

    monkeypatch.setattr(type(fs), "put_file", put_file)

    def upload() -> None:
        with replaced_path("memory://cut/off", folder=True, last="index") as folder:
            for name in ("index", "a", "z"):
                Path(folder, name).write_text(name)

    with pytest.raises(ConnectionError):
        upload()
    assert uploaded == ["/cut/off/a"]
    assert os.listdir(tmp_path) == []


def test_what_a_protocol_raises_at_an_upload_is_an_error_of_writing(monkeypatch: pytest.MonkeyPatch):
    def put_file(*_, **__) -> None:
        raise RuntimeError("Unable to locate credentials")  # botocore's is no OSError either

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", put_file)
    with (
        pytest.raises(OSError, match=r"memory://a\.pt can't be written to: Unable to locate credentials"),
        replacing("memory://a.pt") as file,
    ):
        file.write(b"a")
