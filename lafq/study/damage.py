"""Damage of quantized models, predicted and measured, and what else predicts it.

Damage is the mean squared change of the output per pixel; half the squared error summed over the
1,024 pixels, which the Fisher information is of, is 512 times that.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.allocation import allocate as solver
from lafq.allocation.frontiers import StorageOption, undominated
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.channels import stored_bytes
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, fake_quantize, get_format, unshrunk_scale
from lafq.quantization.model import bits_per_weight, dequantize_, nbytes, quantize
from lafq.quantization.plan import Recipe
from lafq.quantization.rounding import damage
from lafq.rng import generator
from lafq.study.diffusion.training import held_out_outputs
from lafq.study.diffusion.unet import quantizable
from lafq.study.images.metrics import interval, mean_draws, resamples
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import (
    BASELINE,
    BUDGET_KEY,
    Row,
    at_bits,
    bits_of,
    is_allocated,
    mib_at,
    quantized,
)
from lafq.study.workspace import Workspace

HALF_PIXELS = 512
FRESH, FRESH_SEED = (
    1000,
    100,
)  # the first held-out digit, and what is added to the seed of the noise
IMAGES = 7
UNIFORM_INT8 = ("uniform", "int8", "tensor", "nearest")
COLUMNS = [
    *BUDGET_KEY,
    *("budget_mib", "mem_mib", "mem_share", "bits_per_weight", "predicted"),
    *("damage", "damage_low", "damage_high", "delta_loss"),
    *(
        "over_int8",
        "over_int8_low",
        "over_int8_high",
        "over_global",
        "over_global_low",
        "over_global_high",
    ),
]


def output_errors(
    model: nn.Module, outputs: tuple[Tensor, Tensor], seed: int, first: int = 0
) -> tuple[Tensor, float]:
    """Mean squared difference per pixel of a model's output from the unquantized model's, for each
    held-out digit (digits,), and the rise of the denoising loss.

    outputs: the unquantized model's, as `held_out_outputs` gives them for the same seed and first
    digit.
    """
    expected, noise = outputs
    predicted, _ = held_out_outputs(model, seed, len(noise), first)
    rise = (predicted - noise).square().mean() - (expected - noise).square().mean()
    return (predicted - expected).square().flatten(1).mean(1), rise.item()


def ratio_of_means(
    errors: Tensor, reference: Tensor | float, seed: int
) -> tuple[float, float, float]:
    """Mean error over the mean of a reference, with its 95 % interval: a bootstrap over the digits,
    paired, of the logarithm.

    A few digits have most of the error, and on the ratio's own scale the interval reaches below
    zero.
    """
    if not errors.any():
        return 0.0, 0.0, 0.0
    indices = resamples(len(errors), seed)
    paired = isinstance(reference, Tensor)
    value = (errors.mean() / (reference.mean() if paired else reference)).item()
    draws = mean_draws(errors, indices) / (mean_draws(reference, indices) if paired else reference)
    low, high = interval(math.log(value), draws.log())
    return value, math.exp(low), math.exp(high)


def output_mse(errors: Tensor, rise: float, seed: int) -> dict[str, float]:
    """`damage`, the mean of `output_errors` with its 95 % interval over the digits, and
    `delta_loss`.
    """
    value, low, high = ratio_of_means(errors, 1.0, seed)
    return {"damage": value, "damage_low": low, "damage_high": high, "delta_loss": rise}


def measure_damage(
    model: nn.Module,
    rows: list[Row],
    validation: Sensitivity,
    seed: int,
    digits: int,
    fresh: bool = False,
) -> pd.DataFrame:
    """Bytes, predicted and measured damage of every row, columns as COLUMNS; measured on so many
    held-out digits.

    validation: from other draws than the plans were made from, since on the draws that it was
    fitted to a plan looks better than it is; damage is predicted from these. The prediction knows
    nothing of tuning. fresh: on digits and noise that no setting of the allocator was chosen on
    (FRESH). over_int8 and over_global are ratios of two damages, paired over the digits: to uniform
    INT8, and of a threshold rule to one threshold for all at the same bytes and with the same
    rounding.
    """
    noise, first = (seed + FRESH_SEED, FRESH) if fresh else (seed, 0)
    outputs, full = held_out_outputs(model, noise, digits, first), nbytes(model, {})
    found, errors = [], {}
    for row in tqdm(rows, desc="measured damage", unit="row", leave=False):
        small, size = dequantize_(quantized(model, row, seed)), nbytes(model, row.plan)
        own, rise = output_errors(small, outputs, noise, first)
        errors[row[:5]] = own
        key = row.budget_key | {"budget_mib": mib_at(model, row.bits)}
        stored = {
            "mem_mib": size / MIB,
            "mem_share": size / full,
            "bits_per_weight": bits_of(model, row.plan),
        }
        damages = {
            "predicted": predicted_damage(model, small, validation) / HALF_PIXELS
        } | output_mse(own, rise, seed)
        found.append(key | stored | damages)
    int8 = [own for key, own in errors.items() if key[:1] + key[2:] == UNIFORM_INT8]
    for row, numbers in zip(rows, found, strict=True):
        own = errors[row[:5]]
        references = {
            "over_int8": int8[0] if int8 else None,
            "over_global": errors.get(("global", *row[1:5])),
        }
        for name, reference in references.items():
            ratio = (math.nan,) * 3 if reference is None else ratio_of_means(own, reference, seed)
            numbers |= dict(zip((name, f"{name}_low", f"{name}_high"), ratio, strict=True))
    return pd.DataFrame(found)[COLUMNS]


def coded_files(model: nn.Module, rows: list[Row], seed: int) -> pd.DataFrame:
    """BUDGET_KEY and file_mib of every row: its entropy-coded file in MiB, header included."""
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "row.safetensors"
        for row in tqdm(rows, desc="entropy-coded files", unit="row", leave=False):
            save_quantized(path, quantized(model, row, seed), model, compress=True)
            found.append(row.budget_key | {"file_mib": path.stat().st_size / MIB})
    return pd.DataFrame(found, columns=[*BUDGET_KEY, "file_mib"])


def bits_by_tensor(
    model: nn.Module, fisher: dict[str, Tensor], rows: list[Row], granularity: str = "mixed"
) -> pd.DataFrame:
    """Bits per weight of every weight tensor in the allocator's rows of a granularity.

    Columns budget_bits, parameter, fisher (the tensor's mean), bits_per_weight.
    """
    found = [
        (
            round(row.bits, 3),
            name,
            fisher[name].mean().item(),
            bits_per_weight(model, row.plan, [name]),
        )
        for row in rows
        if is_allocated(row, granularity)
        for name in quantizable(model)
    ]
    return pd.DataFrame(found, columns=["budget_bits", "parameter", "fisher", "bits_per_weight"])


def images_at_bits(
    work: Workspace,
    model: nn.Module,
    rows: list[Row],
    bits: list[float],
    steps: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """A few images of the unquantized model and of the allocator's plans (granularity mixed) for
    these bits, from the same noise.

    Returns one row per model, columns KEY, mem_mib, sample, and uint8 images (7, 32, 32) by sample.
    """
    chosen = [row for b in bits for row in rows if is_allocated(row) and abs(row.bits - b) < 1e-6]
    shown = [BASELINE._replace(bits=32.0), *chosen]
    found, samples = [], {}
    for row in shown:
        name, small = f"{row.bits:g} bits", dequantize_(quantized(model, row, seed))
        key, generated, _ = ImageStore(work).draw(small, Sampling(IMAGES, steps, seed), name)
        samples[key] = generated[:, 0].numpy()
        size = {"mem_mib": nbytes(model, row.plan) / MIB, "sample": key}
        found.append(row.key | {"setting": name} | size)
    return pd.DataFrame(found), samples


PROXIES = ("curvature x error", "Fisher x error", "rounding error", "Fisher", "magnitude", "random")


def by_tensor(
    model: nn.Module, calibration: Sensitivity, formats: tuple[str, ...], seed: int, digits: int
) -> pd.DataFrame:
    """One tensor at a time in one format, the rest FP32: measured damage beside what would predict
    it.

    Columns parameter, format, nbytes, measured, and the predictions of PROXIES.
    """
    outputs, weights, found, g = (
        held_out_outputs(model, seed, digits),
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
                "measured": output_errors(small, outputs, seed)[0].mean().item(),
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
            best = own.iloc[undominated(own["nbytes"], own[proxy])]
            frontiers[name] = [
                StorageOption(int(n), d, f)
                for n, d, f in best[["nbytes", proxy, "format"]].itertuples(index=False)
            ]
        plan = solver.solve_budget(
            model, frontiers, mib_at(model, bits), Recipe(unshrunk_scale, calibration.fisher)
        )
        rows.append(at_bits(proxy, "any", "tensor", "nearest", bits, plan))
    return rows


def with_fid(table: pd.DataFrame, evidence: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of `measure_damage` with fid_mnist_delta, _low, _high and n_images, empty
    where `make evidence` has none.
    """
    names = {f"delta_fid_mnist{end}": f"fid_mnist_delta{end}" for end in ("", "_low", "_high")}
    columns = [*names.values(), "n_images"]
    if evidence is None:
        return table.assign(**dict.fromkeys(columns, np.nan))
    key = BUDGET_KEY
    found = evidence.rename(columns=names).assign(budget_bits=evidence["budget_bits"].astype(float))
    return table.merge(found[key + columns], on=key, how="left")


def bits_of_equal_damage(rows: pd.DataFrame, damage: float) -> float:
    """Budget in bits per weight at which rows, sorted by it, do this damage, between two of them
    log-linear; NaN outside.
    """
    logs = np.log(rows["damage"].to_numpy())[::-1]
    return float(
        np.interp(
            np.log(damage), logs, rows["budget_bits"].to_numpy()[::-1], left=np.nan, right=np.nan
        )
    )
