"""Flags of scripts that vocode."""

import dataclasses
from pathlib import Path

from utils.flags.choices import WeightsKind
from utils.options import option


@dataclasses.dataclass
class SynthesisArguments:
    """Flags of all scripts that vocode."""

    input: list[str] = option([], "files, and folders of files")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    chunk_frames: int = option(2000, "mel frames per pass of the vocoder; 0: all", ge=0)
    bf16: bool = option(False, "bfloat16 autocast over fp32 weights; Fourier transforms stay in fp32")
    output_dir: str = option("", "folder of the results")


@dataclasses.dataclass
class VocodeArguments(SynthesisArguments):
    """Flags of `inference/vocode.py`."""

    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    output_dir: str = option("inference/generated/audio/vocode", "folder of the results")

    def validate_input(self):
        if not self.checkpoint or not self.input:
            raise ValueError("--checkpoint and --input are needed: a run folder, and audio or log-mel files")


@dataclasses.dataclass
class ReconstructionArguments(SynthesisArguments):
    """Flags of `inference/reconstruct_audio.py`."""

    vae_checkpoint: str = option("", "run or checkpoint folder of an audio VAE")
    vocoder_checkpoint: str = option("", "run or checkpoint folder of a vocoder")
    speaker: str = option("", "name of the speaker, for an audio VAE that was trained with --use_speakers")
    output_dir: str = option("inference/generated/audio/reconstruction", "folder of the results")

    def validate_input(self):
        if not (self.vae_checkpoint and self.vocoder_checkpoint and self.input):
            raise ValueError("--vae_checkpoint, --vocoder_checkpoint and --input are needed: runs, and files")


@dataclasses.dataclass
class ExportArguments:
    """Flags of `inference/export_vocoder.py`."""

    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    output: str = option("inference/generated/audio/vocoder.onnx", "output file")
    tolerance: float = option(
        1e-4, "maximum accepted difference of waveforms, relative to full scale or the peak", gt=0
    )

    def validate_checkpoint(self):
        if not self.checkpoint:
            raise ValueError("--checkpoint is needed: the run folder of a vocoder")

    def validate_output(self):
        if Path(self.output).is_dir():
            raise ValueError(f"--output {self.output!r} must be a file, such as my_vocoder.onnx, not a folder")
