"""The page: a tab per task, made by the modules of `utils/app/tabs/`."""

from collections.abc import Callable, Iterable
from typing import Any

from utils.app.arguments import AppArguments
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs
from utils.app.tabs import chat, draw, metrics, rebuild, speak, voice, watch, write

# Name -> what makes its components. A new tab is a module with a function `build`, and a line here.
TABS: dict[str, Callable[[Context], None]] = {
    "Draw": draw.build,
    "Rebuild image": rebuild.build,
    "Speak": speak.build,
    "Voice": voice.build,
    "Write": write.build,
    "Chat": chat.build,
    "Watch": watch.build,
    "Metrics": metrics.build,
}
TITLE = "MegaTransformer"
# Uploads and results in the temporary folder: looked through so often, and deleted after so long, in seconds.
DELETE_CACHE = (600, 3600)


def check_nothing_twice(gr: Any, components: Iterable[Any]) -> None:
    """Hand on what visitors send as it is: jobs check it as flags of scripts, and say in our words what is wrong.
    Gradio's own check of sliders and lists would come first, with words of its own."""
    for component in components:
        if isinstance(component, gr.Slider):
            component.preprocess = lambda value: value if isinstance(value, int | float) else None
        elif isinstance(component, gr.Dropdown | gr.Radio):
            component.preprocess = lambda value: value


def build_page(gr: Any, args: AppArguments) -> tuple[Any, Jobs]:
    """The page as `gradio.Blocks`, which `utils.app.server.serve` starts, and its jobs.

    Args: gr: the package gradio.
    """
    context = Context(gr, args, Runs(args.runs), Models(), Jobs(gr))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(
            f"# {TITLE}\nThe checkpoints in `{args.runs}`. One job computes at a time, others wait; every tab shows "
            "the command line that does the same."
        )
        tabs = []
        for name, build in TABS.items():
            with gr.Tab(name) as context.tab:
                build(context)
            tabs.append(context.tab)
        context.switch_timers(tabs)
        # Checkpoints that came since the last time.
        outputs = [component for _, choice, notice in context.choices for component in (choice, notice)]
        page.load(context.refreshed, outputs=outputs, queue=False, api_visibility="private", show_progress="hidden")
        check_nothing_twice(gr, page.blocks.values())
    return page.queue(max_size=args.queue_size, api_open=False), context.jobs
