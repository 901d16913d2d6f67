"""Every stage on a GPU: equal to the CPU in fp32, and bf16, compiled, under ZeRO-2, resumed.

Run with `make test-cuda`. The runs of a stage are processes of their own, started together; `-rP` shows how far each
is from the CPU's.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.audio_cache import SMALL_VOCODER, make_audio_cache
from tests.helpers.audio_latent_cache import SMALL_SPEECH, make_speech
from tests.helpers.mel_cache import SETTINGS, SMALL_AUDIO_VAE, write_mel_cache
from tests.helpers.runs import SMALL_DIFFUSION, SMALL_RUN, Run, changed, relative_distance
from tests.helpers.stream_caches import SMALL_RECURRENT, SMALL_STREAMS, make_stream_caches
from tests.helpers.text_cache import SMALL_CORE, SMALL_TEXT, make_text, with_dropout
from tests.helpers.two_processes import skip_without_deepspeed

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no NVIDIA GPU"),
]

# Name -> script, flags, and the fixture or function that makes its cache.
STAGES = {
    "image_vae": ("image_vae", SMALL_RUN, "image_cache"),
    "recurrent_vae": ("recurrent_vae", [*SMALL_RUN, "--mean_decoder_steps", "3"], "image_cache"),
    "image_diffusion": ("image_diffusion", SMALL_DIFFUSION, "latent_cache"),
    "vocoder": ("vocoder", SMALL_VOCODER, make_audio_cache),
    "audio_vae": ("audio_vae", SMALL_AUDIO_VAE, lambda folder: write_mel_cache(folder, SETTINGS)),
    "audio_diffusion": ("audio_diffusion", SMALL_SPEECH, make_speech),
    "text_flat": ("multimodal", SMALL_TEXT, make_text),
    "text_recurrent": ("multimodal", SMALL_CORE, make_text),
    "text_dropout": ("multimodal", with_dropout(SMALL_CORE), make_text),
    "streams": ("multimodal", SMALL_STREAMS, make_stream_caches),
    "recurrent_streams": ("multimodal", SMALL_RECURRENT, make_stream_caches),
}

# Name of a run -> its flags beyond the stage's.
RUNS = {
    "cpu": [],
    "fp32": ["--save_steps", str(STEPS // 2)],
    "bf16": ["--bf16"],
    "compiled": ["--compile_model"],
    "deterministic": ["--deterministic", "--save_steps", str(STEPS // 2)],
    "zero_2": ["--use_deepspeed", "--deepspeed_config", "ds_config_zero-2.json"],
    "checkpointing": ["--use_gradient_checkpointing"],
}


class StageRuns:
    """The runs of one stage, each a process."""

    def __init__(self, name: str, cache: Path | list[str], folder: Path):
        self.stage, self.common, _ = STAGES[name]
        self.cache, self.folder = cache if isinstance(cache, list) else ["--cached_dataset", str(cache)], folder
        self.processes = {run: self.start(run, *flags) for run, flags in RUNS.items()}

    def start(self, run: str, *flags: str) -> subprocess.Popen:
        """Start one run; its output goes to a file."""
        words = [*self.cache, "--output_dir", str(self.folder), "--run_name", run]
        words = changed([*self.common, *words, "--max_steps", str(STEPS)], "--batch_size", "8", *flags)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRANSFORMER_TRACEBACK": "1"}
        if run == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = (self.folder / f"{run}.log").open("w")
        return subprocess.Popen(
            [sys.executable, f"pretrain_{self.stage}.py", *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def __getitem__(self, run: str) -> Run:
        code = self.processes[run].wait(400)
        assert code == 0, (self.folder / f"{run}.log").read_text()[-6000:]
        return Run(self.folder / self.stage / run, STEPS)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in STAGES])
def runs(request, tmp_path_factory):
    """The runs of one stage, started."""
    folder, source = tmp_path_factory.mktemp("runs"), STAGES[request.param][2]
    cache = request.getfixturevalue(source) if isinstance(source, str) else source(folder / "cache")
    started = StageRuns(request.param, cache, folder)
    yield started
    for process in started.processes.values():
        process.kill()


def distances(one: Run, two: Run) -> tuple[float, float, float]:
    """Relative distances of losses (the largest) and of trained and averaged weights; printed."""
    losses = max(abs(b / a - 1) for a, b in zip(one.losses, two.losses, strict=True))
    found = (losses, *(relative_distance(one.weights(name), two.weights(name)) for name in ("model", "ema")))
    print(two.folder.parent, "losses {:.1e}, weights {:.1e}, averages {:.1e}".format(*found))
    return found


def test_fp32_equals_the_cpu(runs):
    losses, *weights = distances(runs["cpu"], runs["fp32"])
    assert losses <= 1e-3 and max(weights) <= 1e-3


@pytest.mark.parametrize("kind, bound", [("fp32", 1e-4), ("deterministic", 0)])
def test_a_resumed_run_equals_the_whole_one(runs, kind, bound):
    """To the bit with deterministic kernels."""
    whole, name = runs[kind], f"resumed_{kind}"
    half = runs.folder / runs.stage / name
    half.mkdir()
    (whole.folder.parent / f"checkpoint-{STEPS // 2}").rename(half / f"checkpoint-{STEPS // 2}")
    flags = ["--deterministic"] if kind == "deterministic" else []
    runs.processes[name] = runs.start(name, "--resume_from_checkpoint", *flags)
    losses, *weights = distances(whole, runs[name])
    assert losses <= bound and max(weights) <= bound


def test_zero_2_equals_the_plain_run(runs):
    skip_without_deepspeed()
    losses, *weights = distances(runs["fp32"], runs["zero_2"])
    assert losses <= 1e-4 and max(weights) <= 1e-4


def test_gradient_checkpointing_changes_nothing(runs):
    losses, *weights = distances(runs["fp32"], runs["checkpointing"])
    assert losses <= 1e-4 and max(weights) <= 1e-4


def test_bf16_stays_near_fp32_with_fp32_weights(runs):
    losses, *_ = distances(runs["fp32"], runs["bf16"])
    assert losses <= 5e-2
    assert all(value.dtype == torch.float32 for value in runs["bf16"].weights().values() if value.is_floating_point())


def test_adapters_train_the_same_compiled(runs):
    if runs.stage not in ("image_diffusion", "audio_diffusion", "multimodal"):
        pytest.skip("the stage has no adapters")
    flags = ["--init_from", str(runs["fp32"].folder.parent), "--lora_rank", "4", "--learning_rate", "1e-3"]
    for name, compiles in {"adapted": [], "adapted_compiled": ["--compile_model"]}.items():
        runs.processes[name] = runs.start(name, *flags, *compiles)
    losses, *weights = distances(runs["adapted"], runs["adapted_compiled"])
    assert losses <= 1e-3 and max(weights) <= 1e-3


def test_a_compiled_model_trains_the_same(runs):
    losses, *weights = distances(runs["fp32"], runs["compiled"])
    assert losses <= 1e-3 and max(weights) <= 1e-3
