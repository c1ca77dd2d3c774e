"""The empirical Fisher information of the diffusion model by weight tensor, timestep and block of samples (02_fisher)."""

from typing import NamedTuple

import pandas as pd
from torch import Tensor, nn

from lafq.diffusion.noising import bin_edges, stratified_batches
from lafq.fisher.empirical import EmpiricalFisher, empirical_fisher

BLOCKS = 10


class Fisher(NamedTuple):
    """by_weight: F of every weight, by parameter name, in the parameter's shape.

    timesteps: mean F of a tensor within a timestep bin, one row per bin and tensor, columns `parameter, layer, weights,
    t_low, t_high, fisher` (weights: their number in the tensor; t_high inclusive).
    blocks: the same by block of samples (BLOCKS of each bin), so that intervals can resample them: columns `parameter, t_low,
    block, samples, fisher`.
    """

    by_weight: dict[str, Tensor]
    timesteps: pd.DataFrame
    blocks: pd.DataFrame


def fisher_by_timestep(
    model: nn.Module, names: list[str], images: Tensor, *, samples: int, bins: int, seed: int, chunk: int | None = None
) -> Fisher:
    """`empirical_fisher` of the noise prediction, `samples` draws spread evenly over `bins` bins of consecutive timesteps.

    images: uint8 (N, 1, 32, 32), drawn from with replacement. Errors: those of `empirical_fisher` and `stratified_batches`.
    """
    batches = stratified_batches(images, samples, bins, seed, next(model.parameters()))
    found = empirical_fisher(model, names, batches, chunk)
    return Fisher(found.by_weight, _by_timestep(found, bins), _by_block(found, bins))


def _by_timestep(found: EmpiricalFisher, bins: int) -> pd.DataFrame:
    edges = bin_edges(bins)
    rows = [
        (name, name.split(".", 1)[0], found.by_weight[name].numel(), edges[b], edges[b + 1] - 1, mean)
        for b, means in enumerate(found.by_batch)
        for name, mean in means.items()
    ]
    return pd.DataFrame(rows, columns=["parameter", "layer", "weights", "t_low", "t_high", "fisher"])


def _by_block(found: EmpiricalFisher, bins: int) -> pd.DataFrame:
    edges = bin_edges(bins)
    rows = [
        (name, edges[b], i, len(part), part.mean().item())
        for b, samples in enumerate(found.by_sample)
        for name, values in samples.items()
        for i, part in enumerate(values.tensor_split(BLOCKS))
        if len(part)
    ]
    return pd.DataFrame(rows, columns=["parameter", "t_low", "block", "samples", "fisher"])
