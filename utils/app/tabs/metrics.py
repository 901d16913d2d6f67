"""Tab Metrics: what `evaluate.py` has measured of two runs or checkpoints, side by side; it computes nothing."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from PIL import Image

from utils.app.context import Context
from utils.app.metrics import MAX_SHEETS, conditions, evaluated, names, read_evaluated, sheets_of, table


@dataclasses.dataclass
class Comparison:
    """What the tab shows.

    Attributes:
        notes: what is to be known before the numbers are compared.
        headings, rows: of the table.
        sheets: names of contact sheets with those of both, None where there is none.
        definitions: of the metrics, as Markdown.
        commands: make the metrics.
    """

    notes: str
    headings: list[str]
    rows: list[list[str]]
    sheets: list[tuple[str, list[Image.Image | None]]]
    definitions: str
    commands: str


def compare(context: Context, *chosen: str | None) -> Comparison:
    """The comparison of two runs or checkpoints.

    Raises: ValueError, OSError: one is none, they are of different stages, or a file is damaged.
    """
    first, second = both = [evaluated(context.runs, name) for name in chosen]
    headings, rows = table(first, second)
    missing = [one.name for one in both if one.folder is None]
    notes = [f"{name} has no metrics yet: run its command below" for name in dict.fromkeys(missing)]
    differing = [] if missing else conditions(first, second)
    if differing:
        notes.append("measured under different conditions: " + "; ".join(differing))
    if not missing and not differing:
        notes.append("measured under the same conditions")
    known = {**first.metrics.get("definitions", {}), **second.metrics.get("definitions", {})}
    return Comparison(
        notes="\n".join(notes),
        headings=headings,
        rows=rows,
        sheets=sheets_of(context.runs, *both),
        definitions="\n".join(f"- **{name}**: {text}" for name, text in known.items()),
        commands="\n".join(dict.fromkeys(one.command for one in both)),
    )


def first_pair(context: Context, known: Sequence[str]) -> tuple[str | None, str | None]:
    """What is compared at first: the newest metrics with the next ones of their stage, or with themselves.

    Args: known: the names that can be compared.
    """
    if not known:
        return None, None
    with contextlib.suppress(OSError, ValueError):  # The newest may be damaged.
        newest = read_evaluated(context.runs, known[0])
        for name in known[1:]:
            with contextlib.suppress(OSError, ValueError):  # It is damaged, or of another stage.
                table(newest, read_evaluated(context.runs, name))
                return known[0], name
    return known[0], known[0]


def build(context: Context) -> None:
    """The components of the tab, and when it compares."""
    gr = context.gr
    gr.Markdown("Two runs or checkpoints side by side, as `evaluate.py` has measured them.")
    known = names(context.runs)
    pair = first_pair(context, known)
    with gr.Row():
        options = {"choices": known, "allow_custom_value": True}
        first = gr.Dropdown(value=pair[0], label="first run or checkpoint", **options)
        second = gr.Dropdown(value=pair[1], label="second run or checkpoint, of the same stage", **options)
    notes = gr.Textbox(label="notes", lines=1, max_lines=12, interactive=False)
    scores = gr.Dataframe(
        headers=["row", "metric", "first", "second", "difference", "better"],
        datatype="str",
        interactive=False,
        wrap=True,
        column_widths=["16%", "20%", "20%", "20%", "14%", "10%"],
        max_height=1200,
        label="metrics; difference: second minus first",
        show_label=True,
    )
    sheets = []
    for _ in range(MAX_SHEETS):
        with gr.Row():
            sheets += [context.image(), context.image()]
    with gr.Accordion("What the metrics mean", open=False):
        definitions = gr.Markdown()
    line = context.command()
    shown = [notes, scores, *sheets, definitions, line]

    def updates(*chosen: str | None) -> list[Any]:
        result = compare(context, *chosen)
        images = []
        for name, pair in result.sheets:
            for side, image in zip(("first", "second"), pair):
                images.append(gr.update(value=image, label=f"{name} of the {side}", visible=True))
        images += [gr.update(value=None, visible=False)] * (len(sheets) - len(images))
        rows = {"headers": result.headings, "data": result.rows}
        return [result.notes, rows, *images, result.definitions, result.commands]

    def show(first: str | None, second: str | None) -> list[Any]:
        try:
            return updates(first, second)
        except Exception as error:
            raise context.jobs.error_of(error) from None

    def opened(*chosen: str | None) -> list[Any]:
        known = names(context.runs)
        lists = [gr.update(choices=known), gr.update(choices=known)]
        try:
            return [*lists, *updates(*chosen)]
        except (OSError, ValueError) as error:  # Nobody has chosen these two yet.
            return [*lists, str(error), *[gr.skip()] * (len(shown) - 1)]

    # Beside the queue, in which jobs of models wait.
    quiet = {"queue": False, "show_progress": "hidden"}
    gr.on([first.input, second.input], show, inputs=[first, second], outputs=shown, api_name="metrics", **quiet)
    outputs = [first, second, *shown]
    context.tab.select(opened, inputs=[first, second], outputs=outputs, api_visibility="private", **quiet)
