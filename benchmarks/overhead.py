"""What a trial costs besides training: no-op trials through Ray, against Ray Tune's own OptunaSearch in the same run.

    python benchmarks/overhead.py [--trials 100] [--plain 40] [--long 2000] [--samplers random,tpe] [--out FILE]

The same space and number of workers for both. Start-up (Ray, the first worker) is left out of both: time is counted
from the first finished trial to the last. With --long, one more study of many trials through Ray: memory of the
driver, and the time of its last 200 trials against its first 200.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # for the workers
sys.path.insert(0, str(HERE))

from studies.records.trial import Report, Rung, TrialSpec  # noqa: E402


def noop(spec: TrialSpec) -> Iterator[Report]:
    """A trial that does nothing but report."""
    yield Report(kind="done", attempt=1, rungs=(Rung(flops=1.0, tokens=1, score=1.0 + spec.number % 7),))


def rss_mib() -> float:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def ours(trials: int, sampler: str) -> dict[str, Any]:
    """A study of no-op trials on two workers."""
    import overhead  # by this name in the workers too
    from launches import LOOSE, study

    from studies.data.corpus import prepare_corpus
    from studies.execution.run import run_on_ray
    from studies.strategy.driver import StudyDriver

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = study(sampler, trials, LOOSE, narrow=True)
        corpus = prepare_corpus(settings.data, folder / "data")
        driver = StudyDriver(settings, folder, corpus)
        ends: list[float] = []
        memory: list[float] = []

        def watch() -> None:
            events = len(driver.progress().events)
            ends.extend([time.perf_counter()] * events)
            memory.extend([rss_mib()] * events)

        run_on_ray(driver, watch, run=overhead.noop)
        disk = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
    first, last = (ends[199] - ends[0], ends[-1] - ends[-200]) if len(ends) > 400 else (1.0, 1.0)
    return {
        "trials": len(ends),
        "s_per_trial": (ends[-1] - ends[0]) / (len(ends) - 1),
        "last_200_over_first_200": last / first,
        "memory_growth": memory[-1] / memory[min(199, len(memory) - 1)] - 1,
        "rss_mib": memory[-1],
        "disk_kib_per_trial": disk / 1024 / len(ends),
    }


def plain(trials: int) -> float:
    """Seconds per trial of `tune.Tuner` with `OptunaSearch` and a function trainable, defaults otherwise."""
    import ray
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    ends: list[float] = []

    class Clock(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            ends.append(time.perf_counter())

    def trainable(config: dict[str, Any]) -> None:
        tune.report({"loss": config["a"]})

    space = {name: tune.uniform(0, 1) for name in "abcdefghijkl"}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    search_alg=ConcurrencyLimiter(OptunaSearch(metric="loss", mode="min"), max_concurrent=2),
                    num_samples=trials,
                ),
                run_config=tune.RunConfig(storage_path=scratch, verbose=0, callbacks=[Clock()]),
            ).fit()
    finally:
        ray.shutdown()
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--plain", type=int, default=40)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--samplers", default="random,tpe", help="of the long studies")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"ours": ours(args.trials, "tpe")}
    print(
        f"ours: {result['ours']['s_per_trial']:.3f} s per trial, {result['ours']['disk_kib_per_trial']:.1f} KiB on disk"
    )
    if args.plain:
        result["plain_s_per_trial"] = plain(args.plain)
        ratio = result["plain_s_per_trial"] / result["ours"]["s_per_trial"]
        print(f"plain Tuner and OptunaSearch: {result['plain_s_per_trial']:.3f} s per trial, {ratio:.1f} times ours")
    for sampler in args.samplers.split(",") if args.long else ():
        row = result[f"long_{sampler}"] = ours(args.long, sampler)
        print(
            f"{sampler}, {row['trials']} trials: {row['s_per_trial']:.3f} s per trial, last 200 took "
            f"{row['last_200_over_first_200']:.2f} times the first 200, memory {row['memory_growth']:+.1%} "
            f"to {row['rss_mib']:.0f} MiB, {row['disk_kib_per_trial']:.1f} KiB per trial on disk"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
