"""What the tabs of the page share: checkpoints, loaded models, jobs, limits, and components that several tabs have."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from utils.app.arguments import AppArguments
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs

ADVICE = "advice"  # class of texts that say what to do, see `utils.app.server.CSS`
BELOW_LABEL = "below-label"  # class of images that begin below their labels, see `utils.app.server.CSS`

IMAGE_BUTTONS = ["download", "fullscreen"]  # Not Gradio's third one, which would publish the image elsewhere.


@dataclasses.dataclass
class Context:
    """The page as a tab sees it.

    Attributes:
        gr: the package gradio, which is optional and therefore imported by nobody.
        args: flags of the page.
        runs, models, jobs: its checkpoints, the loaded models, and what runs the work of tabs.
        choices: dropdowns of checkpoints with the kinds that they offer and the text below them.
        tab: the `gradio.Tab` that is being built.
        timers: tabs with their timers, which tick while they are open.
    """

    gr: Any
    args: AppArguments
    runs: Runs
    models: Models
    jobs: Jobs
    choices: list[tuple[tuple[str, ...], Any, Any]] = dataclasses.field(default_factory=list)
    tab: Any = None
    timers: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)

    def choose_checkpoint(self, *kinds: str, label: str = "checkpoint") -> Any:
        """A dropdown of the complete checkpoints of some kinds, listed anew whenever the page is opened; without any,
        a text below it says which command trains one. Its value is for `Runs.choose`, which checks it."""
        listing, text = self.offers(*kinds)
        choice = self.gr.Dropdown(label=label, allow_custom_value=True, **listing)
        notice = self.gr.Markdown(elem_classes=ADVICE, **text)
        self.choices.append((kinds, choice, notice))
        return choice

    def offers(self, *kinds: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choices of a dropdown with the first one, and the text below it."""
        names = self.runs.names(*kinds)
        listing = {"choices": names, "value": names[0] if names else None}
        return listing, {"value": "" if names else self.runs.advice_of_page(*kinds), "visible": not names}

    def refreshed(self) -> list[Any]:
        """All dropdowns and their texts, for the folder as it is now."""
        return [self.gr.update(**changes) for kinds, _, _ in self.choices for changes in self.offers(*kinds)]

    def timer(self, seconds: float) -> Any:
        """A timer that ticks every so many seconds while the tab is open."""
        timer = self.gr.Timer(seconds, active=False)
        self.timers.append((self.tab, timer))
        return timer

    def switch_timers(self, tabs: Sequence[Any]) -> None:
        """Let the choice of one of all tabs start its timers and stop those of the others."""
        for tab in tabs:
            active = [timed_tab is tab for timed_tab, _ in self.timers]
            tab.select(
                functools.partial(switched, self.gr, active),
                outputs=[timer for _, timer in self.timers],
                queue=False,
                api_visibility="private",
                show_progress="hidden",
            )

    def follow(
        self, choice: Any, offers: Callable[[Any], dict[str, dict[str, Any]]], components: Sequence[Any]
    ) -> None:
        """Let components offer what fits a choice, when the page is opened and whenever the choice changes.

        Args:
            offers: from the value of the choice; one entry per component, in their order, with what to change.
        """

        def updates(value: Any) -> Any:
            changes = [self.gr.update(**change) for change in offers(value).values()]
            return changes if len(changes) > 1 else changes[0]  # Gradio takes a list for one component as its value.

        # Without triggers it is called for both.
        self.gr.on(
            fn=updates,
            inputs=[choice],
            outputs=list(components),
            queue=False,
            api_visibility="private",
            show_progress="hidden",
        )

    def buttons(self, label: str) -> tuple[Any, Any]:
        """A button that starts a job, and one that stops it."""
        with self.gr.Row():
            return self.gr.Button(label, variant="primary"), self.gr.Button("Stop", variant="stop")

    def image(self) -> Any:
        """A place for an image, invisible until there is one; it can be saved, and shared with nobody."""
        options = {
            "format": "png",
            "min_width": 480,
            "buttons": IMAGE_BUTTONS,
            "elem_classes": BELOW_LABEL,
        }
        return self.gr.Image(interactive=False, visible=False, **options)

    def status(self) -> Any:
        """A line that says how far a job is."""
        return self.gr.Textbox(label="status of the job", lines=1, interactive=False)

    def command(self) -> Any:
        """A field that shows the command line that does the same."""
        label = "the same on the command line"
        return self.gr.Textbox(label=label, lines=2, max_lines=8, interactive=False, buttons=["copy"])


def switched(gr: Any, active: Sequence[bool]) -> Any:
    """Which timers tick."""
    updates = [gr.Timer(active=is_active) for is_active in active]
    return updates[0] if len(updates) == 1 else updates
