"""From thresholds to the rows of a table: how large each plan is, which to sample, and what they are called."""

import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation.thresholds import by_unit, cuts, keep_global, keep_ratio, relative_to_group, standardized
from lafq.diffusion.unet import quantizable
from lafq.evaluation.candidates import BASELINE, MIB, Candidate
from lafq.paper.poster import TARGET_SHARE
from lafq.quantization.model import channel_view, make_plan, nbytes
from lafq.quantization.weight_spec import counted_bytes


def size_sweep(model: nn.Module, scores: dict[str, Tensor], low: str, unit: str, count: int) -> pd.DataFrame:
    """Size of the plan at every threshold of `thresholds.cuts`: columns format, unit, cut, kept_share, mem_mib, mem_share.

    scores: one value per weight, or per weight tensor. Only numbers of kept weights are counted, which takes seconds at width 64.
    """
    values, weights = cuts(scores, count), quantizable(model)
    thresholds = torch.tensor(values, dtype=next(iter(scores.values())).dtype)
    total = torch.zeros(len(values), dtype=torch.int64)
    full = nbytes(model, {})
    stored = torch.full((len(values),), full - 4 * sum(weights[n].numel() for n in scores), dtype=torch.int64)
    for name, score in scores.items():
        size, rows = weights[name].numel(), channel_view(model, name)
        ascending = score.flatten().cpu().sort().values
        kept = (score.numel() - torch.searchsorted(ascending, thresholds)) * (size // score.numel())
        total += kept
        in_first_row = torch.zeros(rows.size[0], dtype=torch.int64)
        for i, number in enumerate(kept.tolist()):
            in_first_row[0] = number
            stored[i] += 4 * size if number == size else counted_bytes(rows, low, in_first_row)
    sizes = {"kept_share": total.double() / sum(w.numel() for w in weights.values())}
    sizes |= {"mem_mib": stored.double() / MIB, "mem_share": stored.double() / full}
    return pd.DataFrame({"format": low, "unit": unit, "cut": values} | {k: v.numpy() for k, v in sizes.items()})


def size_table(model: nn.Module, scores: dict[str, dict[str, Tensor]], kinds: list[list[str]], count: int) -> pd.DataFrame:
    """`size_sweep` of several kinds, each a format and a unit; scores by unit."""
    return pd.concat([size_sweep(model, scores[unit], low, unit, count) for low, unit in kinds]).reset_index(drop=True)


def nearest_size(sweeps: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every (format, unit) the row of `size_sweep` whose share of the baseline's bytes is nearest to `share`.

    A column `target` says so in words.
    """
    kinds = [sweeps["format"], sweeps["unit"]]
    found = sweeps.loc[(sweeps["mem_share"] - share).abs().groupby(kinds).idxmin()]
    counts = sweeps.groupby(kinds)["cut"].transform("size")[found.index]
    return found.assign(target=[f"nearest to {share:.4f} of FP32 of {n} cuts" for n in counts]).reset_index(drop=True)


def candidates_at(
    method: str, symbol: str, chosen: pd.DataFrame, scores: dict[str, dict[str, Tensor]], inception: bool = False
) -> list[Candidate]:
    """A configuration for every row of `nearest_size`; scores by unit; the threshold is written `symbol=cut`."""
    return [
        Candidate(
            method,
            f"{symbol}={row.cut:.3g}",
            row.format,
            row.unit,
            make_plan(keep_global(scores[row.unit], row.cut), row.format),
            inception,
            row.target,
        )
        for row in chosen.itertuples()
    ]


def uniform(model: nn.Module, formats: tuple[str, ...] = ("fp16", "int8")) -> list[Candidate]:
    """All weights of the six layers in one format: the rows that go with every table."""
    return [Candidate("uniform", "all", low, "tensor", dict.fromkeys(quantizable(model), low), inception=True) for low in formats]


def ratio_configurations(
    fisher: dict[str, Tensor], ratios: list[float], coarse: list[float], formats: list[str]
) -> list[Candidate]:
    """The ratio sweep: the paper's ratios at both units, the coarse ones for single weights; Inception for FP16 weights."""
    return [
        Candidate(
            "ratio",
            f"{ratio:.2f}",
            low,
            unit,
            make_plan(keep_ratio(by_unit(fisher, unit), ratio), low),
            inception=low == "fp16" and unit == "weight" and ratio in ratios,
        )
        for unit in ("tensor", "weight")
        for low in formats
        for ratio in sorted({*ratios, *(coarse if unit == "weight" else ())})
    ]


def published_rows(model: nn.Module, fisher: dict[str, Tensor], ratios: list[float], cuts: int) -> list[Candidate]:
    """The rows of the poster's table in INT8 on single weights, beside the baseline and both uniform formats.

    Global, group-wise and mean/std thresholds are taken at the paper's share of bytes, the nearest of `cuts` sizes.
    """
    found, values = [BASELINE._replace(inception=True), *uniform(model)], by_unit(fisher, "weight")
    rules = {"global": ("tau", values), "group": ("factor", relative_to_group(values)), "mean_std": ("k", standardized(values))}
    for method, (symbol, scores) in rules.items():
        sizes = size_sweep(model, scores, "int8", "weight", cuts)
        found += candidates_at(method, symbol, nearest_size(sizes, TARGET_SHARE[method]), {"weight": scores}, inception=True)
    kept = [row for row in ratio_configurations(fisher, ratios, [], ["int8"]) if row.unit == "weight"]
    return found + [row._replace(inception=True) for row in kept]
