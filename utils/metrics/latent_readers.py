"""Readers: small convolutional networks that say what the latents of an image or a clip show, in words of its text.

A reader is trained on the latents of real items and their texts. Applied to generated latents, it tells which of the
words that were asked for arrived. Its own scores on real held-out latents are the ceiling.

N items, Z latent channels, y x rows and columns, L latent frames, C classes of a factor, W words.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dataset_loading.files import replacing
from model.layers import in_double
from utils.console.progress import reported
from utils.metrics.caption_agreement import choose_words, mean_auc, words_of

logger = logging.getLogger(__name__)

Factors = Callable[[str], Mapping[str, str] | None]  # The factors of a text, such as its object.
GRID = 4  # Rows and columns to which the features of an image are pooled.
STRIDE = 4  # Of the features of a clip, in latent frames.
NOISE = 0.3  # Maximum std of the noise that training adds: generated latents are noisy too.
AT_ONCE = 64  # Items of a forward pass without gradients.
LEARNING_RATE = 3e-3


class FactorLabels:
    """What texts of a closed set say, factor by factor, such as object and ground.

    Args:
        texts: of the training items; their values are the classes.
        factors: of a text.
    Raises: ValueError: a text without factors.
    """

    kind = "factors"

    def __init__(self, texts: Sequence[str], factors: Factors):
        rows = [factors(text) for text in texts]
        if missing := [text for text, row in zip(texts, rows) if row is None]:
            raise ValueError(f"the text {missing[0]!r} has no factors")
        self.factors = factors
        self.classes = {name: sorted({row[name] for row in rows if row}) for name in rows[0] or ()}

    @property
    def width(self) -> int:
        """Outputs of the reader."""
        return sum(map(len, self.classes.values()))

    def describe(self) -> dict[str, Any]:
        """What it reads, for reports."""
        return {name: len(classes) for name, classes in self.classes.items()}

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        """Logits (N, C) of each factor."""
        return dict(zip(self.classes, logits.split([len(classes) for classes in self.classes.values()], dim=1)))

    def targets(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The class of each factor, (N,) int64; -1 for what is no class."""
        rows = [self.factors(text) or {} for text in texts]
        places = {name: {value: i for i, value in enumerate(classes)} for name, classes in self.classes.items()}
        return {name: torch.tensor([places[name].get(row.get(name, ""), -1) for row in rows]) for name in places}

    def loss(self, logits: Tensor, texts: Sequence[str]) -> Tensor:
        """Sum of the factors' cross-entropies."""
        targets = self.targets(texts)
        return torch.stack([F.cross_entropy(part, targets[name]) for name, part in self.split(logits).items()]).sum()

    def scores(self, logits: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """Share of items whose factor is read as the text says, by factor, and `all` of them."""
        targets = self.targets(texts)
        hits = {name: part.argmax(1) == targets[name] for name, part in self.split(logits).items()}
        shares = {name: in_double(hit).mean().item() for name, hit in hits.items()}
        return {**shares, "all": in_double(torch.stack(list(hits.values())).all(0)).mean().item()}


class WordLabels:
    """Which words of the training vocabulary a text has: for texts of any kind.

    Args: texts: of the training items.
    Raises: UnusableCaptionsError: no word is in some texts and absent from others.
    """

    kind = "words"

    def __init__(self, texts: Sequence[str]):
        self.words = choose_words(texts)

    @property
    def width(self) -> int:
        """Outputs of the reader."""
        return len(self.words)

    def describe(self) -> dict[str, Any]:
        """What it reads, for reports."""
        return {"words": len(self.words)}

    def targets(self, texts: Sequence[str]) -> Tensor:
        """(N, W), 1 where the text has the word."""
        return torch.tensor([[word in words for word in self.words] for words in map(words_of, texts)]).float()

    def loss(self, logits: Tensor, texts: Sequence[str]) -> Tensor:
        """Sum over words of the binary cross-entropy, mean over items."""
        targets = self.targets(texts).to(logits.device)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    def scores(self, logits: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """`words`: area under the ROC curve of a word, mean over words. `top1`: share of items whose own text is the
        most probable one among the distinct texts; equally probable ones count fractionally."""
        distinct = sorted(set(texts))
        has = self.targets(distinct)  # (M, W)
        # Log-probability of each text's words, and of the absence of the others.
        likelihood = F.logsigmoid(logits) @ has.T + F.logsigmoid(-logits) @ (1 - has).T
        best = likelihood >= likelihood.amax(1, keepdim=True) - 1e-5
        own = torch.tensor([distinct.index(text) for text in texts])
        top1 = (best[torch.arange(len(own)), own] / best.sum(1)).mean().item()
        return {"words": mean_auc(self.targets(texts), logits), "top1": top1}


Labels = FactorLabels | WordLabels


def labels_of(texts: Sequence[str], factors: Factors) -> Labels:
    """Factors where all texts have them, otherwise words."""
    return FactorLabels(texts, factors) if all(factors(text) for text in texts) else WordLabels(texts)


class LatentReader(nn.Module):
    """Latents to what their texts say.

    Args:
        modality: image latents (Z, y, x) or audio latents (L, Z), standardised.
        labels: what is read.
        n_channels: Z.
        width: channels of the first layer.
    """

    def __init__(self, modality: Literal["image", "audio"], labels: Labels, n_channels: int, width: int = 0):
        super().__init__()
        self.modality, self.labels = modality, labels
        width = width or (128 if modality == "image" else 96)
        Conv: Any = nn.Conv2d if modality == "image" else nn.Conv1d
        if modality == "image":
            layers = [Conv(n_channels, width, 3, padding=1), Conv(width, width, 3, padding=1, stride=2)]
        else:
            layers = [Conv(n_in, width, 4, padding=1, stride=2) for n_in in (n_channels, width)]
        self.layers = nn.ModuleList([*layers, Conv(width, 2 * width, 3, padding=1)])
        self.head = nn.Linear(2 * width * (GRID**2 if modality == "image" else 2), labels.width)

    def forward(self, latents: Sequence[Tensor]) -> Tensor:
        """N latents, clips of any lengths -> logits (N, outputs of the labels)."""
        if self.modality == "image":
            x = torch.stack(list(latents))
            for layer in self.layers:
                x = F.gelu(layer(x))
            return self.head(F.adaptive_avg_pool2d(x, GRID).flatten(1))
        # Clips, padded with zeros; features of padding are zero too, so that a clip does not depend on its batch.
        lengths = torch.tensor([max(len(clip), STRIDE) for clip in latents], device=latents[0].device)
        x = nn.utils.rnn.pad_sequence(list(latents), batch_first=True).transpose(1, 2)
        x = F.pad(x, (0, max(0, STRIDE - x.shape[2])))
        is_frame = torch.ones_like(x[:, :1], dtype=torch.bool)
        for layer in self.layers:
            x, lengths = F.gelu(layer(x)), lengths // layer.stride[0]  # type: ignore[index]
            is_frame = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
            x = x * is_frame
        # Maximum and mean over the frames of each clip.
        largest = x.masked_fill(~is_frame, -torch.inf).amax(2)
        return self.head(torch.cat([largest, x.sum(2) / lengths[:, None]], dim=1))

    @torch.no_grad()
    def read(self, latents: Sequence[Tensor]) -> Tensor:
        """Logits on the CPU, in batches."""
        device = self.head.weight.device
        rows = [self([row.to(device) for row in latents[i : i + AT_ONCE]]) for i in range(0, len(latents), AT_ONCE)]
        return torch.cat(rows).float().cpu()

    def score(self, latents: Sequence[Tensor], texts: Sequence[str]) -> dict[str, float]:
        """Agreement of latents with texts, see `Labels.scores`."""
        return self.labels.scores(self.read(latents), texts)


def train_reader(
    reader: LatentReader, latents: Sequence[Tensor], texts: Sequence[str], *, n_steps: int, seed: int = 0
) -> LatentReader:
    """Train a reader on the latents of real items and their texts; the same arguments give the same reader.

    Args: n_steps: of AdamW, one cycle of the learning rate; 64 images or 32 clips each.
    """
    device = reader.head.weight.device
    n_rows = min(64 if reader.modality == "image" else 32, len(latents))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for module in reader.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                module.reset_parameters()
        optimizer = torch.optim.AdamW(reader.parameters(), LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=n_steps + 1)
        for _ in reported(range(n_steps), f"reader of {reader.modality} latents", n_steps, "steps"):
            chosen = torch.randint(len(latents), (n_rows,)).tolist()
            noisy = [latents[i] + NOISE * torch.rand(()) * torch.randn_like(latents[i]) for i in chosen]
            loss = reader.labels.loss(reader([row.to(device) for row in noisy]), [texts[i] for i in chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return reader.eval().requires_grad_(False)


def saved_reader(
    file: Path,
    reader: LatentReader,
    load: Callable[[], tuple[Sequence[Tensor], Sequence[str]]],
    *,
    n_steps: int,
    identity: Mapping[str, Any],
) -> LatentReader:
    """A trained reader: that of a file, where it was trained on the same data in the same way, or a new one, which is
    written there.

    Args:
        load: latents and texts of the training items.
        identity: of the training items, JSON values.
    """
    content = {**identity, "n_steps": n_steps, "labels": reader.labels.describe(), "layers": str(reader)}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if file.exists() and stored_key(file) == key:
        reader.load_state_dict(safetensors.torch.load_file(file))
        return reader.eval().requires_grad_(False)
    logger.info("training the reader of %s latents: %d steps", reader.modality, n_steps)
    train_reader(reader, *load(), n_steps=n_steps)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        weights = {name: tensor.cpu().contiguous() for name, tensor in reader.state_dict().items()}
        safetensors.torch.save_file(weights, temporary, metadata={"key": key})
    return reader


def stored_key(file: Path) -> str:
    """The key of a file of `saved_reader`; "" where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as stored:
            return (stored.metadata() or {}).get("key", "")
    except (OSError, safetensors.SafetensorError):
        return ""
