"""Tensors that may be spread over processes (FSDP2's DTensor): the whole of them, and filling them."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of a sharded one on every process; to be called by all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a tensor, or each process's part of it into its shard."""
    target.detach().copy_(like(target, value))


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the device of `target`, sharded as that is; one that is sharded already, as it is."""
    if isinstance(value, DTensor):
        return value
    value = value.to(device=target.device)
    if isinstance(target, DTensor):
        # Every process holds the whole value already: nothing needs to be sent.
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value
