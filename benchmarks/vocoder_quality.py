"""Quality over CPU time: our vocoder by its stage, Vocos by its published recipe, on the same clips; see `vocoder.py`.

Runs go to OUTPUT_DIR and are kept: a second call measures them again without training. CPU seconds of evaluation and
of saving do not count, those of loading clips do.
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
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.vocoder_peers import VocosRecipe
from dataset_loading.audio_dataset import VocoderDataset
from dataset_loading.collators import collate_audio
from model.audio.griffin_lim import griffin_lim
from model.audio.spectral import LogMel
from model.audio.vocoders import Vocoder
from pretrain_vocoder import VocoderStage
from utils.audio_metrics import mel_l1, pesq_wb, stoi
from utils.checkpoints import load_model, write_json
from utils.configuration import option
from utils.pictures import spread
from utils.training_utils import EpochSampler
from utils.vocoder_trainer import crop_pairs

logger = logging.getLogger("benchmark")
SECONDS_PER_MINUTE = 60
TIMES = "times.json"


@dataclasses.dataclass
class QualityArguments:
    """Flags of the quality curve."""

    quality: list[float] = option([], "CPU minutes of training at which quality is measured", gt=0)
    cached_dataset: str = option("cached_datasets/audio_vocoder", "clips")
    output_dir: str = option("runs/benchmark", "folder of the runs")
    side: Literal["", "ours", "vocos"] = option("", "train only one side now, and measure the runs that are there")
    config: str = option("small", "our preset")
    flags: str = option("", "further flags of pretrain_vocoder.py, in one string")
    max_steps: int = option(0, "steps of our schedule, a cosine; 0: a constant rate", ge=0)
    peer_batch_size: int = option(16, "crops per step of Vocos' recipe", gt=0)
    peer_segment_frames: int = option(32, "frames of its crops; published: 64", gt=1)
    peer_learning_rate: float = option(5e-4, "its peak learning rate, on a cosine over the CPU time", gt=0)
    n_clips: int = option(10, "held-out clips that are measured", gt=0)
    seed: int = option(42, "seed of weights, data order and crops", ge=0)


QUALITY_FLAGS = [field.name for field in dataclasses.fields(QualityArguments) if field.name != "quality"]


class Clock:
    """CPU seconds of this process since it was made, without pauses."""

    def __init__(self):
        self.start = time.process_time()
        self.paused_at = 0.0

    def seconds(self) -> float:
        """Seconds so far."""
        return time.process_time() - self.start

    def pause(self) -> None:
        """What follows does not count."""
        self.paused_at = time.process_time()

    def go_on(self) -> None:
        """What follows counts."""
        self.start += time.process_time() - self.paused_at


class SaveAtMinutes(TrainerCallback):
    """Saves a checkpoint once each number of CPU minutes has passed, and stops after the last one.

    Attributes:
        steps: optimizer steps by minutes.
    """

    def __init__(self, minutes: list[float], file: Path):
        self.left, self.steps, self.file = sorted(minutes), {}, file

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock = Clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.left and self.clock.seconds() >= self.left[0] * SECONDS_PER_MINUTE:
            self.steps[f"{self.left.pop(0):g}"] = state.global_step
            control.should_save, control.should_training_stop = True, not self.left
            self.clock.pause()

    def on_save(self, args, state, control, **kwargs):
        self.clock.go_on()

    def on_train_end(self, args, state, control, **kwargs):
        if self.left:
            logger.warning("the run ended at step %d before %s CPU minutes", state.global_step, self.left)
        write_json(self.file, self.steps)


def timed_stage(minutes: list[float]) -> type[VocoderStage]:
    """The stage, saving at these CPU minutes."""

    class TimedStage(VocoderStage):
        def build_callbacks(self, writer):
            return [*super().build_callbacks(writer), SaveAtMinutes(minutes, self.run_dir / TIMES)]

    return TimedStage


def run_folder(args: QualityArguments, side: str) -> Path:
    """Where a side's run is, by what shapes it."""
    if side == "ours":
        return Path(args.output_dir) / "vocoder" / f"{args.config}_{args.max_steps}_{args.seed}"
    name = f"vocos_{args.peer_batch_size}x{args.peer_segment_frames}_{args.peer_learning_rate:g}_{args.seed}"
    return Path(args.output_dir) / "vocoder" / name


def is_trained(folder: Path, minutes: list[float]) -> bool:
    """Whether a run has a checkpoint for each number of minutes."""
    file = folder / TIMES
    return file.is_file() and {f"{each:g}" for each in minutes} <= json.loads(file.read_text()).keys()


def train_ours(args: QualityArguments) -> None:
    """By the stage's own command line."""
    never, length = 10**9, args.max_steps or 10**6
    words = f"""--config {args.config} --run_name {run_folder(args, "ours").name} --output_dir {args.output_dir}
        --cached_dataset {args.cached_dataset} --seed {args.seed} --max_steps {length} --eval_steps {never}
        --save_steps {never} --save_total_limit {len(args.quality) + 1}"""
    schedule = [] if args.max_steps else ["--lr_scheduler_type", "constant"]
    timed_stage(args.quality).main([*words.split(), *schedule, *shlex.split(args.flags)])


def train_vocos(args: QualityArguments) -> None:
    """AdamW at a cosine rate over the CPU time, crops at random places, no averaged weights, as published."""
    folder, steps = run_folder(args, "vocos"), {}
    folder.mkdir(parents=True, exist_ok=True)
    dataset = VocoderDataset(args.cached_dataset, "train")
    torch.manual_seed(args.seed)
    recipe = VocosRecipe(dataset.mel, args.peer_learning_rate)
    sampler, generator = EpochSampler(len(dataset), args.peer_batch_size, args.seed), torch.Generator()
    generator.manual_seed(args.seed)
    left, total, step, epoch, clock = sorted(args.quality), max(args.quality) * SECONDS_PER_MINUTE, 0, 0, Clock()
    while left:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for first in range(0, len(order), args.peer_batch_size):
            samples = [dataset[i] for i in order[first : first + args.peer_batch_size]]
            batch, floor = collate_audio(samples, dataset.mel.log_floor), dataset.mel.log_floor
            places = torch.rand(len(samples), generator=generator)
            length = (batch["mel"], batch["waveform"], batch["n_frames"], places, args.peer_segment_frames)
            _, waveform = crop_pairs(*length, floor)
            recipe.set_rate(0.5 * (1 + math.cos(math.pi * min(1.0, clock.seconds() / total))))
            terms = recipe.step(waveform)
            step += 1
            if step % 20 == 0:
                logger.info("vocos: step %d, %.0f CPU s, %s", step, clock.seconds(), terms)
            if clock.seconds() >= left[0] * SECONDS_PER_MINUTE:
                clock.pause()
                steps[f"{left[0]:g}"] = step
                torch.save(recipe.generator.state_dict(), folder / f"{left.pop(0):g}.pt")
                clock.go_on()
                if not left:
                    break
        epoch += 1
    write_json(folder / TIMES, steps)


def measure(args: QualityArguments) -> dict[str, dict[str, float]]:
    """Means over the held-out clips by row: the real sound, Griffin-Lim, every checkpoint of every run there is."""
    dataset = VocoderDataset(args.cached_dataset, "validation")
    clips = [dataset[i] for i in spread(len(dataset), args.n_clips)]
    mel = dataset.mel
    untrained = Vocoder.from_preset(args.config, **mel.as_dict()).eval()
    rows: dict[str, Callable[[Tensor], Tensor]] = {"Griffin-Lim, 60": lambda clip: griffin_lim(clip, mel)}
    rows["ours, untrained"] = untrained
    for side in ("ours", "vocos"):
        folder = run_folder(args, side)
        if not (folder / TIMES).is_file():
            continue
        for minutes, step in json.loads((folder / TIMES).read_text()).items():
            if side == "ours":
                model = load_model(Vocoder, folder / f"checkpoint-{step}")
            else:
                model = VocosRecipe(mel).generator.eval()
                model.load_state_dict(torch.load(folder / f"{minutes}.pt", weights_only=True))
            rows[f"{side}, {minutes} CPU min, {step} steps"] = model
    found = {"real sound": scores(dataset, clips, None)}
    return {**found, **{name: scores(dataset, clips, vocode) for name, vocode in rows.items()}}


@torch.inference_mode()
def scores(dataset: VocoderDataset, clips: list[dict[str, Tensor]], vocode) -> dict[str, float]:
    """Mean metrics of the clips vocoded from their log-mels; None: of the clips themselves."""
    log_mel, rate = LogMel(dataset.mel), dataset.mel.sample_rate
    values: dict[str, list[float]] = {"PESQ-wb": [], "STOI": [], "log-mel L1": []}
    for clip in clips:
        real = clip["waveform"]
        made = real if vocode is None else vocode(clip["mel"][None])[0].clamp(-1, 1)
        results = pesq_wb(real, made, rate), stoi(real, made, rate), mel_l1(clip["mel"], log_mel(made[None])[0])
        for column, value in zip(values.values(), results):
            column += [] if value is None else [value]
    return {name: sum(column) / max(1, len(column)) for name, column in values.items()}


def quality(args: QualityArguments) -> None:
    """Train what is not there, measure, print, write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    for side, train in (("ours", train_ours), ("vocos", train_vocos)):
        if args.side in ("", side) and not is_trained(run_folder(args, side), args.quality):
            train(args)
    results = measure(args)
    table = Table(title=f"{args.n_clips} held-out clips of {args.cached_dataset}", box=SIMPLE_HEAD)
    for column in ("", *next(iter(results.values()))):
        table.add_column(column)
    for name, row in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console(width=120).print(table)
    write_json(Path(args.output_dir) / "vocoder" / "quality.json", results)
