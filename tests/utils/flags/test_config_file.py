"""Files of flags: what they hold, what wins over them, and the record of a run as one."""

import dataclasses
import json

import pytest

from utils.command_line import parse_arguments
from utils.evaluation.arguments.every_stage import EvaluateArguments
from utils.flags.config_file import OF_THE_COMMAND
from utils.generation.arguments.image import TextToImageArguments
from utils.preprocessing.arguments import ImageVAEPreprocessArguments, MergeArguments
from utils.resuming.flags import CALL, ON_RESUME
from utils.training.arguments.image_vae import ImageVAEGANArguments, RecurrentVAEArguments

YAML = """
# A comment.
run_name: abc
learning_rate: 2e-4
max_steps: 10
use_ema: no
bf16: true
override:
  image_size: 32
  encoder_widths: [8, 16]
  architecture: residual
diff_augment: [color, cutout]
"""


@pytest.fixture
def parse(tmp_path):
    """parse(content, words) -> flags of the image VAE with a file, whose name may say that it is JSON."""

    def parse(content: str, *words: str, name: str = "run.yaml", arguments: type = ImageVAEGANArguments):
        (tmp_path / name).write_text(content)
        return parse_arguments(arguments, [*words, "--config_file", str(tmp_path / name)], "")

    return parse


@pytest.fixture
def error(parse, capsys):
    """error(content, words) -> the message that ends a command line."""

    def error(*contents: str, **settings) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*contents, **settings)
        assert stop.value.code == 2
        return capsys.readouterr().err.rpartition("error: ")[2]

    return error


def test_a_file_gives_flags_as_the_command_line_does(parse):
    args = parse(YAML)
    words = "--run_name abc --learning_rate 2e-4 --max_steps 10 --no_use_ema --bf16 --diff_augment color cutout"
    overrides = ["image_size=32", "encoder_widths=[8, 16]", "architecture=residual"]
    same = parse_arguments(ImageVAEGANArguments, [*words.split(), "--override", *overrides], "")
    assert args == same and args.given == same.given


def test_json_gives_the_same(parse):
    content = {"learning_rate": 2e-4, "use_ema": False, "override": {"encoder_widths": [8, 16]}, "diff_augment": []}
    args = parse(json.dumps(content), name="run.json")
    assert (args.learning_rate, args.use_ema, args.diff_augment) == (2e-4, False, [])
    assert args.override == ["encoder_widths=[8, 16]"]
    assert parse(json.dumps(content)).override == args.override  # JSON is YAML


def test_the_command_line_wins(parse):
    args = parse(YAML, "--use_ema", "--learning_rate", "1e-5", "--override", "image_size=64", "--diff_augment")
    assert (args.use_ema, args.learning_rate, args.diff_augment, args.run_name) == (True, 1e-5, [], "abc")
    assert args.override == ["encoder_widths=[8, 16]", "architecture=residual", "image_size=64"]


def test_a_given_length_replaces_that_of_the_file(parse):
    args = parse("max_steps: 10\n", "--num_train_epochs", "3")
    assert (args.max_steps, args.num_train_epochs) == (-1, 3)


def test_what_the_command_line_switches_off_is_left_out(parse, error):
    args = parse("gan_weight: 1\nr1_weight: 2\nema_decay: 0.9\n", "--gan_weight", "0", "--no_use_ema")
    assert (args.gan_weight, args.r1_weight, args.use_ema) == (0, 0, False) and "r1_weight" not in args.given
    message = error("use_ema: false\nema_decay: 0.9\n")  # The file alone contradicts itself.
    assert "--ema_decay has no effect with use_ema=False" in message and "run.yaml" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lerning_rate: 1\n", "unknown key lerning_rate; did you mean 'learning_rate'"),
        ("learning_rat: 1\n", "unknown key learning_rat; did you mean"),  # No abbreviation, as on the command line.
        ("lr: 1\n", "unknown argument --lr; here it is --learning_rate"),
        ("no_use_ema: true\n", "unknown key no_use_ema; did you mean 'use_ema'"),
        ("config_file: other.yaml\n", "unknown key config_file"),
        ("batch_size: 4\nbatch_size: 8\n", "batch_size is given twice"),
        ("n_logged_samples: 4\nn_logged_pictures: 8\n", "--n_logged_samples is given twice"),
        ("override: {a: 1, a: 2}\n", "a is given twice"),
        ("batch_size: many\n", "--batch_size: invalid int or auto value: 'many'"),
        ("batch_size: 0\n", "--batch_size=0 must be > 0"),
        ("use_ema: maybe\n", "--use_ema='maybe' must be true or false"),
        ("discriminator: pach\n", "did you mean 'patch'"),
        ("- batch_size\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("batch_size: [4\n", "line"),
    ],
)
def test_errors_name_file_and_key(content, expected, error):
    message = error(content)
    assert expected in message and "run.yaml" in message


@pytest.mark.parametrize("content", ['{"batch_size": 4, "batch_size": 8}', '{"batch_size": 4,}'])
def test_errors_in_json(content, error):
    message = error(content, name="run.json")
    assert "run.json" in message and ("batch_size is given twice" in message or "line 1" in message)


def test_a_missing_file_a_folder_and_no_text(tmp_path, capsys):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG")
    cases = ((tmp_path / "no.yaml", "does not exist"), (tmp_path, "stage.json"), (tmp_path / "image.yaml", "decode"))
    for path, expected in cases:
        with pytest.raises(SystemExit):
            parse_arguments(ImageVAEGANArguments, ["--config_file", str(path)], "")
        message = capsys.readouterr().err
        assert str(path) in message and expected in message


# ---- The record of a run.


def record_of(*words: str, stage: str = "image_vae", **changes) -> str:
    args = parse_arguments(ImageVAEGANArguments, list(words), "")
    return json.dumps({"stage": stage, "arguments": {**dataclasses.asdict(args), **changes}, "preset": "tiny"})


def test_a_run_is_repeated_from_its_record(parse):
    words = ["--no_use_ema", "--gan_weight", "0", "--learning_rate", "2e-4", "--override", "image_size=32"]
    first = parse_arguments(ImageVAEGANArguments, words, "")
    record = record_of(*words, "--run_name", "first", "--output_dir", "elsewhere", "--dry_run")
    args = parse(record, name="stage.json")
    assert args == first and args.given == ["gan_weight", "learning_rate", "override", "use_ema"]
    args = parse(record, "--run_name", "second", "--use_ema", "--ema_decay", "0.9", name="stage.json")
    assert (args.run_name, args.use_ema, args.ema_decay, args.learning_rate) == ("second", True, 0.9, 2e-4)


def test_a_record_of_another_version_may_hold_other_defaults(parse):
    args = parse(record_of(grokfast_window=50, max_grad_norm=3.0), name="stage.json")  # The former has no effect.
    assert args.given == ["max_grad_norm"] and args.max_grad_norm == 3


def test_records_of_other_stages_and_versions_are_refused(error):
    message = error(record_of(), name="stage.json", arguments=RecurrentVAEArguments)
    assert "stage.json" in message and "'image_vae'" in message and "pretrain_image_vae.py" in message
    assert "'image_vae'" in error(record_of(), name="stage.json", arguments=EvaluateArguments)
    assert "unknown key former_flag" in error(record_of(former_flag=3), name="stage.json")


def test_what_belongs_to_a_command_is_not_taken():
    assert {name for name, kind in ON_RESUME.items() if kind == CALL} == set(OF_THE_COMMAND)


# ---- Scripts that train nothing.


def test_other_scripts_take_files_too(parse, error):
    args = parse("checkpoint: runs/a\nprompts: [a key, -5 degrees]\nseeds: [1, 2]\n", arguments=TextToImageArguments)
    assert args.prompts == ["a key", "-5 degrees"] and args.seeds == [1, 2]
    args = parse(
        "dataset_name: images\nhorizontal_flip: 0.5\n",
        "--num_augmented_copies",
        "1",
        arguments=ImageVAEPreprocessArguments,
    )
    assert (args.dataset_name, args.horizontal_flip) == ("images", 0.5)
    assert "--merge" in error("dataset_name: a\nmerge: [b]\n", arguments=ImageVAEPreprocessArguments)
    assert parse("output_dir: x\npack: 5\n", "--merge", "a", "b", arguments=MergeArguments).pack == 5
