"""The training loop on a small network, as processes that can be killed within seconds of being started."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from applications.openvclip import distributed
from applications.openvclip.data.loader import MicroBatch
from applications.openvclip.runs.folder import RunFolder
from applications.openvclip.runs.journal import Journal, read_journal
from applications.openvclip.training.checkpoints import Checkpoints
from applications.openvclip.training.interruption import Interruption
from applications.openvclip.training.monitor import Monitor
from applications.openvclip.training.parallel import whole
from applications.openvclip.training.trainer import Saving, Trainer
from applications.openvclip.training.watch import Watch
from interpolate.weights import trainable_weights
from tests.openvclip.steps import Plan, small_batches, small_step


def train(folder: Path, steps: int, step_s: float) -> None:
    """Train, or go on with training, and leave what has been learnt in `learnt.pt`."""
    torch.set_num_threads(1)
    distributed.initialise()
    run = RunFolder(folder)
    journal, plan = Journal(run.journal), Plan(steps=steps, learning_rate=0.01)
    trainer = Trainer(
        small_step(plan),
        checkpoints=Checkpoints(run.checkpoints, keep=2),
        saving=Saving(every_steps=3, every_minutes=10),
        watch=Watch(60),
        monitor=Monitor(journal, run, steps, plan.batch_size, False) if distributed.rank() == 0 else None,
        identity={},
    )
    trainer.resume()
    if distributed.rank() == 0:
        journal.cut(trainer.step.taken)
        journal.write("start", step=trainer.step.taken)

    def batches() -> Iterator[MicroBatch]:
        for batch in small_batches(trainer.step.order, trainer.step.taken):
            time.sleep(step_s)
            yield batch

    with trainer.monitor or nullcontext(), Interruption() as interruption:
        trainer.fit(batches(), interruption)
    learnt = {
        "last": whole(trainable_weights(trainer.step.encoder)),
        "averaged": whole(trainer.step.averager.weights),
        "optimizer": trainer.step.state_dict()["optimizer"],
    }
    if distributed.rank() == 0:
        torch.save(learnt, folder / "learnt.pt")
    distributed.finish()


class Processes:
    """A training on n processes, started as torchrun starts them: their store is kept by this process."""

    def __init__(self, n: int, folder: Path, steps: int, step_s: float) -> None:
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once for all
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._processes = [
            context.Process(target=_process, args=({**common, "RANK": str(rank)}, str(folder), steps, step_s))
            for rank in range(n)
        ]
        for process in self._processes:
            process.start()

    def kill(self) -> None:
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    def wait(self) -> list[int | None]:
        """Their exit codes."""
        for process in self._processes:
            process.join(600)
        return [process.exitcode for process in self._processes]

    def are_running(self) -> bool:
        return all(process.is_alive() for process in self._processes)


def _process(environment: dict[str, str], folder: str, steps: int, step_s: float) -> None:
    os.environ.update(environment)
    with open(f"{folder}/output-{environment['RANK']}.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    train(Path(folder), steps, step_s)


def learnt(folder: Path) -> dict[str, Any]:
    """What must be the same however often a training was killed, all to the last bit."""
    ignored = {"time", "machine"}
    events = [event for event in read_journal(folder / "journal.jsonl") if event["event"] != "start"]
    return {
        "journal": [{name: value for name, value in event.items() if name not in ignored} for event in events],
        "tensors": dict(_tensors(torch.load(folder / "learnt.pt"), "")),
    }


def _tensors(state: dict[str, Any], prefix: str) -> Iterator[tuple[str, list[float]]]:
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value.double().flatten().tolist()  # exact, and equal where the bits are
