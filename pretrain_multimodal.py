r"""The multimodal transformer: text alone, or text, images and audio in one stream, with or without a recurrent core.

Before: of text alone nothing, texts are tokenised by the first run on them; of images and audio the latents that
preprocess_image_diffusion_dataset.py and preprocess_audio_diffusion_dataset.py make, which belong together where their
source files have the same name. After: evaluate.py and inference/generate_text.py for text alone, inference/chat.py.

    python pretrain_multimodal.py --run_name demo --config tiny --text_dataset python-topics --max_steps 500
    python pretrain_multimodal.py --run_name deep --config recurrent-tiny --text_dataset my_texts --tokenizer bpe
    deepspeed --num_gpus=8 pretrain_multimodal.py --use_deepspeed --bf16 --run_name base --config small \
        --text_dataset my_texts --tokenizer bpe --tokenizer_vocab_size 16384 --sequence_length 1024 \
        --deepspeed_config ds_config_zero-2.json
    python pretrain_multimodal.py --run_name world --config multimodal-tiny --include_modes text image audio --bf16 \
        --image_latents cached_datasets/scenes_latents --audio_latents cached_datasets/speech_latents \
        --batch_size 72 --learning_rate 1.5e-3 --max_steps 1500
    python pretrain_multimodal.py --run_name spoken --config multimodal-tiny --include_modes text audio --bf16 \
        --init_from runs/multimodal/demo --override n_layers=4 --learning_rates trunk:0.1 --batch_tokens 2000 \
        --cached_dataset cached_datasets/text --tasks audio-text text-audio:4 text:1
"""

from utils.command_line import check_flags
from utils.training.arguments.multimodal import MultimodalArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(MultimodalArguments, __doc__)

from functools import cached_property

from dataset_loading.text.windows import TextDataset
from model.causal import MegaTransformerForCausalLM
from model.presets import MEGATRANSFORMER
from utils.configuration import MegaTransformerConfig
from utils.training.multimodal import MultimodalTrainer, TextSamplesCallback, ThinkingStepsCallback
from utils.training.stage import Stage
from utils.training.streams.stage import MultimodalStreamStage
from utils.training.text import (
    check_checkpoint,
    check_core_flags,
    fit_to_tokenizer,
    take_tokenizer,
    tokenize_texts,
    untokenized,
)


class MultimodalStage(Stage):
    name = "multimodal"  # runs are in runs/multimodal
    cache_name = "text"
    arguments_class = MultimodalArguments
    config_class = MegaTransformerConfig
    model_class = MegaTransformerForCausalLM
    presets = MEGATRANSFORMER  # --config names a row
    trainer_class = MultimodalTrainer  # its docstring states the loss

    @classmethod
    def complete_arguments(cls, args):
        super().complete_arguments(args)
        take_tokenizer(args)  # of a Llama

    def run(self):
        """A run on text alone, or that of the stage with images and audio."""
        return super().run() if self.args.include_modes == ["text"] else MultimodalStreamStage(self.args).run()

    def prepare(self):
        tokenize_texts(self.args, self.cache_dir)  # once; later runs read the cache

    def unprepared(self):
        return untokenized(self.args, self.cache_dir)

    @cached_property
    def texts(self) -> TextDataset:
        """The training set, once it is prepared: its tokenizer determines the vocabulary."""
        return TextDataset(self.cache_dir, "train", self.args.sequence_length)

    def build_config(self):
        """The preset with what the texts determine."""
        # A checkpoint to start from, or to resume, must have the tokenizer of the texts.
        for path in filter(None, (self.args.init_from, self.find_checkpoint())):
            check_checkpoint(path, self.texts)
        config = fit_to_tokenizer(super().build_config(), self.texts, self.args.override)
        check_core_flags(self.args, config)
        return config

    def build_dataset(self, split, config):
        return TextDataset(self.cache_dir, split, self.args.sequence_length)

    def build_trainer_parts(self, model):
        return {"tokenizer": self.texts.tokenizer}

    def build_callbacks(self, trainer, writer):
        # Histograms of thinking steps, and continuations of validation prompts.
        callbacks = [ThinkingStepsCallback(trainer, writer)]
        if self.args.n_samples:
            settings = {"n_samples": self.args.n_samples, "n_tokens": self.args.sample_tokens}
            callbacks.append(TextSamplesCallback(trainer, writer, **settings))
        return callbacks


if __name__ == "__main__":
    MultimodalStage.main()
