"""A stage run in this process: common flags, the run's files, and how far two states are apart."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from utils.checkpoints import mark_complete, write_json
from utils.options import effect_conditions
from utils.training.arguments.adversary import WITH_ADVERSARY

# The seed command's rates at a size that trains in seconds; the discriminator joins at step 2.
SMALL_RUN = """
    --config tiny --override image_size=32 --learning_rate 1e-4 --logging_steps 1 --eval_steps 1000 --save_steps 1000
    --perceptual_weight 0 --discriminator_channels 8 --gan_start_step 2 --gan_warmup_steps 2 --gan_ramp_steps 4
    --r1_weight 1 --r1_every 2 --lecam_weight 0.01 --diff_augment color --use_spectral_norm
    --latent_statistics_samples 16""".split()  # noqa: SIM905
# Latents of 16 x 4 x 4 and a UNet that trains in seconds.
SMALL_DIFFUSION = """
    --config tiny --override widths=[32,64] n_blocks=[1,1] conditioning_width=64 text_width=32
    --learning_rate 1e-3 --logging_steps 1 --eval_steps 1000 --save_steps 1000 --n_steps 2 --n_prompts 2
    --n_time_buckets 2 --eval_images 0""".split()  # noqa: SIM905
# Models in the layout `ldm` that train in seconds, beside `from_preset("ldm")`.
SMALL_LDM_VAE = {
    "encoder_widths": [8, 16],
    "decoder_widths": [8, 16],
    "n_encoder_blocks": [1, 1],
    "n_decoder_blocks": [2, 2],
    "n_norm_groups": 4,
    "image_size": 32,
}
SMALL_LDM_UNET = {
    "widths": [8, 16],
    "n_blocks": [1, 2],
    "use_attention": [True, False],
    "n_heads": 2,
    "n_norm_groups": 4,
    "text_width": 12,
    "text_embedding_width": 12,
    "latent_size": 8,
}


class Run:
    """A finished run's newest checkpoint, as files."""

    def __init__(self, run_dir: Path, step: int):
        self.folder = run_dir / f"checkpoint-{step}"

    @property
    def history(self) -> list[dict]:
        """The log lines so far."""
        return json.loads((self.folder / "trainer_state.json").read_text())["log_history"]

    def logged(self, name: str) -> list[float]:
        """A number of all log lines that have it."""
        return [line[name] for line in self.history if name in line]

    @property
    def losses(self) -> list[float]:
        return self.logged("loss")

    def weights(self, name: str = "model") -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @property
    def adversary(self) -> dict:
        return torch.load(self.folder / "stage_state.pt", weights_only=True)["adversary"]


def run_stage(
    stage: type, common: list[str], cache: Path | None, output_dir: Path, name: str, steps: int, *flags: str
) -> Run:
    """Run a stage in this process, on the caches that its flags name where `cache` is None; errors come as they are.

    Of the flags in `common`, those of the adversary are left out where `flags` have `--gan_weight 0`, and a run of one
    or two steps has its adversary from the beginning.
    """
    words = ["--output_dir", str(output_dir), "--run_name", name]
    words += [] if cache is None else ["--cached_dataset", str(cache)]
    if ("--gan_weight", "0") in itertools.pairwise(flags):
        common = without_adversary(common, stage)
    elif "--gan_start_step" in common and steps <= 2:
        common = changed(common, "--gan_start_step", "0")
    try:
        stage.main(changed([*common, *words, "--max_steps", str(steps)], *flags))
    except SystemExit as end:
        raise end.__cause__ or end from None
    return Run(output_dir / stage.name / name, steps)


def named_runs(stage: type, common: list[str], cache: Path, folder: Path) -> Iterator[Callable[..., Run]]:
    """For a fixture: runs("name", steps, *flags) -> Run; a run with the name and steps of an earlier one is that
    one."""
    runs: dict[tuple[str, int], Run] = {}

    def run(name: str, steps: int, *flags: str, cache: Path = cache) -> Run:
        if (name, steps) not in runs:
            runs[name, steps] = run_stage(stage, common, cache, folder, name, steps, *flags)
        return runs[name, steps]

    yield run
    logging.getLogger().handlers.clear()


def move_alone(run_dir: Path, target: Path) -> dict:
    """Move a run of diffusion to where it lies as if the folders of its VAE and its data were deleted.

    Returns: the record of its latents.
    """
    (record,) = run_dir.rename(target).glob("checkpoint-*/stage.json")
    gone = {"vae_checkpoint": "gone"}
    content = edit_record(
        record, lambda content: (content["latents"].update(gone), content["data"].update(folder="gone"))
    )
    return content["latents"]


def edit_record(file: Path, change: Callable[[dict], object]) -> dict:
    """Change the content of a JSON file of a checkpoint, which stays complete."""
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)
    mark_complete(file.parent)
    return content


def changed(words: list[str], *flags: str) -> list[str]:
    """A command line with some flags replaced or added, since a flag is given once."""
    names = {name_of(word) for word in flags if word.startswith("--")}
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = name_of(word) not in names
        kept += [word] if keeps else []
    return [*kept, *flags]


def name_of(flag: str) -> str:
    """`use_ema` of `--use_ema`, `--no_use_ema` and `--use_ema=...`."""
    return flag.removeprefix("--").removeprefix("no_").partition("=")[0]


def without_adversary(words: list[str], stage: type) -> list[str]:
    """The flags without those that need an adversary."""
    conditions, kept, keeps = effect_conditions(stage.arguments_class), [], True
    for word in words:
        if word.startswith("--"):
            keeps = WITH_ADVERSARY not in conditions.get(word[2:], [])
        kept += [word] if keeps else []
    return kept


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two state dicts with the same names."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def relative_distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of two state dicts with the same names, over the norm of the first."""
    assert first.keys() == second.keys()
    one, two = (torch.cat([each[name].double().flatten() for name in first]) for each in (first, second))
    return ((one - two).norm() / one.norm()).item()


def equal(first, second) -> bool:
    """Bit for bit equality of nested dicts, lists and tensors."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second
