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

import dataclasses
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.checkpoints import WeightsKind, chosen_weights, resolve_checkpoint
from utils.command_line import explained_errors, parse_arguments
from utils.exporting.arguments import PartsArguments
from utils.exporting.folder import Content, DType, Format, export_folder
from utils.exporting.hub import check_hub, push
from utils.options import option


@dataclasses.dataclass
class ExportModelArguments(PartsArguments):
    checkpoint: str = option("", "run folder (its newest complete checkpoint) or checkpoint folder")
    output: str = option("", "folder to write; it must not exist, or be empty")
    weights: WeightsKind = option("ema", "averaged weights, if they were saved, or the trained weights")
    format: Format = option(
        "transformers", "library whose from_pretrained opens it; diffusers: architecture ldm alone"
    )
    dtype: DType = option("float32", "precision of the stored weights; media models still compute in fp32")
    license: str = option("", "licence in the model card, by the hub's name, such as mit or cc-by-4.0")
    push_to_hub: str = option("", "also upload the folder as a new repository of this name, such as my_user/my_model")
    private: bool = option(False, "make the repository private", only_with=("push_to_hub", bool))

    def validate_checkpoint(self):
        if not self.checkpoint or not self.output:
            raise ValueError("--checkpoint and --output are needed: a run folder, and the folder to write")


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
    return output


def main(argv: list[str] | None = None) -> Path:
    """The command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with explained_errors(logging.getLogger("export_model")):
        return export(parse_arguments(ExportModelArguments, argv, __doc__ or ""))


if __name__ == "__main__":
    main()
