"""Rounding with error feedback: what rounding one weight does to the output, the weights after it make good.

To second order an error dw of an output channel's weights does the damage c/2 * dw^T H dw, c its mean Fisher value and H the
channels' common curvature (`true_fisher.sensitivity`). By its diagonal alone every weight goes to its nearest code. By
all of H the weights are rounded one after another, and the error e of each is passed on to those still free: dw = -e * U_k / U_kk,
with H^-1 = U^T U, makes the damage least (Hassibi and Stork 1993, "Optimal Brain Surgeon"; one order for all channels, and U
once for all: Frantar et al. 2023, "GPTQ").
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal
BLOCK = 128


class Factor(NamedTuple):
    """Of a curvature H: the order (C,) in which columns are rounded, and U / diag(U) (C, C), U upper triangular, H^-1 = U^T U."""

    order: Tensor
    inverse: Tensor


def factor(curvature: Tensor) -> Factor:
    """The factor of H (C, C), damped; weights of large H_kk come first, while many are left to make their errors good.

    With P the reversal of the order and P H P = L L^T, U is P L^-1 P.
    """
    order = curvature.diagonal().argsort(descending=True, stable=True)
    damped = curvature[order][:, order].double().flip(0, 1)
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    one = torch.eye(len(damped)).to(damped)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(damped), one, upper=False).flip(0, 1)
    return Factor(order, (root / root.diagonal()[:, None]).to(curvature.dtype))


def fed_back(values: Tensor, scales: Tensor, levels: Tensor, factor: Factor, kept: Tensor | None = None) -> Tensor:
    """Rows (R, C) whose integer weights lie on the grid of their row, scales[r] * (-levels[r]..levels[r]).

    scales, levels: (R,), levels 0 for a row that is not rounded. kept: boolean (R, C), weights that are not rounded; they take up
    errors of others as well.
    """
    order, inverse = factor
    free = (levels == 0)[:, None].expand_as(values) if kept is None else kept | (levels == 0)[:, None]
    # Columns as rows: what is worked on at a time then lies together in memory.
    columns, free, limit = values[:, order].T.contiguous(), free[:, order].T.contiguous(), levels.to(values)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty(stop - start, len(values)).to(values)
        for k in range(start, stop):
            column = columns[k]
            grid = (column / scales).round_().clamp_(-limit, limit).mul_(scales)
            grid = torch.where(free[k], column, grid)
            torch.sub(column, grid, out=errors[k - start])
            columns[k] = grid
            columns[k + 1 : stop].addr_(inverse[k, k + 1 : stop], errors[k - start], alpha=-1)
        columns[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    return columns[order.argsort()].T


def damage(change: Tensor, fisher: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Predicted damage of each row (R,): half the squared error summed over the output, to second order.

    change, fisher: (R, C); curvature: (C, C), or None for the diagonal alone, 1/2 * sum(F * dw^2).
    """
    if curvature is None:
        return 0.5 * (fisher * change.square()).double().sum(1)
    return 0.5 * (fisher.mean(1) * ((change @ curvature) * change).sum(1)).double().clamp_min(0)
