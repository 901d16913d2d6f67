"""Components that offer what fits a choice."""

import pytest

from utils.app.arguments import AppArguments
from utils.app.context import Context
from utils.app.jobs import Jobs
from utils.app.models import Models
from utils.app.runs import Runs


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_one_component_or_several_follow_a_choice(names, tmp_path):
    """Gradio takes a list as the value of one component, and as the updates of several."""
    gr = pytest.importorskip("gradio")
    context = Context(gr, AppArguments(), Runs(tmp_path), Models(), Jobs(gr))
    with gr.Blocks() as blocks:
        choice, *followers = (gr.Dropdown(["x", "y"], value="x") for _ in ["choice", *names])
        context.follow(choice, lambda value: {name: {"choices": [f"{name} of {value}"]} for name in names}, followers)
    (function,) = blocks.fns.values()
    assert {name for _, name in function.targets} == {"load", "change"}
    updates = function.fn("y")
    for name, update in zip(names, updates if len(names) > 1 else [updates], strict=True):
        assert update["__type__"] == "update" and update["choices"] == [f"{name} of y"]
