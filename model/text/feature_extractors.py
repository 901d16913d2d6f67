"""Frozen pretrained text encoders.  B batch, T tokens, E width of the encoder."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer


class FrozenTextEncoder:
    """The last hidden states of a pretrained transformer, for captions that are encoded once and kept.

    Args:
        name: local folder or hub name of any transformers model with a tokenizer; of encoder-decoder models (T5) the
            encoder is used.
    Attributes:
        width: E.
    Raises:
        OSError: there is no such model; the message names it.
    """

    def __init__(self, name: str):
        config = AutoConfig.from_pretrained(name)
        self.name = name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        # Decoders such as GPT-2 have no padding token; the mask hides what stands in for it.
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        kind = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        model = kind.from_pretrained(name, dtype=torch.float32)
        model = getattr(model, "text_model", model)  # of models for text and images
        self.model = model.requires_grad_(False).eval()
        self.width: int = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Encode captions, each cut at `max_tokens` tokens, or at as many as the model has positions.

        Returns: states (B, T, E) bfloat16, 0 beyond a caption's end, and their mask (B, T), True at tokens.
        """
        limit = min(max_tokens, self.tokenizer.model_max_length)
        batch = self.tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        batch = batch.to(self.model.device)
        mask = batch["attention_mask"].bool()
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return (states * mask[..., None]).bfloat16(), mask
