"""Damage of quantized models, predicted and measured, and what else predicts it.

Damage is the mean squared change of the output per pixel; half the squared error summed over the
1,024 pixels, which the Fisher information is of, is 512 times that.
"""

import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from lafq.allocation import allocate as solver
from lafq.allocation.frontiers import StorageOption, undominated
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.channels import stored_bytes
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import (
    MIB,
    STUDY_FORMATS,
    absmax_scale,
    fake_quantize,
    get_format,
    unshrunk_scale,
)
from lafq.quantization.model import bits_per_weight, dequantize_, quantize
from lafq.quantization.plan import PLAIN, Recipe
from lafq.quantization.rounding import damage
from lafq.rng import generator
from lafq.study import budget_rows
from lafq.study import rows as study_rows
from lafq.study.budget_rows import is_allocated, mib_at
from lafq.study.diffusion.subject import quantizable
from lafq.study.diffusion.training import held_out_outputs
from lafq.study.images.metrics import interval, mean_draws, resamples
from lafq.study.rows import BUDGET_KEY, Row, packed, quantized

HALF_PIXELS = 512
FRESH, FRESH_SEED = 1000, 100  # the first held-out digit, and what is added to the noise's seed
UNIFORM_INT8 = ("uniform", "int8", "tensor", "nearest")
ENDS = ("", "_low", "_high")
COLUMNS = [
    *(*BUDGET_KEY, "budget_mib", "mem_mib", "mem_share", "bits_per_weight", "predicted"),
    *(*(f"damage{end}" for end in ENDS), "delta_loss"),
    *(f"{name}{end}" for name in ("over_int8", "over_global") for end in ENDS),
]
PROXIES = ("curvature x error", "Fisher x error", "rounding error", "Fisher", "magnitude", "random")


def output_errors(
    model: nn.Module, outputs: tuple[Tensor, Tensor], seed: int, first: int = 0
) -> tuple[Tensor, float]:
    """Mean squared difference per pixel of a model's output from the unquantized model's, by digit
    (digits,), and the rise of the denoising loss; outputs: of `held_out_outputs`, equal arguments.
    """
    expected, noise = outputs
    predicted, _ = held_out_outputs(model, seed, len(noise), first)
    rise = (predicted - noise).square().mean() - (expected - noise).square().mean()
    return (predicted - expected).square().flatten(1).mean(1), rise.item()


def over(name: str, errors: Tensor, reference: Tensor, seed: int) -> dict[str, float]:
    """Mean error over the mean of a reference, with its 95 % interval: a bootstrap over the digits,
    paired, of the logarithm, as few digits have most of the error. Columns name, _low, _high.
    """
    ratio = (0.0, 0.0, 0.0)
    if errors.any():
        indices = resamples(len(errors), seed)
        value = (errors.mean() / reference.mean()).item()
        draws = mean_draws(errors, indices) / mean_draws(reference, indices)
        ratio = value, *map(math.exp, interval(math.log(value), draws.log()))
    return {f"{name}{end}": value for end, value in zip(ENDS, ratio, strict=True)}


def measure_damage(
    model: nn.Module,
    rows: list[Row],
    validation: Sensitivity,
    seed: int,
    digits: int,
    fresh: bool = False,
) -> pd.DataFrame:
    """Bytes, predicted and measured damage of every row (COLUMNS), on so many held-out digits.

    validation: predicts the damage, from other draws than the plans were made from (on those a plan
    looks better than it is); it knows no tuning. fresh: digits and noise that no setting of the
    allocator was chosen on. over_int8, over_global: ratios of damages, paired over the digits, to
    uniform INT8, and of a threshold rule to one threshold for all, of equal bytes and rounding.
    """
    noise, first = (seed + FRESH_SEED, FRESH) if fresh else (seed, 0)
    outputs = held_out_outputs(model, noise, digits, first)
    lines, errors = [], {}
    for row in tqdm(rows, desc="measured damage", unit="row", leave=False):
        small = quantized(model, row, seed)
        errors[row[:5]], rise = output_errors(small, outputs, noise, first)
        line = row.budget_key | {"budget_mib": mib_at(model, row.bits), "delta_loss": rise}
        line |= {"bits_per_weight": budget_rows.bits_of(model, row.plan)}
        line |= {"predicted": predicted_damage(model, small, validation) / HALF_PIXELS}
        lines.append(line | over("damage", errors[row[:5]], torch.ones(digits), seed))
    int8 = next((key for key in errors if key[:1] + key[2:] == UNIFORM_INT8), None)
    for row, line in zip(rows, lines, strict=True):
        references = {"over_int8": int8, "over_global": ("global", *row[1:5])}
        for name, key in references.items():
            if key in errors:
                line.update(over(name, errors[row[:5]], errors[key], seed))
    sizes = study_rows.sizes(model, [row.plan for row in rows])
    return pd.DataFrame(lines).join(sizes).reindex(columns=COLUMNS)


def coded_files(model: nn.Module, rows: list[Row], seed: int) -> pd.DataFrame:
    """BUDGET_KEY and file_mib of every row: its entropy-coded file in MiB, header included."""
    lines = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "row.safetensors"
        for row in tqdm(rows, desc="entropy-coded files", unit="row", leave=False):
            save_quantized(path, packed(model, row, seed), model, compress=True)
            lines.append(row.budget_key | {"file_mib": path.stat().st_size / MIB})
    return pd.DataFrame(lines, columns=[*BUDGET_KEY, "file_mib"])


def bits_by_tensor(model: nn.Module, fisher: dict[str, Tensor], rows: list[Row]) -> pd.DataFrame:
    """Mean Fisher value and bits per weight of every tensor, in the allocator's "mixed" rows."""
    means = {name: fisher[name].mean().item() for name in quantizable(model)}
    lines = [
        (round(row.bits, 3), name, mean, bits_per_weight(model, row.plan, [name]))
        for row in filter(is_allocated, rows)
        for name, mean in means.items()
    ]
    return pd.DataFrame(lines, columns=["budget_bits", "parameter", "fisher", "bits_per_weight"])


def by_tensor(
    model: nn.Module, calibration: Sensitivity, formats: tuple[str, ...], seed: int, digits: int
) -> pd.DataFrame:
    """Each tensor in each format, the rest FP32: bytes, the measured damage, and PROXIES of it."""
    outputs, g = held_out_outputs(model, seed, digits), generator(seed, 2)
    recipe = Recipe(unshrunk_scale, calibration.fisher)
    kinds, lines = [(name, low) for name in quantizable(model) for low in formats], []
    for name, low in tqdm(kinds, desc="one tensor at a time", unit="plan", leave=False):
        small = dequantize_(quantize(model, {name: low}, recipe))
        measured = output_errors(small, outputs, seed)[0].mean().item()
        size = stored_bytes(channel_view(model, name), low)
        line = {"parameter": name, "format": low, "nbytes": size, "measured": measured}
        lines.append(line | _proxies(model, name, low, calibration, g))
    return pd.DataFrame(lines)


def _proxies(
    model: nn.Module, name: str, low: str, calibration: Sensitivity, g: Generator
) -> dict[str, float]:
    view, format = channel_view(model, name), get_format(low)
    w, f = view.of(model.get_parameter(name).detach()), view.of(calibration.fisher[name])
    change, step = fake_quantize(w, format, unshrunk_scale, f) - w, 4.0**-format.bits
    values = (
        damage(change, f, calibration.curvature[name].to(f)).sum() / HALF_PIXELS,
        damage(change, f).sum() / HALF_PIXELS,
        change.square().sum(),
        f.mean() * step,
        w.square().sum() * step,
        torch.rand((), generator=g) * step,
    )
    return {proxy: value.item() for proxy, value in zip(PROXIES, values, strict=True)}


def rank_correlations(points: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of predictions with the measured damage, over all and by format."""
    parts = {"all formats": points} | dict(iter(points.groupby("format", sort=False)))
    ranks = {
        name: rows[list(PROXIES)].corrwith(rows["measured"], method="spearman")
        for name, rows in parts.items()
    }
    return pd.DataFrame(ranks).rename_axis("prediction").reset_index()


def allocate_by_proxy(
    model: nn.Module, points: pd.DataFrame, bits: float, calibration: Sensitivity
) -> list[Row]:
    """An allocation (granularity "tensor") by each prediction of `by_tensor`, and by `measured`."""
    rows, recipe = [], Recipe(unshrunk_scale, calibration.fisher)
    for proxy in (*PROXIES, "measured"):
        frontiers = {}
        for name, choices in points.groupby("parameter", sort=False):
            best = choices.iloc[undominated(choices["nbytes"], choices[proxy])]
            options = best[["nbytes", proxy, "format"]].itertuples(index=False)
            frontiers[name] = [StorageOption(*option) for option in options]
        plan = solver.solve_budget(model, frontiers, mib_at(model, bits), recipe=recipe)
        rows.append(budget_rows.at_bits(proxy, "any", "tensor", "nearest", bits, plan))
    return rows


def rungs(
    model: nn.Module, known: Sensitivity
) -> dict[str, tuple[dict[str, list[StorageOption]], Recipe]]:
    """What each part of the allocator adds: by name the frontiers that a plan is made of, and how
    it is rounded. "absmax formats" are chosen for scales of the largest weight; the formats of the
    next three are the same, chosen per layer for least-squares scales and nearest codes.
    """
    fisher, of = Sensitivity(known.fisher, {}), partial(solver.frontiers_of, model, progress=False)
    layer = of(fisher, "tensor")
    return {
        "absmax formats": (of(fisher, "tensor", STUDY_FORMATS, scale=absmax_scale), PLAIN),
        "absmax scales": (layer, PLAIN),
        "least-squares scales": (layer, fisher.recipe),
        "error feedback": (layer, known.recipe),
        "per channel": (of(known, "channel"), known.recipe),
        "mixed": (of(known, "mixed"), known.recipe),
    }


def bits_of_equal_damage(rows: pd.DataFrame, damage: float) -> float:
    """Budget in bits per weight at which rows, sorted by it, do this damage, between two of them
    log-linear; NaN outside.
    """
    rows = rows.iloc[::-1]
    ends, logs = {"left": np.nan, "right": np.nan}, np.log(rows["damage"])
    return float(np.interp(np.log(damage), logs, rows["budget_bits"], **ends))
