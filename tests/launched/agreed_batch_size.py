"""Let two processes, of which the second one has room for less, look for a batch size; print what each one takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain_image_vae import ImageVAEStage
from utils.command_line import parse_arguments
from utils.distributed import end_processes, launched_rank
from utils.training.planning.batch_size import settle_batch_size


def trial(stage_class, args, batch_size):
    """Fails to allocate a petabyte where the batch is too large."""
    assert stage_class is ImageVAEStage and launched_rank() == 0
    bytearray(10**15 if batch_size > args.eval_batch_size else 1)


if __name__ == "__main__":
    room = {0: "8", 1: "4"}[launched_rank()]
    words = ["--batch_size", "auto", "--eval_batch_size", room, "--output_dir", sys.argv[1]]
    stage = ImageVAEStage(parse_arguments(ImageVAEStage.arguments_class, words, ""))
    settle_batch_size(stage, 17, trial)
    Path(sys.argv[1], f"{launched_rank()}.txt").write_text(str(stage.args.batch_size))
    end_processes()
