"""The sections of the page: what one run has learnt, as HTML."""

import datetime
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from utils.reporting.curves import chart
from utils.reporting.markup import Markup, tag
from utils.reporting.media import Media
from utils.reporting.runs import Clip, Run
from utils.reporting.scores import Figure, Scores
from utils.reporting.times import Step, duration
from utils.reporting.views import View

MAX_IMAGES, MAX_CLIPS, MAX_TEXTS = 12, 8, 8  # of a folder of generated files
SHEET_TITLES = {"contact_sheet": "Held-out samples", "sheet": "Generated"}
LOGGED = 3  # images of TensorBoard that are shown where there is no contact sheet
ALIGNMENTS = ("alignment", "durations")  # in the names of TensorBoard's images


def section(view: View, run: Run, scores: Sequence[Scores], media: Media, steps: Sequence[Step]) -> Markup:
    """Everything about a run."""
    own = [step for step in steps if Path(step.output).is_relative_to(run.folder)]
    parts = [
        tag("h2", view.title),
        tag("p", view.meaning, class_="soft"),
        facts(run, own),
        figures([figure for table in scores if (figure := table.figure())]),
        notes(run, view),
        sheets(run, media),
        clips(run.clips(), media),
        *generated(run, media),
        tables(scores, run.metrics.get("definitions")),
        curves(view, run),
        commands(own),
    ]
    return tag("section", parts, id=anchor(view))


def missing(commands: Sequence[tuple[str, str]]) -> Markup | None:
    """What stands in the place of runs that do not exist.

    Args: commands: title of the stage and the command that makes it.
    """
    if not commands:
        return None
    rows = [tag("tr", tag("td", title), tag("td", tag("code", command), class_="left")) for title, command in commands]
    table = tag("div", tag("table", tag("tbody", rows)), class_="scroll")
    # Recipes have all flags; a script has others, of the data.
    hint = (
        tag("p", "With the flags that --help lists.", class_="soft")
        if any("--" in row[1] for row in commands)
        else None
    )
    return tag("section", tag("h2", "Not there yet"), hint, table, id="missing", class_="missing")


def anchor(view: View) -> str:
    """The name by which links find a section."""
    return re.sub(r"[^a-z]+", "-", view.title.lower())


def trained(run: Run, steps: Sequence[Step]) -> str:
    """How long a run was trained, as its recipe says; "" where that is not known."""
    seconds = [step.seconds for step in steps if Path(step.output) == run.folder]
    return duration(sum(seconds)) if seconds else ""


def facts(run: Run, steps: Sequence[Step]) -> Markup:
    """What was trained, how long, from which code."""
    arguments, data = run.record.get("arguments") or {}, run.metrics.get("data") or run.record.get("data") or {}
    n_parameters, time = run.n_parameters(), trained(run, steps)
    n_ranks = run.record.get("n_ranks") or 1
    shown = {
        "preset": run.record.get("preset"),
        "parameters": n_parameters and millions(n_parameters),
        "steps": f"{run.step:,}" + (f" of {run.n_steps:,}" if run.n_steps > run.step else "") if run.step else None,
        "batch": batch_of(arguments, n_ranks),
        "trained for": time or None,
        "processes": n_ranks if n_ranks > 1 else None,
        "device": run.metrics.get("device"),
        "data": data.get("folder"),
        "commit": run.record.get("git_commit"),
        "finished": run.checkpoint and day_of(run.checkpoint),
    }
    return tag(
        "div", [tag("span", f"{name} ", tag("b", value)) for name, value in shown.items() if value], class_="facts"
    )


def batch_of(arguments: dict[str, Any], n_ranks: int) -> str | None:
    """Samples or frames of an optimizer step, over all processes."""
    n_parts = n_ranks * (arguments.get("gradient_accumulation_steps") or 1)
    for name, unit in (("batch_frames", " frames"), ("batch_tokens", " tokens"), ("batch_size", "")):
        if isinstance(size := arguments.get(name), int) and size:
            return f"{size * n_parts:,}{unit}"
    return None


def millions(number: int) -> str:
    """A number of parameters in a few digits."""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.0f} k"


def day_of(path: Path) -> str:
    """When a folder was written, to the minute."""
    return datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def figures(figures: Sequence[Figure]) -> Markup | None:
    """The metrics that sum up the tables: bars of the model and of its references."""
    boxes = []
    for figure in figures:
        longest = max([abs(bar.value) for bar in figure.bars]) or 1
        rows = []
        for bar in figure.bars:
            filled = tag("i", style=f"width:{100 * abs(bar.value) / longest:.1f}%")
            cells = [tag("span", bar.label), tag("span", filled, class_="track"), tag("b", bar.text)]
            rows.append(tag("div", *cells, class_="row model" if bar.is_model else "row"))
        hint = {"high": "higher is better", "low": "lower is better"}.get(figure.better)
        metric = tag("small", ", ".join(filter(None, (figure.metric, hint))))
        boxes.append(tag("div", tag("h4", figure.title, " ", metric), rows, class_="figure"))
    return tag("div", boxes, class_="figures") if boxes else None


def notes(run: Run, view: View) -> list[Markup]:
    """What could not be read, and what is still to be done."""
    texts = list(dict.fromkeys(run.problems))
    if run.checkpoint and run.n_steps > run.step:
        texts.append(f"step {run.step:,} of {run.n_steps:,}: {view.going_on(run.folder.name)}")
    if run.checkpoint and not run.metrics:
        texts.append(f"not evaluated: python evaluate.py --checkpoint {run.folder}")
    return [tag("p", text, class_="note") for text in texts]


def sheets(run: Run, media: Media) -> list[Markup]:
    """Contact sheets of the evaluation, or the newest images of the training where there are none; alignments."""
    found: list[tuple[str, Path | bytes]] = []
    for file in run.sheets():
        direction = file.stem.removeprefix("contact_sheet").strip("_").replace("-", " to ")
        found.append((f"{SHEET_TITLES['contact_sheet']}{f', {direction}' if direction else ''}", file))
    logged = run.logged_images()
    if not found:
        names = [name for name in logged if not any(word in name for word in ALIGNMENTS)]
        for name in names[:LOGGED]:
            step, content = logged[name]
            found.append((f"{name.rpartition('/')[2].capitalize()}, at step {step:,} of the training", content))
    for name, (step, content) in logged.items():
        if any(word in name for word in ALIGNMENTS):
            title = f"Alignment of text and speech: {name.rpartition('/')[2]}, at step {step:,} of the training"
            found.append((title, content))
    return [sheet(title, image) for title, source in found if (image := media.image(source, title))]


def sheet(title: str, image: Markup) -> Markup:
    """A large image with its title."""
    return tag("figure", tag("figcaption", title), tag("div", image, class_="frame"), class_="sheet")


def generated(run: Run, media: Media) -> Iterator[Markup]:
    """What inference has written into the run's folder."""
    for folder, settings in run.generated():
        title = tag("h3", folder.name.replace("_", " ").capitalize())
        for parts in (
            gallery(folder, settings, media),
            clips(spoken(folder, settings, run.captions()), media),
            texts(settings),
            answers(settings, media),
        ):
            if parts:
                yield Markup(title + parts)


def listed(settings: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of a list in settings.json."""
    rows = settings.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def gallery(folder: Path, settings: dict[str, Any], media: Media) -> Markup | None:
    """Generated images with their prompts."""
    shown = []
    for row in listed(settings, "images")[:MAX_IMAGES]:
        if image := media.image(folder / str(row.get("file")), str(row.get("prompt"))):
            shown.append(tag("figure", image, tag("figcaption", row.get("prompt"))))
    return tag("div", shown, class_="gallery") if shown else None


def spoken(folder: Path, settings: dict[str, Any], captions: Mapping[str, str]) -> list[Clip]:
    """Generated or reconstructed clips with what they say.

    Args: captions: stem of a raw file -> its text.
    """
    found = []
    for row in listed(settings, "files"):
        files = {}
        if isinstance(row.get("file"), str):
            files["generated"] = folder / row["file"]
        for name, label in (("input", "recording"), ("vocoder", "vocoder"), ("reconstruction", "VAE and vocoder")):
            file = row.get(name)
            file = (
                folder / str(file.get("file"))
                if isinstance(file, dict)
                else Path(file)
                if isinstance(file, str)
                else None
            )
            if file:
                files[label] = file
        text = row.get("text") or row.get("prompt") or captions.get(Path(str(row.get("input"))).stem)
        found.append(Clip(str(text or row.get("input") or ""), files))
    return found


def clips(clips: Sequence[Clip], media: Media) -> Markup | None:
    """Players of clips, with what they say."""
    shown = []
    for clip in clips[:MAX_CLIPS]:
        players = [
            tag("div", tag("span", label), player)
            for label, file in clip.files.items()
            if file.is_file() and (player := media.audio(file, f"{label}: {clip.text}"))
        ]
        if players:
            shown.append(tag("div", tag("p", f"“{clip.text}”"), tag("div", players, class_="players"), class_="clip"))
    return Markup("".join(shown)) if shown else None


def texts(settings: dict[str, Any]) -> Markup | None:
    """Prompts with their continuations."""
    rows = listed(settings, "texts")[:MAX_TEXTS]
    shown = [tag("blockquote", tag("b", row.get("prompt")), str(row.get("continuation") or "")) for row in rows]
    return Markup("".join(shown)) if shown else None


def answers(settings: dict[str, Any], media: Media) -> Markup | None:
    """Prompts of a multimodal model with its answers."""
    shown = []
    for row in listed(settings, "answers"):
        prompt, answer, modality = (str(row.get(name) or "") for name in ("prompt", "answer", "modality"))
        # A prompt may be a file, which is shown, too.
        question: Any = tag("p", f"“{prompt}”")
        if (file := Path(prompt)).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and file.is_file():
            question = media.image(file, prompt) or question
        elif file.suffix.lower() in (".wav", ".flac", ".mp3") and file.is_file():
            question = media.audio(file, prompt) or question
        reply: Any = tag("p", f"“{answer}”") if modality == "text" else None
        if modality == "image":
            reply = media.image(Path(answer), prompt)
        elif modality == "audio":
            reply = media.audio(Path(answer), prompt)
        cells = [
            tag("div", tag("span", name), part) for name, part in (("asked", question), ("answered", reply)) if part
        ]
        shown.append(tag("div", tag("div", cells, class_="players answer"), class_="clip"))
    return Markup("".join(shown)) if shown else None


def tables(scores: Sequence[Scores], definitions: Any) -> Markup | None:
    """All metrics, and what they mean."""
    if not scores:
        return None
    parts: list[Any] = [html_table(table.table()) for table in scores]
    if isinstance(definitions, dict):
        meanings = [(tag("dt", name), tag("dd", text)) for name, text in definitions.items()]
        parts.append(tag("details", tag("summary", "What the metrics mean"), tag("dl", *itertools.chain(*meanings))))
    return Markup(tag("h3", "Metrics") + Markup("".join(parts)))


def html_table(table: Table) -> Markup:
    """A table of the console as HTML."""
    headings = []
    for column in table.columns:
        title, _, hint = str(column.header).partition("\n")
        headings.append(tag("th", title, tag("small", hint) if hint else None))
    body = []
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns))):
        body.append(tag("tr", [tag("td", cell) for cell in cells], class_=str(row.style or "") or None))
    content = [tag("caption", table.title), tag("thead", tag("tr", headings)), tag("tbody", body)]
    return tag("div", tag("table", content), class_="scroll")


def curves(view: View, run: Run) -> Markup | None:
    """Training curves."""
    charts = [
        chart({label: run.curve(name) for label, name in names.items()}, title) for title, names in view.curves.items()
    ]
    charts = [one for one in charts if one]
    return Markup(tag("h3", "Training") + tag("div", charts, class_="charts")) if charts else None


def commands(steps: Sequence[Step]) -> Markup | None:
    """The commands of the recipe that made the run."""
    if not steps:
        return None
    lines = [tag("pre", step.command) for step in steps]
    return tag("details", tag("summary", "How it was made"), lines)
