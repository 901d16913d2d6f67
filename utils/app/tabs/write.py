"""Tab Write: a text goes on, shown token by token; that of `inference/generate_text.py` with the same flags."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.app.commands import MAX_SEED, Command, command, real_number, whole_number
from utils.app.context import Context
from utils.app.jobs import UNCHANGED, Clock, Report
from utils.checkpoints import chosen_weights
from utils.devices import compute_device
from utils.generation.arguments.text import GenerateTextArguments
from utils.generation.files import check_unicode
from utils.generation.text import TextGenerator

KIND = "text"
MAX_CHARACTERS = 8000  # of a prompt
# Settings of the tab, in the order of its fields: whole numbers with the most that the page allows, and others.
MOST = {"max_new_tokens": 1000, "top_k": 2**31, "seed": MAX_SEED, "thinking_steps": 64}
FIELDS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "thinking_steps", "exit_threshold")


def settings(checkpoint: Path, prompt: str, **values: float | None) -> Command[GenerateTextArguments]:
    """The call of the script for a tab's settings.

    Args: values: of `FIELDS`.
    Raises: ValueError: as `utils.app.commands.command`, a field without a number, or more than the page allows.
    """
    whole_number("characters of the prompt", len(prompt), MAX_CHARACTERS)
    check_unicode(prompt)
    flags: dict[str, Any] = {
        name: whole_number(name, value, MOST[name]) if name in MOST else real_number(name, value)
        for name, value in values.items()
    }
    script = "inference/generate_text.py"
    return command(script, GenerateTextArguments, checkpoint=str(checkpoint), prompts=[prompt], **flags)


@torch.inference_mode()
def write(context: Context, report: Report, name: str, prompt: str, *values: float | None) -> tuple[str, str, str]:
    """Continue a prompt.

    Args:
        report: called with outputs on the way, see `utils.app.jobs.Jobs.attach`.
        name: of the checkpoint.
        values: of `FIELDS`.
    Returns: the prompt with its continuation, a line about it, and the command line.
    Raises: ValueError, OSError: no such checkpoint, or settings that the script or the model refuses.
    """
    checkpoint = context.runs.choose(name, KIND)
    call = settings(checkpoint.folder, prompt, **dict(zip(FIELDS, values, strict=True)))
    args = call.arguments
    report(UNCHANGED, f"loading {checkpoint.name}", str(call))
    weights, device = chosen_weights(checkpoint.folder, args), str(compute_device())
    load = functools.partial(TextGenerator.load, checkpoint.folder, weights, device)
    # A generator warns of long texts once; every job has a copy.
    generator = copy.copy(context.models.get(KIND, checkpoint.folder, load))
    continuation, clock = Continuation(generator, prompt), Clock()

    def show(tokens: Sequence[int]) -> None:
        continuation.add(tokens[0])
        n_new = len(continuation.ids)
        report(prompt + continuation.text(), clock.progress(n_new, args.max_new_tokens, "token"), UNCHANGED)

    report(prompt, "reading the prompt", UNCHANGED)
    (text,) = generator.continue_texts([prompt], args, on_tokens=show)
    summary = f"{clock.rate(len(continuation.ids), 'token')}; weights {weights}, {device}"
    return prompt + text, summary, str(call)


class Continuation:
    """What follows a prompt, as far as it has been generated.

    Attributes: ids: its tokens, without the one that ends a document.
    """

    def __init__(self, generator: TextGenerator, prompt: str):
        self.generator, self.after = generator, generator.encode(prompt)
        self.ids: list[int] = []

    def add(self, token: int) -> None:
        """The next token."""
        if token != self.generator.model.config.eos_token_id:
            self.ids.append(token)

    def text(self) -> str:
        """The text so far; a character comes once all of its bytes are there."""
        return self.generator.decode(self.ids, self.after).rstrip("\ufffd")


def build(context: Context) -> None:
    """The components of the tab, and what its buttons do."""
    gr, defaults = context.gr, GenerateTextArguments()
    with gr.Row():
        with gr.Column(scale=1, min_width=380):
            checkpoint = context.choose_checkpoint(KIND)
            prompt = gr.Textbox(label="prompt", lines=3, max_lines=12, value="The lambda expression")
            n_new = gr.Slider(1, MOST["max_new_tokens"], value=defaults.max_new_tokens, step=1, label="new tokens")
            temperature = gr.Slider(0, 2, value=defaults.temperature, step=0.05, label="temperature; 0: greedy")
            with gr.Row():
                top_k = gr.Number(label="top k; 0: all tokens", value=defaults.top_k, precision=0)
                top_p = gr.Slider(0.05, 1, value=defaults.top_p, step=0.01, label="top p; 1: all tokens")
            seed = gr.Number(label="seed", value=defaults.seed, precision=0)
            with gr.Accordion("recurrent models", open=False):
                label = "thinking steps per token; 0: the model's own"
                n_steps = gr.Slider(0, MOST["thinking_steps"], value=defaults.thinking_steps, step=1, label=label)
                label = "threshold of an early exit; 0: no exits; -1: the model's own"
                exit_threshold = gr.Number(label=label, value=defaults.exit_threshold)
            button, stop = context.buttons("Write")
        with gr.Column(scale=2, min_width=320):
            text = gr.Textbox(label="text", lines=16, max_lines=32, interactive=False, buttons=["copy"])
            status, line = context.status(), context.command()
    inputs = [checkpoint, prompt, n_new, temperature, top_k, top_p, seed, n_steps, exit_threshold]
    work = functools.partial(write, context)
    context.jobs.attach(
        button, stop, work, inputs=inputs, outputs=[text, status, line], status=status, api_name="write"
    )
