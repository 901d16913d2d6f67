"""What the causal model changes of transformers' `generate`: its cache, and what it refuses."""

import functools
from typing import Any, NoReturn

from torch import Tensor
from transformers import GenerationMixin

from model.kv_cache import CACHE_NAME, KeyValueCache

# Arguments of `generate` itself, which its loops hand on to the model's inputs.
OF_GENERATE = ("tokenizer", "assistant_tokenizer")


class CausalGenerationMixin(GenerationMixin):
    """`generate()` of transformers for a model whose cache has a slot per layer and thinking step."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Our own cache, unless the caller brings one or asks for another kind.

        Raises: ValueError: the model is in train mode, or decodes with an early exit of the layers.
        """
        if self.training:
            raise ValueError(
                "generate() in train mode: dropout, a random number of thinking steps and gradient checkpointing "
                "would change the text; call model.eval() first"
            )
        if (layers := generation_config.assistant_early_exit) is not None:
            raise ValueError(
                f"assistant_early_exit={layers} is not supported: the head reads the last layer alone; give a smaller "
                "assistant_model, or prompt_lookup_num_tokens"
            )
        is_default = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if is_default and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = KeyValueCache()
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    # The signature stays that of transformers, which inspects it.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """The arguments of `forward` for the next tokens."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in OF_GENERATE}

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Transformers asks for a 4-D mask with static caches; `forward` makes it itself from the mask of tokens."""
        return attention_mask

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        """Raises: ValueError: always; paged caches have no slots for thinking steps."""
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') is not supported: use generate() with "
            "a batch that is padded on the left"
        )
