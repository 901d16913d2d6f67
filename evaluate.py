"""Evaluate a checkpoint of any stage on held-out data: tables, metrics.json, TensorBoard, and a contact sheet.

    python evaluate.py --checkpoint runs/image_vae/demo --contact_sheet 16
    python evaluate.py --checkpoint runs/image_vae/demo --dataset my_images --max_samples 500 --output_dir out
    python evaluate.py --checkpoint runs/image_diffusion/demo --curve --curve_steps 5 10 20 --curve_scales 1 3 5
    python evaluate.py --checkpoint runs/audio_vae/demo --contact_sheet 8 --vocoder_checkpoint runs/vocoder/demo
    python evaluate.py --checkpoint runs/audio_diffusion/demo --waveforms cached_datasets/vocoder --sentences 50
    python evaluate.py --checkpoint runs/multimodal/demo --thinking_steps 1 2 4 8 16
    python evaluate.py --checkpoint runs/multimodal/world --contact_sheet 8 --beside runs/image_diffusion/demo

The stage is read from the checkpoint; flags that its evaluator does not read are refused. Results go to the run's
folder, or to --output_dir.
"""

from utils.command_line import check_flags
from utils.evaluation.arguments.every_stage import EvaluateArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(EvaluateArguments, __doc__)

import logging
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from dataset_loading.cached import evenly_spaced
from utils.checkpoints import log_folder, provenance, read_stage, resolve_checkpoint, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.console.progress import progress_shown
from utils.evaluation.audio_diffusion import AudioDiffusionEvaluator
from utils.evaluation.audio_vae import AudioVAEEvaluator
from utils.evaluation.evaluator import Evaluation, Evaluator
from utils.evaluation.image_diffusion import ImageDiffusionEvaluator
from utils.evaluation.image_vae import ImageVAEEvaluator
from utils.evaluation.recurrent_vae import RecurrentVAEEvaluator
from utils.evaluation.text import TextEvaluator
from utils.evaluation.vocoder import VocoderEvaluator
from utils.generation.exported import home_of

logger = logging.getLogger("evaluate")

# Stage -> evaluator; a new stage adds a row, and its flags to `EvaluateArguments`.
EVALUATORS: dict[str, type[Evaluator]] = {
    "image_vae": ImageVAEEvaluator,
    "recurrent_vae": RecurrentVAEEvaluator,
    "image_diffusion": ImageDiffusionEvaluator,
    "vocoder": VocoderEvaluator,
    "audio_vae": AudioVAEEvaluator,
    "audio_diffusion": AudioDiffusionEvaluator,
    "multimodal": TextEvaluator,
}


def build_evaluator(args: EvaluateArguments) -> Evaluator:
    """The evaluator of the stage that wrote the checkpoint."""
    checkpoint = resolve_checkpoint(args.checkpoint)
    stage = (record := read_stage(checkpoint))["stage"]
    if stage not in EVALUATORS:
        raise ValueError(f"{checkpoint} is of stage {stage!r}, which has no evaluator; known: {', '.join(EVALUATORS)}")
    return EVALUATORS[stage].of(record)(args, checkpoint)


def evaluate(args: EvaluateArguments) -> dict:
    """Measure, write and print the metrics of a checkpoint; returns the content of metrics.json."""
    start = time.perf_counter()
    dataset = (evaluator := build_evaluator(args)).build_dataset()
    indices = evenly_spaced(len(dataset), args.max_samples or len(dataset))
    data = evaluator.describe_data(dataset, len(indices))
    with torch.inference_mode():
        evaluation = evaluator.measure(dataset, indices)
    # metrics.json: what was evaluated, on which data, the metrics, and the versions of the code.
    report = {**evaluator.describe(), "data": data, **evaluation.metrics, **provenance()}
    report["seconds"] = time.perf_counter() - start
    files = write(evaluator, evaluation, report)
    # The tables on the console; a file has no width.
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    samples = f"{data['folder']} {data['split']}"
    console.print(f"\n[bold]{evaluator.checkpoint}[/bold], {evaluator.weights} weights, on {samples}")
    for table in evaluation.tables:
        console.print(table)
    for file in files:
        console.print(f"wrote {file}", soft_wrap=True)
    return report


def write(evaluator: Evaluator, evaluation: Evaluation, report: dict) -> list[Path]:
    """Write metrics.json, images, audio and TensorBoard; returns the paths."""
    output_dir = Path(evaluator.args.output_dir or home_of(evaluator.checkpoint))
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "metrics.json", report)
    saved = evaluation.save(output_dir)
    # One group of TensorBoard tags per data set, split and kind of weights.
    log_dir = log_folder(output_dir)
    group = f"evaluation_{Path(report['data']['folder']).name}_{report['data']['split'] or 'all'}_{report['weights']}"
    with SummaryWriter(str(log_dir)) as writer:
        evaluation.log(writer, group, evaluator.step)
    return [output_dir / "metrics.json", *saved, log_dir]


def main(argv: list[str] | None = None) -> dict:
    """The command line."""
    args = parse_arguments(EvaluateArguments, argv, __doc__ or "")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    with explained_errors(logger), progress_shown():
        return evaluate(args)


if __name__ == "__main__":
    main()
