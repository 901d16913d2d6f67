"""Preprocessing by the processes of a launcher, such as torchrun with one per GPU: each writes a shard, then the first
one joins them. The shards stay, for the next run to continue from; on one file system they are links."""

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.devices import local_processes, usable_cpus
from utils.distributed import barrier, ending_together, launched_rank, launched_world_size
from utils.preprocessing.arguments import MergeArguments
from utils.preprocessing.merging import merge_shards
from utils.preprocessing.shards import Shard


def run_launched(stage: str, args: Any, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Preprocess as one of several processes, or alone.

    Args:
        stage: of the preprocessing.
        args: its flags.
        run: preprocesses with other flags.
    Returns: the manifest, in the first process that of the whole.
    Raises: ValueError: `--shard` is given, or what preprocessing raises.
    """
    count = launched_world_size()
    if count == 1:
        return run(args)
    if args.shard:
        raise ValueError(f"--shard={args.shard} has no effect under a launcher, whose processes are the shards")
    shard = Shard(launched_rank() + 1, count)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args_of_shard = copy.copy(args)
    args_of_shard.shard, args_of_shard.pack = str(shard), 0
    if args.num_workers < 0:
        args_of_shard.num_workers = max(usable_cpus() // local_processes(), 1)
    # One process may have much more to do than another.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    with ending_together():
        manifest = run(args_of_shard)
        barrier()
        if shard.index == 1:
            output = Path(args.output_dir or f"cached_datasets/{stage}")
            folders = [str(Shard(index, count).folder_of(output)) for index in range(1, count + 1)]
            manifest = merge_shards(stage, MergeArguments(merge=folders, output_dir=args.output_dir, pack=args.pack))
    return manifest
