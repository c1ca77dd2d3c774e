"""Round weights in order; later weights compensate for earlier errors.

To second order an error dw of an output channel's weights does the damage c/2 * dw^T H dw, c its
mean Fisher value and H the channels' common curvature (`sensitivity.estimate_sensitivity`). By its
diagonal alone every weight goes to its nearest code. With H = U D U^T, U upper triangular with ones
on its diagonal, it is a sum over weights, c/2 * D_k * (dw_k + sum_{j<k} U_jk dw_j)^2: the weights
are rounded one after another, each to the code nearest to w_k - sum_{j<k} U_jk dw_j, which makes
its term least (Chee et al. 2023, "QuIP", who show it to be what Frantar et al. 2023, "GPTQ", do
with H^-1; the idea is that of Hassibi and Stork 1993, "Optimal Brain Surgeon").

A curvature of three dimensions (B, S, S) stands for a block diagonal one: B blocks of S consecutive
columns, which do not compensate for each other's errors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal
BLOCK = 128


class Factor(NamedTuple):
    """Of a curvature H: the order (C,) in which columns are rounded, and U (C, C) and D (C,) of H =
    U D U^T in that order.

    damping: what had been added to the diagonal of H, a number. Of blocks (B, S, S): order (B, S),
    upper (B, S, S), pivots (B, S) and damping (B,).
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor
    damping: Tensor


def factor(curvature: Tensor) -> Factor:
    """The factor of H (C, C), or of each of its blocks (B, S, S), damped.

    Weights of large H_kk come first, while many are left to compensate for their errors.
    With P the reversal of the order and P H P = L L^T, the columns of P L P over its diagonal are
    U. Raises ValueError for an H that is not positive semidefinite.
    """
    if curvature.ndim == 3:
        return Factor(*map(torch.stack, zip(*map(factor, curvature), strict=True)))
    order = curvature.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    damped = curvature[backwards].index_select(1, backwards).double()
    mean = damped.diagonal().mean()
    damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    damped.diagonal().add_(damping)
    root, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            "a curvature is not positive semidefinite: give what estimate_sensitivity estimates"
        )
    diagonal = root.diagonal().clone()
    upper = root.div_(diagonal).to(curvature.dtype).flip(0, 1)
    return Factor(order, upper, diagonal.flip(0).square().to(curvature.dtype), damping)


def round_with_error_feedback(
    values: Tensor, scales: Tensor, qmax: Tensor, factor: Factor, kept: Tensor | None = None
) -> Tensor:
    """Rows (R, C) whose integer weights lie on the grid of their row, scales[r] *
    (-qmax[r]..qmax[r]).

    scales: (R,), or (R, C) where the weights of a row have several. qmax: (R,), 0 for a row that is
    not rounded, a half-integer
    for one whose codes are halves. kept: boolean (R, C), weights that are not rounded; they take up
    errors of others as well.
    """
    return rounded(values, scales, qmax, factor, kept)[0]


def rounded(
    values: Tensor, scales: Tensor, qmax: Tensor, factor: Factor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `round_with_error_feedback` returns, and dw^T H dw of each row, float64 (R,), for its
    change dw.

    The weights are rounded by the terms of that sum, so it comes without a product with H.
    """
    if factor.upper.ndim == 3:
        return _rounded_by_blocks(values, scales, qmax, factor, kept)
    order, upper, pivots, damping = factor
    free = None
    if kept is not None or bool((qmax == 0).any()):
        whole_rows = (qmax == 0)[:, None].expand_as(values)
        free = (whole_rows if kept is None else kept | whole_rows)[:, order].T.contiguous()
    # Columns as rows: what is worked on at a time then lies together in memory.
    exact, limit = values[:, order].T.contiguous(), qmax.to(values)
    wanted, half = exact.clone(), limit % 1
    halves = bool(half.any())
    scales = scales.expand(len(exact), -1) if scales.ndim == 1 else scales[:, order].T.contiguous()
    quadratic = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for start in range(0, len(wanted), BLOCK):
        stop = min(start + BLOCK, len(wanted))
        errors, terms = values.new_empty(2, stop - start, len(values))
        for k in range(start, stop):
            column = wanted[k]
            grid = column / scales[k]
            grid = grid.sub_(half).round_().add_(half) if halves else grid.round_()
            grid = grid.clamp_(-limit, limit).mul_(scales[k])
            grid = grid if free is None else torch.where(free[k], column, grid)
            torch.sub(grid, column, out=terms[k - start])
            column.copy_(grid)
            torch.sub(exact[k], column, out=errors[k - start])
            wanted[k + 1 : stop].addr_(upper[k, k + 1 : stop], errors[k - start])
        wanted[stop:].addmm_(upper[start:stop, stop:].T, errors)
        quadratic += pivots[start:stop].double() @ terms.double().square_()
        quadratic -= damping * errors.double().square_().sum(0)
    return wanted[order.argsort()].T, quadratic.clamp_min_(0)


def _rounded_by_blocks(
    values: Tensor, scales: Tensor, qmax: Tensor, factor: Factor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    size = factor.upper.shape[1]
    steps = scales[:, None].expand_as(values) if scales.ndim == 1 else scales
    columns = zip(values.split(size, 1), steps.split(size, 1), strict=True)
    masks = [None] * len(factor.order) if kept is None else kept.split(size, 1)
    blocks = [
        rounded(w, s, qmax, Factor(*parts), mask)
        for (w, s), mask, *parts in zip(columns, masks, *factor, strict=True)
    ]
    return torch.cat([rows for rows, _ in blocks], 1), sum(quadratic for _, quadratic in blocks)


def damage(change: Tensor, fisher: Tensor, curvature: Tensor | None = None) -> Tensor:
    """Predicted damage of each row (R,): half the squared error summed over the output, to second
    order.

    change, fisher: (R, C); curvature: (C, C) or (B, S, S), or None for the diagonal alone, 1/2 *
    sum(F * dw^2).
    """
    if curvature is None:
        return 0.5 * (fisher * change.square()).double().sum(1)
    if curvature.ndim == 3:
        parts = [
            ((c @ h) * c).sum(1)
            for c, h in zip(change.split(curvature.shape[1], 1), curvature, strict=True)
        ]
        return 0.5 * (fisher.mean(1) * torch.stack(parts).sum(0)).double().clamp_min(0)
    return 0.5 * (fisher.mean(1) * ((change @ curvature) * change).sum(1)).double().clamp_min(0)


def diagonal_of(curvature: Tensor) -> Tensor:
    """The diagonal (C,) of a matrix (C, C), or of a block diagonal one (B, S, S)."""
    return curvature.diagonal(dim1=-2, dim2=-1).flatten()
