"""Round weights in order; later weights compensate for earlier errors.

To second order an error dw of an output channel's weights does the damage c/2 * dw^T H dw, c its
mean Fisher value and H the channels' common curvature (`sensitivity.estimate_sensitivity`). By its
diagonal alone every weight goes to its nearest code. With H = U D U^T, U upper triangular with ones
on its diagonal, it is a sum over weights, c/2 * D_k * (dw_k + sum_{j<k} U_jk dw_j)^2: the weights
are rounded one after another, each to the code nearest to w_k - sum_{j<k} U_jk dw_j, which makes
its term least (Chee et al. 2023, "QuIP", who show it to be what Frantar et al. 2023, "GPTQ", do
with H^-1; the idea is that of Hassibi and Stork 1993, "Optimal Brain Surgeon").

A curvature of three dimensions (B, S, S) stands for a block diagonal one: B blocks of S consecutive
columns, which do not compensate for each other's errors. The last one may be padded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal
BLOCK = 128


class Factor(NamedTuple):
    """U (S, S) and D (S,) of H = U D U^T for one block of a curvature.

    columns: which ones the block has (S,), in the order in which they are rounded. damping: what
    had been added to the diagonal of H, a number.
    """

    columns: Tensor
    upper: Tensor
    pivots: Tensor
    damping: Tensor


def factor(curvature: Tensor, length: int | None = None) -> list[Factor]:
    """The factor of every block of a curvature, damped; (C, C) is one block. length: C, where the
    last block is padded.

    Weights of large H_kk come first, while many are left to compensate for their errors.
    With P the reversal of the order and P H P = L L^T, the columns of P L P over its diagonal are
    U. Raises ValueError for an H that is not positive semidefinite.
    """
    factors = []
    for start, block in _blocks(curvature, length):
        order = block.diagonal().argsort(descending=True, stable=True)
        backwards = order.flip(0)
        damped = block[backwards].index_select(1, backwards).double()
        mean = damped.diagonal().mean()
        damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
        damped.diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            advice = "give what estimate_sensitivity estimates"
            raise ValueError(f"a curvature is not positive semidefinite: {advice}")
        diagonal = root.diagonal().clone()
        upper = root.div_(diagonal).to(block.dtype).flip(0, 1)
        pivots = diagonal.flip(0).square().to(block.dtype)
        factors.append(Factor(start + order, upper, pivots, damping))
    return factors


def rounded(
    values: Tensor, scales: Tensor, qmax: Tensor, factors: list[Factor], kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows (R, C) rounded with error feedback to scale * (-qmax..qmax), and dw^T H dw of each row,
    float64 (R,), for its change dw.

    scales: (R, n), each of C / n consecutive weights. qmax: (R,), 0 for a row that is not rounded,
    a half-integer for one whose codes are halves. kept: boolean (R, C), weights that are not
    rounded; they take up errors of others as well. Exact zeros (pruned, masked) stay zero.
    """
    whole_rows = (qmax == 0)[:, None].expand_as(values)
    free = whole_rows if kept is None else kept | whole_rows
    free = free if free.any() else None
    result, quadratic = values.new_empty(values.shape[::-1]), 0
    for block in factors:
        result[block.columns], terms = _round_block(values, scales, qmax.to(values), block, free)
        quadratic += terms
    return result.T, quadratic


def _round_block(
    values: Tensor, scales: Tensor, limit: Tensor, block: Factor, free: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rounded` for the columns of one block, which come back as rows (S, R), in its order."""
    columns, upper, pivots, damping = block
    # Columns as rows: what is worked on at a time then lies together in memory.
    exact = values[:, columns].T.contiguous()
    free = None if free is None else free[:, columns].T.contiguous()
    steps = scales.to(values).T.contiguous()
    group = (columns * len(steps) // values.shape[1]).tolist()
    wanted, half = exact.clone(), limit % 1
    halves, zero = bool(half.any()), (exact == 0) & (half == 0)
    zero = zero if zero.any() else None
    quadratic = torch.zeros(len(limit), dtype=torch.float64, device=limit.device)
    for start in range(0, len(wanted), BLOCK):
        stop = min(start + BLOCK, len(wanted))
        errors, terms = exact.new_empty(2, stop - start, len(limit))
        for k in range(start, stop):
            column, step = wanted[k], steps[group[k]]
            grid = column / step
            grid = grid.sub_(half).round_().add_(half) if halves else grid.round_()
            grid = grid.clamp_(-limit, limit).mul_(step)
            grid = grid if free is None else torch.where(free[k], column, grid)
            grid = grid if zero is None else grid.masked_fill_(zero[k], 0)
            torch.sub(grid, column, out=terms[k - start])
            column.copy_(grid)
            torch.sub(exact[k], column, out=errors[k - start])
            wanted[k + 1 : stop].addr_(upper[k, k + 1 : stop], errors[k - start])
        wanted[stop:].addmm_(upper[start:stop, stop:].T, errors)
        quadratic += pivots[start:stop].double() @ terms.double().square_()
        quadratic -= damping * errors.double().square_().sum(0)
    return wanted, quadratic.clamp_min_(0)


def damage(change: Tensor, fisher: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Predicted damage of each row (R,): to second order half the output's summed squared error.

    change, fisher: (R, C); curvature: (C, C) or (B, S, S), or None: 1/2 * sum(F * dw^2).
    """
    if curvature is None:
        return 0.5 * (fisher * change.square()).double().sum(1)
    parts = [(change[:, i : i + len(h)], h) for i, h in _blocks(curvature, change.shape[1])]
    quadratic = torch.stack([((c @ h) * c).sum(1) for c, h in parts]).sum(0)
    return 0.5 * (fisher.mean(1) * quadratic).double().clamp_min(0)


def diagonal_of(curvature: Tensor) -> Tensor:
    """The diagonal (C,) of a curvature, with its padding."""
    return curvature.diagonal(dim1=-2, dim2=-1).flatten()


def _blocks(curvature: Tensor, length: int | None = None) -> list[tuple[int, Tensor]]:
    """The blocks without padding, each with its first column."""
    blocks = curvature if curvature.ndim == 3 else curvature[None]
    starts = range(0, length or len(blocks) * blocks.shape[1], blocks.shape[1])
    ends = [(length or i + blocks.shape[1]) - i for i in starts]
    return [(i, h[:n, :n]) for i, n, h in zip(starts, ends, blocks, strict=True)]
