"""Random clips of speech of different lengths, as the collator of audio latents pads them."""

import torch


def speech_clips(lengths=(9, 4, 14), *, n_symbols=12, n_channels=6, compression=2, seed=0) -> list[dict]:
    """Clips with so many tokens: latents, tokens, durations, some of 0 frames."""
    generator, clips = torch.Generator().manual_seed(seed), []
    for index, n_tokens in enumerate(lengths):
        highest = torch.tensor([n_symbols, 3, 4])
        tokens = (torch.rand(n_tokens, 3, generator=generator) * highest).long()
        durations = torch.randint(0, 5, (n_tokens,), generator=generator)
        durations[0] = 3
        n_latents = -(-int(durations.sum()) // compression)
        latents = torch.randn(n_latents, n_channels, generator=generator)
        index, speaker = torch.tensor(index), torch.tensor(index % 2)
        clips.append(
            {"latents": latents, "tokens": tokens, "durations": durations, "speakers": speaker, "index": index}
        )
    return clips


def collate(clips: list[dict], *, extra: int = 0, padding: float = 0) -> dict:
    """A batch, with `extra` more tokens and frames of padding than needed, filled with a number."""
    n_latents, n_tokens = ([len(clip[name]) for clip in clips] for name in ("latents", "tokens"))
    batch = {
        "n_latent_frames": torch.tensor(n_latents),
        "n_tokens": torch.tensor(n_tokens),
        "speakers": torch.stack([clip["speakers"] for clip in clips]),
        "index": torch.stack([clip["index"] for clip in clips]),
    }
    for name, length in (("latents", max(n_latents)), ("tokens", max(n_tokens)), ("durations", max(n_tokens))):
        first = clips[0][name]
        batch[name] = torch.full((len(clips), length + extra, *first.shape[1:]), padding).to(first.dtype)
        for row, clip in zip(batch[name], clips):
            row[: len(clip[name])] = clip[name]
    return batch
