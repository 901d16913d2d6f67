"""The model card README.md of an exported folder: what the model is, how it opens, what it needs, how it was trained,
and how good it is, from the records of its run."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoints import EXPORTED
from utils.exporting.stages import ExportedModel
from utils.generation.exported import home_of
from utils.options import flag_words

# Arguments of the run that the card names.
TRAINED_WITH = ("learning_rate", "batch_size", "gradient_accumulation_steps", "sequence_length", "ema_decay", "seed")
# What metrics.json says beside metrics.
NO_METRICS = {
    "definitions",
    "data",
    "packages",
    "threads",
    "seconds",
    "step",
    "n_clips_defined",
    "sampling",
    "model",
    "arguments",
}
N_METRICS = 40  # Numbers in the card; metrics.json has all.


def read_metrics(checkpoint: Path, step: int) -> dict[str, Any]:
    """The run's metrics.json where it is of this step; {} where there is none."""
    file = home_of(checkpoint) / "metrics.json"
    try:
        metrics = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) and metrics.get("step") == step else {}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers in nested objects, with their names joined by dots; lists are left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if name or key not in NO_METRICS:
                yield from numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, value


def model_card(
    name: str,
    kind: ExportedModel,
    record: Mapping[str, Any],
    *,
    use: str,
    needs: Mapping[str, str],
    license: str,
    metrics: Any,
) -> str:
    """The text of the card.

    Args:
        name: of the folder, or of the hub's repository.
        record: of the exported folder.
        use: how the folder opens.
        needs: what the model needs -> which one, in words.
        license: the hub's name of a licence; "" for none.
        metrics: content of metrics.json, or {}.
    """
    head = ["---", *([f"license: {license}"] if license else []), f"pipeline_tag: {kind.task}"]
    head += ["tags:", "- megatransformer", f"- {record['stage']}", "---"]
    sections = [
        *("\n".join(head), f"# {Path(name).name}", kind.summary, f"## Use\n\n{use}"),
        *(required(needs), training(record), evaluation(metrics)),
        f"## Licence\n\n{license or 'Not stated by whoever exported this model.'}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def opening(folder: str, kind: ExportedModel, speakers: Sequence[str] = (), hub_name: str = "") -> str:
    """How the folder opens; from the hub, where scripts need a copy of it.

    Args: speakers: that the model knows; the command names one.
    """
    command = kind.command_for(folder, speakers)
    name, copy = hub_name or folder, f"hf download {hub_name} --local-dir {folder}\n" if hub_name else ""
    imports, tokenizer = f"from transformers import {kind.auto_class}", []
    if kind.auto_class == "AutoModelForCausalLM":
        imports += ", AutoTokenizer"
        tokenizer = [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    lines = ["import model.auto", imports, *tokenizer, f'model = {kind.auto_class}.from_pretrained("{name}").eval()']
    code = "\n".join([*lines, kind.usage])
    return (
        f"In the folder of the MegaTransformer repository, which has the model's code:\n\n```python\n{code}"
        f"\n```\n\n```bash\n{copy}{command}\n```\n\n"
        "`docs/api.md` there generates and encodes with each model in ten lines.\n\nThe folder is also "
        "a `--checkpoint` of `evaluate.py` and a `--init_from` of the script that trains this model."
    )


def required(needs: Mapping[str, str]) -> str:
    """What the model needs beside itself."""
    if not needs:
        return ""
    return "## Needs\n\n" + "\n".join(f"- {name}: {which}" for name, which in needs.items())


def training(record: Mapping[str, Any]) -> str:
    """How the model was trained: data, length, and the flags that shaped it."""
    export, arguments, data = record[EXPORTED], record["arguments"], record.get("data") or {}
    kind = {"ema": "the moving average of the trained weights", "raw": "the weights as the optimizer left them"}
    overrides = " ".join(arguments.get("override") or [])
    rows = {
        "stage": record["stage"],
        "preset": f"{record.get('preset')}{f' with {overrides}' if overrides else ''}",
        "steps": export["step"],
        "processes": record.get("n_ranks"),
        **{name: arguments.get(name) for name in TRAINED_WITH},
        "commit": record.get("git_commit"),
        "packages": ", ".join(f"{name} {version}" for name, version in (record.get("packages") or {}).items()),
        "data": data.get("folder") and f"`{data['folder']}`, fingerprint `{data.get('fingerprint')}`",
        "weights": f"{kind[export['weights']]}, stored as {export['dtype']}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value not in (None, ""))
    return f"## Training\n\n| | |\n|---|---|\n{table}\n\n`stage.json` holds all arguments of the run."


def evaluation_command(metrics: Mapping[str, Any]) -> str:
    """The command that measured; of earlier versions, which did not record flags, with the checkpoint alone."""
    arguments = {"checkpoint": metrics.get("checkpoint"), **(metrics.get("arguments") or {})}
    words = [word for name, value in arguments.items() for word in flag_words(name, value)]
    return shlex.join(["python", "evaluate.py", *words])


def evaluation(metrics: Mapping[str, Any]) -> str:
    """Numbers of metrics.json with the command that measured them."""
    values = list(numbers(metrics))[:N_METRICS]
    if not values:
        return ""
    data = metrics.get("data") or {}
    table = "\n".join(f"| {name} | {value:.5g} |" for name, value in values)
    return (
        f"## Metrics\n\n`{evaluation_command(metrics)}` at commit {metrics.get('git_commit')}, "
        f"{metrics.get('weights')} weights, on {data.get('n_samples')} samples of `{data.get('folder')}` "
        f"({data.get('split')}):\n\n| metric | value |\n|---|---|\n{table}"
    )
