import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataset_loading.text.tokenizers import byte_tokenizer
from model.causal import MegaTransformerForCausalLM
from utils.generation.text import TextGenerator


@pytest.fixture(scope="module")
def sentencepiece():
    """Words as SentencePiece writes them: a blank is a part of the word after it, and of a text's first word."""
    words = ["<s>", "\u2581the", "\u2581cat", "\u2581sat", "s", "<unk>"]
    backend = Tokenizer(models.Unigram([(word, -float(number)) for number, word in enumerate(words)], unk_id=5))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_the_blank_between_prompt_and_continuation_is_kept(sentencepiece):
    model = MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64, vocab_size=6)
    generator = TextGenerator(model, sentencepiece)
    prompt = generator.encode("the cat")
    assert generator.decode([3], after=prompt) == " sat" and generator.decode([4], after=prompt) == "s"
    assert generator.decode([3]) == "sat" and generator.decode([], after=prompt) == ""


def test_characters_that_the_seam_cuts(sentencepiece):
    model = MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64, vocab_size=258)
    generator = TextGenerator(model, byte_tokenizer())
    ids = generator.encode("a \u00e9")
    assert generator.decode(ids[2:], after=ids[:2]) == " \u00e9"
    assert generator.decode(ids[-1:], after=ids[:-1]) == "\ufffd"
