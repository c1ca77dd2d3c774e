"""Shrink what few passes estimate: Fisher values towards their channel's and tensor's mean, the
curvature towards its diagonal.

An estimate is a mean over passes, so the spread over passes tells how noisy it is. With x the
estimate and t its target,

    x* = (1 - s) x + s t,    s = sum of Var(x_i) / sum of (x_i - t_i)^2, at most 1,

has the least expected squared error (Schaefer and Strimmer 2005, section 2; Ledoit and Wolf 2004).
s falls as 1 / passes. One pass tells nothing of its spread: s is 1, and weights of a tensor then
count alike.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lafq.quantization.rounding import diagonal_of


class Moments:
    """Sums over passes of what the gradients (R, C) of one tensor, R channels of C weights, tell of
    its Fisher information.

    largest: with more columns, sums for the curvature are kept in blocks of at most so many,
    (B, S, S): equal ones where a B below twice the least divides the columns, else zeros fill the
    last. channels: with more rows, about so many of them count in the curvature of a pass, and
    the others in those of the next passes; None: all in each.
    """

    def __init__(self, gradient: Tensor, largest: int, channels: int | None) -> None:
        rows, columns = gradient.shape
        self.passes, self.turns = 0, -(-rows // (channels or rows))
        fewest = max(1, -(-columns // largest))
        even = [b for b in range(fewest, 2 * fewest) if columns % b == 0]
        size = -(-columns // (even[0] if even else fewest))
        self.columns, self.blocks = columns, -(-columns // size)
        shape = (self.blocks, size, size) if self.blocks > 1 else (size, size)
        zeros = partial(gradient.new_zeros, dtype=torch.float64)
        self.curvature, self.padding = gradient.new_zeros(shape), self.blocks * size - columns
        self.off_diagonal_squares, self.diagonal_squares = zeros(()), zeros(columns)
        self.fourth_powers, self.mean_squares = zeros(rows), zeros(rows)

    def add(self, *draws: Tensor) -> None:
        """Add the gradients (R, C) of one pass, one per draw of noise; channels count alike in the
        curvature, whatever their size.

        The spread is that of passes: draws of a pass share its inputs, so only their mean counts.
        """
        square = sum(g.square() for g in draws) / len(draws)
        mean = square.mean(1, keepdim=True)
        turn = slice(self.passes % self.turns, None, self.turns)
        scale = (len(draws) * mean[turn]).sqrt()
        unit = torch.cat([torch.where(scale > 0, g[turn] / scale, 0) for g in draws])
        columns = unit
        if self.blocks > 1:
            columns = pad(unit, (0, self.padding)).unflatten(1, (self.blocks, -1)).movedim(1, 0)
        diagonal = unit.square().sum(0).double().square()
        self.passes += 1
        add_product = self.curvature.addmm_ if self.blocks == 1 else self.curvature.baddbmm_
        add_product(columns.mT, columns)
        # G^T G has the norm of G G^T, which is the smaller of the two.
        norm = torch.linalg.vector_norm(columns @ columns.mT).double()
        self.off_diagonal_squares += norm.square() - diagonal.sum()
        self.diagonal_squares += diagonal
        self.fourth_powers += square.square().sum(1)
        self.mean_squares += mean[:, 0].double().square()

    def plain_curvature(self) -> Tensor:
        """H (C, C), or (B, S, S), of mean diagonal 1: the mean over passes as it is."""
        mean = diagonal_of(self.curvature)[: self.columns].mean()
        return self.curvature / mean.clamp_min(1e-30)

    def shrunk_curvature(self) -> tuple[Tensor, float]:
        """H (C, C), or (B, S, S), of mean diagonal 1, shrunk off the diagonal towards 0 and on it
        towards 1; and the first share.

        The off-diagonal shrinks at least as much as the diagonal, so H stays positive semidefinite.
        """
        mean = self.curvature / self.passes
        # A copy, as `mean` is changed in place below.
        diagonal = diagonal_of(mean)[: self.columns].double().clone()
        level, square = diagonal.mean(), diagonal.square().sum()
        off = (torch.linalg.vector_norm(mean).double().square() - square).clamp_min(0)
        around = (diagonal - level).square().sum()
        on = self._share(self.diagonal_squares.sum(), square, around)
        share = torch.maximum(self._share(self.off_diagonal_squares, off, off), on)
        level = level.clamp_min(1e-30)
        shrunk = mean.mul_((1 - share) / level)
        target = (1 - on) * diagonal / level + on
        shrunk.diagonal(dim1=-2, dim2=-1).copy_(
            pad(target, (0, self.padding)).view(shrunk.shape[:-1])
        )
        return shrunk, share.item()

    def shrunk_squares(self, squares: Tensor) -> Tensor:
        """Sums of squares (R, C), shrunk to the channel's mean, and that to the tensor's."""
        mean = squares.double() / self.passes
        channel = mean.mean(1, keepdim=True)
        tensor = channel.mean()
        around = (mean - channel).square().sum(1)
        within = self._share(self.fourth_powers, mean.square().sum(1), around)[:, None]
        around = (channel - tensor).square().sum()
        across = self._share(self.mean_squares.sum(), channel.square().sum(), around)
        level = (1 - across) * channel + across * tensor
        shape = (1 - within) * mean / channel.clamp_min(1e-300) + within
        return (level * shape.where(channel > 0, 1) * self.passes).to(squares.dtype)

    def _share(self, squares: Tensor, squared_mean: Tensor, distance: Tensor) -> Tensor:
        """s, from the sum of squares, the squared mean, and the squared distance to the target."""
        if self.passes < 2:
            return torch.ones_like(distance)
        variance = (squares - self.passes * squared_mean) / (self.passes * (self.passes - 1))
        return torch.where(distance > 0, variance / distance.clamp_min(1e-300), 1).clamp(0, 1)
