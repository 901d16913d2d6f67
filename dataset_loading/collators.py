"""Batches from samples, and how processes that make them meet signals."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from model.text.tokenizer import TOKENS_MULTIPLE, pad_tokens


def collate_stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples with the same keys and shapes along a new first axis.

    Raises:
        ValueError: keys or shapes differ between samples; the message names the key and the shapes.
    """
    check_keys(samples)
    batch = {}
    for key in samples[0]:
        tensors = [sample[key] for sample in samples]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"{key!r} has different shapes within one batch: {sorted(shapes)}")
        batch[key] = torch.stack(tensors)
    return batch


def collate_captioned(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples with captions of different lengths, which are padded.  B batch, T text tokens, E width.

    Args:
        samples: `tokens` (T,), optionally `text_states` (T', E), and tensors that `collate_stack` takes.
    Returns:
        the stacked tensors; `tokens` (B, T) int64, or `text_states` (B, T, E) padded with zeros where there are any;
        and `mask` (B, T) bool, True where a caption has a token. T is a multiple of 8.
    Raises:
        ValueError: keys or shapes differ between samples, or a caption has no token.
    """
    check_keys(samples)
    text = ("tokens", "text_states")
    stacked = collate_stack([{name: sample[name] for name in sample if name not in text} for sample in samples])

    # Captions as byte tokens, (B, T). A folder with a text encoder's states uses these instead.
    if "text_states" not in samples[0]:
        tokens, mask = pad_tokens([sample["tokens"] for sample in samples], TOKENS_MULTIPLE)
        return {**stacked, "tokens": tokens, "mask": mask}

    # Captions as states of a frozen text encoder, (B, T, E). Ones stand for its tokens to get the padded shape.
    positions, mask = pad_tokens([torch.ones(len(sample["text_states"])) for sample in samples], TOKENS_MULTIPLE)
    states = samples[0]["text_states"].new_zeros(*positions.shape, samples[0]["text_states"].shape[1])
    for row, sample in zip(states, samples):
        row[: len(sample["text_states"])] = sample["text_states"]
    return {**stacked, "text_states": states, "mask": mask}


def collate_audio(samples: Sequence[dict[str, Tensor]], log_floor: float) -> dict[str, Tensor]:
    """Stack clips of different lengths, which are padded.  B batch, M mel bins, F frames, S samples, T text tokens.

    Args:
        samples: `mel` (M, F), optionally `waveform` (S,) and `tokens` (T,), and tensors that `collate_stack` takes.
        log_floor: the log-mel of silence, `MelSettings.log_floor`.
    Returns:
        the stacked tensors; `mel` (B, M, F) padded with `log_floor` at the end, `n_frames` (B,) int64; `waveform`
        (B, S) and `tokens` (B, T) int64 padded with zeros at the end; `token_lengths` (B,) int64.
    Raises:
        ValueError: keys, or shapes of what is not padded, differ between samples.
    """
    check_keys(samples)
    padded = ("mel", "waveform", "tokens")
    batch = collate_stack([{name: sample[name] for name in sample if name not in padded} for sample in samples])

    # Log-mels, in place: a long clip makes the batch large, which should not be there twice.
    lengths = [sample["mel"].shape[1] for sample in samples]
    batch["mel"] = samples[0]["mel"].new_full((len(samples), samples[0]["mel"].shape[0], max(lengths)), log_floor)
    for row, sample in zip(batch["mel"], samples):
        row[:, : sample["mel"].shape[1]] = sample["mel"]
    batch["n_frames"] = torch.tensor(lengths)

    # Waveforms (B, S) and transcripts (B, T), where the samples have them. Their zeros are silence and no token.
    if "waveform" in samples[0]:
        batch["waveform"] = pad_sequence([sample["waveform"] for sample in samples], batch_first=True)
    if "tokens" in samples[0]:
        batch["tokens"] = pad_sequence([sample["tokens"].long() for sample in samples], batch_first=True)
        batch["token_lengths"] = torch.tensor([len(sample["tokens"]) for sample in samples])
    return batch


def collate_by_length(samples: Sequence[dict[str, Tensor]], log_floor: float, max_frames: int) -> dict[str, Any]:
    """Clips as batches of `collate_audio`, each of clips of like length, so that one long clip does not pad all others
    to its length.

    Args:
        samples, log_floor: as for `collate_audio`.
        max_frames: of a batch with its padding, unless a single clip has more; clips that have no more together come
            in one batch, in their order.
    Returns: `batches`, a dict by their number; `rows`, the places of their clips in `samples`, (B,) int64.
    """
    lengths = [sample["mel"].shape[1] for sample in samples]
    groups: list[list[int]] = [list(range(len(samples)))]
    if len(samples) * max(lengths) > max_frames:
        groups = []
        for row in sorted(range(len(samples)), key=lengths.__getitem__):
            if not groups or (len(groups[-1]) + 1) * lengths[row] > max_frames:
                groups.append([])
            groups[-1].append(row)
    batches = {number: collate_audio([samples[row] for row in rows], log_floor) for number, rows in enumerate(groups)}
    return {"batches": batches, "rows": torch.tensor([row for rows in groups for row in rows])}


def collate_by_shape(
    samples: Sequence[dict[str, Tensor]], collate: Callable[[Sequence[dict[str, Tensor]]], dict[str, Any]], name: str
) -> dict[str, Any]:
    """Samples as one batch where a tensor has the same shape in all of them, else as batches of one shape each.

    Args:
        collate: samples of one shape -> batch.
        name: of the tensor.
    Returns: the batch; or `batches`, a dict by their number, and `rows`, the places of their samples, (B,) int64.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(tuple(sample[name].shape), []).append(row)
    if len(groups) == 1:
        return collate(samples)
    batches = {number: collate([samples[row] for row in rows]) for number, rows in enumerate(groups.values())}
    return {"batches": batches, "rows": torch.tensor([row for rows in groups.values() for row in rows])}


def batches_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches of one shape, or of like length, that a batch consists of; alone itself."""
    return list(batch["batches"].values()) if "batches" in batch else [batch]


def in_order(batch: dict[str, Any], values: Sequence[Any]) -> list[Any]:
    """Values of the samples of `batches_of(batch)`, one batch after the other, in the order of the samples."""
    if "batches" not in batch:
        return list(values)
    return [values[place] for place in batch["rows"].argsort().tolist()]


class HostFields:
    """A collator whose batches have some fields as numpy arrays, which no loader moves to a device. A process that
    loads data leaves signals to its parent from its first batch on.

    Args:
        collator: samples -> batch.
        names: of the fields, also within the dicts of a batch.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]], names: Sequence[str]):
        self.collator, self.names = collator, tuple(names)

    def __call__(self, samples: Any) -> dict[str, Any]:
        if get_worker_info() is not None:
            leave_signals_to_parent()
        return self.on_host(self.collator(samples))

    def on_host(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its fields, and those of its dicts, as arrays."""
        fields = {}
        for name, value in batch.items():
            if isinstance(value, dict):
                value = self.on_host(value)
            fields[name] = value.numpy() if name in self.names and isinstance(value, Tensor) else value
        return fields


@functools.cache
def leave_signals_to_parent() -> None:
    """Let this loading process live on when its process group gets SIGTERM or SIGINT, so that the training process
    can finish its step and save. A SIGTERM of the training process itself still ends it.

    PyTorch's handler would end the loader. The signals are blocked instead of ignored, since the training process
    ends its loaders by SIGTERM and waits for them. macOS and Windows do not tell who sent a signal: there SIGTERM ends
    the loader, and Ctrl-C alone is left to the parent.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    threading.Thread(target=end_with_parent_signal, daemon=True).start()  # It inherits the mask.


def end_with_parent_signal() -> None:
    """Wait for SIGTERM, and end this process where it comes from the parent."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def check_keys(samples: Sequence[dict[str, Tensor]]) -> None:
    """Raises: ValueError: keys differ between samples."""
    keys = samples[0].keys()
    for sample in samples:
        if sample.keys() != keys:
            # A folder whose samples were made in two ways, such as with and without --horizontal_flip.
            raise ValueError(f"samples of one batch have different keys: {sorted(keys)} and {sorted(sample)}")
