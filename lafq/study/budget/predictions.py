"""What predicts the damage of quantizing a tensor: Fisher information times rounding error, beside
what it must beat.

Weights go to their nearest code here, with `formats.unshrunk_scale` scales.
"""

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from lafq.allocation import allocate as solver
from lafq.allocation.frontiers import StorageOption, undominated
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.channels import stored_bytes
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import fake_quantize, get_format, unshrunk_scale
from lafq.quantization.model import dequantize_, quantize
from lafq.quantization.plan import Recipe
from lafq.quantization.rounding import damage
from lafq.rng import generator
from lafq.study.budget.budget import HALF_PIXELS
from lafq.study.budget.methods import budget_row, mib_at
from lafq.study.diffusion import training
from lafq.study.diffusion.unet import quantizable
from lafq.study.rows import Row

PROXIES = ("curvature x error", "Fisher x error", "rounding error", "Fisher", "magnitude", "random")


def by_tensor(
    model: nn.Module, calibration: Sensitivity, formats: tuple[str, ...], seed: int, digits: int
) -> pd.DataFrame:
    """One tensor at a time in one format, the rest FP32: measured damage beside what would predict
    it.

    Columns parameter, format, nbytes, measured, and the predictions of PROXIES.
    """
    outputs, weights, found, g = (
        training.held_out_outputs(model, seed, digits),
        quantizable(model),
        [],
        generator(seed, 2),
    )
    for name, low in tqdm(
        [(n, f) for n in weights for f in formats],
        desc="one tensor at a time",
        unit="plan",
        leave=False,
    ):
        view = channel_view(model, name)
        w, f = view.of(weights[name]), view.of(calibration.fisher[name])
        change = fake_quantize(w, get_format(low), unshrunk_scale, f) - w
        small = dequantize_(
            quantize(model, {name: low}, Recipe(unshrunk_scale, calibration.fisher))
        )
        step = 4.0 ** -get_format(low).bits
        found.append(
            {
                "parameter": name,
                "format": low,
                "nbytes": stored_bytes(view, low),
                "measured": damage.output_errors(small, outputs, seed)[0].mean().item(),
                "curvature x error": damage(change, f, calibration.curvature[name].to(f))
                .sum()
                .item()
                / HALF_PIXELS,
                "Fisher x error": damage(change, f).sum().item() / HALF_PIXELS,
                "rounding error": change.square().sum().item(),
                "Fisher": f.mean().item() * step,
                "magnitude": w.square().sum().item() * step,
                "random": torch.rand((), generator=g).item() * step,
            }
        )
    return pd.DataFrame(found)


def rank_correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of every prediction with the measured damage, over all formats
    and within each.
    """
    found = {"all formats": points} | dict(iter(points.groupby("format", sort=False)))
    table = {
        name: [rows[p].corr(rows["measured"], method="spearman") for p in PROXIES]
        for name, rows in found.items()
    }
    return pd.DataFrame(table, index=list(PROXIES)).rename_axis("prediction").reset_index()


def allocate_by_proxy(
    model: nn.Module, points: pd.DataFrame, bits: float, calibration: Sensitivity
) -> list[Row]:
    """The same allocation (granularity "tensor") by every prediction of `by_tensor`, and by the
    measurement itself.
    """
    rows = []
    for proxy in (*PROXIES, "measured"):
        frontiers = {}
        for name, own in points.groupby("parameter", sort=False):
            choices = [
                StorageOption(int(n), d, f)
                for n, d, f in own[["nbytes", proxy, "format"]].itertuples(index=False)
            ]
            frontiers[name] = undominated(choices)
        plan = solver.solve_budget(
            model, frontiers, mib_at(model, bits), recipe=Recipe(unshrunk_scale, calibration.fisher)
        )
        rows.append(budget_row(proxy, "any", "tensor", "nearest", bits, plan))
    return rows
