"""What all averages of weights share: when a snapshot is taken, how it is kept, applied, saved and resumed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from interpolate._sharding import like, local
from interpolate._strategies import without_gradient
from interpolate._unmixable import check_mixable
from interpolate.batchnorm import reestimate_batchnorm
from interpolate.errors import WeightMismatchError
from interpolate.weights import (
    check_match,
    check_there,
    listed,
    mixing_precision,
    persistent_buffers,
    put,
    trainable_weights,
    whole,
)

T = TypeVar("T")

_CHUNK = 2**17
"""Numbers cast at a time on a CPU: the cast ones stay in its cache."""


class WeightAverager(ABC):
    """What the averagers share: a snapshot every `cycle_steps` steps after the first `start_step` steps.

    Trainable weights are averaged by name, and the average is exact however long it gets: snapshots are summed in
    float64, and the mean is rounded once, to float32 (float64 weights to float64). After 100,000 snapshots it is within
    one last bit of float32; where snapshots cancel, within 1e-11 of their mean magnitude. The sum takes 8 bytes a
    weight, as two copies of float32 weights do, and an update takes as long as about two and a half copies.

    Buffers that belong to the model's state are copied at every snapshot, not averaged; those that don't
    (`persistent=False`: caches, positions) stay the model's own. Under FSDP2 every rank averages its shards and nothing
    is communicated.

    The average can be a teacher while theta is trained: `averager(x)` is the model's forward pass there, without
    gradient and without a second module.

    Args:
        model: The model being trained, wrapped or sharded as it may be; it is neither copied nor kept busy, only read
            at every snapshot.
        start_step: Number of steps before averaging starts, the paper's T.
        cycle_steps: Steps from one snapshot to the next, the paper's c, at least 1.
        start_at: `"anchor"` takes the weights that the model has now as the first snapshot, so that the average begins
            at the pretrained weights; None leaves them out, as the paper does.
        averaged_buffers: Patterns (as in `fnmatch`) of buffers that are averaged like the weights instead of copied,
            such as `("*.running_mean", "*.running_var")`.
        device: Where the average is kept, for instance "cpu"; by default with the weights.

    Raises:
        ValueError: An argument is out of its range, or the device has no float64; or the weights are factors of an
            adapter such as LoRA, whose means are not the factors of the mean: save merged checkpoints at the
            snapshots and average those, with `average_files`.
    """

    _n_sets = 1

    def __init__(
        self,
        model: nn.Module,
        *,
        start_step: int = 0,
        cycle_steps: int = 1,
        start_at: Literal["anchor"] | None = None,
        averaged_buffers: Sequence[str] = (),
        device: torch.device | str | None = None,
    ) -> None:
        if start_at not in (None, "anchor"):
            raise ValueError(f"start_at must be 'anchor' or None, got {start_at!r}.")
        self.model = model
        self.start_step = whole("start_step", start_step, at_least=0)
        self.cycle_steps = whole("cycle_steps", cycle_steps, at_least=1)
        self.device = None if device is None else torch.device(device)
        self.step = 0
        """Updates so far."""
        self.n_averaged = 0
        """Snapshots taken so far."""
        theta = trainable_weights(model)
        check_mixable(theta)
        check_there(theta)
        self._averaged_buffers = _fitting(averaged_buffers, persistent_buffers(model))
        tensors = self._tensors()
        for place in {self.device or p.device for p in tensors.values()}:
            _check_float64(place)
        self._sets = [{name: self._zeros(p) for name, p in tensors.items()} for _ in range(self._n_sets)]
        self._total_weight = 0.0  # the average is the sum of the sets over it
        self._dtypes = _averaged_dtypes(tensors)
        self.buffers: dict[str, Tensor] = _copied(persistent_buffers(model))
        """The model's persistent buffers by name, as of the last snapshot or of `reestimate_batchnorm`."""
        if start_at == "anchor":
            self._take_snapshot()

    def update(self) -> None:
        """Count one step of training; on the schedule, take the weights into the average. Call it after the optimizer.

        Raises:
            WeightMismatchError: The model's trainable weights are no longer those that have been averaged, or no longer
                sharded in the same way.
        """
        self.step += 1
        if self.step <= self.start_step or (self.step - self.start_step) % self.cycle_steps:
            return
        self._take_snapshot()

    @torch.no_grad()
    def _take_snapshot(self) -> None:
        tensors = self._tensors()
        check_match(tensors, self._sets[0])
        _check_shards(tensors, self._sets[0])
        self._sets = [{name: self._moved(s[name], p) for name, p in tensors.items()} for s in self._sets]
        self._absorb([local(p) for p in tensors.values()])
        self._dtypes = _averaged_dtypes(tensors)
        self.n_averaged += 1
        self.buffers = _copied(persistent_buffers(self.model))
        for name in self._averaged_buffers:
            self.buffers[name] = like(self._average(name), self.buffers[name])

    def _tensors(self) -> dict[str, Tensor]:
        """What is averaged of the model."""
        buffers = persistent_buffers(self.model)
        return {**trainable_weights(self.model), **{n: buffers[n] for n in self._averaged_buffers if n in buffers}}

    @abstractmethod
    def _absorb(self, snapshot: list[Tensor]) -> None:
        """Take a snapshot, shard by shard, into `_sets` and `_total_weight`."""

    @property
    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The average by name, in float32 or better: new tensors, which later updates don't change.

        Raises:
            RuntimeError: Nothing has been averaged yet.
        """
        if self.n_averaged == 0:
            raise RuntimeError(
                f"no weights have been averaged: update() was called {self.step} times, and the first snapshot is due "
                f"at call {self.start_step + self.cycle_steps}. With start_at='anchor' the average begins at once."
            )
        return {name: self._average(name) for name in self._dtypes if name not in self._averaged_buffers}

    def _average(self, name: str) -> Tensor:
        kept = [s[name] for s in self._sets]
        average = torch.empty_like(kept[0], dtype=self._dtypes[name])
        for part, first, *others in in_parts(local(average), *map(local, kept)):
            total = first.double()
            for other in others:
                total = total + other
            part.copy_(total / self._total_weight)
        return average

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass at the average, without gradient: a teacher for the loss; see `run`.

        Example:
            >>> import torch
            >>> from interpolate import EMAAverager
            >>> model = torch.nn.Linear(2, 2)
            >>> averager = EMAAverager(model, decay=0.99, warmup=False, start_at="anchor")
            >>> x = torch.ones(4, 2)
            >>> loss = torch.nn.functional.mse_loss(model(x), averager(x))
        """
        return self.run(lambda model: model(*args, **kwargs))

    def run(self, function: Callable[[nn.Module], T]) -> T:
        """Call a function with the model at the average and its buffers, without gradient.

        It may be called at any time, between the forward and the backward pass of what is trained too: weights,
        gradients and the state of modules are as before. Meanwhile another thread that calls the model gets the
        average, too: let one thread do both. The model is in the mode that it is in, and a function may
        change that for itself: `averager.run(lambda model: model.eval().encode_image(x))`. What its forward pass does
        to its buffers is forgotten. Under DDP, it is the module inside and nothing is communicated; with weights
        sharded by FSDP2, every rank has to call this, and gathers.

        The average is made for the call and not kept, as a second module would be. That takes as long as a clone of the
        weights; micro-batches of one step can share it: `averager.run(lambda model: [model(x) for x in batches])`.

        Raises:
            RuntimeError: Nothing has been averaged yet, or the model is TorchScript's.
            WeightMismatchError: The model's trainable weights are no longer those that have been averaged.
        """
        return without_gradient(self.model, self.weights, self.buffers, function)

    def applied(self) -> AbstractContextManager[nn.Module]:
        """The model with the average and its buffers for the length of a `with` block; its own come back afterwards.

        Example:
            >>> import torch
            >>> from interpolate import SWAAverager
            >>> model = torch.nn.Linear(1, 1)
            >>> averager = SWAAverager(model)
            >>> averager.update()
            >>> with averager.applied() as averaged:
            ...     output = averaged(torch.ones(1))
        """
        return put(self.model, {**self.weights, **self.buffers})

    def reestimate_batchnorm(self, batches: Iterable[Any]) -> None:
        """Put BatchNorm statistics of the averaged model into `buffers`; see `interpolate.reestimate_batchnorm`."""
        with self.applied() as model:
            reestimate_batchnorm(model, batches)
            self.buffers = _copied(persistent_buffers(model))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the tensors are the averager's own, as in `nn.Module.state_dict`.

        `torch.distributed.checkpoint` saves it under one world size and loads it under another.
        """
        return {
            "kind": self._kind(),
            "step": self.step,
            "n_averaged": self.n_averaged,
            "total_weight": self._total_weight,
            "averages": {str(i): dict(s) for i, s in enumerate(self._sets)},
            "buffers": dict(self.buffers),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            WeightMismatchError: The state is of another model.
            ValueError: The state is of another kind of average, or of one with another number of snapshots kept.
        """
        averages, buffers = state["averages"], state["buffers"]
        if state.get("kind") != self._kind():
            raise ValueError(f"the state is of {state.get('kind')}, this averager is {self._kind()}.")
        if len(averages) != len(self._sets):
            raise ValueError(f"the state holds {len(averages)} sets of weights, this averager {len(self._sets)}.")
        if buffers.keys() != self.buffers.keys():
            check_match(self.buffers, buffers)  # their shapes may differ: buffers grow
        for i, own in enumerate(self._sets):
            check_match(own, averages[str(i)])
        for i, own in enumerate(self._sets):
            for name, tensor in own.items():
                given = averages[str(i)][name]
                own[name] = tensor.to(torch.promote_types(tensor.dtype, given.dtype))
                local(own[name]).copy_(local(like(given, own[name])))
        self.buffers = {name: like(buffers[name], own).clone() for name, own in self.buffers.items()}
        self.step, self.n_averaged = int(state["step"]), int(state["n_averaged"])
        self._total_weight = float(state["total_weight"])

    def _kind(self) -> str:
        """What the average is, for a state not to be continued as another."""
        return type(self).__name__

    def _kept_dtype(self, p: Tensor) -> torch.dtype:
        return torch.float64

    def _zeros(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p.detach().to(self.device or p.device), dtype=self._kept_dtype(p))

    def _moved(self, kept: Tensor, p: Tensor) -> Tensor:
        """What is kept of a weight, where the model has gone and as fine as it has become."""
        place = self.device or p.device
        if place.type != kept.device.type:
            _check_float64(place)
        dtype = torch.promote_types(kept.dtype, self._kept_dtype(p))
        return kept if (place, dtype) == (kept.device, kept.dtype) else kept.to(place, dtype)


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, a piece of each at a time: on a CPU, so much as stays in its cache when it is cast."""
    if tensors[0].device.type != "cpu":
        yield tensors
        return
    tensors = tuple(map(torch.atleast_1d, tensors))
    rows = max(1, _CHUNK // max(1, math.prod(tensors[0].shape[1:])))
    yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _fitting(patterns: Sequence[str], buffers: dict[str, Tensor]) -> list[str]:
    """The names of the buffers to average."""
    if isinstance(patterns, str):
        raise ValueError(f"averaged_buffers must be a sequence of patterns, got {patterns!r}: write ({patterns!r},).")
    fitting: set[str] = set()
    for pattern in patterns:
        found = {name for name in buffers if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"{pattern!r} in averaged_buffers fits none of the buffers ({listed(buffers)}).")
        fitting |= found
    codes = [f"{n} ({str(buffers[n].dtype)[6:]})" for n in sorted(fitting) if not buffers[n].is_floating_point()]
    if codes:
        raise ValueError(
            f"averaged_buffers fits {listed(codes)}: only floating point has a mean. What no pattern fits is copied."
        )
    return [name for name in buffers if name in fitting]


def _averaged_dtypes(tensors: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: mixing_precision(p.dtype) for name, p in tensors.items()}


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check_float64(device: torch.device) -> None:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"weights are averaged in float64, which is not to be had on {str(device)!r}: {str(error).split('. ')[0]}. "
            "Keep the average elsewhere: device='cpu'."
        ) from error


def _check_shards(tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    for name, p in tensors.items():
        now, then = getattr(p, "placements", None), getattr(kept[name], "placements", None)
        if now != then:
            raise WeightMismatchError(
                f"{name} is sharded as {now} and was as {then} when the averager was made (None: not sharded). "
                "Make the averager after fully_shard."
            )
