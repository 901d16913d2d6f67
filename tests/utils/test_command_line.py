import pytest

from utils.command_line import parse_arguments, parse_overrides
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
