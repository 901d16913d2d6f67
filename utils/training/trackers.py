"""Where a run shows its numbers, images, sounds and texts: TensorBoard, Weights & Biases, trackio (`--report_to`).

Stages write to one writer with the methods of TensorBoard's `SummaryWriter`; `TrackerWriter` hands on to each tracker.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils.options import import_extra


def tracker_module(name: str) -> Any:
    """The package of a tracker. Raises: ValueError: it is not installed; names the command."""
    if name == "wandb":
        return import_extra("wandb", "trackers", "--report_to wandb")
    return import_extra("trackio", "trackers", "--report_to trackio")


class Tracker:
    """A run of Weights & Biases or trackio, whose packages have the same functions, as a `SummaryWriter`.

    Args:
        name: `"wandb"` or `"trackio"`.
        project: the stage.
        run: name of the run. A resumed one goes on in it.
        flags: shown as the run's configuration.
    """

    def __init__(self, name: str, project: str, run: str, flags: Mapping[str, Any]):
        self.module = tracker_module(name)
        # An identity of its own lets a resumed run go on in its charts.
        options = {"id": f"{project}-{run}"} if name == "wandb" else {}
        self.module.init(project=project, name=run, config=dict(flags), resume="allow", **options)

    def add(self, name: str, value: Any, step: int) -> None:
        """Log one value."""
        self.module.log({name: value}, step=step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A number."""
        self.add(name, float(value), step)

    def add_image(self, name: str, image: Any, step: int, *, dataformats: Literal["HWC"]) -> None:
        """An image (Y, X, 3) uint8, which TensorBoard calls HWC."""
        self.add(name, self.module.Image(image), step)

    def add_audio(self, name: str, waveform: Any, step: int, *, sample_rate: int) -> None:
        """A waveform (1, S) in [-1, 1]."""
        self.add(name, self.module.Audio((waveform[0].numpy() * 32767).astype("int16"), sample_rate=sample_rate), step)

    def add_histogram(self, name: str, values: Any, step: int) -> None:
        """A histogram of a tensor."""
        self.add(name, self.module.Histogram(values.detach().float().cpu().numpy()), step)

    def add_histogram_raw(
        self, name: str, *, bucket_limits: Any, bucket_counts: Any, global_step: int, **_: Any
    ) -> None:
        """A histogram by its buckets."""
        limits = np.asarray(bucket_limits, dtype=float)
        edges = np.concatenate([limits[:1] - 1, limits])
        self.add(name, self.module.Histogram(np_histogram=(np.asarray(bucket_counts), edges)), global_step)

    def add_text(self, name: str, text: str, step: int = 0) -> None:
        """Markdown, shown as it is written."""
        html = f"<pre>{text.replace('&', '&amp;').replace('<', '&lt;')}</pre>"
        self.add(name, self.module.Html(html), step)

    def flush(self) -> None:
        """Trackers send by themselves."""

    def close(self) -> None:
        """End the run."""
        self.module.finish()


class TrackerWriter:
    """Hands what is written on to several writers, in their order."""

    def __init__(self, writers: Sequence[Any]):
        self.writers = writers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            for writer in self.writers:
                getattr(writer, name)(*args, **kwargs)

        return call


def add_table(writer: Any, name: str, titles: tuple[str, str], rows: Iterable[tuple[Any, Any]]) -> None:
    """A table of two columns under Text."""
    lines = [f"| {key} | {str(value).replace('|', ' ')} |" for key, value in rows]
    writer.add_text(name, "\n".join([f"| {' | '.join(titles)} |", "|---|---|", *lines]))


def write_flags(writer: SummaryWriter, flags: Mapping[str, Any]) -> None:
    """The flags of a run in TensorBoard: a table under Text, and the tab HParams, with the loss of its evaluations."""
    add_table(writer, "flags", ("flag", "value"), sorted(flags.items()))
    # `SummaryWriter.add_hparams` would begin another run beside this one.
    values = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flags.items()
    }
    for summary in hparams(values, {"eval/loss": 0.0}):
        writer.file_writer.add_summary(summary)


def open_writer(
    report_to: Sequence[str], folder: str, *, project: str, run: str, flags: Mapping[str, Any], purge_step: int | None
) -> Any:
    """The writer of a run, None where it reports to none.

    Args:
        report_to: `"tensorboard"`, `"wandb"`, `"trackio"`, or `"none"`.
        folder: of TensorBoard's files.
        purge_step: TensorBoard forgets what an interrupted run logged from this step on.
    """
    writers: list[Any] = []
    for name in report_to:
        if name == "tensorboard":
            writers.append(SummaryWriter(folder, purge_step=purge_step))
            write_flags(writers[-1], flags)
        elif name != "none":
            writers.append(Tracker(name, project, run, flags))
    return writers[0] if len(writers) == 1 else TrackerWriter(writers) if writers else None
