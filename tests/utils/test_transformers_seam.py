"""What the trainers and the causal model override of transformers: the installed version has it, as we call it."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import GenerationMixin, Trainer
from transformers.masking_utils import create_masks_for_generate

from model.causal import MegaTransformerForCausalLM
from model.kv_cache import GENERATION_RELIES_ON, LAYER_RELIES_ON, GrowingLayer
from utils import training_utils
from utils.training_utils import RELIES_ON, TRAINERS, StageTrainer

ROOT = Path(__file__).resolve().parents[2]


def changes(table, *classes):
    """What transformers' `classes` lack of a table, or have with other parameters, one line each."""
    lines = []
    for name, (parameters, reason) in table.items():
        if parameters is None:  # An attribute of the instance.
            if not any(f"self.{name} =" in inspect.getsource(cls) for cls in classes):
                lines.append(f"{name} is no longer set ({reason})")
            continue
        method = next((getattr(cls, name) for cls in classes if hasattr(cls, name)), None)
        if method is None:
            lines.append(f"{name} is missing ({reason})")
            continue
        found = ", ".join(list(inspect.signature(method).parameters)[1:])
        if found != parameters:
            lines.append(f"{name} takes ({found}), not ({parameters}) ({reason})")
    return lines


def of_transformers(cls):
    return [base for base in cls.__mro__ if base.__module__.startswith("transformers")]


def overrides(cls, table):
    """Names that our own part of a class takes from transformers and that a table lacks; not class attributes."""
    theirs = of_transformers(cls)
    ours = [base for base in cls.__mro__ if base.__module__.startswith(("utils", "model"))]
    names = {name for base in ours for name, value in vars(base).items() if inspect.isfunction(value)}
    return {
        name for name in names if not name.startswith("__") and any(hasattr(base, name) for base in theirs)
    } - table.keys()


def test_the_trainer_has_what_the_trainers_rely_on():
    assert changes(RELIES_ON, Trainer) == []


def test_the_model_has_what_its_generation_relies_on():
    assert changes(GENERATION_RELIES_ON, *of_transformers(MegaTransformerForCausalLM)) == []
    assert changes(LAYER_RELIES_ON, *of_transformers(GrowingLayer)) == []
    # `generate` asks the model for its masks by this name, with keywords only, the mask of tokens among them.
    source = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    assert 'getattr(self, "create_masks_for_generate"' in source
    assert "attention_mask" in inspect.signature(create_masks_for_generate).parameters


def test_what_is_missing_or_changed_is_named():
    class Other:
        def _save(self, folder):
            """Other parameters than ours."""

    table = {name: RELIES_ON[name] for name in ("_save", "_run_epoch", "_total_loss_scalar")}
    lines = changes(table, Other)
    assert [line.split()[0] for line in lines] == list(table)
    assert "(folder), not (output_dir, state_dict)" in lines[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_table_names_all_overrides_of_a_trainer(name):
    assert overrides(getattr(training_utils, name), RELIES_ON) == set()


def test_the_tables_name_all_overrides_of_the_model():
    embeddings = {"get_input_embeddings", "set_input_embeddings", "set_output_embeddings", "resize_token_embeddings"}
    public = {*embeddings, "forward", "prepare_inputs_for_generation", "init_continuous_batching"}
    assert overrides(MegaTransformerForCausalLM, GENERATION_RELIES_ON) <= public
    assert overrides(GrowingLayer, LAYER_RELIES_ON) == set()


def test_the_table_names_all_private_parts_that_are_read():
    files = [
        ROOT / "utils/training_utils.py",
        ROOT / "utils/saving.py",
        *(ROOT / "utils/training").glob("*.py"),
        *(ROOT / "utils/resuming").glob("*.py"),
    ]
    names = {
        name for file in files for name in re.findall(r"(?:self|super\(\)|trainer)\.(_[a-z]\w*)", file.read_text())
    }
    ours = {name for name in names if hasattr(StageTrainer, name) and not hasattr(Trainer, name)}
    assert names - ours <= RELIES_ON.keys()
