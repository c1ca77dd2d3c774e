"""From thresholds to the rows of a table: how large each plan is, which to sample, and what they
are called.
"""

import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation.rules import (
    by_granularity,
    keep_global,
    keep_ratio,
    relative_to_group,
    standardized,
    threshold_grid,
)
from lafq.quantization.channels import channels_by_format, counted_bytes
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB
from lafq.quantization.model import nbytes
from lafq.quantization.plan import make_plan
from lafq.study.diffusion.unet import quantizable
from lafq.study.poster import TARGET_SHARE
from lafq.study.rows import BASELINE, Row


def size_sweep(
    model: nn.Module, scores: dict[str, Tensor], format: str, granularity: str, count: int
) -> pd.DataFrame:
    """Size of the plan at every threshold of `threshold_grid`: columns format, granularity,
    threshold, kept_share, mem_mib, mem_share.

    scores: one value per weight, or per weight tensor. kept_share: of the weights of the six
    layers; mem_mib: of the whole model. Only numbers of kept weights are counted, no masks built,
    which takes seconds at width 64; a test holds the sizes equal to those of the plans
    (`rows.sizes`).
    """
    values, weights = threshold_grid(scores, count), quantizable(model)
    thresholds = torch.tensor(values, dtype=next(iter(scores.values())).dtype)
    total = torch.zeros(len(values), dtype=torch.int64)
    full = nbytes(model, {})
    stored = torch.full(
        (len(values),), full - 4 * sum(weights[n].numel() for n in scores), dtype=torch.int64
    )
    for name, score in scores.items():
        size, view = weights[name].numel(), channel_view(model, name)
        ascending = score.flatten().cpu().sort().values
        kept = (score.numel() - torch.searchsorted(ascending, thresholds)) * (size // score.numel())
        total += kept
        kept_by_channel, channels = (
            torch.zeros(view.size[0], dtype=torch.int64),
            channels_by_format(format, view.size[0]),
        )
        for i, number in enumerate(kept.tolist()):
            # In one format, bytes depend on the sum of the kept weights alone: all of them stand in
            # channel 0.
            kept_by_channel[0] = number
            stored[i] += (
                4 * size if number == size else counted_bytes(view, channels, kept_by_channel)
            )
    sizes = {"kept_share": total.double() / sum(w.numel() for w in weights.values())}
    sizes |= {"mem_mib": stored.double() / MIB, "mem_share": stored.double() / full}
    return pd.DataFrame(
        {"format": format, "granularity": granularity, "threshold": values}
        | {k: v.numpy() for k, v in sizes.items()}
    )


def size_table(
    model: nn.Module, scores: dict[str, dict[str, Tensor]], kinds: list[list[str]], count: int
) -> pd.DataFrame:
    """`size_sweep` of several kinds, each a format and a granularity; scores by granularity."""
    sweeps = [
        size_sweep(model, scores[granularity], format, granularity, count)
        for format, granularity in kinds
    ]
    return pd.concat(sweeps, ignore_index=True)


def nearest_size(sweeps: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every (format, granularity) the row of `size_sweep` whose share of the baseline's bytes is
    nearest to `share`.

    A column `target` says so in words.
    """
    kinds = [sweeps["format"], sweeps["granularity"]]
    found = sweeps.loc[(sweeps["mem_share"] - share).abs().groupby(kinds).idxmin()]
    counts = sweeps.groupby(kinds)["threshold"].transform("size")[found.index]
    # These words stand for the threshold in `rows.recipe`, as its last digits differ between
    # machines: do not reword them.
    return found.assign(
        target=[f"nearest to {share:.4f} of FP32 of {n} cuts" for n in counts]
    ).reset_index(drop=True)


def candidates_at(
    method: str,
    symbol: str,
    chosen: pd.DataFrame,
    scores: dict[str, dict[str, Tensor]],
    inception: bool = False,
) -> list[Row]:
    """A candidate for every row of `nearest_size`; its threshold is written `symbol=value`.

    scores: by granularity, Fisher values, or what a rule makes of them (`relative_to_group`,
    `standardized`): all keep what lies at or above the threshold.
    """
    return [
        Row(
            method,
            f"{symbol}={row.threshold:.3g}",
            row.format,
            row.granularity,
            "nearest",
            make_plan(keep_global(scores[row.granularity], row.threshold), row.format),
            inception,
            row.target,
        )
        for row in chosen.itertuples()
    ]


def uniform(model: nn.Module, formats: tuple[str, ...] = ("fp16", "int8")) -> list[Row]:
    """All weights of the six layers in one format: the rows that go with every table."""
    return [
        Row(
            "uniform",
            "all",
            low,
            "tensor",
            "nearest",
            dict.fromkeys(quantizable(model), low),
            inception=True,
        )
        for low in formats
    ]


def ratio_candidates(
    fisher: dict[str, Tensor], ratios: list[float], coarse: list[float], formats: list[str]
) -> list[Row]:
    """The ratio sweep: the paper's ratios by tensor and by weight, the coarse ones by weight;
    Inception by weight.
    """
    return [
        Row(
            "ratio",
            f"{ratio:.2f}",
            low,
            granularity,
            "nearest",
            make_plan(keep_ratio(by_granularity(fisher, granularity), ratio), low),
            inception=granularity == "weight" and ratio in ratios,
        )
        for granularity in ("tensor", "weight")
        for low in formats
        for ratio in sorted({*ratios, *(coarse if granularity == "weight" else ())})
    ]


def published_rows(
    model: nn.Module, fisher: dict[str, Tensor], ratios: list[float], count: int
) -> list[Row]:
    """The rows of the poster's table in INT8 on single weights, beside the baseline and both
    uniform formats.

    Global, group-wise and mean/std thresholds are taken at the paper's share of bytes, the nearest
    of `count` thresholds.
    """
    found, values = (
        [BASELINE._replace(inception=True), *uniform(model)],
        by_granularity(fisher, "weight"),
    )
    rules = {
        "global": ("tau", values),
        "group": ("factor", relative_to_group(values)),
        "mean_std": ("k", standardized(values)),
    }
    for method, (symbol, scores) in rules.items():
        sizes = size_sweep(model, scores, "int8", "weight", count)
        found += candidates_at(
            method,
            symbol,
            nearest_size(sizes, TARGET_SHARE[method]),
            {"weight": scores},
            inception=True,
        )
    return found + [
        row for row in ratio_candidates(fisher, ratios, [], ["int8"]) if row.granularity == "weight"
    ]
