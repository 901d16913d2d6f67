"""`--help` and wrong flags of every script: what they import, and what the help says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from model import presets
from utils.evaluation.arguments.every_stage import EvaluateArguments
from utils.flags.parser import build_parser
from utils.generation.arguments.image import TextToImageArguments
from utils.options import declared_fields
from utils.training.arguments.audio_vae import AudioVAEArguments
from utils.training.arguments.diffusion import AudioDiffusionArguments, ImageDiffusionArguments
from utils.training.arguments.image_vae import ImageVAEGANArguments, RecurrentVAEArguments
from utils.training.arguments.multimodal import MultimodalArguments
from utils.training.arguments.vocoder import VocoderArguments

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("pretrain_*.py", "preprocess_*.py", "evaluate.py", "inference/[a-z]*.py")
    for path in ROOT.glob(pattern)
)
# Runs scripts one after the other, and prints each one's exit status and the modules of other packages so far.
ANSWERS = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, "")
for script in sys.argv[2:]:
    for words in (["--help"], ["--no_such_flag"], ["--config_file", "no_such_file.yaml"]):
        sys.argv = [script, *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                runpy.run_path(script, run_name="__main__")
                status = None
            except SystemExit as stop:
                status = stop.code
        files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
        packages = {name.partition(".")[0] for name, file in files.items() if "site-packages" in file}
        message = errors.getvalue().strip().rpartition("\\n")[2]
        print(json.dumps([script, words[0], status, message, sorted(packages)]))
"""
# Of other packages the help needs what reads files of flags, and addresses of data sets; the last is Python's own.
LIGHT = {"yaml", "_yaml", "fsspec", "filelock", "_distutils_hack"}
STAGES = {
    ImageVAEGANArguments: ("image_vae", presets.IMAGE_VAE),
    RecurrentVAEArguments: ("recurrent_vae", presets.RECURRENT_VAE),
    ImageDiffusionArguments: ("image_diffusion", presets.IMAGE_DIFFUSION),
    VocoderArguments: ("vocoder", presets.VOCODER),
    AudioVAEArguments: ("audio_vae", presets.AUDIO_VAE),
    AudioDiffusionArguments: ("audio_diffusion", presets.AUDIO_DIFFUSION),
    MultimodalArguments: ("multimodal", {**presets.MEGATRANSFORMER, **presets.MULTIMODAL}),
}


def test_help_and_wrong_flags_of_every_script_import_nothing_slow():
    command = [sys.executable, "-c", ANSWERS, "", *PROGRAMS]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 3 * len(PROGRAMS) and len(PROGRAMS) >= 23
    slow = [(script, sorted(set(packages) - LIGHT)) for script, *_, packages in answers if set(packages) - LIGHT]
    assert not slow, slow[0]
    for script, flag, status, message, _ in answers:
        named = {"--help": "", "--no_such_flag": "--no_such_flag", "--config_file": "no_such_file.yaml"}[flag]
        assert (status, named in message) == (2 if named else 0, True), (script, flag, status, message)


def test_a_wrong_value_names_its_rule_without_slow_imports():
    command = [sys.executable, "-X", "importtime", "pretrain_vocoder.py", "--batch_size", "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "--batch_size=0 must be > 0" in run.stderr
    assert not {"torch", "transformers"} & {line.split("|")[-1].strip() for line in run.stderr.splitlines()}


def help_of(arguments: type) -> str:
    return build_parser(arguments, "").format_help()


@pytest.mark.parametrize("arguments", STAGES, ids=lambda arguments: arguments.stage)
def test_stages_name_their_presets_with_sizes_a_line_each(arguments):
    stage, rows = STAGES[arguments]
    assert (arguments.stage, arguments.presets) == (stage, rows)
    lines = [line.split() for line in help_of(arguments).splitlines()]
    for name, row in rows.items():
        if isinstance(row, dict):
            (line,) = [line for line in lines if line[:1] == [name] and "parameters" in line]
            assert float(line[1].replace(",", "")) == pytest.approx(row["parameters"] / 1e6, abs=0.006)


def groups(text: str) -> list[str]:
    return [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]


def test_flags_come_in_groups():
    titles = groups(help_of(ImageVAEGANArguments))
    assert titles[1:4] == ["Model", "Run", "Data"]
    assert {"Training", "Optimizer", "Engine: speed and memory", "GAN", "Losses"} < set(titles)
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("arguments", [*STAGES, EvaluateArguments, TextToImageArguments], ids=lambda cls: cls.__name__)
def test_every_flag_of_a_script_is_in_a_group_of_its_own_title(arguments):
    text = help_of(arguments)
    assert "Flags" not in groups(text)  # the title of flags without a section
    shown = {line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")}
    assert shown == {f"--{field.name}" for field in declared_fields(arguments)} | {"--config_file"}


def entry(text: str, flag: str) -> str:
    """The lines of a flag, joined."""
    _, _, rest = text.partition(f"\n  --{flag} ") if f"\n  --{flag} " in text else text.partition(f"\n  --{flag},")
    return " ".join(f"{flag} {rest.partition(chr(10) + '  --')[0]}".split())


def test_a_flag_says_bounds_default_choices_condition_and_its_no_form():
    text = help_of(AudioDiffusionArguments)
    assert ">= 0 and < 1; default: 0.98" in entry(text, "adam_beta2")
    assert "only with use_ema=True" in entry(text, "ema_decay")
    assert "< 2^32; default: 42" in entry(text, "seed")
    assert "--no_use_ema" in entry(text, "use_ema") and "default: True" in entry(text, "use_ema")
    sampler = next(field for field in declared_fields(AudioDiffusionArguments) if field.name == "sampler")
    assert all(name in entry(text, "sampler") for name in get_args(sampler.type))


def test_a_condition_of_a_whole_group_is_said_once():
    text = help_of(VocoderArguments)
    assert text.count("only with gan_weight other than 0 or empty") == 1
    assert "only with" not in entry(text, "gan_start_step")
