"""What goes wrong in a training, provoked for real: the run says what and where, and what it has learnt is not lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from applications.openvclip.data.layouts import read_dataset
from applications.openvclip.runs.journal import read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from tests.integration.runs import (
    TIME_LIMIT_S,
    arguments,
    differences,
    family,
    finished,
    outcome,
    ranks,
    running,
    wait_for_steps,
)

pytestmark = pytest.mark.slow

LONG = ("--optimization.epochs", "1000")
SHORT = ("--optimization.epochs", "2")


def newest(folder: Path) -> int | None:
    return Checkpoints(folder / "checkpoints", keep=1).newest()


def failed(arguments: list[str], n: int = 1) -> str:
    """What a run prints that ends with a fault of its own."""
    with running(arguments, n) as run:
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode in (1, 2), printed
    return printed


def readers(run: subprocess.Popen[str]) -> list[int]:
    """Processes that read videos: those that the server has forked."""
    return [
        pid
        for pid in family(run.pid)
        if "forkserver" in command_line(pid) and "forkserver" in command_line(parent(pid))
    ]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_loss_that_is_not_finite_names_step_rank_and_videos_and_the_state_before_is_saved(
    small_world: dict[str, Path], tmp_path: Path
) -> None:
    huge = ("--optimization.learning-rate", "1e30", "--optimization.warmup-epochs", "0")
    printed = failed(arguments(small_world, tmp_path / "run", *huge), 2)
    assert "step 2 is not finite: loss nan" in printed
    for m, rank in ((0, 0), (1, 1)):
        assert f"micro-batch {m} on rank {rank} ({small_world['train'].parent}" in printed
    assert newest(tmp_path / "run") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reading_process_that_dies_or_hangs_costs_its_video(
    small_world: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    command = arguments(small_world, tmp_path / "run", "--optimization.epochs", "8", "--data.time-limit-s", "20")
    with running(command) as run:
        wait_for_steps(run, tmp_path / "run", 2)
        os.kill(readers(run)[0], number)
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode == 0, printed
    told = [
        event["reason"] for event in read_journal(tmp_path / "run" / "journal.jsonl") if event["event"] == "unreadable"
    ]
    assert len(told) == 1
    assert ("(SIGKILL)" if number == signal.SIGKILL else "not read within 20 s") in told[0]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, ": rank 1 does not answer (last sign "),
        (signal.SIGSTOP, " took longer than 30 s: rank 1 does not answer (last sign "),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_others_with_its_name(
    small_world: dict[str, Path], tmp_path: Path, number: signal.Signals, expected: str
) -> None:
    with running(arguments(small_world, tmp_path / "run", *LONG, "--hang-limit-s", "30"), 2) as run:
        wait_for_steps(run, tmp_path / "run", 5)  # the checkpoint of step 4 waits for that of step 2
        os.kill(ranks(run)[1], number)
        printed = run.communicate(timeout=TIME_LIMIT_S)[0]
    assert run.returncode == 1
    assert expected in printed, printed
    assert newest(tmp_path / "run")


def test_a_rank_without_its_part_of_the_data_is_named_with_the_reason(
    small_world: dict[str, Path], tmp_path: Path
) -> None:
    folders = node_folders(small_world, tmp_path)
    for video in folders[1].rglob("*.mp4"):
        video.unlink()
    printed = on_two_nodes(tmp_path, "--data.train", "train/manifest.csv", *SHORT)
    assert "rank 1 ended with " in printed
    assert "none of 10 videos in a row can be read" in printed


def test_ranks_with_other_classes_are_refused(small_world: dict[str, Path], tmp_path: Path) -> None:
    folders = node_folders(small_world, tmp_path)
    manifest = folders[1] / "train" / "manifest.csv"
    first = read_dataset(str(manifest)).classes[0]
    manifest.write_text(manifest.read_text().replace(first, f"no {first}"))
    printed = on_two_nodes(tmp_path, "--data.train", "train/manifest.csv", *SHORT)
    assert "processes that train together must be alike, and differ in videos: " in printed
    assert "on rank 0" in printed
    assert "on rank 1" in printed


def test_ranks_with_other_settings_are_refused(small_world: dict[str, Path], tmp_path: Path) -> None:
    node_folders(small_world, tmp_path)
    printed = on_two_nodes(tmp_path, "--data.train", "train/manifest.csv", "--seed", "$RANK", *SHORT)
    assert "processes that train together must be alike, and differ in seed: 0 on rank 0, 1 on rank 1" in printed


def node_folders(small_world: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A working folder for each of two nodes, with a copy of the videos."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        shutil.copytree(small_world["train"].parent, folder / "train")
    return folders


def on_two_nodes(tmp_path: Path, *arguments: str) -> str:
    """What a run prints whose processes have working folders of their own, and that fails."""
    train = f"{sys.executable} -m applications.openvclip.train miniature --output {tmp_path / 'run'} --data.workers 1"
    batches = "--optimization.batch-size 4 --optimization.micro-batch 2 --averager.start-epoch 0"
    script = f"cd {tmp_path}/node$RANK && exec {train} {batches} {' '.join(arguments)}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIME_LIMIT_S, check=False)
    assert done.returncode == 1
    return done.stdout + done.stderr


def in_mounted(folder: Path, options: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a file system of its own mounted on a folder; what it leaves is copied to `left`."""
    folder.mkdir()
    mount, copy = f"mount -t tmpfs -o {options} none {folder}", f"cp -r {folder} {folder.parent}/left"
    script = f'{mount} && {{ "$@"; code=$?; {copy}; exit $code; }}'
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, "bash", *command]
    if subprocess.run([*unshare[:4], "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no user mount anything")
    return subprocess.run(unshare, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(small_world: dict[str, Path], tmp_path: Path) -> None:
    command = arguments(small_world, tmp_path / "disk" / "run", *LONG, "--checkpoint.keep", "100")
    done = in_mounted(tmp_path / "disk", "size=40m", [sys.executable, "-m", "applications.openvclip.train", *command])
    assert done.returncode == 2, done.stderr
    assert "was not written: [Errno 28] No space left on device" in done.stderr
    assert "Those before it are as they were" in done.stderr
    assert newest(tmp_path / "left" / "run")


def test_where_nothing_can_be_written_that_is_told_at_once(small_world: dict[str, Path], tmp_path: Path) -> None:
    command = arguments(small_world, tmp_path / "disk" / "run", *LONG)
    done = in_mounted(tmp_path / "disk", "ro", [sys.executable, "-m", "applications.openvclip.train", *command])
    assert done.returncode == 2, done.stderr
    assert f"Read-only file system: '{tmp_path / 'disk' / 'run'}" in done.stderr


def test_a_clock_that_was_set_back_changes_nothing(small_world: dict[str, Path], tmp_path: Path) -> None:
    """Files and journal of the first half are of tomorrow, as they look once the clock has been set right."""
    finished(arguments(small_world, tmp_path / "whole", "--optimization.epochs", "4"))
    folder = tmp_path / "run"
    command = arguments(small_world, folder, "--optimization.epochs", "4")
    with running(command) as run:
        wait_for_steps(run, folder, 5)
    tomorrow = time.time() + 86400
    for path in folder.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    events = read_journal(folder / "journal.jsonl")
    later = [{**event, "time": event["time"].replace("202", "203", 1)} for event in events]
    (folder / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in later))
    finished(command)
    assert not differences(outcome(tmp_path / "whole"), outcome(folder))
