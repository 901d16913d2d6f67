"""Interleaved CPU seconds of several sides, and their report; shared by the comparisons."""

import statistics
import time
from collections.abc import Callable


def cpu_seconds(run: Callable[[], None]) -> float:
    """CPU seconds of one call, over all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def interleave(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Run the sides in turn after one warm-up each; seconds of every repeat."""
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(cpu_seconds(run))
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Minimum and median of two sides, and the ratio of medians."""
    (ours, first), (theirs, second) = times.items()
    ratio = statistics.median(first) / statistics.median(second)
    for name, values in times.items():
        print(f"{title:28} {name:10} min {min(values):7.3f}  median {statistics.median(values):7.3f} CPU s")
    print(f"{title:28} {ours} / {theirs} = {ratio:.3f}", flush=True)
