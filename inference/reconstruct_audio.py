r"""Reconstruct audio with an audio VAE and a vocoder: two WAV files per input, and a sheet of log-mels.

    python inference/reconstruct_audio.py --vae_checkpoint runs/audio_vae/base \
        --vocoder_checkpoint runs/vocoder/base --input speech.flac my_recordings/

NAME_reconstruction.wav is the output of VAE and vocoder, NAME_vocoder.wav that of the vocoder alone, so that the
errors of both can be heard separately. Both models must have been trained on the same log-mel definition. Files ending
in .pt hold log-mels.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.audio import ReconstructionArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ReconstructionArguments, __doc__)

from dataset_loading.audio.signal import AUDIO_SUFFIXES
from utils.command_line import explained_errors, parse_arguments
from utils.drawing.audio import TRIPLE, mel_triple, strip_sheet
from utils.drawing.images import Group, save_image
from utils.generation.audio import MEL_SUFFIX, AudioReconstructor, Synthesizer
from utils.generation.files import Failures, claim_folder, find_inputs, refuse_overwriting, write_settings

MAX_ROWS = 32  # clips that are shown on the sheet


def reconstruct(args: ReconstructionArguments) -> None:
    """Reconstruct all files. Raises: ValueError: at the end, where some gave no result."""
    files = find_inputs(args.input, {*AUDIO_SUFFIXES, MEL_SUFFIX})
    folder, groups, records = Path(args.output_dir), [], []
    outputs = (folder / f"{name}_{kind}.wav" for name in files for kind in ("reconstruction", "vocoder"))
    refuse_overwriting(files.values(), outputs)  # an output may have the name of an input
    synthesizer = Synthesizer.load(args.vocoder_checkpoint, args)
    reconstructor = AudioReconstructor.load(args.vae_checkpoint, args, synthesizer, speaker=args.speaker)
    folder, failures = claim_folder(args.output_dir, args), Failures()
    # Each file as log-mel (M, F): reconstructed by the VAE, then vocoded with and without the VAE.
    for name, file in files.items():
        with failures.around(file):
            mel, n_samples = synthesizer.read(file)
            reconstruction = reconstructor.reconstruction(mel)  # (M, F)
            vocoded = synthesizer.write(reconstruction, n_samples, folder / f"{name}_reconstruction.wav")
            without_vae = synthesizer.write(mel, n_samples, folder / f"{name}_vocoder.wav")
            distance = (reconstruction - mel).abs().mean().item()  # without the vocoder
            entry = {"input": str(file), "vae_mel_l1": distance, "reconstruction": vocoded, "vocoder": without_vae}
            records.append(entry)
            if len(groups) < MAX_ROWS:
                triple = mel_triple(reconstruction, mel, synthesizer.log_mel.settings)
                groups.append(Group(triple, f"{distance:.3f}  {name}"))
            print(f"{folder / vocoded['file']}  {vocoded['seconds']:.2f} s, log-mel L1 of the VAE {distance:.3f}")
    if groups:
        save_image(strip_sheet(groups, TRIPLE), folder / "sheet.png")  # of the first MAX_ROWS clips
        print(folder / "sheet.png")
    write_settings(folder, args, **synthesizer.record, **reconstructor.record, files=records)
    failures.check(len(files))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("reconstruct_audio")):
        reconstruct(parse_arguments(ReconstructionArguments, None, __doc__ or ""))
