"""A small text dataset whose windows have unequal numbers of targets, and flags of runs that take seconds."""

import random
from pathlib import Path

from dataset_loading.text.windows import prepare_text

WORDS = "a the tensor list of in is are model reads writes makes Zwölf bears — again and then while not".split()  # noqa: SIM905

SMALL_TEXT = """
    --config tiny --override hidden_size=64 --sequence_length 32 --learning_rate 1e-3 --logging_steps 1
    --eval_steps 1000 --save_steps 1000 --n_samples 0""".split()  # noqa: SIM905

# Sampled depths, a truncated window, and a random first state.
SMALL_CORE = """
    --config recurrent-tiny --override hidden_size=64 n_recurrent_layers=1 recurrent_mean_thinking_steps=3
    recurrent_max_thinking_steps=6 recurrent_backprop_steps=2 recurrent_state_initialization=normal
    --sequence_length 32 --learning_rate 1e-3 --logging_steps 1 --eval_steps 1000 --save_steps 1000
    --n_samples 0""".split()  # noqa: SIM905

# Every kind of dropout, as overrides.
DROPOUT = ["hidden_dropout=0.2", "embedding_dropout=0.1", "attention_dropout=0.1", "ffn_dropout=0.1"]


def with_dropout(common: list[str]) -> list[str]:
    """The flags of a run, with `DROPOUT`."""
    after = common.index("--override") + 1
    return [*common[:after], *DROPOUT, *common[after:]]


def make_text(
    folder: Path, n_documents: int = 120, *, tokenizer: str = "bytes", vocab_size: int | None = None
) -> Path:
    """Documents of 2 to 40 words, prepared next to their raw text; returns the prepared folder."""
    draw = random.Random(0)
    raw = folder.with_name(f"{folder.name}_raw")
    raw.mkdir(parents=True)
    for number in range(n_documents):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 40)))
        (raw / f"{number:03}.txt").write_text(f"{number} {text}\n", encoding="utf-8")
    return prepare_text(str(raw), folder, tokenizer, vocab_size=vocab_size, validation_fraction=0.2)
