"""Tab Metrics: what `evaluate.py` has measured of two runs or checkpoints, side by side; it computes nothing."""

import contextlib
import dataclasses
from typing import Any

from PIL import Image

from utils.app.context import Context
from utils.app.jobs import message_of
from utils.app.metrics import MAX_SHEETS, conditions, evaluated, fitting, names, next_measured, sheets_of, table

ALONE = "none: the first alone"  # in place of a second name


@dataclasses.dataclass
class Comparison:
    """What the tab shows.

    Attributes:
        notes: what is to be known before the numbers are compared.
        headings, rows: of the table.
        sheets: names of contact sheets with those of both or of the first, None where there is none.
        definitions: of the metrics, as Markdown.
        commands: make the metrics.
    """

    notes: str
    headings: list[str]
    rows: list[list[str]]
    sheets: list[tuple[str, list[Image.Image | None]]]
    definitions: str
    commands: str


def compare(context: Context, first: str | None, second: str | None) -> Comparison:
    """The comparison of two runs or checkpoints.

    Args: second: `ALONE` or none: the first is shown alone.
    Raises: ValueError, OSError: one is none, they are of different stages, or a file is damaged.
    """
    sides = [evaluated(context.runs, name) for name in (first, *([] if second in (None, "", ALONE) else [second]))]
    headings, rows = table(*sides)
    missing = [one.name for one in sides if one.folder is None]
    notes = [f"{name} has no metrics yet: run its command below" for name in dict.fromkeys(missing)]
    notes += [
        f"metrics.json of {one.name} is of an earlier version, which recorded no flags: its command below has defaults"
        for one in {one.name: one for one in sides}.values()
        if one.metrics and not one.metrics.get("arguments")
    ]
    if len(sides) == 2 and not missing:
        differing = conditions(*sides)
        told = f"different conditions: {'; '.join(differing)}" if differing else "the same conditions"
        notes.insert(0, f"measured under {told}")
    known = {name: text for one in reversed(sides) for name, text in one.metrics.get("definitions", {}).items()}
    return Comparison(
        notes="\n".join(notes),
        headings=headings,
        rows=rows,
        sheets=sheets_of(context.runs, *sides),
        definitions="\n".join(f"- **{name}**: {text}" for name, text in known.items()),
        commands="\n".join(dict.fromkeys(one.command for one in sides)),
    )


def choices_of(context: Context, first: str | None, second: str | None = None) -> dict[str, dict[str, Any]]:
    """What both lists offer, as arguments of dropdowns: all names, and those that can be compared with the first.

    Args:
        first: a name; None: the newest.
        second: is kept where it fits the first; else another run of its stage that has metrics takes its place.
    """
    known = names(context.runs)
    first = next(iter(known), None) if first is None else first
    others = fitting(context.runs, first, known)
    if second is None or (first in known and second not in (ALONE, *others)):
        second = None
        with contextlib.suppress(OSError, ValueError):  # One is damaged or gone since.
            second = next_measured(context.runs, str(first), others)
    return {
        "first": {"choices": known, "value": first},
        "second": {"choices": [ALONE, *others], "value": second or ALONE},
    }


def build(context: Context) -> None:
    """The components of the tab, and when it compares."""
    gr = context.gr
    gr.Markdown("Two runs or checkpoints side by side, as `evaluate.py` has measured them.")
    with gr.Row():
        # Without values, which would be those of the start of the page: whoever opens the tab gets the newest.
        options: dict[str, Any] = {"choices": [], "value": None, "allow_custom_value": True, "min_width": 300}
        first = gr.Dropdown(label="first run or checkpoint", **options)
        second = gr.Dropdown(label="second run or checkpoint, of the same stage", **options)
    notes = gr.Textbox(label="notes", lines=1, max_lines=12, interactive=False)
    scores = gr.Dataframe(
        datatype="str",
        interactive=False,
        wrap=True,
        max_height=1200,
        label="metrics; difference: second minus first; samples: clips, images or texts that a mean is of",
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

    def updates(result: Comparison) -> list[Any]:
        images = []
        for name, pair in result.sheets:
            labels = [f"{name} of the {side}" for side in ("first", "second")]
            images += [gr.update(value=image, label=label, visible=True) for label, image in zip(labels, pair)]
            images += [gr.update(value=None, visible=False)] * (2 - len(pair))
        images += [gr.update(value=None, visible=False)] * (len(sheets) - len(images))
        rows = {"headers": result.headings, "data": result.rows}
        return [result.notes, rows, *images, result.definitions, result.commands]

    def show(first: str | None, second: str | None) -> list[Any]:
        try:
            return updates(compare(context, first, second))
        except Exception as error:
            # Nothing of an earlier comparison stays below other names.
            return updates(Comparison(message_of(error), ["row", "metric"], [], [], "", ""))

    def follow(first_name: str | None, second_name: str | None) -> list[Any]:
        # Another run has others beside it, also where the former had none.
        offered = choices_of(context, first_name or "", None if second_name == ALONE else second_name)
        return [gr.update(**offered["second"]), *show(first_name, offered["second"]["value"])]

    def opened(first_name: str | None, second_name: str | None) -> list[Any]:
        offered = choices_of(context, first_name, second_name)
        lists = [gr.update(**offer) for offer in offered.values()]
        return [*lists, *show(*(offer["value"] for offer in offered.values()))]

    # Beside the queue, in which jobs of models wait.
    quiet: dict[str, Any] = {"inputs": [first, second], "queue": False, "show_progress": "hidden"}
    second.input(show, outputs=shown, api_name="metrics", **quiet)
    first.input(follow, outputs=[second, *shown], api_visibility="private", **quiet)
    context.tab.select(opened, outputs=[first, second, *shown], api_visibility="private", **quiet)
