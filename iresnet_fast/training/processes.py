"""The processes of a data-parallel run, as ``torchrun`` starts them; one, where nobody did."""

from __future__ import annotations

import os

import torch
from torch import distributed as dist
from torch import nn


class Processes:
    """This process among the others.

    Attributes:
        rank: its number.
        count: of all.
        first: whether it is the one that writes files.
        device: that it computes on.
    """

    def __init__(self) -> None:
        available = dist.is_available()
        if available and not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        several = available and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.first = self.rank == 0
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over all processes."""
        return model if self.count == 1 else nn.parallel.DistributedDataParallel(model)

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def part_of(self, size: int) -> slice:
        """Which samples of a batch are this process's."""
        each = size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def any(self, value: bool) -> bool:
        """Whether it holds in any of the processes."""
        if self.count == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)
