import logging

import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading.embedded import openmoji
from utils.command_line import explained_errors, parse_arguments, parse_overrides
from utils.generation.arguments.image import TextToImageArguments
from utils.megatransformer_utils import StageArguments


def parse(*words):
    return parse_arguments(StageArguments, list(words), "test")


def test_published_command_line():
    words = """--use_deepspeed --bf16 --run_name r --config tiny --num_train_epoch 100 --batch_size 64
        --learning_rate 1e-4
        --gradient_accumulation_steps 8 --use_gradient_checkpointing --deepspeed_config ds_config_zero-2.json
        --local_rank=1"""
    args = parse(*words.split())
    assert args.num_train_epochs == 100 and args.bf16 and args.use_deepspeed and args.gradient_accumulation_steps == 8


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lerning_rate 1", "unknown argument --lerning_rate; did you mean '--learning_rate'"),
        ("--batch_size 0", "--batch_size=0 must be > 0"),
        ("--lr_scheduler_type cosin", "did you mean 'cosine'"),
        ("--max_steps 0", "trains nothing"),
        ("--deepspeed_config ds_config.json", "--deepspeed_config has no effect with use_deepspeed=False"),
        ("--use_deepspeed --deepspeed_config no.json", "--deepspeed_config='no.json' does not exist"),
        ("--no_use_ema --ema_decay 0.9", "--ema_decay has no effect with use_ema=False"),
        ("--grokfast_window 5", "--grokfast_window has no effect with trainer='default'"),
        ("--grokfast_lambda 5", "it needs trainer='grokfast_ema' or 'grokfast_ma'"),
    ],
)
def test_wrong_flags_end_with_a_message(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_booleans_have_a_no_form():
    assert parse().use_ema is True
    assert parse("--no_use_ema").use_ema is False


def test_resume_without_value_means_latest():
    assert parse("--resume_from_checkpoint").resume_from_checkpoint == "latest"
    assert parse("--resume_from_checkpoint", "runs/a").resume_from_checkpoint == "runs/a"


def test_overrides_are_read_as_json():
    fields = {"n_layers": 0, "name": 0, "widths": 0}
    assert parse_overrides(["n_layers=2", "name=abc", "widths=[1,2]"], fields) == {
        "n_layers": 2,
        "name": "abc",
        "widths": [1, 2],
    }
    with pytest.raises(ValueError, match="no field 'n_layer'; did you mean 'n_layers'"):
        parse_overrides(["n_layer=2"], fields)
    with pytest.raises(ValueError, match="must read key=value"):
        parse_overrides(["n_layers"], fields)


# ---- Flags that are given twice.


@pytest.mark.parametrize(
    ("words", "name", "values"),
    [
        ("--batch_size 4 --batch_size 8", "--batch_size", ("--batch_size 4", "--batch_size 8")),
        ("--batch_size 4 --batch_size 4", "--batch_size", ("--batch_size 4",)),
        ("--batch_size=4 --max_steps 3 --batch_size=8", "--batch_size", ("--batch_size 4", "--batch_size 8")),
        ("--use_ema --no_use_ema", "--use_ema", ("--use_ema", "--no_use_ema")),
        ("--bf16 --bf16", "--bf16", ("--bf16",)),
        ("--resume_from_checkpoint --resume_from_checkpoint runs/a", "--resume_from_checkpoint", ("latest", "runs/a")),
    ],
)
def test_a_flag_given_twice_is_refused_with_both_values(words, name, values, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    message = capsys.readouterr().err
    assert stop.value.code == 2 and f"{name} is given twice" in message and all(value in message for value in values)


@pytest.mark.parametrize(
    "words", ["--n_pictures 3 --n_images 4", "--n_images 4 --n_pictures=3", "--prompts b --prompts c d"]
)
def test_former_names_and_lists_count_too(words, capsys):
    required = [] if "--prompts" in words else ["--prompts", "a"]
    with pytest.raises(SystemExit) as stop:
        parse_arguments(TextToImageArguments, ["--checkpoint", "x", *required, *words.split()], "")
    assert stop.value.code == 2 and "is given twice" in capsys.readouterr().err


def test_overrides_add_up_and_launchers_append_their_rank():
    args = parse("--override", "a=1", "b=2", "--override", "c=3", "--local_rank=0", "--local-rank=1")
    assert args.override == ["a=1", "b=2", "c=3"] and args.given == ["override"]
    assert parse().override == []
    fields = {"a": 0, "b": 0}
    assert parse_overrides(["a=1", "b=2", "a=1"], fields) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"--override gives a twice: a=1 and a=2"):
        parse_overrides(["a=1", "b=2", "a=2"], fields)


def test_commands_of_embedded_data_take_a_flag_once(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        openmoji.main([str(tmp_path / "out"), "--limit", "2", "--limit", "3"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--limit 2 and --limit 3" in message and not (tmp_path / "out").exists()


# ---- Booleans with a value.


@pytest.mark.parametrize("text", ["false", "no", "0", "False", "off"])
def test_a_boolean_takes_a_value(text):
    assert parse("--use_ema", text).use_ema is False and parse(f"--use_ema={text}").use_ema is False
    assert parse("--bf16", {"0": "1", "no": "yes", "off": "on"}.get(text, "True")).bf16 is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--use_ema maybe", "--use_ema='maybe' must be true or false"),
        ("--no_use_ema=false", "--no_use_ema takes no value, not 'false'"),
        ("--use_ema false --use_ema true", "--use_ema is given twice: --no_use_ema and --use_ema"),
        ("--use_ema 0 --ema_decay 0.9", "--ema_decay has no effect with use_ema=False"),
        ("--config run.yaml", "--config_file"),
    ],
)
def test_wrong_values_of_booleans_and_presets(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(*words.split())
    assert message in capsys.readouterr().err


# ---- Errors of workers.


class UnreadableDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            raise KeyError(index)
        except KeyError as error:
            raise ValueError("a/b.pt is damaged (why);\nthis writes it: python x.py") from error


def test_an_error_of_a_loading_process_is_one_message(caplog):
    with pytest.raises(SystemExit) as stop, explained_errors(logging.getLogger("test")):
        list(DataLoader(UnreadableDataset(), num_workers=1))
    assert stop.value.code == 2
    assert caplog.messages == ["a/b.pt is damaged (why);\nthis writes it: python x.py"]
