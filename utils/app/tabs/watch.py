"""Tab Watch: how a run goes on, from what it writes for TensorBoard; it computes nothing and waits for no job."""

import contextlib
import dataclasses
import io
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dataset_loading.locks import owner_of
from utils.app.context import Context
from utils.app.events import IMAGES, EventLog, EventLogs, number_of
from utils.app.jobs import message_of
from utils.app.run_folders import choose_run, run_names
from utils.checkpoints import log_folder
from utils.training.log_lines import duration, log_line
from utils.training.planning.phases import first_steps

REFRESH_SECONDS = 3.0
READ_SECONDS = 0.7  # At most, of one look: a long run is read in several.
MAX_CURVES = 6
N_DEFAULT_CURVES = 4
MAX_IMAGES = 4
MAX_POINTS = 400  # of a curve, which is about as wide in pixels


@dataclasses.dataclass
class View:
    """What the tab shows of a run.

    Attributes:
        runs: the names of all runs.
        status: its last log line, and whether it runs.
        tags: of all its curves.
        curves: chosen tag -> points [step, value].
        images: tag -> step and file content of the last one.
        command: starts TensorBoard.
        version, image_version: equal where the curves and lists, or the images, are.
    """

    runs: list[str]
    status: str
    tags: list[str]
    curves: dict[str, list[list[float]]]
    images: dict[str, tuple[int, bytes]]
    command: str
    version: tuple[Any, ...]
    image_version: tuple[Any, ...]


def look(context: Context, logs: EventLogs, name: str | None, tags: Sequence[str]) -> View:
    """A run as it is now.

    Args:
        name: of the run.
        tags: of the curves; none: losses and scores, as far as there are any.
    Raises: ValueError: there is no such run, or more than `MAX_CURVES` tags.
    """
    if len(tags) > MAX_CURVES:
        raise ValueError(f"{len(tags)} curves are more than {MAX_CURVES}; TensorBoard shows all")
    names = run_names(context.runs)
    run = choose_run(context.runs, name)
    log = logs.of(run)
    with log.lock:
        log.read(READ_SECONDS)
        known = log.tags()
        chosen = list(tags) or default_tags(known)
        curves = {tag: log.curves[tag].points(MAX_POINTS) if tag in known else [] for tag in chosen}
        return View(
            runs=names,
            status=status_of(log, is_running=owner_of(run) is not None),
            tags=known,
            curves=curves,
            images=dict(log.images),
            command=shlex.join(["tensorboard", "--logdir", str(log_folder(run))]),
            version=(name, log.n_read, tuple(chosen), tuple(names)),
            image_version=(name, *((tag, step) for tag, (step, _) in log.images.items())),
        )


def default_tags(tags: Sequence[str]) -> list[str]:
    """The curves that are shown first: losses, then what evaluations score."""
    groups = ("train/loss", "eval/loss", "eval/", "listening/", "loss/", "train/")
    ranked = sorted(tags, key=lambda tag: next((n for n, group in enumerate(groups) if tag.startswith(group)), 99))
    return ranked[:N_DEFAULT_CURVES]


def status_of(log: EventLog, *, is_running: bool) -> str:
    """The last log line of a run, and below it what it does now."""
    if log.is_behind:
        return f"reading {log.run.name}: {100 * log.n_read / log.n_bytes:.0f} %"
    age = f", last entry {duration(max(time.time() - log.moment, 0))} ago" if log.moment else ""
    state = f"running{age}" if is_running else f"not running{age}"
    damage = [f"{name} cannot be read to its end" for name in log.damaged]
    n_steps = log.n_steps()
    if not log.history:
        return "\n".join([f"no training step was logged yet: {state}", *damage])
    step = log.history[-1][0]
    values = log.last_values(step)
    # The time that is left is that of a run which goes on.
    history = log.history if is_running else ()
    slower_from = first_steps({name: number_of(text) for name, text in log.flags.items()}).values()
    line = log_line(step, n_steps, values, history, slower_from) if n_steps else f"step {step}"
    ended = n_steps is not None and step >= n_steps and not is_running
    return "\n".join([line, f"has made all its steps{age}" if ended else state, *damage])


def build(context: Context) -> None:
    """The components of the tab, and when it looks."""
    gr, logs = context.gr, EventLogs()
    gr.Markdown("How a run goes on: its last log line, curves and images, from what it writes for TensorBoard.")
    with gr.Row():
        label = "run; the one that logged last is the first"
        # Without a value, which would be that of the start of the page: whoever opens the tab gets the newest.
        run = gr.Dropdown([], value=None, label=label, allow_custom_value=True, scale=2, min_width=300)
        label = f"curves, at most {MAX_CURVES}; none: losses and scores"
        options: dict[str, Any] = {"multiselect": True, "max_choices": MAX_CURVES, "allow_custom_value": True}
        tags = gr.Dropdown([], value=[], label=label, scale=3, min_width=300, **options)
    status = gr.Textbox(label=f"last log line; looked at every {REFRESH_SECONDS:g} s", lines=2, interactive=False)
    plots = []
    for _ in range(0, MAX_CURVES, 2):
        with gr.Row():
            options = {"x": "step", "y": "value", "y_title": " ", "height": 240, "min_width": 320, "visible": False}
            # Steps as they are, such as 250 and 1,000,000.
            options |= {"x_axis_format": ",.12~g", "y_axis_format": ".6~g"}
            plots += [gr.LinePlot(**options), gr.LinePlot(**options)]
    with gr.Row():
        images = [context.image() for _ in range(MAX_IMAGES)]
    line = context.command()
    seen = gr.State(((), ()))  # the versions that the visitor has
    shown = [run, tags, status, *plots, *images, line, seen]

    def updates(view: View, seen: tuple[Any, Any], chosen: Any) -> list[Any]:
        plotted = [plot_update(gr, tag, points) for tag, points in view.curves.items()]
        hidden = [gr.update(visible=False)] * (MAX_CURVES - len(plotted))
        lists = [gr.update(choices=view.runs), gr.update(choices=view.tags, **chosen)]
        grids = [gr.skip()] * MAX_IMAGES
        if view.image_version != seen[1]:
            grids = [gr.update(value=image, label=label, visible=True) for image, label in decoded(view.images)]
            grids += [gr.update(visible=False)] * (MAX_IMAGES - len(grids))
        return [*lists, view.status, *plotted, *hidden, *grids, view.command, (view.version, view.image_version)]

    def watch(name: str, chosen: list[str], **kept: Any) -> list[Any]:
        try:
            return updates(look(context, logs, name, chosen), ((), ()), kept)
        except Exception as error:
            return refused(error)

    def refused(error: Exception) -> list[Any]:
        # Nothing of another run stays below the message.
        hidden = [gr.update(visible=False)] * (len(plots) + len(images))
        return [gr.update(choices=run_names(context.runs)), gr.skip(), message_of(error), *hidden, "", ((), ())]

    def glance(name: str | None, chosen: list[str], seen: tuple[Any, Any]) -> list[Any]:
        skipped = [gr.skip()] * len(shown)
        newest = next(iter(run_names(context.runs)), None) if name is None else name
        try:
            view = look(context, logs, newest, chosen)
        except (OSError, ValueError) as error:
            return refused(error)
        if name is None:
            return [gr.update(choices=view.runs, value=newest), *updates(view, seen, {})[1:]]
        # Plots keep what the visitor points at while nothing changes.
        return [*skipped[:2], view.status, *skipped[3:]] if view.version == seen[0] else updates(view, seen, {})

    # Beside the queue, in which jobs of models wait.
    quiet = {"queue": False, "show_progress": "hidden"}
    tags.input(watch, inputs=[run, tags], outputs=shown, api_name="watch", **quiet)
    private = {"outputs": shown, "api_visibility": "private", **quiet}
    run.input(lambda name: watch(name, [], value=[]), inputs=[run], **private)  # Another run has other curves.
    gr.on([context.timer(REFRESH_SECONDS).tick, context.tab.select], glance, inputs=[run, tags, seen], **private)


def plot_update(gr: Any, tag: str, points: list[list[float]]) -> Any:
    """A curve as a plot takes it; its form is that of `gradio.components.native_plot.PlotData`."""
    kinds = {"step": "quantitative", "value": "quantitative"}
    data = {"columns": list(kinds), "data": points, "datatypes": kinds, "mark": "line"}
    steps = [step for step, _ in points] or [0, 1]
    limits = [min(steps), max(steps)]
    if limits[0] == limits[1]:
        # One step is no line, and no range of the axis either.
        data["mark"], limits = "point", [0, 2 * limits[0] or 1]
    # Limits are always given, since no update takes them away.
    return gr.update(value=data if points else None, label=tag, show_label=True, visible=True, x_lim=limits)


def decoded(images: Mapping[str, tuple[int, bytes]]) -> list[tuple[Image.Image, str]]:
    """The images of a `View` with labels; damaged ones are left out."""
    found = []
    for tag, (step, content) in sorted(images.items())[:MAX_IMAGES]:
        # Pillow raises SyntaxError for broken PNG files.
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(io.BytesIO(content)) as image:
            found.append((image.convert("RGB"), f"{tag.removeprefix(IMAGES)}, step {step}"))
    return found
