"""The Fisher information of the diffusion model by weight tensor, timestep and block of samples
(02_fisher).

Empirical, on noised digits; and Monte Carlo, on noised digits and on the states that the model's
own reverse process visits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.fisher.empirical import EmpiricalFisher, empirical_fisher
from lafq.fisher.sensitivity import monte_carlo_fisher
from lafq.rng import generator
from lafq.study.diffusion.ddpm import (
    bin_edges,
    reverse_process,
    stratified_batches,
    trailing_timesteps,
)
from lafq.study.diffusion.unet import TIMESTEPS, layer_of

BLOCKS = 10


class Fisher(NamedTuple):
    """by_weight: F of every weight, by parameter name, in the parameter's shape.

    timesteps: mean F of a tensor within a timestep bin, one row per bin and tensor, columns
    `parameter, layer, weights, t_low, t_high, fisher` (weights: their number in the tensor; t_high
    inclusive).
    blocks: the same by block of samples (BLOCKS of each bin), so that intervals can resample them:
    columns `parameter, t_low, block, samples, fisher`.
    """

    by_weight: dict[str, Tensor]
    timesteps: pd.DataFrame
    blocks: pd.DataFrame


def fisher_by_timestep(
    model: nn.Module,
    names: list[str],
    images: Tensor,
    *,
    samples: int,
    bins: int,
    seed: int,
    chunk: int | None = None,
) -> Fisher:
    """`empirical_fisher` of the noise prediction, `samples` draws spread evenly over `bins` bins of
    consecutive timesteps.

    images: uint8 (N, 1, 32, 32), drawn from with replacement. Errors: those of `empirical_fisher`
    and `stratified_batches`.
    """
    batches = stratified_batches(images, samples, bins, seed, next(model.parameters()))
    found = empirical_fisher(model, names, batches, chunk)
    return Fisher(found.by_weight, _by_timestep(found, bins), _by_block(found, bins))


def fisher_kinds(
    model: nn.Module,
    names: list[str],
    images: Tensor,
    *,
    samples: int,
    bins: int,
    seed: int,
    steps: int,
) -> pd.DataFrame:
    """Monte Carlo Fisher information of noised digits, and of states of the reverse process: mean F
    of a tensor, by bin and block.

    samples: of noised digits, spread evenly over `bins` bins of timesteps. Of the reverse process
    as many images, at one timestep of each bin that `steps` sampling steps visit. A block has one
    backward pass. Columns `kind, parameter, t_low, block, samples, fisher`.
    """
    like, rows = next(model.parameters()), []
    sources = {
        "Monte Carlo, noised digits": (
            pair for pair, _ in stratified_batches(images, samples, bins, seed, like)
        ),
        "Monte Carlo, states of the reverse process": _reverse_states(
            model, max(1, samples // bins), bins, seed, steps
        ),
    }
    for kind, batches in sources.items():
        for x, t in batches:
            t_low = max(edge for edge in bin_edges(bins)[:-1] if edge <= t.min().item())
            parts = zip(x.tensor_split(BLOCKS), t.tensor_split(BLOCKS), strict=True)
            for block, part in enumerate(p for p in parts if len(p[0])):
                found = monte_carlo_fisher(
                    model, names, [part], seed=(seed * TIMESTEPS + t_low) * BLOCKS + block
                )
                rows += [
                    (kind, name, t_low, block, len(part[0]), f.mean().item())
                    for name, f in found.items()
                ]
    return pd.DataFrame(rows, columns=["kind", "parameter", "t_low", "block", "samples", "fisher"])


def _reverse_states(
    model: nn.Module, images: int, bins: int, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_t, t) at the last timestep that the reverse process visits in each bin."""
    edges, visited = bin_edges(bins), trailing_timesteps(steps)
    last = {max(edge for edge in edges[:-1] if edge <= t): t for t in visited}
    streams = [generator(seed, i) for i in range(images)]
    for t, x in tqdm(
        reverse_process(model, streams, steps),
        desc="reverse process",
        total=steps + 1,
        unit="step",
        leave=False,
    ):
        if t in last.values():
            yield x, torch.full((len(x),), t, device=x.device)


def _by_timestep(found: EmpiricalFisher, bins: int) -> pd.DataFrame:
    # Batch b holds the timesteps of bin b (`ddpm.stratified_batches`).
    edges = bin_edges(bins)
    rows = [
        (name, layer_of(name), found.by_weight[name].numel(), edges[b], edges[b + 1] - 1, mean)
        for b, means in enumerate(found.by_batch)
        for name, mean in means.items()
    ]
    return pd.DataFrame(
        rows, columns=["parameter", "layer", "weights", "t_low", "t_high", "fisher"]
    )


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


def by_layer(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Weights, mean Fisher value per weight and share of the Fisher trace of every layer, over all
    timesteps; columns layer, weights, mean_fisher, share_of_all.
    """
    traced = timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])
    total = traced.groupby("layer")[["weights", "trace"]].sum()
    table = pd.DataFrame({"weights": total["weights"] // timesteps["t_low"].nunique()})
    table["mean_fisher"] = total["trace"] / total["weights"]
    table["share_of_all"] = total["trace"] / total["trace"].sum()
    return table.reset_index()
