"""The lock of a run's folder, with real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from applications.openvclip.runs.lock import LockedError, locked

_HOLD = """
import sys, time
from pathlib import Path
from applications.openvclip.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(tmp_path), pytest.raises(LockedError, match=me), locked(tmp_path):
        pass
    with locked(tmp_path) as former:
        assert former is None
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path) as former:
        assert former == f"process {process.pid} on {socket.gethostname()}, which is gone"


def test_another_process_of_the_same_number_does_not_hold_it(tmp_path: Path) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "long ago"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with locked(tmp_path) as former:
        assert former is not None


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_lock_that_names_nobody_is_refused_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(LockedError, match=r"\.lock does not say which process .* delete it"), locked(tmp_path):
        pass


def test_another_machine_holds_it_as_long_as_its_lock_is_touched(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    with pytest.raises(LockedError, match="process 1 on elsewhere"), locked(tmp_path):
        pass
    os.utime(lock, (lock.stat().st_atime, lock.stat().st_mtime - 301))
    with locked(tmp_path) as former:
        assert former == "process 1 on elsewhere, which is gone"
