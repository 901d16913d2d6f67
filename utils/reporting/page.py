"""One page of several runs: what was trained, what it makes, how well, how long it took, and what to do next.

The page is one file that needs nothing else: images, audio and styles are inside it, and it has no scripts.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from utils.evaluation.tables import Column, score_table
from utils.reporting.markup import Markup, tag
from utils.reporting.media import Media
from utils.reporting.runs import Run
from utils.reporting.scores import Scores, scores_of
from utils.reporting.sections import anchor, millions, missing, section, trained
from utils.reporting.style import STYLE
from utils.reporting.times import Step, by_stage, duration, read_steps
from utils.reporting.views import OPTIONAL, VIEWS, View

logger = logging.getLogger(__name__)

LIMIT = 14_000_000  # bytes of images and audio
TIMES = (
    "By the clock: preparing data, training, evaluation and generation. Evaluations run beside what comes next, and "
    "count where that had to wait for them."
)
MACHINE = "machine.txt"  # beside the times, see recipes/demo/steps.sh
SUMMARY = {
    "stage": Column("stage", "{}"),
    "preset": Column("preset", "{}"),
    "parameters": Column("parameters", "{}"),
    "steps": Column("steps", "{}"),
    "time": Column("trained for", "{}"),
    "result": Column("result", "{}"),
}


@dataclasses.dataclass
class Shown:
    """A stage of the page: its view, the name of its run, the run and its scores where there are some."""

    view: View
    name: str
    run: Run | None = None
    scores: Sequence[Scores] = ()

    @property
    def result(self) -> str:
        """What the text table says about it."""
        if self.run is None:
            return f"missing: {self.view.command(self.name)}"
        if self.run.checkpoint is None:
            return f"no complete checkpoint: {self.view.going_on(self.name)}"
        found = [(table.title, figure) for table in self.scores if (figure := table.figure())]
        if len(found) > 1:
            return "; ".join(f"{title}: {figure.metric} {figure.value}" for title, figure in found)
        return str(found[0][1]) if found else f"not evaluated: python evaluate.py --checkpoint {self.run.folder}"


class Report:
    """The runs of some names, in one page.

    Args:
        runs: folder of all runs, with a folder per stage.
        names: of the runs; the first one names the page.
    """

    def __init__(self, runs: Path, names: Sequence[str]):
        self.runs, self.names = runs, list(names)
        self.home = runs / self.names[0]
        self.steps: list[Step] = read_steps(self.home)
        self.shown = self.find()

    def find(self) -> list[Shown]:
        """The stages in the order of the page, each run of each; one without a run where no name has one."""
        shown = []
        for view in VIEWS:
            found = []
            for name in self.names:
                folder = self.runs / view.stage / name
                if folder.is_dir() and view.shows(run := Run.read(view.stage, folder)):
                    found.append(Shown(view, name, run, read_scores(run)))
            if not found and view.stage not in OPTIONAL:
                own = [name for name in self.names if bool(view.suffix) == name.endswith("_text")]
                found.append(Shown(view, self.names[0] if view.suffix == "" or not own else own[0]))
            shown += found
        return shown

    def summary(self) -> Table:
        """A row per stage, for the console."""
        rows = {}
        for number, shown in enumerate(self.shown):
            row = {"stage": shown.view.title, "result": shown.result}
            if run := shown.run:
                n_parameters = run.n_parameters()
                row |= {"preset": run.record.get("preset"), "steps": f"{run.step:,}" if run.step else None}
                row |= {
                    "parameters": n_parameters and millions(n_parameters),
                    "time": trained(run, self.steps) or None,
                }
            rows[number] = row
        table = score_table(rows, SUMMARY, title=f"Runs {', '.join(self.names)} in {self.runs}", evaluated=None)
        table.columns[-1].no_wrap = False
        return table

    def html(self) -> str:
        """The page."""
        media = Media(LIMIT)
        there = [shown for shown in self.shown if shown.run]
        sections = [section(shown.view, shown.run, shown.scores, media, self.steps) for shown in there if shown.run]
        absent = [(shown.view.title, shown.view.command(shown.name)) for shown in self.shown if not shown.run]
        parts = [*sections, missing(absent), self.times(), self.next()]
        if media.left_out:
            names = "; ".join(f"{name} ({reason})" for name, reason in list(media.left_out.items())[:5])
            more = f"; and {len(media.left_out) - 5} more" if len(media.left_out) > 5 else ""
            parts.append(tag("p", f"Left out: {names}{more}", class_="note"))
        head = [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", self.title),
            tag("style", Markup(STYLE)),
        ]
        body = [self.header(), tag("main", parts), self.footer()]
        return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"

    @property
    def title(self) -> str:
        """The page's title."""
        return f"MegaTransformer: {self.names[0]}"

    def header(self) -> Markup:
        """Title, what the page is about, links to the sections."""
        there = [shown for shown in self.shown if shown.run and shown.run.checkpoint]
        total = sum(step.seconds for step in self.steps)
        machine = self.machine()
        lead = [
            f"{len(there)} of {len(self.shown)} models, trained from {weights_of(there)}",
            f" in {duration(total)}" if total else "",
            f" on {machine}" if machine else "",
            ". Images, clips and scores are of data that they were not trained on.",
        ]
        links = [tag("a", shown.view.title, href=f"#{anchor(shown.view)}") for shown in self.shown if shown.run]
        if not all(shown.run for shown in self.shown):
            links.append(tag("a", "Not there yet", href="#missing"))
        if self.steps:
            links.append(tag("a", "Times", href="#times"))
        links.append(tag("a", "What next", href="#next"))
        return tag("header", tag("h1", self.title), tag("p", "".join(lead), class_="lead"), tag("nav", links))

    def machine(self) -> str:
        """The machine that the recipe ran on; "" where it is not known."""
        try:
            return (self.home / MACHINE).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def times(self) -> Markup | None:
        """Time of each stage of the recipe."""
        seconds = by_stage(self.steps)
        if not seconds:
            return None
        longest = max(max(seconds.values()), 1)
        rows = []
        for stage, value in seconds.items():
            bar = tag("div", class_="bar", style=f"width:{100 * value / longest:.1f}%")
            stopped = any(step.stage == stage and not step.is_complete for step in self.steps)
            cells = [tag("td", stage), tag("td", duration(value) + (", stopped" if stopped else ""))]
            rows.append(tag("tr", *cells, tag("td", bar, class_="bar-cell")))
        total = tag("tr", tag("td", "all"), tag("td", duration(sum(seconds.values()))), tag("td"), class_="bold")
        table = tag("table", tag("tbody", rows, total), class_="wide")
        text = tag("p", TIMES, class_="soft")
        return tag("section", tag("h2", "Times"), text, tag("div", table, class_="scroll"), id="times")

    def next(self) -> Markup:
        """Commands to go on with."""
        runs = [(shown.view, shown.run) for shown in self.shown if shown.run and shown.run.checkpoint]
        vocoder = next((run.folder for view, run in runs if view.stage == "vocoder"), None)
        parts: list[Markup] = [tag("h2", "What next")]
        if runs:
            parts.append(tag("p", "Use what was trained:", class_="soft"))
            parts.append(
                tag("pre", "\n".join(line for view, run in runs for line in view.next_commands(run, vocoder)))
            )
        parts.append(
            tag("p", "See all curves, and train on your own data (README.md has the commands):", class_="soft")
        )
        parts.append(tag("pre", "make tensorboard\npython preprocess_image_vae_dataset.py --dataset_name my_images"))
        return tag("section", parts, id="next")

    def footer(self) -> Markup:
        """Where the page comes from."""
        commits = {str(shown.run.record.get("git_commit")) for shown in self.shown if shown.run and shown.run.record}
        text = f"Made by inference/report.py from {self.runs}, commit {', '.join(sorted(commits)) or 'unknown'}."
        return tag("footer", tag("p", text))


def weights_of(shown: Sequence[Shown]) -> str:
    """What runs began with: random weights, or those of others."""
    begun = {one.view.title: one.run.begun_from for one in shown if one.run and one.run.begun_from}
    others = ", ".join(f"{title} from {path}" for title, path in begun.items())
    if not others:
        return "random weights"
    return f"given weights ({others})" if len(begun) == len(shown) else f"random weights, but {others}"


def read_scores(run: Run) -> list[Scores]:
    """The scores of a run; none, with a problem noted, where its metrics have another form."""
    try:
        scores = scores_of(run.stage, run.metrics)
        for table in scores:
            table.table()
            table.figure()
        return scores
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        run.problems.append(
            f"metrics.json has another form ({type(error).__name__}: {error}); evaluate.py writes it anew"
        )
        return []
