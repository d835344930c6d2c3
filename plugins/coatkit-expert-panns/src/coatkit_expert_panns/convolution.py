"""3 x 3 convolutions over time and frequency, each followed by ReLU, on arrays [rows, F, C] (rows are time steps).

A layer takes the rows it makes and one more on either side; at the edges in frequency it sees zeros.

`Direct` is torch's own routine. `Winograd` multiplies a quarter as often, which a CPU gains from: it turns tiles of
input into points, multiplies the channels at each point by a matrix, and turns the products into tiles of output (Lavin
and Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016). In float32 its outputs are within 4e-6 of the
exact ones, four times as far as `Direct`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4
"""Output rows of one tile; the rows a layer makes are a multiple of it."""

# Of Winograd's F(4, 3), with points 0, 1, -1, 2, -2 and infinity: kernel taps to points.
_TAPS_OF_FOUR = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
# Two columns with zeros on either side: y0 = k1 d0 + k2 d1 and y1 = k0 d0 + k1 d1, from (d0 + d1) k1, d1 (k2 - k1) and
# d0 (k0 - k1).
_TAPS_OF_TWO = ((0.0, 1.0, 0.0), (0.0, -1.0, 1.0), (1.0, -1.0, 0.0))


class Direct(nn.Module):
    """torch's own convolution.

    Args:
        weight: [C_out, C_in, 3, 3], taps over time and frequency.
        bias: [C_out].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[n + 2, F, C_in] to [n, F, C_out]."""
        image = rows.permute(2, 0, 1)[None]  # channels-last in memory, which is the fast order
        made = F.conv2d(image, self.weight, self.bias, padding=(0, 1))
        return made.relu_()[0].permute(1, 2, 0)


class First(nn.Module):
    """The first layer, which has one channel: a product of 3 x 3 patches with one matrix.

    Args:
        weight: [C_out, 1, 3, 3], taps over time and frequency.
        bias: [C_out].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.flatten(1).T.contiguous(), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[n + 2, F, 1] to [n, F, C_out]."""
        patches = F.pad(rows[..., 0], (1, 1)).unfold(0, 3, 1).unfold(1, 3, 1)  # [n, F, 3, 3]
        made = torch.addmm(self.bias, patches.reshape(-1, 9), self.weight)
        return made.relu_().view(*patches.shape[:2], -1)


class Winograd(nn.Module):
    """The same convolution in fewer multiplications: tiles of 4 x 4 outputs, or 4 x 2 where there are two columns.

    Args:
        weight: [C_out, C_in, 3, 3], taps over time and frequency.
        bias: [C_out].
        columns: F of the input: 2 or a multiple of 4.
    """

    matrices: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, columns: int) -> None:
        super().__init__()
        self.narrow = columns == 2
        over_time = torch.tensor(_TAPS_OF_FOUR, dtype=torch.float64, device=weight.device)
        over_columns = over_time.new_tensor(_TAPS_OF_TWO) if self.narrow else over_time
        spread = torch.kron(over_time, over_columns)  # [points, 9 taps]
        taps = weight.permute(2, 3, 1, 0).reshape(9, -1)  # [9, C_in * C_out]
        matrices = torch.empty(len(spread), taps.shape[1], device=weight.device)
        for i in range(0, taps.shape[1], 1 << 16):  # in float64, but not a whole layer of 1.2 GB
            matrices[:, i : i + (1 << 16)] = spread @ taps[:, i : i + (1 << 16)].double()
        matrices = matrices.view(len(spread), weight.shape[1], weight.shape[0])
        self.register_buffer("matrices", matrices, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """[n + 2, F, C_in] to [n, F, C_out], n a multiple of 4."""
        count, columns, channels = rows.shape[0] - 2, rows.shape[1], rows.shape[2]
        tiles, across = count // TILE, 1 if self.narrow else columns // TILE
        edge = 0 if self.narrow else 1

        in_time = rows.new_empty(6, tiles, columns + 2 * edge, channels)
        in_time[:, :, :edge] = 0.0
        in_time[:, :, edge + columns :] = 0.0
        here = in_time[:, :, edge : edge + columns]
        _points_of_six([rows[i : i + count - 3 : TILE] for i in range(6)], here.unbind(0))
        if self.narrow:
            points = rows.new_empty(6, 3, tiles, across, channels)
            left, right = in_time[:, :, :1], in_time[:, :, 1:]
            torch.add(left, right, out=points[:, 0])
            points[:, 1] = right
            points[:, 2] = left
        else:
            points = rows.new_empty(6, 6, tiles, across, channels)
            shifted = [in_time[:, :, i : i + columns - 3 : TILE] for i in range(6)]
            _points_of_six(shifted, points.unbind(1))

        products = torch.bmm(points.view(len(self.matrices), tiles * across, channels), self.matrices)
        products = products.view(*points.shape[:-1], products.shape[-1])
        # The second point over time and this one over columns go into every output once.
        products[1, 0 if self.narrow else 1] += self.bias

        made = rows.new_empty(tiles, TILE, across, columns // across, products.shape[-1])
        if self.narrow:
            summed = rows.new_empty(6, tiles, across, 2, products.shape[-1])
            torch.add(products[:, 0], products[:, 1], out=summed[..., 0, :])
            torch.add(products[:, 0], products[:, 2], out=summed[..., 1, :])
        else:
            summed = rows.new_empty(6, tiles, across, TILE, products.shape[-1])
            _outputs_of_four(products.unbind(1), summed.unbind(3))
        _outputs_of_four(summed.unbind(0), made.unbind(1))
        return made.relu_().view(count, columns, -1)


def _points_of_six(inputs: Sequence[Tensor], points: Sequence[Tensor]) -> None:
    """F(4, 3): six neighbouring inputs to six points, written into `points`."""
    d0, d1, d2, d3, d4, d5 = inputs
    even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    torch.add(even, odd, out=points[1])
    torch.sub(even, odd, out=points[2])
    torch.sub(d4, d2, out=even)
    torch.sub(d3, d1, out=odd)
    torch.add(even, odd, alpha=2, out=points[3])
    torch.sub(even, odd, alpha=2, out=points[4])
    torch.sub(d0, d2, out=points[0])
    torch.add(even, points[0], alpha=4, out=points[0])
    torch.sub(d5, d3, out=points[5])
    points[5].sub_(odd, alpha=4)


def _outputs_of_four(products: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """F(4, 3): the products at six points to four neighbouring outputs, written into `outputs`."""
    m0, m1, m2, m3, m4, m5 = products
    near, far = m1 + m2, m3 + m4
    torch.add(m0, near, out=outputs[0])
    outputs[0].add_(far)
    torch.add(near, far, alpha=4, out=outputs[2])
    torch.sub(m1, m2, out=near)
    torch.sub(m3, m4, out=far)
    torch.add(near, far, alpha=2, out=outputs[1])
    torch.add(m5, near, out=outputs[3])
    outputs[3].add_(far, alpha=8)
