"""Several processes, one training: what torchrun starts, and what one process is without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from common.refusal import Refusal


@dataclass(frozen=True)
class World:
    """This process among those that share each batch."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def wrap(self, net: nn.Module, *, sync_batch_norm: bool = False) -> nn.Module:
        """`net` with gradients averaged over all processes; batch statistics stay each process's own.

        With `sync_batch_norm` they are those of the whole batch: the layers of `net` change for it, and keep
        their parameters.
        """
        if self.size == 1:
            return net
        if sync_batch_norm:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return DistributedDataParallel(net, device_ids=[self.device] if self.device != "cpu" else None)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        total = numbers.clone()
        if self.size > 1:
            distributed.all_reduce(total)
        return total

    def count(self, number: int) -> int:
        """The sum over all processes of a number on the host: all learn it at the same step.

        It goes from host to host, so that no process waits for what its device has still to do.
        """
        return int(self.sum(torch.tensor(number))) if self.size > 1 else number

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.count(int(flag)) > 0


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes, on "cpu" (gloo) or "cuda" (NCCL, one device each).

    With devices, numbers on the host go by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise Refusal(f"--nproc-per-node is over the {torch.cuda.device_count()} CUDA devices of this machine")
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        distributed.destroy_process_group()
