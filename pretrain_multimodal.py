r"""The multimodal transformer: a causal language model so far, with or without a recurrent core.

Before: nothing, texts are tokenised by the first run on them. After: evaluate.py, inference/generate_text.py.

    python pretrain_multimodal.py --run_name demo --config tiny --text_dataset python-topics --max_steps 500
    python pretrain_multimodal.py --run_name deep --config recurrent-tiny --text_dataset my_texts --tokenizer bpe
    deepspeed --num_gpus=8 pretrain_multimodal.py --use_deepspeed --bf16 --run_name base --config small \
        --text_dataset my_texts --tokenizer bpe --tokenizer_vocab_size 16384 --sequence_length 1024 \
        --deepspeed_config ds_config_zero-2.json
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from dataset_loading.text import TextDataset
from model.causal import MegaTransformerForCausalLM
from model.presets import MEGATRANSFORMER
from utils.configuration import MegaTransformerConfig, option
from utils.megatransformer_utils import StageArguments
from utils.multimodal_trainer import MultimodalTrainer
from utils.stage import Stage
from utils.text_callbacks import TextSamples, ThinkingStepsHistograms
from utils.text_stage import TextArguments, check_checkpoint, check_core_flags, fit_to_tokenizer, prepare


@dataclasses.dataclass
class MultimodalArguments(TextArguments, StageArguments):
    """Flags of the multimodal stage."""

    include_modes: list[Literal["text", "audio", "image"]] = option(["text"], "what the stream holds; text so far")

    learning_rate: float = option(6e-4, "peak learning rate of AdamW", gt=0)
    num_train_epochs: float = option(1.0, "passes over the training set; ignored where max_steps is given", gt=0)

    # The recurrent core in training.
    recurrent_steps_per_rank: bool = option(False, "every process draws its own number of thinking steps")
    recurrent_curriculum: float = option(
        0.0, "share of the steps over which the mean number of thinking steps grows from 1; 0: none", ge=0, le=1
    )

    # What is looked at during training.
    eval_thinking_steps: list[int] = option([], "depths that are evaluated; default: 1, 2, the mean, twice it", gt=0)
    sample_tokens: int = option(64, "most tokens of a continuation in TensorBoard", gt=0)
    n_samples: int = option(4, "validation prompts that are continued in TensorBoard; 0: none", ge=0)

    needs = {**TextArguments.needs, "sample_tokens": ("n_samples", bool)}

    def validate_modes(self):
        missing = [mode for mode in self.include_modes if mode != "text"]
        if missing or not self.include_modes:
            raise ValueError(
                f"--include_modes={self.include_modes}: text is the only mode so far; the parts that read and write "
                f"{' and '.join(missing) or 'other modes'} do not exist yet. Give --include_modes text"
            )

    def validate_ranks(self):
        if not (self.recurrent_steps_per_rank and self.use_deepspeed):
            return
        if json.loads(Path(self.deepspeed_config).read_text()).get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                f"--recurrent_steps_per_rank with ZeRO stage 3 ({self.deepspeed_config}): processes that run layers a "
                "different number of times wait for each other for ever; use stage 2 or below, or leave it out"
            )


class MultimodalStage(Stage):
    name = "multimodal"
    cache_name = "text"
    arguments_class = MultimodalArguments
    config_class = MegaTransformerConfig
    model_class = MegaTransformerForCausalLM
    presets = MEGATRANSFORMER
    trainer_class = MultimodalTrainer

    def build_config(self):
        """The preset with what the texts determine. They are tokenised here, before the processes meet."""
        prepare(self.args, self.cache_dir)
        texts = TextDataset(self.cache_dir, "train", self.args.sequence_length)
        self.tokenizer = texts.tokenizer
        for path in filter(None, (self.args.init_from, self.find_checkpoint())):
            check_checkpoint(path, texts, resumes=path != self.args.init_from)
        config = fit_to_tokenizer(super().build_config(), texts, self.args.override)
        check_core_flags(self.args, config)
        return config

    def build_dataset(self, split, config):
        return TextDataset(self.cache_dir, split, self.args.sequence_length)

    def build_trainer_parts(self, model):
        return {"tokenizer": self.tokenizer}

    def build_callbacks(self, writer):
        samples = [TextSamples(writer, self.args.n_samples, self.args.sample_tokens)] if self.args.n_samples else []
        return [*samples, ThinkingStepsHistograms(writer)]


if __name__ == "__main__":
    MultimodalStage.main()
