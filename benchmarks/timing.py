"""Timing that the comparisons share: several models in turns in CPU seconds, and rates and peak memory on a GPU."""

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU seconds of one call, summed over all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleave(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every repeat. The sides take turns, so that changes of the machine's load affect all of them."""
    for run in sides.values():
        run()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(cpu_seconds(run))
    return times


def report(title: str, times: dict[str, list[float]], *, unit: float = 1.0, n_ours: int = 1) -> None:
    """Print minimum and median of every side, and the ratios of our medians to those of the peers.

    Args:
        unit: units of work per repeat, such as its number of steps or seconds of audio.
        n_ours: number of our models, which are the first sides.
    """
    medians = {name: statistics.median(values) / unit for name, values in times.items()}
    for name, values in times.items():
        print(f"{title:28} {name:10} min {min(values) / unit:7.4f}  median {medians[name]:7.4f} CPU s")
    # Ratios below 1 mean that ours is faster.
    names = list(medians)
    for ours in names[:n_ours]:
        for theirs in names[n_ours:]:
            print(f"{title:28} {ours} / {theirs} = {medians[ours] / medians[theirs]:.3f}", flush=True)


def measure(run: Callable[[], object], repeats: int, *, n_warm: int = 3) -> dict[str, float]:
    """Median and minimum seconds of a call, and its peak memory in GiB (0 on a CPU), after `n_warm` calls."""
    has_gpu = torch.cuda.is_available()
    for _ in range(n_warm):
        run()
    if has_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    # Each call is synchronised, so that its time is that of the GPU.
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if has_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0.0
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "peak_gib": peak}


class ResultRows:
    """Measurements of one part, printed as they are made.

    Args: args: flags of `benchmarks/cuda.py`.
    """

    def __init__(self, args: Any):
        self.args, self.rows = args, []
        self.device = torch.device(args.device)
        self.is_small = args.device == "cpu"  # The same code at sizes that a CPU computes in seconds.

    def size(self, full: Any, small: Any) -> Any:
        """A size of the comparison, or the one that stands for it on a CPU."""
        return small if self.is_small else full

    def has_package(self, name: str) -> bool:
        """Whether a peer's package is installed; it is left out with a note where it is not."""
        is_there = importlib.util.find_spec(name) is not None
        if not is_there:
            print(f"{name} is not installed: its side is left out (pip install -r requirements-bench.txt)", flush=True)
        return is_there

    def add(self, what: str, side: str, run: Callable[[], object], *, unit: str, n_units: float) -> None:
        """Measure a side. One call processes `n_units` of `unit`."""
        row = {"what": what, "side": side, **measure(run, self.args.repeats, n_warm=self.size(3, 1))}
        row[f"{unit}_per_s"] = n_units / row["median_s"]
        self.rows.append(row)
        shown = f"{row['median_s'] * 1e3:9.2f} ms  {row[f'{unit}_per_s']:12,.1f} {unit}/s  {row['peak_gib']:6.2f} GiB"
        print(f"{what:34} {side:16} {shown}", flush=True)

    def add_step(self, what: str, models: dict[str, nn.Module], step: Callable, *, unit: str, n_units: float) -> None:
        """Measure the step of every side, with --compile also compiled.

        Args: step: model -> function of one step.
        """
        for name, model in models.items():
            model.to(self.device)  # one model at a time, so that its memory is measured alone
            self.add(what, name, step(model), unit=unit, n_units=n_units)
            if self.args.compile:
                torch._dynamo.reset()  # no graphs of earlier models
                model.compile()
                self.add(f"{what}, compiled", name, step(model), unit=unit, n_units=n_units)
            model.to("cpu")
            free_memory()


def free_memory() -> None:
    """Return what no tensor holds any more to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
