"""Run a function in several real processes with gloo."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm


def run(function, world_size, folder, *args):
    """Call ``function(rank, world_size, folder, *args)`` in each process; raises if one fails."""
    mp.spawn(_process, (world_size, str(folder), function, args), nprocs=world_size, join=True)


def _process(rank, world_size, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.path.join(folder, f'store-{function.__name__}')}",
        rank=rank,
        world_size=world_size,
    )
    comm.create_local_process_group(world_size)
    function(rank, world_size, folder, *args)
    dist.barrier()
    dist.destroy_process_group()
