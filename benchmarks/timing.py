"""Interleaved timing of several models in CPU seconds, and the report; shared by the comparisons."""

import statistics
import time
from collections.abc import Callable


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
