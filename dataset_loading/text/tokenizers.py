"""Tokenizers of text data: bytes, byte-level pairs trained here, or any fast tokenizer of a folder or of the hub.

All are transformers' `PreTrainedTokenizerFast`. Those built here give back every UTF-8 text exactly, and read special
tokens that are spelled out in a text (`<bos>`) as ordinary characters. Called on a prompt they put the first token of
a document in front, as in training.

    bytes   id 0 <pad>, 1 <bos> (also the end), byte b is b + 2: the ids of `model/text/tokenizer.py`
    bpe     id 0 <pad>, 1 <bos>, 2 <eos>, then 256 bytes, then merged pairs
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset_loading.files import fingerprint_of_bytes
from model.text.tokenizer import BEGIN_OF_TEXT, FIRST_BYTE, PADDING

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SMALLEST_BPE = 3 + 256  # Special tokens and bytes.
NO_LIMIT = 1 << 40  # Tokens of a text: transformers warns of longer ones.
PARALLEL, OURS = "TOKENIZERS_PARALLELISM", "off"  # Users write "false" or "0".
IMPORTED_IN = os.getpid()


TOKENIZER_FILE = "tokenizer.json"
# Usual names of special tokens, by the argument of transformers' tokenizers.
SPECIAL_NAMES = {
    "bos_token": (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]", "[BOS]"),
    "eos_token": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "[EOS]"),
    "pad_token": (PAD, "[PAD]", "<|pad|>"),
    "unk_token": ("<unk>", "[UNK]"),
}


class DocumentEnds(NamedTuple):
    """The ids of the first and the last token of a document."""

    begin: int
    end: int


class EncodedText(NamedTuple):
    """A text's ids, and the UTF-8 bytes that each id stands for; both (L,) int64."""

    ids: np.ndarray
    widths: np.ndarray


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: 258 ids. `<bos>` also ends a document."""
    characters = byte_characters()
    vocabulary = {PAD: PADDING, BOS: BEGIN_OF_TEXT}
    vocabulary |= {character: byte + FIRST_BYTE for byte, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return wrap(backend, BOS)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level pair encoding, split into words as GPT-2 does; equal texts give equal tokenizers.

    Args:
        texts: what it is trained on.
        vocab_size: ids in all; few texts may give fewer, as a pair must occur twice.
    Raises:
        ValueError: vocab_size is too small for special tokens and bytes.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {SMALLEST_BPE}: 256 bytes and 3 special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # All bytes are in the alphabet, so that every text has ids, also one of characters that training never saw.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    with parallel_tokenizers():
        backend.train_from_iterator(texts, trainer)
    return wrap(backend, EOS)


def wrap(backend: Tokenizer, end: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as transformers knows it."""
    backend.decoder = decoders.ByteLevel()
    begin = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=end,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=NO_LIMIT,
    )


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in byte-level tokenizers, as in GPT-2."""
    # GPT-2's table: printable characters stand for themselves, the other bytes for characters from U+0100 on.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + number) for number in range(256 - len(visible)))
    return [chr(byte) if byte in visible else next(hidden) for byte in range(256)]


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer by folder, by its file tokenizer.json, or by hub name.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: it is not a fast one, or has neither an end-of-text nor a beginning-of-text token.
    """
    path = Path(name).expanduser()
    # A file alone does not say which tokens begin and end a text; with the files beside it, its folder is loaded.
    if path.is_file() and path.suffix != ".json":
        remedy = "give that file, or its folder; save_pretrained of transformers converts others"
        raise FileNotFoundError(f"tokenizer={name!r} is no tokenizer.json; {remedy}")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"tokenizer={name!r} is neither 'bytes' nor 'bpe', and does not exist")
    is_alone = path.is_file() and not (path.parent / "tokenizer_config.json").is_file()
    try:
        if is_alone or (path.is_dir() and [file.name for file in path.glob("*.json")] == [TOKENIZER_FILE]):
            tokenizer = from_file(path if path.is_file() else path / TOKENIZER_FILE)
        else:
            place = path.parent if path.is_file() else path
            tokenizer = AutoTokenizer.from_pretrained(str(place) if path.exists() else name)
    except Exception as error:  # A damaged tokenizer.json raises errors of many types.
        reason = str(error).partition("\n")[0]
        if path.is_dir() and not (path / TOKENIZER_FILE).exists():
            checkpoint = next(iter(sorted(path.glob("checkpoint-*"))), None)
            reason = (
                f"the folder has no tokenizer.json{f'; name a checkpoint, such as {checkpoint}' * bool(checkpoint)}"
            )
        raise FileNotFoundError(
            f"tokenizer={name!r} is neither 'bytes' nor 'bpe', and transformers cannot load it: {reason}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer={name!r} is a {type(tokenizer).__name__}, not a fast tokenizer; choose one with tokenizer.json"
        )
    document_ends(tokenizer)
    return tokenizer


def from_file(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a tokenizer.json alone, with the usual names of the tokens that begin, end and pad a text."""
    backend = Tokenizer.from_file(str(file))
    names = {
        kind: next((name for name in names if backend.token_to_id(name) is not None), None)
        for kind, names in SPECIAL_NAMES.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=NO_LIMIT,
        **{kind: name for kind, name in names.items() if name},
    )


def document_ends(tokenizer: PreTrainedTokenizerFast) -> DocumentEnds:
    """The ids that begin and end a document; a tokenizer with only one of them uses it for both.

    Raises: ValueError: it has neither.
    """
    ends = [number for number in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(number, int)]
    if not ends:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has neither eos_token nor bos_token; "
            "documents need one: set it and save the tokenizer, or choose 'bytes' or 'bpe'"
        )
    return DocumentEnds(ends[0], ends[-1])


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows that an embedding needs: the largest id and one more."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hexadecimal digits of all that shapes the ids of a document."""
    text = f"{document_encoder(tokenizer).to_str()} {tuple(document_ends(tokenizer))}"
    return fingerprint_of_bytes([text.encode()])


def document_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's core that encodes whole texts and nothing else: uncut, unpadded, no token added."""
    # By its JSON: what is changed below must not reach the caller's tokenizer.
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    core.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    core.encode_special_tokens = True  # A text that spells a special token does not end the document.
    return core


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bytes per id of a tokenizer that was built here, (V,) int64; special tokens have none."""
    # A token of a byte-level vocabulary has one visible character per byte.
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = 0 if number in tokenizer.all_special_ids else len(token)
    return lengths


def encode_texts(core: Tokenizer, texts: Sequence[str], lengths: np.ndarray | None) -> Iterator[EncodedText]:
    """Encode a batch of texts with the core that `document_encoder` gives.

    Args:
        lengths: what `byte_lengths` gives, or None for other tokenizers, where the offsets tell.
    Yields:
        for each text its ids and their bytes, whose sum is the text's length, except that bytes which no id covers
        are missing from it.
    """
    with parallel_tokenizers():
        encode = core.encode_batch if lengths is None else core.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, encodings):
        ids = np.asarray(encoding.ids, dtype=np.int64)
        yield EncodedText(ids, bytes_by_offsets(text, encoding.offsets) if lengths is None else lengths[ids])


def bytes_by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes between the end of each token and that of those before it, (L,) int64.

    Of several tokens within one character the first has all its bytes; blanks that no token covers belong to the next.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")  # (characters,)
    # UTF-8 takes 1 byte for ASCII, 2 below U+0800, 3 below U+10000, else 4.
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    # Offsets count characters: the end of each token in bytes, (L,), which never goes back.
    ends = np.concatenate(([0], np.cumsum(widths)))[[end for _, end in offsets]] if offsets else np.zeros(0, np.int64)
    return np.diff(np.maximum.accumulate(ends), prepend=0).astype(np.int64)


@contextlib.contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Several threads inside; none afterwards, which is what makes later forks safe and silent.

    What the user has set stands. A forked process has no threads, and would wait for them forever.
    """
    if os.environ.get(PARALLEL, OURS) != OURS or os.getpid() != IMPORTED_IN:
        yield
        return
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ[PARALLEL] = OURS
