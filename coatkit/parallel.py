"""Several processes: what they agree on, what one does for all, and how the model is spread over them.

One process is a team of one, and everything here then costs nothing. Launchers (`accelerate launch`, `torchrun`) set
the environment that accelerate reads; `ACCELERATE_USE_FSDP`, which `accelerate launch --use_fsdp` sets, asks for
sharding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coatkit.errors import CoatkitError
from coatkit.sharding import whole
from coatkit.zero import ZeroOptimizer, wanted_stage

T = TypeVar("T")
Learner = torch.optim.Optimizer | ZeroOptimizer


class Team:
    """The processes of a run.

    Attributes:
        accelerator: accelerate's handle on them.
        shards: Whether parameters are spread over the processes (FSDP2) rather than repeated on each (DDP).
        zero_stage: DeepSpeed's ZeRO stage, 1 or 2; 0 without DeepSpeed.
        together: Whether every process must give a gradient for all that learns, in every part of a step.
    """

    def __init__(self) -> None:
        # Sharding is torch's own fully_shard on the units the backbone names, the same code on CPU and GPU.
        # accelerate would shard by its own rules, and only on a GPU, so it is not told.
        self.shards = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.zero_stage = wanted_stage()
        # What accelerate would take from the launcher's settings besides changes numbers; the spec alone may.
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.rank: int = self.accelerator.process_index
        self.size: int = self.accelerator.num_processes
        self.leads = self.rank == 0
        self.device = torch.device(self.accelerator.device.type, self.accelerator.device.index)
        self.shards = self.shards and self.size > 1
        self.together = self.size > 1 or self.zero_stage > 0
        # What processes tell each other is on the host: over NCCL it would go through the device and wait for it.
        self._told: Any = torch.distributed.new_group(backend="gloo") if self.size > 1 else None

    def gather(self, value: T) -> list[T]:
        """What every process gave, in order of rank; to be called by all."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self._told)
        return found

    def once(self, work: Callable[[], None]) -> None:
        """Do something in the first process only; all wait for it, and all raise what it raises.

        Raises:
            CoatkitError, OSError: The first process's.
        """
        problem: CoatkitError | OSError | None = None
        if self.leads:
            try:
                work()
            except (CoatkitError, OSError) as error:  # told to all, or the others would wait for ever
                problem = error
        if first := self.gather(problem)[0]:
            raise first

    def spread(self, model: nn.Module, units: Iterable[nn.Module]) -> nn.Module:
        """The model to call in training: itself, in DDP, or sharded in place with each unit gathered as it is needed.

        Args:
            units: Modules that every process calls once in every forward pass.
        """
        if self.zero_stage:
            return model  # `divide` wraps it, for DeepSpeed makes model and optimizer one
        if not self.shards:
            wrapped: nn.Module = self.accelerator.prepare(model)
            return wrapped
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(model, FSDPModule):
            mesh = torch.distributed.device_mesh.init_device_mesh(self.device.type, (self.size,))
            again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
            # Quantised weights are repeated: their codes mean nothing apart from the scales, and they are small.
            codes = {p for p in model.parameters() if not p.is_floating_point()}
            for unit in units:
                fully_shard(unit, mesh=mesh, reshard_after_forward=again, ignored_params=codes)
            fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=codes)
        return model

    def divide(
        self, wrapped: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], clip_norm: float
    ) -> tuple[nn.Module, Learner]:
        """The model to call and the optimizer, under DeepSpeed where that was asked for."""
        if not self.zero_stage:
            return wrapped, optimizer
        divided = ZeroOptimizer(wrapped, optimizer, named, self.zero_stage, clip_norm)
        return divided.engine, divided

    def accumulating(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around one part of a step: gradients are exchanged after the last."""
        # DeepSpeed is told which is the last when it goes back.
        found: AbstractContextManager[None] = (
            nullcontext() if last or self.zero_stage else self.accelerator.no_sync(wrapped)
        )
        return found

    def backward(self, loss: Tensor, optimizer: Learner, *, last: bool) -> None:
        """The way back of one part of a step; gradients are averaged over processes."""
        if isinstance(optimizer, ZeroOptimizer):
            optimizer.backward(loss, last=last)
        else:
            self.accelerator.backward(loss)

    def clip(self, optimizer: Learner, parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
        """Norm of the gradient over all processes, on the device; clipped at the latest when the step is taken."""
        if isinstance(optimizer, ZeroOptimizer):
            return torch.tensor(optimizer.norm(), device=self.device)
        return whole(self.accelerator.clip_grad_norm_(parameters, clip_norm))

    def part(self) -> None:
        """Wait until all are done: the first to leave would cut the others' connections."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def release(self, optimizer: Learner) -> None:
        """Let go of what `spread` and `divide` made, so that the next stage's can hook the same parameters."""
        if isinstance(optimizer, ZeroOptimizer):
            optimizer.close()
        if self.size > 1:
            self.accelerator.free_memory()


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of mappings that need not have the same keys, in the order they come."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
