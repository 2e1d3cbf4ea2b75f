"""What a whole run takes, and what would make it faster."""

import pytest

from applications.openvclip.training.planning import Pace, advice

PACE = Pace(step_s=2.0, waited_s=1.0, decoding_s=0.1, clips=64, processes=8, workers=2, cores=4)
GPU = {"on_gpu": True, "precision": "bf16", "activation_checkpointing": False, "fits_without": True}


def test_a_run_costs_its_hours_times_its_processes() -> None:
    assert PACE.hours(1800) == 1
    assert PACE.device_hours(1800) == 8
    assert PACE.waiting == 0.5


def test_workers_needed_decode_as_fast_as_the_model_trains() -> None:
    assert PACE.workers_needed == 7  # 6.4 seconds of decoding for each second of the model


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({}, "more workers: --data.workers 4 (now 2)"),
        ({"cores": 2}, "cheaper clips: 7 cores would be needed for each process and there are 2"),
        ({"workers": 8, "cores": 8}, "faster storage"),
        ({"waited_s": 0.05}, "--compile"),
    ],
)
def test_the_first_advice_is_for_what_holds_training_up(change, first) -> None:
    assert advice(Pace(**{**vars(PACE), **change}), **GPU)[0].startswith(first)


def test_checkpointing_is_advised_against_where_memory_has_room_without() -> None:
    swift = Pace(**{**vars(PACE), "waited_s": 0.0})
    for fits in (True, False):
        found = advice(swift, **{**GPU, "activation_checkpointing": True, "fits_without": fits})
        assert any("--no-activation-checkpointing" in text for text in found) == fits
    assert "--precision bf16" in advice(swift, **{**GPU, "precision": "fp32"})
