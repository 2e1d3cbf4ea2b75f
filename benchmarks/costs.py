"""What things cost, as a table of the results that are shipped: docs/performance.md.

Every figure comes out of a file of `benchmarks/results`, so that none is older or better than what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from applications.openvclip.runs.texts import markdown_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cost:
    """A row: what something costs, and against what."""

    what: str
    figure: str
    against: str
    script: str
    """Name of the benchmark without its ending."""


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def quartiles(ratio: Mapping[str, float]) -> str:
    """Median and quartiles, as "1.08 (1.04 to 1.13)"."""
    return f"{ratio['median']:.2f} ({ratio['quartile_1']:.2f} to {ratio['quartile_3']:.2f})"


def costs() -> list[Cost]:
    """All rows, in the order of the tables."""
    rows = []
    for model, found in results("iwr_step")["results"].items():
        floor = found["time_over_floor"]
        figure = f"{quartiles(floor['functional'])}; swapped in place {quartiles(floor['in_place'])}"
        figure += f"; the published procedure {quartiles(floor['published'])}"
        rows.append(Cost(f"a regularized step, {model}", figure, "two passes and one update, the floor", "iwr_step"))
        plain = found["time_over_plain_step"]
        figure = f"half a batch to either term {quartiles(plain['split'])}; one at random {quartiles(plain['random'])}"
        rows.append(Cost(f"a regularized step of one pass, {model}", figure, "a plain step", "iwr_step"))
    memory = results("iwr_memory")
    for model, copies in memory["peak_above_plain_step_in_copies_of_the_parameters"].items():
        figure = f"{copies['functional']:.1f} copies of the parameters more, the anchor being one; with "
        figure += '`anchor_device="cpu"`, counted for an accelerator, '
        figure += f"{memory['counted_on_a_device_by_place_of_the_anchor'][model]['elsewhere']:.1f}"
        rows.append(Cost(f"its peak of memory, {model}", figure, "a plain step", "iwr_memory"))
    update = results("averaging_update")
    figure = f"{quartiles(update['time_over_copy']['SWAAverager'])}; `AveragedModel` "
    figure += (
        f"{quartiles(update['time_over_copy']['AveragedModel'])}, its `multi_avg_fn` in float32, which stands still "
    )
    figure += f"after many steps, {quartiles(update['time_over_copy']['AveragedModel, multi_avg_fn'])}"
    rows.append(Cost(f"an averaging update, {update['model']}", figure, "a copy of the weights", "averaging_update"))
    others = ", ".join(
        f"{name} {update['others'][package]} {quartiles(update['time_over_copy'][name])}"
        for name, package in (("timm's ModelEmaV3", "timm"), ("ema-pytorch's EMA", "ema-pytorch"))
    )
    figure = f"{quartiles(update['time_over_copy']['EMAAverager'])}; {others}"
    rows.append(Cost("an exponential one", figure, "a copy of the weights", "averaging_update"))
    teacher = results("teacher_step")
    for case, found in teacher["time_over_plain_pass"].items():
        figure = f"{quartiles(found['averager(x)'])}; at the anchor {quartiles(found['regularizer.at_anchor(x)'])}"
        rows.append(
            Cost(
                f"a pass at the average, {case}",
                figure,
                "a plain pass without gradient",
                "teacher_step",
            )
        )
    for model, copies in teacher["peak_above_plain_step_in_copies_of_the_parameters"].items():
        figure = f"{copies['averager(x)']:.1f} copies of the parameters more; with a module of its own for the average "
        figure += f"{copies['copy of the average']:.1f}"
        rows.append(
            Cost(
                f"peak of memory of a step with that teacher, {model}",
                figure,
                "a plain step",
                "teacher_step",
            )
        )
    files = results("file_patching")
    mixed, held = files["time_over_load_mix_save"], files["anonymous_memory_mb"]
    figure = f"{quartiles(mixed['patch_files'])}, where reading and writing alone take {quartiles(mixed['floor'])}; "
    figure += f"{held['patch_files']:.0f} MB of memory and not {held['load, mix, save']:.0f}"
    for name, number in files["others"].items():
        figure += f"; {name} {number} {quartiles(mixed[name])}, {held[name]:.0f} MB"
    rows.append(Cost(f"patching two files of {files['file_mb']} MB", figure, "load both, mix, save", "file_patching"))
    attention = results("temporal_attention")
    figure = f"{quartiles(attention['time_over_plain']['temporal, mask'])}; the published procedure "
    figure += f"{quartiles(attention['time_over_plain']['published procedure'])}; "
    figure += f"the multiplications alone {attention['floor']:.2f}"
    rows.append(
        Cost("attention over three frames, a layer of ViT-B/16", figure, "plain attention", "temporal_attention")
    )
    tower = attention["time_over_the_plain_tower"]
    figure = f"{quartiles(tower['temporal, mask'])}; frame by frame {quartiles(tower['frame by frame'])}; "
    figure += f"the multiplications alone {attention['floor_of_the_tower']:.2f}"
    what, against = "the whole image tower of ViT-B/16, a clip of 8 frames", "open_clip's own, on the frames"
    rows.append(Cost(what, figure, against, "temporal_attention"))
    one_pass = results("one_pass_evaluation")
    together, apart = one_pass["one pass"], one_pass["one by one"]
    figure = f"{together['videos decoded']} videos decoded and not {apart['videos decoded']}; "
    figure += f"{_seconds(together)} and not {_seconds(apart)}"
    what = f"{one_pass['parts']} protocol parts at {len(one_pass['anchor_weights'])} anchor weights in one pass"
    rows.append(Cost(what, figure, f"one by one, {one_pass['videos']} videos", "one_pass_evaluation"))
    training = results("training_throughput")
    for size, found in training["bare loop over trainer, ready clips"].items():
        figure = f"speed {quartiles(found['ratio'])}"
        rows.append(Cost(f"training, clips of {size}", figure, "a bare loop on ready clips", "training_throughput"))
    decoded = training["decoded clips"]
    figure = f"{decoded['waiting']:.1%} of the time waiting for {decoded['workers']} reading processes"
    against = f"{len(decoded['videos'])} clips of Kinetics again and again, {decoded['clips_per_s']:.1f} clips/s"
    rows.append(Cost("training, clips that are decoded", figure, against, "training_throughput"))
    for video, found in results("decoding")["videos"].items():
        for how, contenders in found.items():
            if isinstance(contenders, dict):
                ours, plain = contenders["this package"], contenders["plain"]
                figure = f"{ours['ratio']:.2f}: {ours['ms']:.0f} ms and not {plain['ms']:.0f}"
                rows.append(Cost(f"reading {how} of {video}", figure, "a plain decoding from the start", "decoding"))
    return rows


def _seconds(found: Mapping[str, Any]) -> str:
    low, high = found["seconds, from and to"]
    return f"{found['seconds, median']:.0f} s ({low:.0f} to {high:.0f}, all rounds)"


def table(rows: list[Cost]) -> str:
    header = "", "time, or as said: median (quartiles)", "against", "`benchmarks/`"
    cells = ([row.what, row.figure, row.against, f"`{row.script}.py`"] for row in rows)
    return "\n".join(markdown_table(header, cells)) + "\n"


def conditions(rows: list[Cost]) -> str:
    """How each script was run, by its own record."""
    lines = []
    for script in dict.fromkeys(row.script for row in rows):
        record = results(script)
        about = record.get("provenance", record)
        hardware = about["hardware"]
        processor = f"{hardware.get('cpu') or hardware['machine']}, {hardware['cores']} cores"
        threads = record.get("torch_threads", hardware.get("threads"))
        load = f"{record['load_average'][0]:.1f}" if "load_average" in record else record.get("machine", "not recorded")
        versions = about["versions"]["torch"]
        lines.append((f"`{script}.json`", f"`{about['command']}`", versions, processor, str(threads), load))
    header = "`benchmarks/results/`", "command", "torch", "processor", "threads", "load of the machine, this included"
    return "\n".join(markdown_table(header, lines)) + "\n"


def limits() -> str:
    """What the figures are bound by, where that is known."""
    update = results("averaging_update")["time_over_copy"]
    total, mixed = (update[f"float64 sum, {way}"] for way in ("read and written", "torch's loop over two dtypes"))
    attention = results("temporal_attention")
    layer, tower = attention["floor"], attention["floor_of_the_tower"]
    return f"""- **Averages.** An exact sum of many float32 weights needs float64. Reading and writing the sum alone is
  {quartiles(total)} copies; the rest is casting the weights, a piece at a time. torch's own loop over two dtypes
  takes {quartiles(mixed)} copies.
- **Attention.** A query sees 2.75 times the keys on average, whose multiplications cost {layer:.2f} in a layer and
  {tower:.2f} in the tower; beyond them there are the scores, 2.75 times as many, and gradients of keys that three
  frames share.
- **A regularized step.** Two passes are the floor; beyond them it reads two sets of weights and writes the mixture.
- **Patching files.** The disk: reading and writing alone take most of it.
"""


def page() -> str:
    """docs/performance.md."""
    rows = costs()
    return f"""# Performance

Ratios are of runs in turn, one of each contender a round: medians and quartiles over rounds. Every figure of the table
is out of a file of `benchmarks/results`, and this page is written by `python benchmarks/quoted.py`.

{table(rows)}
## What bounds them

{limits()}
## How it was measured

{conditions(rows)}"""
