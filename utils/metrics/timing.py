"""Time of calls: samples per second, and the real-time factor of audio models."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch


class Stopwatch:
    """Time of calls on batches. The first call is a warm-up, which does not count if others follow."""

    def __init__(self, device: torch.device):
        self.device = device
        self.calls: list[tuple[int, float]] = []  # (samples, seconds)

    def time(self, function: Callable, batch: Sized) -> Any:
        """Call the function on the batch."""
        start = self.now()
        result = function(batch)
        self.calls.append((len(batch), self.now() - start))
        return result

    def now(self) -> float:
        """Seconds of a clock, read after the device has finished its work."""
        # Kernels run asynchronously: without waiting, only their launch would be timed.
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def per_second(self) -> float:
        """Samples per second."""
        calls = self.calls[1:] or self.calls  # Without the warm-up.
        return sum(count for count, _ in calls) / sum(seconds for _, seconds in calls)


class RealTime:
    """Real-time factor of functions called by name: seconds of computing per second of audio.

    Computing is measured in CPU seconds of one thread, which other programs do not prolong, or in seconds on the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.calls: dict[str, list[tuple[float, float]]] = {}  # name -> (seconds of computing, seconds of audio)

    def run(self, name: str, seconds_of_audio: float | Callable[[Any], float], function: Callable[[], Any]) -> Any:
        """Call the function, whose result lasts `seconds_of_audio`; or a function of the result says how long."""
        now = time.process_time if self.device.type == "cpu" else Stopwatch(self.device).now
        with one_thread():
            start = now()
            result = function()
            spent = now() - start
        seconds = seconds_of_audio(result) if callable(seconds_of_audio) else seconds_of_audio
        self.calls.setdefault(name, []).append((spent, seconds))
        return result

    def factor(self, name: str) -> float | None:
        """The factor of all calls but the first one, or of the only one; None where there is none."""
        calls = self.calls.get(name, [])
        calls = calls[1:] or calls  # Without the warm-up.
        return sum(spent for spent, _ in calls) / sum(audio for _, audio in calls) if calls else None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
