"""Export a trained vocoder to ONNX, for runtimes without PyTorch. The export is verified with onnxruntime.

    python inference/export_vocoder.py --checkpoint runs/vocoder/base --output my_vocoder.onnx

The model maps log-mels (batch, mel bins, frames) to waveforms (batch, samples), for any batch size and any number of
frames from min_frames on (2 for the presets). Fourier transforms are written as matrix products without complex
numbers. The definition of the log-mel and min_frames are in the metadata of the file.
Needs the packages in requirements-eval.txt.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.generation.arguments.audio import ExportArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ExportArguments, __doc__)

from dataset_loading.files import replacing
from model.audio.vocoder_export import export_onnx
from utils.checkpoints import chosen_weights, resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.generation.audio import load_vocoder
from utils.generation.vocoder_onnx import compare_with_onnx, import_runtime


def export(args: ExportArguments) -> None:
    """Write under a temporary name, compare with the PyTorch model, rename."""
    import_runtime()  # Missing packages are reported before the export.
    # The vocoder, on the CPU, where the export is compared with it.
    checkpoint, output = resolve_checkpoint(args.checkpoint), Path(args.output)
    vocoder = load_vocoder(checkpoint, chosen_weights(checkpoint, args))
    output.parent.mkdir(parents=True, exist_ok=True)
    # The file appears under its name only if the outputs agree.
    with replacing(output) as temporary:
        export_onnx(vocoder, temporary)
        comparisons = compare_with_onnx(vocoder, temporary)
        for row in comparisons:
            numbers = f"maximum difference of samples {row.difference:.1e}, peak {row.peak:.2f}"
            print(f"batch {row.n_batch}, {row.n_frames} frames: {numbers}")
            if not row.share <= args.tolerance:  # also true for NaN
                scale = "of full scale" if row.peak <= 1 else "of the peak"
                rule = f"more than --tolerance {args.tolerance:g}"
                raise ValueError(f"the export differs by {row.share:.1e} {scale}, {rule}")
    # Speed of the last comparison, the longest input.
    last, mel = comparisons[-1], vocoder.config.mel
    seconds = last.n_batch * last.n_frames * mel.hop_length / mel.sample_rate
    speed = f"PyTorch {last.model_seconds / seconds:.3f}, onnxruntime {last.runtime_seconds / seconds:.3f}"
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB; CPU seconds per second of audio: {speed}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("export_vocoder")):
        export(parse_arguments(ExportArguments, None, __doc__ or ""))
