"""What predicts the damage of quantizing a tensor: Fisher information times rounding error, beside what it must beat.

Weights go to their nearest code here, with `formats.unbiased` scales.
"""

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from lafq import allocation, scoring
from lafq.budget import HALF_PIXELS
from lafq.feedback import damage
from lafq.formats import get_format, read_back, unbiased
from lafq.frontier import Choice
from lafq.methods import Row, mib_at
from lafq.precision import stored_bytes
from lafq.quantize import pack, rows_of, unpack
from lafq.seeds import generator
from lafq.true_fisher import Sensitivity
from lafq.unet import quantizable

PROXIES = ("curvature x error", "Fisher x error", "rounding error", "Fisher", "magnitude", "random")


def by_tensor(model: nn.Module, known: Sensitivity, formats: tuple[str, ...], seed: int, digits: int) -> pd.DataFrame:
    """One tensor at a time in one format, the rest FP32: measured damage beside what would predict it.

    Columns parameter, format, nbytes, measured, and the predictions of PROXIES.
    """
    outputs, weights, found, g = scoring.held_out_outputs(model, seed, digits), quantizable(model), [], generator(seed, 2)
    for name, low in tqdm([(n, f) for n in weights for f in formats], desc="one tensor at a time", unit="plan", leave=False):
        rows = rows_of(model, name)
        w, f = rows.of(weights[name]), rows.of(known.fisher[name])
        change = read_back(w, get_format(low), unbiased, f) - w
        small = unpack(pack(model, {name: low}, unbiased, known.fisher))
        step = 4.0 ** -get_format(low).bits
        found.append(
            {
                "parameter": name,
                "format": low,
                "nbytes": stored_bytes(rows, low),
                "measured": scoring.output_damage(small, outputs, seed)["damage"],
                "curvature x error": damage(change, f, known.curvature[name].to(f)).sum().item() / HALF_PIXELS,
                "Fisher x error": damage(change, f).sum().item() / HALF_PIXELS,
                "rounding error": change.square().sum().item(),
                "Fisher": f.mean().item() * step,
                "magnitude": w.square().sum().item() * step,
                "random": torch.rand((), generator=g).item() * step,
            }
        )
    return pd.DataFrame(found)


def rank_correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every prediction with the measured damage, over all formats and within each."""
    found = {"all formats": points} | dict(iter(points.groupby("format", sort=False)))
    table = {name: [rows[p].corr(rows["measured"], method="spearman") for p in PROXIES] for name, rows in found.items()}
    return pd.DataFrame(table, index=list(PROXIES)).rename_axis("prediction").reset_index()


def by_proxy(model: nn.Module, points: pd.DataFrame, bits: float) -> list[Row]:
    """The same allocation (unit tensor) by every prediction of `by_tensor`, and by the measurement itself."""
    rows = []
    for proxy in (*PROXIES, "measured"):
        frontiers = {}
        for name, own in points.groupby("parameter", sort=False):
            choices = [Choice(int(n), d, f) for n, d, f in own[["nbytes", proxy, "format"]].itertuples(index=False)]
            best, kept = float("inf"), []
            for choice in sorted(choices):
                if choice.damage < best:
                    best = choice.damage
                    kept.append(choice)
            frontiers[name] = kept
        plan = allocation.choose(model, frontiers, mib_at(model, bits)).plan
        rows.append(Row(f"by {proxy}", "tensor", bits, plan, unbiased))
    return rows


def gaps(model: nn.Module, known: Sensitivity, bits: list[float]) -> pd.DataFrame:
    """The fast allocation's damage over the integer program's, unit tensor: columns budget_bits, fast, exact, gap."""
    layers = {name: known.fisher[name] for name in quantizable(model)}
    frontiers, found = allocation.frontiers_of(model, layers, "tensor", curvature=known.curvature), []
    for b in bits:
        try:
            found_by = [allocation.choose(model, frontiers, mib_at(model, b), exact=e) for e in (False, True)]
        except ValueError:
            continue
        fast, exact = (a.damage / HALF_PIXELS for a in found_by)
        found.append((round(b, 3), fast, exact, fast / exact - 1))
    return pd.DataFrame(found, columns=["budget_bits", "fast", "exact", "gap"])
