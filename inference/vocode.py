"""Waveforms from log-mels with a trained vocoder: a WAV file per input, and the settings as JSON.

    python inference/vocode.py --checkpoint runs/vocoder/base --input speech.flac my_recordings/
    python inference/vocode.py --checkpoint runs/vocoder/base --input cached_datasets/audio_vocoder/validation

Audio files are mixed to one channel and resampled, and their log-mels computed as in the vocoder's training. Files
ending in .pt hold log-mels. Long inputs are vocoded in chunks, with the same result.
"""

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.audio import VocodeArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(VocodeArguments, __doc__)

from dataset_loading.audio.signal import AUDIO_SUFFIXES
from utils.checkpoints import provenance, write_json
from utils.command_line import explained_errors, parse_arguments
from utils.generation.audio import MEL_SUFFIX, Synthesizer
from utils.generation.files import Failures, claim_folder, find_inputs, refuse_overwriting


def vocode(args: VocodeArguments) -> None:
    """Vocode all files. Raises: ValueError: at the end, where some gave no result."""
    files = find_inputs(args.input, {*AUDIO_SUFFIXES, MEL_SUFFIX})
    folder, records = Path(args.output_dir), []
    # An output may have the name of an input.
    refuse_overwriting(files.values(), (folder / f"{name}.wav" for name in files))
    synthesizer, failures = Synthesizer.load(args.checkpoint, args), Failures()
    folder = claim_folder(args.output_dir, args)
    # Log-mel (M, F) of each file -> waveform, cut to the length of the input.
    for name, file in files.items():
        with failures.around(file):
            mel, n_samples = synthesizer.read(file)
            record = synthesizer.write(mel, n_samples, folder / f"{name}.wav")
            records.append({"input": str(file), **record})
            # The real-time factor: seconds of computation per second of audio.
            factor = record["compute_seconds"] / record["seconds"]
            numbers = f"{record['seconds']:.2f} s, {factor:.3f} x real time, log-mel L1 {record['mel_l1']:.3f}"
            print(f"{folder / record['file']}  {numbers}")
    # Settings and results of all files.
    settings = {**dataclasses.asdict(args), **synthesizer.record, "files": records, **provenance()}
    write_json(folder / "settings.json", settings)
    print(folder / "settings.json")
    failures.check(len(files))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("vocode")):
        vocode(parse_arguments(VocodeArguments, None, __doc__ or ""))
