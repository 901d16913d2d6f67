"""Quality over CPU time of training: our stage and Vocos' published recipe on the same clips, see `vocoder.py`.

Runs are stored in OUTPUT_DIR, in folders named after their settings; a second call measures them again without
training. --run_dirs measures the given folders instead. The time for evaluation and saving does not count, that for
loading clips does.
"""

import dataclasses
import json
import logging
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.peers.vocoder import Vocos, VocosRecipe
from dataset_loading.audio.cached import Crop, VocoderDataset
from dataset_loading.cached import evenly_spaced
from dataset_loading.collators import collate_audio
from dataset_loading.epoch_sampler import EpochSampler
from dataset_loading.files import fingerprint, read_manifest
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel
from model.audio.vocoders import Vocoder
from pretrain_vocoder import VocoderStage
from utils.checkpoints import checkpoints_in, is_complete, load_model, step_of, write_json
from utils.evaluation.tables import Column, score_table
from utils.metrics.audio import mel_l1, pesq_wb_and_mean, stoi
from utils.options import option
from utils.training.vocoder import pad_crops

logger = logging.getLogger("benchmark")
SECONDS_PER_MINUTE = 60
TIMES = "times.json"  # in the folder of a run: minutes -> optimizer steps


@dataclasses.dataclass
class QualityArguments:
    """Flags of the quality curve."""

    quality: list[float] = option([], "CPU minutes of training at which quality is measured", gt=0)
    cached_dataset: str = option("cached_datasets/audio_vocoder", "clips")
    output_dir: str = option("runs/benchmark", "folder of the runs")
    side: Literal["", "ours", "vocos"] = option(
        "", "train only one side, and measure the existing runs", only_with=("quality", bool)
    )
    config: str = option("small", "our preset")
    flags: str = option("", "further flags of pretrain_vocoder.py, in one string", only_with=("quality", bool))
    max_steps: int = option(
        0, "steps of our cosine schedule; 0: constant learning rate", ge=0, only_with=("quality", bool)
    )
    peer_batch_size: int = option(16, "crops per step in the recipe of Vocos", gt=0, only_with=("quality", bool))
    peer_segment_frames: int = option(
        64, "mel frames per crop in the recipe of Vocos", gt=1, only_with=("quality", bool)
    )
    peer_learning_rate: float = option(
        5e-4,
        "peak learning rate in the recipe of Vocos, with a cosine over the CPU time",
        gt=0,
        only_with=("quality", bool),
    )
    n_clips: int = option(10, "held-out clips that are measured", gt=0)
    seed: int = option(42, "seed of weights, data order and crops", ge=0, only_with=("quality", bool))
    run_dirs: list[str] = option([], "measure these run folders of either side, whatever their minutes; train nothing")

    def validate_run_dirs(self):
        if self.run_dirs and self.quality:
            raise ValueError("--run_dirs measures existing runs and --quality trains new ones; give one of them")


# Flags that matter to the measurement, and flags that matter to training alone.
MEASURING_FLAGS = ("cached_dataset", "output_dir", "config", "n_clips")


class Clock:
    """CPU seconds of this process since the clock was created, without pauses."""

    def __init__(self):
        self.start = time.process_time()
        self.paused_at = 0.0

    def seconds(self) -> float:
        return time.process_time() - self.start

    def pause(self) -> None:
        self.paused_at = time.process_time()

    def resume(self) -> None:
        self.start += time.process_time() - self.paused_at


class SaveAtMinutesCallback(TrainerCallback):
    """Saves a checkpoint after each number of CPU minutes, and stops the run after the last one.

    Attributes:
        steps: number of minutes -> optimizer steps.
    """

    def __init__(self, minutes: list[float], file: Path):
        self.left, self.steps, self.file = sorted(minutes), {}, file

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock = Clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.left and self.clock.seconds() >= self.left[0] * SECONDS_PER_MINUTE:
            self.steps[f"{self.left.pop(0):g}"] = state.global_step
            control.should_save, control.should_training_stop = True, not self.left
            self.clock.pause()  # until the checkpoint is written

    def on_save(self, args, state, control, **kwargs):
        self.clock.resume()

    def on_train_end(self, args, state, control, **kwargs):
        if self.left:
            logger.warning("the run ended at step %d before %s CPU minutes", state.global_step, self.left)
        write_json(self.file, self.steps)


def timed_stage(minutes: list[float]) -> type[VocoderStage]:
    """The vocoder stage with checkpoints at these CPU minutes."""

    class TimedStage(VocoderStage):
        def build_callbacks(self, writer):
            return [*super().build_callbacks(writer), SaveAtMinutesCallback(minutes, self.run_dir / TIMES)]

    return TimedStage


def run_folder(args: QualityArguments, side: str) -> Path:
    """The folder of a side's run. Its name contains a hash of clips, flags and schedule."""
    data = read_manifest(Path(args.cached_dataset), VocoderDataset.stage)["fingerprint"]
    if side == "ours":
        name, shape = f"{args.config}_{args.max_steps}_{args.seed}", shlex.split(args.flags)
    else:  # Its learning rate is a cosine over the total time.
        name = f"vocos_{args.peer_batch_size}x{args.peer_segment_frames}_{args.peer_learning_rate:g}_{args.seed}"
        shape = [f"{max(args.quality):g}"]
    digest = fingerprint([name, data, shape], n_digits=8)
    return Path(args.output_dir) / "vocoder" / f"{name}_{digest}"


def is_trained(folder: Path, minutes: list[float]) -> bool:
    """Whether a run has a checkpoint for each number of minutes."""
    file = folder / TIMES
    return file.is_file() and {f"{value:g}" for value in minutes} <= json.loads(file.read_text()).keys()


def train_ours(args: QualityArguments) -> None:
    """Train our vocoder with the command line of the stage."""
    # The run ends by the callback, so its number of steps is only that of the schedule.
    never, length = 10**9, args.max_steps or 10**6
    words = f"""--config {args.config} --run_name {run_folder(args, "ours").name} --output_dir {args.output_dir}
        --cached_dataset {args.cached_dataset} --seed {args.seed} --max_steps {length} --eval_steps {never}
        --save_steps {never} --save_total_limit {len(args.quality) + 1}"""
    schedule = [] if args.max_steps else ["--lr_scheduler_type", "constant"]
    timed_stage(args.quality).main([*words.split(), *schedule, *shlex.split(args.flags)])


def train_vocos(args: QualityArguments) -> None:
    """Train Vocos as published: AdamW, a cosine over the CPU time, random crops, no averaged weights."""
    # Data, model, and the order of the clips, all determined by the seed.
    folder, steps = run_folder(args, "vocos"), {}
    folder.mkdir(parents=True, exist_ok=True)
    dataset = VocoderDataset(args.cached_dataset, "train")
    torch.manual_seed(args.seed)
    recipe = VocosRecipe(dataset.mel, args.peer_learning_rate)
    sampler, generator = EpochSampler(len(dataset), args.peer_batch_size, args.seed), torch.Generator()
    generator.manual_seed(args.seed)
    left, total, step, epoch, clock = sorted(args.quality), max(args.quality) * SECONDS_PER_MINUTE, 0, 0, Clock()
    # Epochs until the last number of minutes has passed.
    while left:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), args.peer_batch_size):
            indices = order[first : first + args.peer_batch_size]
            # Random crops of log-mel and waveform, and a step at the learning rate of the current time.
            uniforms = torch.rand(len(indices), generator=generator).tolist()
            crops = [Crop(i, args.peer_segment_frames, uniform) for i, uniform in zip(indices, uniforms)]
            batch = collate_audio([dataset[crop] for crop in crops], dataset.mel.log_floor)
            _, waveform = pad_crops(
                batch["mel"],
                batch["waveform"],
                segment_frames=args.peer_segment_frames,
                hop_length=dataset.mel.hop_length,
                log_floor=dataset.mel.log_floor,
            )
            recipe.set_rate(0.5 * (1 + math.cos(math.pi * min(1.0, clock.seconds() / total))))
            terms = recipe.step(waveform)
            step += 1
            if step % 20 == 0:
                logger.info("vocos: step %d, %.0f CPU s, %s", step, clock.seconds(), terms)
            # Save at each number of minutes, outside the measured time.
            if clock.seconds() >= left[0] * SECONDS_PER_MINUTE:
                clock.pause()
                steps[f"{left[0]:g}"] = step
                torch.save(recipe.generator.state_dict(), folder / f"{left.pop(0):g}.pt")
                clock.resume()
                if not left:
                    break
        epoch += 1
    write_json(folder / TIMES, steps)


def saved_models(folder: Path, name: str) -> dict[str, Path]:
    """The saved models of a run by title: complete checkpoints of ours, files of weights of Vocos.

    Args: name: of the run, for the titles. They also contain minutes and steps, "?" if the run has not ended.
    Raises: FileNotFoundError: there are none.
    """
    steps = json.loads((folder / TIMES).read_text()) if (folder / TIMES).is_file() else {}
    minutes = {step: minute for minute, step in steps.items()}
    models = {}
    for path in filter(is_complete, checkpoints_in(folder)):
        step = step_of(path)
        models[f"{name}, {minutes.get(step, '?')} CPU min, {step} steps"] = path
    for path in sorted(folder.glob("*.pt"), key=lambda path: float(path.stem)):
        models[f"{name}, {path.stem} CPU min, {steps.get(path.stem, '?')} steps"] = path
    if not models:
        raise FileNotFoundError(f"{folder} holds no complete checkpoint and no weights of Vocos")
    return models


def load_saved(path: Path, dataset: VocoderDataset) -> torch.nn.Module:
    """Load a model of `saved_models`. Raises: ValueError: it has another log-mel than the clips."""
    # Ours is a checkpoint folder, Vocos a file of weights.
    if path.is_dir():
        ours = load_model(Vocoder, path)
        dataset.expect_mel(ours.config.mel, str(path))
        return ours
    vocos = Vocos(dataset.mel)
    vocos.load_state_dict(torch.load(path, weights_only=True))
    return vocos.eval()


def measure(args: QualityArguments, folders: list[Path]) -> tuple[int, dict[str, dict[str, float | None]]]:
    """Number of held-out clips, and mean metrics by row: ground truth, Griffin-Lim, and all models in the folders."""
    dataset = VocoderDataset(args.cached_dataset, "validation")
    clips = [dataset[i] for i in evenly_spaced(len(dataset), args.n_clips)]
    # Titles of the models: the name of the folder, or its path where names repeat.
    names = [folder.resolve().name for folder in folders]
    saved = {}
    for folder, name in zip(folders, names):
        saved |= saved_models(folder, name if names.count(name) == 1 else str(folder))
    untrained = Vocoder.from_preset(args.config, **dataset.mel.as_dict()).eval()
    # References, then the models.
    rows = {
        "ground truth": scores(dataset, clips, None),
        "Griffin-Lim, 60": scores(dataset, clips, lambda clip: griffin_lim(clip, dataset.mel)),
        f"ours {args.config}, untrained": scores(dataset, clips, untrained),
    }
    rows |= {title: scores(dataset, clips, load_saved(path, dataset)) for title, path in saved.items()}
    return len(clips), rows


@torch.inference_mode()
def scores(
    dataset: VocoderDataset, clips: list[dict[str, Tensor]], vocode: Callable[[Tensor], Tensor] | None
) -> dict[str, float | None]:
    """Mean metrics of clips vocoded from their log-mels; `vocode` None: of the clips themselves.

    Returns: metric -> mean over the clips for which it is defined; None where there are none.
    """
    log_mel, rate = LogMel(dataset.mel), dataset.mel.sample_rate
    values: dict[str, list[float]] = {"PESQ-wb": [], "PESQ-wb, 4 starts": [], "STOI": [], "log-mel L1": []}
    for clip in clips:
        target = clip["waveform"]
        generated = target if vocode is None else vocode(clip["mel"][None])[0].clamp(-1, 1)  # (S,)
        distance = mel_l1(log_mel(generated[None])[0], clip["mel"])
        results = *pesq_wb_and_mean(generated, target, rate), stoi(generated, target, rate), distance
        for column, value in zip(values.values(), results):
            column += [] if value is None else [value]
    return {name: sum(column) / len(column) if column else None for name, column in values.items()}


def quality(args: QualityArguments) -> None:
    """Train the missing runs, measure all of them, print, write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    folders = list(map(Path, args.run_dirs))
    # A side is trained unless its run has all checkpoints; runs that exist are measured in any case.
    for side, train in (("ours", train_ours), ("vocos", train_vocos)) if args.quality else ():
        folder = run_folder(args, side)
        if args.side in ("", side) and not is_trained(folder, args.quality):
            train(args)
        folders += [folder] if (folder / TIMES).is_file() else []
    n_clips, results = measure(args, folders)
    columns = {name: Column(name) for row in results.values() for name in row}
    title = f"{n_clips} held-out clips of {args.cached_dataset}"
    Console(width=120).print(score_table(results, columns, title=title, names={name: name for name in results}))
    file = Path(args.output_dir) / "vocoder" / "quality.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"n_clips": n_clips, "cached_dataset": args.cached_dataset, "rows": results})
