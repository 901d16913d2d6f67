"""What text to speech and captions to sound share: loading, sampling, the VAE's decoder, the vocoder.

B batch, L latent frames, Z latent channels, M mel bins, F mel frames, S samples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model.audio.configuration import AudioDiffusionConfig
from model.audio.diffusion import AudioDiffusion
from model.audio.frame_conv import prepack
from model.audio.griffin_lim import griffin_lim
from model.audio.lengths import sequence_to_latents
from model.audio.spectral import MelSettings, check_same_mel
from model.audio.unet1d import AudioCondition
from model.audio.vae import AudioVAE
from model.audio.vocoders import Vocoder
from model.samplers import OnEstimate
from model.text.phonemes import SpeechTokenizer
from utils.checkpoints import chosen_weights, data_of, load_model, read_stage, resolve_checkpoint
from utils.devices import compute_device
from utils.flags.choices import WeightsKind
from utils.generation.audio import load_vocoder
from utils.generation.exported import home_of, vocoder_of
from utils.generation.latents import find_vae, load_vae
from utils.options import suggest
from utils.seeds import generators


class AudioPipeline:
    """Makes sound of texts with a diffusion model, the VAE of its latents, and a vocoder. Subclasses say how texts
    become inputs.

    Args:
        model, vae: on the same device, in eval mode.
        vocoder: of the VAE's log-mel; None for Griffin-Lim.
        bf16: bfloat16 autocast.
    """

    conditioning: ClassVar[str]  # The only one whose models are accepted.
    task = "text to speech"  # In messages.
    text_flags: ClassVar[tuple[str, ...]] = ()  # Flags that are options of `text_parts`.
    default_temperature: ClassVar[float] = 1.0  # Where the flags leave it open.

    def __init__(self, model: AudioDiffusion, vae: AudioVAE, vocoder: Vocoder | None = None, *, bf16: bool = False):
        self.model, self.vae, self.vocoder, self.bf16 = model, vae, vocoder, bf16
        self.record: dict[str, str] = {}  # Checkpoints, weights and device, for the settings of a run.

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        vae_checkpoint: str = "",
        vocoder_checkpoint: str = "",
        weights: WeightsKind = "ema",
        device: torch.device | str = "cpu",
        bf16: bool = False,
        **options: Any,
    ) -> Self:
        """From a run or checkpoint folder of the diffusion stage.

        Args:
            vae_checkpoint: path of the VAE; empty: its copy in the run or the cache, or the recorded path.
            vocoder_checkpoint: path of a vocoder; empty: that of an exported folder, or Griffin-Lim.
            options: of `text_parts`.
        Raises:
            FileNotFoundError: a checkpoint is missing.
            ValueError: the checkpoint is of another stage or conditioning, its latents come from another VAE, or the
                vocoder reads another log-mel.
        """
        folder, record = resolve_checkpoint(checkpoint), read_stage(checkpoint)
        if record["stage"] != "audio_diffusion":
            raise ValueError(f"{checkpoint} is of stage {record['stage']!r}; {cls.task} needs audio_diffusion")
        model = load_model(AudioDiffusion, checkpoint, weights).requires_grad_(False)
        if model.config.conditioning != cls.conditioning:
            raise ValueError(
                f"{checkpoint} was trained with conditioning={model.config.conditioning!r}; {cls.task} needs a model "
                f"of conditioning={cls.conditioning!r}"
            )
        # Latents of another VAE would decode to noise, so the VAE is identified by its fingerprint.
        name = f"the latents that {checkpoint} was trained on"
        folders = (home_of(folder), data_of(folder))
        path = find_vae(record["latents"], name, given=vae_checkpoint, folders=folders, media="audio")
        vae = load_vae(path, media="audio").requires_grad_(False)
        vocoder_path = vocoder_of(folder, vocoder_checkpoint)
        vocoder = load_matching_vocoder(vocoder_path, vae.config.mel, f"the VAE {path}")
        for network in (model, vae, vocoder):
            if network is not None:
                network.to(device)
                if network.device.type == "cpu":
                    prepack(network)
        parts = cls.text_parts(record, folder, device, **options)
        pipeline = cls(model, vae, vocoder=vocoder, bf16=bf16, **parts)
        pipeline.record = {
            "checkpoint": str(folder),
            "weights": weights,
            "device": str(device),
            "vae_checkpoint": str(path),
            "vocoder_checkpoint": vocoder_path,
        }
        if encoder := parts.get("text_encoder"):
            pipeline.record["text_encoder"] = encoder.name
        return pipeline

    @classmethod
    def of_flags(cls, args: Any) -> Self:
        """As `load`, by the flags of the script that generates; on the GPU if there is one."""
        checkpoint, device = resolve_checkpoint(args.checkpoint), compute_device()
        names = ("vae_checkpoint", "vocoder_checkpoint", "bf16", *cls.text_flags)
        options = {name: getattr(args, name) for name in names}
        return cls.load(checkpoint, **options, weights=chosen_weights(checkpoint, args), device=device)

    @classmethod
    def text_parts(cls, record: Mapping[str, Any], folder: Path, device: torch.device | str) -> dict[str, Any]:
        """Keywords of the pipeline that turn texts into inputs of the model.

        Args:
            record: of the checkpoint, with `latents`, the settings of its cache.
            folder: the checkpoint.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.model.device

    def autocast(self) -> torch.autocast:
        """The autocast of all networks."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def temperature_of(self, settings: Any) -> float:
        """The temperature of the sampling flags."""
        return self.default_temperature if settings.temperature is None else settings.temperature

    def sample(
        self,
        condition: AudioCondition,
        seeds: Sequence[int],
        settings: Any,
        on_estimate: OnEstimate | None = None,
    ) -> Tensor:
        """Latents (B, L, Z) by the sampling flags; the noise of a clip depends on its seed alone.

        Args: on_estimate: called during sampling with estimates of the latents, see `model.samplers.sample`.
        """
        noise = [generator for seed in seeds for generator in generators(seed, 0, torch.zeros(1), stream="speech")]
        low, high = settings.guidance_interval
        return self.model.sample(
            condition,
            noise,
            sampler=settings.sampler,
            n_steps=settings.n_steps,
            guidance_scale=settings.guidance_scale,
            guidance_interval=(low, high),
            temperature=self.temperature_of(settings),
            on_estimate=on_estimate,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, n_frames: Tensor, speakers: Sequence[str] = ()) -> list[Tensor]:
        """Log-mels of latents.

        Args:
            latents: (B, L, Z) standardised.
            n_frames: mel frames of each clip, (B,).
            speakers: their names, for a VAE that is conditioned on speakers.
        Returns: (M, F) fp32 on the CPU for each clip.
        Raises: ValueError: a log-mel that is not finite, a speaker that the VAE does not know, or none where it needs
            them.
        """
        known, places = self.vae.config.speakers, None
        if known:
            if not speakers:
                raise ValueError(f"the VAE needs a speaker for each clip, one of {', '.join(known)}; none is given")
            unknown = [name for name in speakers if name not in known]
            if unknown:
                raise ValueError(f"the VAE knows no speaker {unknown[0]!r}{suggest(unknown[0], known)}")
            places = torch.tensor([known.index(name) for name in speakers], device=self.device)
        latents = sequence_to_latents(latents.float(), self.vae.config.latent_channels)
        latents = self.vae.denormalize_latents(latents)
        with self.autocast():
            mels = self.vae.decode(latents, n_frames, places).float().cpu().clamp_min(self.vae.config.mel.log_floor)
        if not mels.isfinite().all():
            raise ValueError(
                "a generated log-mel is not finite: --temperature or --guidance_scale is far too large, or the "
                "weights are broken"
            )
        return [mel[:, :n] for mel, n in zip(mels, n_frames.tolist())]

    def vocode(self, mel: Tensor) -> Tensor:
        """The waveform (F * hop_length,) of a log-mel (M, F), by the vocoder or Griffin-Lim, fp32 on the CPU."""
        settings = self.vae.config.mel
        # Frames up to the shortest waveform that has a log-mel.
        n_frames, shortest = mel.shape[1], -(-settings.min_samples // settings.hop_length)
        mel = F.pad(mel, (0, max(0, shortest - n_frames)), value=settings.log_floor)[None].to(self.device)
        with torch.no_grad():
            if self.vocoder is None:
                waveform = griffin_lim(mel, settings)
            else:
                with self.autocast():
                    waveform = self.vocoder.synthesize(mel)
        return waveform[0, : n_frames * settings.hop_length].float().cpu()


def load_matching_vocoder(path: str, mel: MelSettings, owner: str) -> Vocoder | None:
    """The vocoder of a run or checkpoint folder, None for "".

    Args:
        mel: the log-mel that it must read.
        owner: whose log-mel this is, in the message.
    Raises: FileNotFoundError, ValueError: no checkpoint of a vocoder, or one of another log-mel.
    """
    if not path:
        return None
    vocoder = load_vocoder(path)
    remedy = "use a vocoder that was trained on the same log-mel"
    check_same_mel(mel, vocoder.config.mel, first_name=owner, second_name=f"the vocoder {path}", remedy=remedy)
    return vocoder


def fit_to_audio_latents(
    config: AudioDiffusionConfig,
    latents: dict[str, Any],
    *,
    speakers: Sequence[str],
    vae_speakers: Sequence[str],
    overrides: Sequence[str],
    folder: Path,
) -> AudioDiffusionConfig:
    """The configuration with the fields that cached latents determine.

    Args:
        latents: settings of the cache's manifest.
        speakers: that the model tells apart; fewer than two are none.
        vae_speakers: those of the latents' VAE.
        overrides: the `key=value` that the user gave.
        folder: of the cache.
    Raises: ValueError: an override contradicts the latents, or the VAE needs speakers that the model is not told.
    """
    fields: dict[str, Any] = {"latent_channels": latents["latent_channels"], "conditioning": latents["conditioning"]}
    fields["compression"] = latents["mel_frames_per_latent"]
    if latents["conditioning"] == "speech":
        tokenizer = SpeechTokenizer.from_dict(latents["tokenizer"])
        fields |= {"symbols": list(tokenizer.symbols), "n_symbols": len(tokenizer.symbols)}
        fields |= {"pause_symbols": tokenizer.pauses, "speakers": list(speakers) if len(speakers) > 1 else []}
        # The phones of a language tell it; the model is told as well only where the user says so.
        fields |= {"languages": list(tokenizer.languages)} if config.languages else {}
    elif latents["text_embedding_width"]:
        fields |= {"caption_encoder": "frozen", "caption_width": latents["text_embedding_width"]}
        fields["max_tokens"] = latents["max_tokens"]
    else:
        fields |= {"caption_encoder": "bytes", "max_tokens": latents["max_tokens"]}
    # Overrides may repeat these fields, but not contradict them.
    for pair in overrides:
        name = pair.partition("=")[0]
        if name in fields and getattr(config, name) != fields[name]:
            raise ValueError(
                f"--override {pair} does not fit the latents in {folder}: they need {name}={fields[name]}"
            )
    missing = [name for name in vae_speakers if name not in fields.get("speakers", [])]
    if missing:
        raise ValueError(
            f"the latents in {folder} come from a VAE with speakers, among them {missing[0]!r}, whom the model must "
            "know to decode them; leave out --no_use_speakers, or use a VAE without speakers"
        )
    return config.replace(**fields)
