"""What commands cost on a study of many trials: seconds and peak memory of each, in processes of their own.

    python benchmarks/large_study.py [--trials 10000] [--folder FOLDER] [--commands status,report,...] [--out FILE]

The journal is written by the driver itself, with trials that report a made-up loss at once. An existing FOLDER is
used again, so that two versions can be held against the same journal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launches import made_up_loss

from searchspace.files import find_file, read_data
from searchspace.plain import dump_yaml


def study_file(folder: Path, trials: int) -> Path:
    """A study over the widest shipped space; a trial takes a second."""
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} is {i} squared\n" for i in range(20_000)))
    study = {
        "name": "large",
        "space": read_data(find_file("families", folder="spaces")),
        "data": {"kind": "text", "path": str(folder / "text.txt")},
        "training": {
            "flops": 1e9,
            "batch_tokens": 384,
            "eval_tokens": 1536,
            "lr": {"float": [1e-3, 1e-2], "log": True},
        },
        "budget": {"params": 10_000_000},
        "search": {"sampler": "random", "num_trials": trials, "stopper": {"asha": {"rungs": 3, "reduction": 3}}},
    }
    file = folder / "large.yaml"
    file.write_text(dump_yaml(study))
    return file


def make_journal(file: Path, folder: Path) -> None:
    """Launch every trial and end it at once."""
    from studies.commands.search import prepare_data
    from studies.config import load_study
    from studies.records.folder import study_folder
    from studies.records.resume import keep_settings
    from studies.records.trial import Report, Rung
    from studies.strategy.driver import StudyDriver

    settings = load_study(file)
    with study_folder(folder):
        corpus = prepare_data(settings, folder)
        keep_settings(settings, folder)
        driver = StudyDriver(settings, folder, corpus)
        while (spec := driver.next_trial()) is not None:
            loss, full = made_up_loss(driver.record(spec.number)), spec.training["flops"]
            rungs: tuple[Rung, ...] = ()
            for share in spec.rungs:
                rungs = (*rungs, Rung(flops=share * full, tokens=int(1e4 * share), score=loss + 0.2 * (1 - share)))
                kind = "done" if share == 1 else "rung"
                report = Report(kind=kind, attempt=1, rungs=rungs, flops=share * full, tokens=1, steps=1)
                if not driver.report(spec.number, report):
                    break


def measure(command: list[str], log: Path) -> dict[str, Any]:
    """Wall and processor seconds, peak memory and exit code of one process."""
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "exit": os.waitstatus_to_exitcode(status),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--commands", default="status,report,going on,predict")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        run = folder / "run"
        file = folder / "large.yaml"
        if not run.exists():
            make_journal(study_file(folder, args.trials), run)
        print(f"journal of {(run / 'journal.log').stat().st_size / 2**20:.0f} MiB")
        cli, more = [sys.executable, "-m", "studies.cli"], f"search.num_trials={args.trials + 1}"
        commands = {
            "status": ["status", str(run)],
            "report": ["report", str(run)],
            "going on": ["search", str(file), "--dir", str(run), "--serial", more],
            "predict": ["predict", str(run), "--candidates", "200"],
        }
        found = {}
        print("| command | wall s | processor s | peak GiB | exit |\n|---|---|---|---|---|")
        for name in args.commands.split(","):
            row = found[name] = measure([*cli, *commands[name]], folder / f"{name}.txt")
            print(f"| {name} | {row['wall_s']} | {row['cpu_s']} | {row['peak_gib']} | {row['exit']} |", flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
