r"""Export a checkpoint of any stage to a folder that opens with `from_pretrained`, with a model card.

    python inference/export_model.py --checkpoint runs/image_vae/demo --output my_vae
    python inference/export_model.py --checkpoint runs/multimodal/demo --output my_model --dtype bfloat16
    python inference/export_model.py --checkpoint runs/audio_diffusion/demo --output my_voice --with_parts \
        --vocoder_checkpoint runs/vocoder/demo --license cc-by-4.0 --push_to_hub my_user/my_voice
    python inference/export_model.py --checkpoint runs/image_vae/ldm --output my_autoencoder_kl --format diffusers

The folder holds the averaged weights as model.safetensors, config.json, the tokenizer, stage.json and README.md; it is
also a --checkpoint of all other scripts. With --format diffusers it is an AutoencoderKL or a UNet2DConditionModel with
its scheduler, for diffusers and for --init_from. Discriminators and the optimizer's state stay in the run.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command_line import check_flags
from utils.exporting.arguments import ExportModelArguments

if __name__ == "__main__":
    # --help and wrong flags end here, before imports that take seconds.
    check_flags(ExportModelArguments, __doc__)

from utils.checkpoints import chosen_weights, resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.exporting.folder import Content, export_folder, next_command
from utils.exporting.hub import check_hub, push


def export(args: ExportModelArguments) -> Path:
    """Write the folder; returns it."""
    checkpoint, output = resolve_checkpoint(args.checkpoint).absolute(), Path(args.output)
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    content = Content(
        output.resolve().name,
        chosen_weights(checkpoint, args),
        args.dtype,
        args.format,
        license=args.license,
        with_parts=args.with_parts,
        vocoder=args.vocoder_checkpoint and str(resolve_checkpoint(args.vocoder_checkpoint)),
        vaes=dict.fromkeys(("image", "audio"), args.vae_checkpoint),
        text_encoder=args.text_encoder,
        hub_name=args.push_to_hub,
    )
    export_folder(checkpoint, output, content)
    print(output)
    if args.push_to_hub:
        print(push(output, args.push_to_hub, private=args.private))
    print(f"next: {next_command(checkpoint, output, args.format)}")
    return output


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("export_model")):
        return export(parse_arguments(ExportModelArguments, argv, __doc__ or ""))


if __name__ == "__main__":
    main()
