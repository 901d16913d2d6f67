"""Two processes equal one: DDP and every ZeRO stage, with the adversary, accumulation, filters and autocast."""

import json
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from dataset_loading.epoch_sampler import EpochSampler
from dataset_loading.image.pixels import ImageDataset
from dataset_loading.locks import only_writer
from model.causal import MegaTransformerForCausalLM
from pretrain_audio_diffusion import AudioDiffusionStage
from pretrain_audio_vae import AudioVAEStage
from pretrain_image_vae import ImageVAEStage
from pretrain_multimodal import MultimodalStage
from pretrain_recurrent_vae import RecurrentVAEStage
from pretrain_vocoder import VocoderStage
from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache
from tests.helpers.audio_latent_cache import SMALL_SPEECH, make_speech
from tests.helpers.mel_cache import SETTINGS, SMALL_AUDIO_VAE, write_mel_cache
from tests.helpers.runs import (
    SMALL_DIFFUSION,
    SMALL_RUN,
    Run,
    changed,
    equal,
    largest_difference,
    named_runs,
    relative_distance,
    run_stage,
)
from tests.helpers.text_cache import SMALL_CORE, make_text, with_dropout
from tests.helpers.two_processes import (
    LIMIT,
    ROOT,
    TWO_PROCESSES,
    WaitingProcesses,
    deepspeed_launcher,
    environment,
    skip_without_deepspeed,
)
from utils.checkpoints import load_model

pytestmark = pytest.mark.launch


TEXT = with_dropout(SMALL_CORE)
COMMON = {
    "image_vae": SMALL_RUN,
    "recurrent_vae": SMALL_RUN,
    "image_diffusion": SMALL_DIFFUSION,
    "audio_vae": SMALL_AUDIO_VAE,
    "audio_diffusion": SMALL_SPEECH,
    "vocoder": SMALL_VOCODER,
    "multimodal": TEXT,
}


def launch(launcher: str, cache: Path, output_dir: Path, steps: int, *flags: str, stage: str = "image_vae") -> Run:
    """Run the stage on two processes; `launcher` is torchrun, or a DeepSpeed configuration."""
    done = launched(launcher, cache, output_dir, steps, *flags, stage=stage)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Run(output_dir / stage / "two", steps)


@pytest.fixture(scope="module")
def launch_together(tmp_path_factory):
    """launch_together(stage, cache, output_dir, {name: (launcher as in `launch`, steps, flags)}): name -> Run, on two
    processes that start once for this module."""
    waiting = {
        has_deepspeed: WaitingProcesses(lambda: tmp_path_factory.mktemp("two")) for has_deepspeed in (False, True)
    }

    def run(stage: str, cache: Path, output_dir: Path, runs: dict[str, tuple[str, int, list[str]]]) -> dict[str, Run]:
        commands: dict[bool, list[list[str]]] = {False: [], True: []}
        for name, (launcher, steps, flags) in runs.items():
            engine = [] if launcher == "torchrun" else ["--use_deepspeed", "--deepspeed_config", launcher]
            words = ["--cached_dataset", str(cache), "--output_dir", str(output_dir), "--run_name", name, *engine]
            words = changed([*COMMON[stage], "--max_steps", str(steps), *words], *flags)
            commands[bool(engine)].append(words)
        if commands[True]:
            skip_without_deepspeed()
        for has_deepspeed, listed in commands.items():
            if listed:
                waiting[has_deepspeed].run(f"pretrain_{stage}", listed)
        return {name: Run(output_dir / stage / name, steps) for name, (_, steps, _) in runs.items()}

    yield run
    for processes in waiting.values():
        processes.end()


@pytest.fixture(scope="module")
def launch_waiting(launch_together):
    """As `launch`, by the processes of `launch_together`."""

    def run(launcher: str, cache: Path, output_dir: Path, steps: int, *flags: str, stage: str) -> Run:
        return launch_together(stage, cache, output_dir, {"two": (launcher, steps, list(flags))})["two"]

    return run


def start(command: list) -> subprocess.CompletedProcess:
    """The ended process of a command."""
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)


def launched(
    launcher: str, cache: Path, output_dir: Path, steps: int, *flags: str, stage: str = "image_vae"
) -> subprocess.CompletedProcess:
    """The launcher's ended process."""
    words = ["--cached_dataset", str(cache), "--output_dir", str(output_dir), "--run_name", "two"]
    words = changed(words, *flags)
    program = [f"pretrain_{stage}.py", *changed([*COMMON[stage], "--max_steps", str(steps)], *words)]
    if launcher == "torchrun":
        command = [*TWO_PROCESSES, "tests/launched/ends_alone.py", *program]
    else:
        command = [*deepspeed_launcher(), *program, "--use_deepspeed", "--deepspeed_config", launcher]
    return start(command)


def assert_same(one: Run, two: Run, tolerance: float = 1e-5) -> None:
    assert two.losses == pytest.approx(one.losses, rel=tolerance)
    for name in ("model", "ema") if (one.folder / "ema.safetensors").exists() else ("model",):
        first, second = one.weights(name), two.weights(name)
        # A bias that a norm cancels has a gradient of rounding errors, which Adam scales up: compare the function.
        kernels = [key for key in first if first[key].ndim == 4]
        assert largest_difference({key: first[key] for key in kernels}, {key: second[key] for key in kernels}) <= 1e-5
    assert largest_difference(one.adversary["discriminator"], two.adversary["discriminator"]) <= 1e-5
    assert one.adversary["updates"] == two.adversary["updates"]


ZERO_STAGES = ("_zero-1", "_zero-2", "_zero-3")
FOUR, EIGHT = ["--batch_size", "4"], ["--batch_size", "8"]
NOISY = ["--latent_noise", "0.5"]
ACCUMULATED = ["--batch_size", "1", "--gradient_accumulation_steps", "4", "--use_gradient_checkpointing"]
# Name -> launcher, steps, flags on two processes and on one.
IMAGE_VAE_RUNS = {
    **{f"zero_{name[-1:] or 0}": (f"ds_config{name}.json", 10, FOUR, EIGHT) for name in ("", *ZERO_STAGES)},
    "accumulation": ("ds_config_zero-3.json", 10, [*ACCUMULATED, *NOISY], [*EIGHT, *NOISY]),
    "bf16": ("ds_config_zero-2.json", 10, [*FOUR, "--bf16"], [*EIGHT, "--bf16"]),
    "filter": ("ds_config_zero-2.json", 20, *([*size, *NOISY, "--trainer", "grokfast_ema"] for size in (FOUR, EIGHT))),
}


@pytest.fixture(scope="module")
def image_vaes(image_cache, tmp_path_factory, launch_together) -> dict[str, Run]:
    """The runs of `IMAGE_VAE_RUNS` on two processes."""
    runs = {name: (launcher, steps, flags) for name, (launcher, steps, flags, _) in IMAGE_VAE_RUNS.items()}
    return launch_together("image_vae", image_cache, tmp_path_factory.mktemp("image_vaes"), runs)


@pytest.mark.parametrize("name", [f"zero_{stage}" for stage in range(4)] + ["accumulation", "filter"])
def test_two_deepspeed_processes_equal_one(name, image_vaes, one_process):
    _, steps, _, flags = IMAGE_VAE_RUNS[name]
    assert_same(one_process("_".join(flags).strip("-"), steps, *flags), image_vaes[name])


@pytest.fixture(scope="module")
def one_process(image_cache, tmp_path_factory):
    yield from named_runs(ImageVAEStage, SMALL_RUN, image_cache, tmp_path_factory.mktemp("one"))


def test_two_ddp_processes_equal_one_and_resume_on_two_and_on_one(train, image_cache, tmp_path):
    one = train("one", 10, *EIGHT, *NOISY)
    two = launch("torchrun", image_cache, tmp_path, 10, *FOUR, *NOISY, "--save_steps", "4", "--async_save")
    assert_same(one, two)
    half, resumed_dir = tmp_path / "again" / "image_vae" / "two", tmp_path / "image_vae" / "resumed"
    for folder in (half, resumed_dir):
        shutil.copytree(two.folder.parent / "checkpoint-4", folder / "checkpoint-4")
    flags = ["--batch_size", "4", "--resume_from_checkpoint"]
    assert_same(one, launch("torchrun", image_cache, tmp_path / "again", 10, *flags))
    assert_same(one, train("resumed", 10, "--batch_size", "8", "--resume_from_checkpoint"))


@pytest.mark.slow
def test_gradient_averages_under_zero_2(train, image_cache, tmp_path):
    flags = ["--trainer", "grokfast_ma", "--grokfast_window", "4"]
    one = train("one", 20, *EIGHT, *flags)
    assert_same(one, launch("ds_config_zero-2.json", image_cache, tmp_path, 20, *FOUR, *flags))


def test_bf16_keeps_fp32_weights(image_vaes, one_process):
    one, two = one_process("bf16", 10, *EIGHT, "--bf16"), image_vaes["bf16"]
    assert two.losses == pytest.approx(one.losses, rel=2e-3)
    assert all(value.dtype == torch.float32 for value in [*two.weights().values(), *two.weights("ema").values()])


def test_resume_under_zero_2_is_exact_and_changed_flags_take_effect(train, image_cache, tmp_path, launch_waiting):
    straight, resumed = launch_and_resume(launch, "image_vae", image_cache, tmp_path, ["--batch_size", "4"])
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    assert largest_difference(straight.adversary["discriminator"], resumed.adversary["discriminator"]) == 0
    assert straight.losses[4:] == resumed.losses[4:]
    # From step 4 again, with other settings: as in one process without an engine.
    words = "--learning_rate 5e-4 --weight_decay 0.1 --adam_beta1 0.5 --max_grad_norm 0.05".split()  # noqa: SIM905
    words += ["--discriminator_learning_rate", "3e-4", "--resume_from_checkpoint"]
    one = train("one", 8, "--batch_size", "8", "--save_steps", "4")
    changed = train("one", 8, *words, str(one.folder.parent / "checkpoint-4"))
    path = str(resumed.folder.parent / "checkpoint-4")
    again = launch_waiting("ds_config_zero-2.json", image_cache, tmp_path / "b", 8, *words, path, stage="image_vae")
    assert_same(changed, again)
    assert changed.losses[5:] != pytest.approx(straight.losses[5:], rel=1e-4)
    assert (resumed.folder.parent / "abandoned-1" / "checkpoint-8").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", *(f"ds_config{name}.json" for name in ("", *ZERO_STAGES))])
def test_flags_changed_on_resume_act_under_every_engine_as_in_one_process(launcher, train, image_cache, tmp_path):
    one = train("one", 8, "--batch_size", "8", "--save_steps", "4")
    two = launch(launcher, image_cache, tmp_path, 8, "--batch_size", "4", "--save_steps", "4")
    # The run becomes longer, so that its schedule is stretched, and loses its average; then it has another schedule,
    # and an average again.
    longer = "--learning_rate 5e-4 --weight_decay 0.1 --max_grad_norm 0.05 --no_use_ema --save_steps 4"
    for step, flags in ((4, longer), (8, "--lr_scheduler_type linear --trainer grokfast_ema --use_ema")):
        runs = []
        for run, resume in ((one, partial(train, "one")), (two, partial(launch, launcher, image_cache, tmp_path))):
            checkpoint = str(run.folder.parent / f"checkpoint-{step}")
            runs.append(resume(12, *flags.split(), "--resume_from_checkpoint", checkpoint))
        assert_same(*runs)
        one, two = runs
    assert (two.folder / "ema.safetensors").exists()


def test_diffusion_on_two_processes_equals_one(train_diffusion, latent_cache, tmp_path, launch_together):
    one = train_diffusion("one", 8, "--batch_size", "8")
    flags = ["--batch_size", "4", "--eval_steps", "4", "--eval_images", "4"]
    launchers = {"ddp": ("torchrun", 8, flags), "sharded": (sharding_all(tmp_path), 8, flags)}
    for two in launch_together("image_diffusion", latent_cache, tmp_path, launchers).values():
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        for name in ("model", "ema"):
            assert largest_difference(one.weights(name), two.weights(name)) <= 1e-4


def test_adapters_on_two_ddp_processes_equal_one(train_diffusion, latent_cache, tmp_path, launch_waiting):
    base = train_diffusion("base", 2, "--batch_size", "8")
    flags = ["--init_from", str(base.folder), "--lora_rank", "4", "--learning_rate", "1e-2", "--batch_size"]
    one = train_diffusion("one", 6, *flags, "8")
    two = launch_waiting("torchrun", latent_cache, tmp_path, 6, *flags, "4", stage="image_diffusion")
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    for name in ("model", "ema"):
        assert largest_difference(one.weights(name), two.weights(name)) <= 1e-4
    frozen = {name: value for name, value in two.weights().items() if "lora_" not in name}
    assert equal(list(frozen.values()), [one.weights()[name] for name in frozen])


def sharding_all(folder: Path) -> str:
    """A ZeRO-3 configuration that shards also what is usually too small for it."""
    settings = json.loads((ROOT / "ds_config_zero-3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "ds_config_zero-3.json").write_text(json.dumps(settings))
    return str(folder / "ds_config_zero-3.json")


@pytest.mark.slow
def test_diffusion_under_zero_2_equals_one_process_and_resumes_exactly(
    train_diffusion, latent_cache, tmp_path, launch_waiting
):
    one = train_diffusion("one", 8, "--batch_size", "8")
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--use_gradient_checkpointing"]
    straight, resumed = launch_and_resume(launch_waiting, "image_diffusion", latent_cache, tmp_path, flags)
    assert straight.losses == pytest.approx(one.losses, rel=1e-5)
    for name in ("model", "ema"):
        assert largest_difference(one.weights(name), straight.weights(name)) <= 1e-4
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    assert straight.losses[4:] == resumed.losses[4:]


def test_recurrent_vae_under_zero_2_equals_one_process_and_resumes_exactly(
    image_cache, tmp_path, fresh_logging, launch_waiting
):
    steps = ["--mean_decoder_steps", "3", "--max_decoder_steps", "4", "--n_backprop_steps", "2", *NOISY]
    one = run_stage(RecurrentVAEStage, SMALL_RUN, image_cache, tmp_path, "one", 8, "--batch_size", "8", *steps)
    straight, resumed = launch_and_resume(
        launch_waiting, "recurrent_vae", image_cache, tmp_path, ["--batch_size", "4", *steps]
    )
    # Rounding grows along the decoder's steps.
    assert straight.losses == pytest.approx(one.losses, rel=1e-4)
    for name in ("model", "ema"):
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    assert largest_difference(straight.adversary["discriminator"], resumed.adversary["discriminator"]) == 0
    assert straight.losses[4:] == resumed.losses[4:]


def test_audio_vae_on_two_ddp_processes_equals_one_and_resumes_on_one(tmp_path, fresh_logging, launch_waiting):
    cache = write_mel_cache(tmp_path / "cache", SETTINGS)
    train = partial(run_stage, AudioVAEStage, SMALL_AUDIO_VAE, cache, tmp_path)
    one = train("one", 8, *EIGHT, *NOISY)
    flags = [*FOUR, *NOISY, "--save_steps", "4"]
    two = launch_waiting("torchrun", cache, tmp_path, 8, *flags, stage="audio_vae")
    (tmp_path / "audio_vae" / "resumed").mkdir()
    (two.folder.parent / "checkpoint-4").rename(tmp_path / "audio_vae" / "resumed" / "checkpoint-4")
    resumed = train("resumed", 8, "--batch_size", "8", "--resume_from_checkpoint")
    for run in (two, resumed):
        assert run.losses == pytest.approx(one.losses, rel=1e-5)
        assert all(largest_difference(one.weights(name), run.weights(name)) <= 1e-4 for name in ("model", "ema"))
        assert largest_difference(one.adversary["discriminator"], run.adversary["discriminator"]) <= 1e-5


@pytest.mark.slow
def test_audio_vae_under_zero_2_equals_one_process_and_resumes_exactly(tmp_path, fresh_logging, launch_waiting):
    cache = write_mel_cache(tmp_path / "cache", SETTINGS)
    one = run_stage(AudioVAEStage, SMALL_AUDIO_VAE, cache, tmp_path, "one", 8, "--batch_size", "8")
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "2"]
    straight, resumed = launch_and_resume(launch_waiting, "audio_vae", cache, tmp_path, flags)
    assert straight.losses == pytest.approx(one.losses, rel=1e-5)
    for name in ("model", "ema"):
        assert largest_difference(one.weights(name), straight.weights(name)) <= 1e-4
        assert largest_difference(straight.weights(name), resumed.weights(name)) == 0
    assert straight.losses[4:] == resumed.losses[4:]


def test_vocoder_on_two_processes_equals_one_and_resumes_exactly_within_a_later_epoch(
    tmp_path, fresh_logging, launch_waiting
):
    cache = make_audio_cache(tmp_path / "cache")  # 3 steps per epoch: the resumed run begins within the second.
    flags = ["--eval_steps", "4"]
    one = run_stage(VocoderStage, SMALL_VOCODER, cache, tmp_path, "one", 8, "--batch_size", "8", *flags)
    ddp = launch_waiting("torchrun", cache, tmp_path / "ddp", 8, *FOUR, *flags, stage="vocoder")
    flags += ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--use_gradient_checkpointing"]
    straight, resumed = launch_and_resume(launch_waiting, "vocoder", cache, tmp_path, flags)
    for two in (ddp, straight):
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        assert two.logged("eval_loss") == pytest.approx(one.logged("eval_loss"), rel=1e-5)
        same_vocoder(one, two)
        # Adam moves the few weights whose gradient is nothing but rounding by up to its rate of 1e-4 in every update.
        discriminators = [run.adversary["discriminator"] for run in (one, two)]
        assert relative_distance(*discriminators) <= 1e-5 and largest_difference(*discriminators) <= 3e-4
        assert one.adversary["updates"] == two.adversary["updates"] == 3
    assert all(largest_difference(straight.weights(name), resumed.weights(name)) == 0 for name in ("model", "ema"))
    assert largest_difference(straight.adversary["discriminator"], resumed.adversary["discriminator"]) == 0
    assert straight.losses == resumed.losses and straight.logged("eval_loss") == resumed.logged("eval_loss")


def same_vocoder(one: Run, two: Run) -> None:
    """The weights of two runs agree as a whole, each weight within two of Adam's steps of 5e-4.

    Adam moves a weight whose gradient is nothing but rounding by up to its rate in every update, and which way differs
    between processors. This finds what goes wrong after the gradient; what goes wrong before shows in losses, which
    the tests compare too: for a loss weight that is 1 % off they differ by 5e-4, the weights by 5e-6 or less.
    """
    for name in ("model", "ema"):
        assert relative_distance(one.weights(name), two.weights(name)) <= 5e-6
        assert largest_difference(one.weights(name), two.weights(name)) <= 1e-3


@pytest.mark.parametrize("stage", [VocoderStage, AudioVAEStage], ids=lambda stage: stage.name)
def test_audio_stages_under_zero_3_equal_one_process(stage, tmp_path, fresh_logging, launch_waiting):
    cache = make_audio_cache(tmp_path / "cache")
    one = run_stage(stage, COMMON[stage.name], cache, tmp_path, "one", 6, "--batch_size", "8")
    flags = ["--batch_size", "4", "--eval_steps", "3", "--n_logged_samples", "1"]
    two = launch_waiting(sharding_all(tmp_path), cache, tmp_path / "sharded", 6, *flags, stage=stage.name)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    if stage is VocoderStage:
        same_vocoder(one, two)
    else:
        assert all(largest_difference(one.weights(name), two.weights(name)) <= 1e-4 for name in ("model", "ema"))
    assert largest_difference(one.adversary["discriminator"], two.adversary["discriminator"]) <= 1e-4


def test_text_on_two_processes_equals_one(tmp_path, fresh_logging, launch_together):
    """With unequal numbers of targets, a recurrent core of drawn depth, a noisy first state, dropout, tied weights."""
    cache = make_text(tmp_path / "cache")
    one = run_stage(MultimodalStage, TEXT, cache, tmp_path, "one", 6, "--batch_size", "8", "--eval_steps", "3")
    flags = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_steps", "3", "--eval_batch_size", "3"]
    launchers = ("torchrun", "ds_config.json", "ds_config_zero-1.json", sharding_all(tmp_path))
    runs = {Path(name).stem: (name, 6, [*flags, "--n_samples", "2"]) for name in launchers}
    for two in launch_together("multimodal", cache, tmp_path, runs).values():
        same_text(one, two)


def same_text(one: Run, two: Run) -> None:
    """Losses, evaluations and weights of two runs of the multimodal stage agree, also as they are loaded."""
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.logged("eval_loss") == pytest.approx(one.logged("eval_loss"), rel=1e-5)
    for name, kind in (("model", "raw"), ("ema", "ema")):
        assert largest_difference(one.weights(name), two.weights(name)) <= 1e-4
        first, second = (load_model(MegaTransformerForCausalLM, run.folder, kind).state_dict() for run in (one, two))
        assert largest_difference(dict(first), dict(second)) <= 1e-4
        assert torch.equal(second["lm_head.weight"], second["model.embed_tokens.weight"])


def test_text_under_zero_2_equals_one_process_and_resumes_exactly(tmp_path, fresh_logging, launch_waiting):
    cache = make_text(tmp_path / "cache")
    flags = ["--trainer", "grokfast_ema", "--eval_steps", "4"]
    one = run_stage(MultimodalStage, TEXT, cache, tmp_path, "one", 8, "--batch_size", "8", *flags)
    flags += ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--use_gradient_checkpointing"]
    straight, resumed = launch_and_resume(launch_waiting, "multimodal", cache, tmp_path, flags)
    same_text(one, straight)
    assert all(largest_difference(straight.weights(name), resumed.weights(name)) == 0 for name in ("model", "ema"))
    assert straight.losses == resumed.losses and straight.logged("eval_loss") == resumed.logged("eval_loss")


def test_speech_on_two_processes_equals_one(tmp_path, fresh_logging, launch_together):
    """Batches by a budget of frames: the two processes have clips of unequal lengths in unequal numbers."""
    cache = make_speech(tmp_path / "cache")
    one = run_stage(AudioDiffusionStage, SMALL_SPEECH, cache, tmp_path, "one", 4)
    flags = ["--batch_frames", "128", "--eval_batch_size", "3"]
    launchers = ("torchrun", "ds_config_zero-3.json")
    runs = launch_together(
        "audio_diffusion", cache, tmp_path, {Path(name).stem: (name, 4, flags) for name in launchers}
    )
    for two in runs.values():
        assert two.losses == pytest.approx(one.losses, rel=1e-5)
        assert two.logged("eval_loss") == pytest.approx(one.logged("eval_loss"))
        assert all(relative_distance(one.weights(name), two.weights(name)) <= 1e-5 for name in ("model", "ema"))


def launch_and_resume(launch, stage: str, cache: Path, output_dir: Path, flags: list[str]) -> tuple[Run, Run]:
    """8 steps under ZeRO-2 on two processes, whose checkpoints threads write, and the last 4 of them again from a copy
    of the checkpoint between."""
    flags = [*flags, "--save_steps", "4"]
    straight = launch("ds_config_zero-2.json", cache, output_dir / "a", 8, *flags, "--async_save", stage=stage)
    half = output_dir / "b" / stage / "two"
    half.mkdir(parents=True)
    (straight.folder.parent / "checkpoint-4").rename(half / "checkpoint-4")
    flags.append("--resume_from_checkpoint")
    return straight, launch("ds_config_zero-2.json", cache, output_dir / "b", 8, *flags, stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "ds_config_zero-2.json"])
def test_errors_of_one_process_end_all_with_one_message(launcher, image_cache, tmp_path):
    cache, flags = tmp_path / "cache", ["--batch_size", "4"]
    shutil.copytree(image_cache, cache)
    data = ImageDataset(cache, "train")
    # A sample of the first step's second micro-batch, which the second process reads.
    file = cache / "train" / f"{data.entries[list(EpochSampler(len(data), 8, 42))[5]]['key']}.pt"
    file.write_bytes(b"")
    damaged = launched(launcher, cache, tmp_path, 10, *flags, "--num_workers", "1")
    with only_writer(tmp_path / "image_vae" / "two", "wait"):
        locked = launched(launcher, image_cache, tmp_path, 10, *flags)
    for done, message in ((damaged, f"{file} is damaged (it has 0 bytes"), (locked, f"by process {os.getpid()} on")):
        output = done.stdout + done.stderr
        assert done.returncode != 0 and message in output, output[-4000:]
        assert "rank0]: Traceback" not in output and "rank1]: Traceback" not in output
    assert damaged.stderr.count(f"{file} is damaged") + damaged.stdout.count(f"{file} is damaged") == 1


def test_measured_steps_of_two_processes_leave_no_run(launch_together, image_cache, tmp_path):
    launchers = ("torchrun", "ds_config_zero-3.json")
    launch_together("image_vae", image_cache, tmp_path, {name: (name, 3, ["--measure", "1"]) for name in launchers})
    assert not (tmp_path / "image_vae").exists()
