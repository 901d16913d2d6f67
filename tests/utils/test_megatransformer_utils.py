import json

import pytest

from utils.megatransformer_utils import StageArguments


@pytest.mark.parametrize(
    "name, problem",
    [
        ("../elsewhere", "leaves the folder of runs"),
        ("a/../../b", "leaves the folder of runs"),
        ("/tmp/run", "leaves the folder of runs"),
        ("~/run", "leaves the folder of runs"),
        ("", "is empty"),
        (" ", "is empty"),
        (".", "is empty"),
        ("checkpoint-5", "looks like a checkpoint"),
        ("a/checkpoint-10", "looks like a checkpoint"),
        ("a\nb", "cannot be printed"),
    ],
)
def test_run_names_that_are_no_folder_of_their_own_are_refused(name, problem):
    with pytest.raises(ValueError, match=f"--run_name=.*{problem}.*'demo'"):
        StageArguments(run_name=name).validate_run_name()


@pytest.mark.parametrize("name", ["demo", "sweep/lr 1e-4", "checkpoint-of-monday", "日本"])
def test_other_run_names_are_taken(name):
    StageArguments(run_name=name).validate_run_name()


@pytest.mark.parametrize("section", [{"nebula": {}}, {"checkpoint": {"writer": {"type": "FAST"}}}])
def test_a_writer_of_deepspeed_and_our_own_thread_are_refused(section, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(section))
    arguments = {"async_save": True, "use_deepspeed": True, "deepspeed_config": str(file)}
    with pytest.raises(ValueError, match=rf"--async_save: {file} .*'{next(iter(section))}'.*leave one"):
        StageArguments(**arguments).validate_async_save()
    file.write_text('{"checkpoint": {"parallel_write": {}}}')
    StageArguments(**arguments).validate_async_save()
