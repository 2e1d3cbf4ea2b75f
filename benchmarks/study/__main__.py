"""Does the method do what the paper says? Every method on the miniature, over seeds, and a report.

$ python -m benchmarks.study --quick            # two seeds, the paper's rows
$ python -m benchmarks.study                    # five seeds, all methods
$ python -m benchmarks.study --full             # other schedules, fewer videos, sensitivities too
$ python -m benchmarks.study --report-only      # the page from what has ended

Stopped by Ctrl-C it goes on with the same command. Runs that are in the output's findings.json and whose folders are
gone stay in the report: so the shipped one is extended, with --output benchmarks/results/study.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from applications.openvclip.miniature import tasks
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
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs, hundreds of MB")
    parser.add_argument("--output", type=Path, help="of findings.json and the report; by default that of the runs")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--seeds", type=int, nargs="+", help="others than those of the size")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    if options.parallel < 1:
        parser.error(f"--parallel {options.parallel}: at least one run at a time")
    size: Size = options.size
    seeds = sorted({*(options.seeds or SEEDS[size])})
    everything = jobs(trainings_of(size), mixtures_of(size), seeds, options.runs)
    if not options.report_only:
        for seed in seeds:
            tasks.prepare(seed)  # before several runs would make the same videos
        run_all(everything, options.parallel)
    output: Path = options.output or options.runs
    found = output / "findings.json"
    if ended := [job for job in everything if job.ended()]:
        now = findings.gather(ended, size)
        if found.exists():
            try:
                now = findings.together(now, findings.read(found))
            except ValueError as error:
                parser.error(f"{found} holds runs that can't be compared with these: {error} Choose another --output.")
        output.mkdir(parents=True, exist_ok=True)
        findings.write(now, found)
    if not found.exists():
        parser.error(f"no run in {options.runs} has ended, and {found} is not there.")
    report.write(findings.read(found), output)
    print(output / "report.md")


if __name__ == "__main__":
    main()
