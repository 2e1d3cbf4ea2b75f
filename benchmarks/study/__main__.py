"""Does the method do what the paper says? Every method on the miniature, over seeds, and a report.

$ python -m benchmarks.study --quick            # two seeds, the paper's rows
$ python -m benchmarks.study                    # five seeds, all methods
$ python -m benchmarks.study --full             # other schedules, fewer videos, sensitivities too
$ python -m benchmarks.study --report-only      # the page from what has ended, or from what is shipped

Stopped by Ctrl-C it goes on with the same command. Runs of which only findings.json tells, because their folders are
elsewhere, stay in the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from applications.openvclip.miniature import tasks
from benchmarks.measuring import RESULTS
from benchmarks.study import findings, report
from benchmarks.study.methods import SEEDS, Size, mixtures_of, trainings_of
from benchmarks.study.running import jobs, run_all


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", default="default")
    sizes.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--output", type=Path, default=RESULTS / "study", help="of findings.json, report.md and plots")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs, hundreds of MB")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than those of the size")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    size: Size = options.size
    found, seeds = options.output / "findings.json", options.seeds or SEEDS[size]
    everything = jobs(trainings_of(size), mixtures_of(size), seeds, options.runs)
    if not options.report_only:
        for seed in seeds:
            tasks.prepare(seed)  # before several runs would make the same videos
        run_all(everything, options.parallel)
    if ended := [job for job in everything if job.ended()]:
        options.output.mkdir(parents=True, exist_ok=True)
        now = findings.gather(ended, size)
        if found.exists():
            try:
                now = findings.with_earlier(now, findings.read(found))
            except ValueError as error:
                print(f"{found}: the runs of before are left out: {error}.")
        findings.write(now, found)
    report.write(findings.read(found), options.output)
    print(options.output / "report.md")


if __name__ == "__main__":
    main()
