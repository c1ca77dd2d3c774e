"""06_budget: every method at every budget, the damage that was predicted and the damage that was
measured.

The unit of all damages here is the mean squared change of the output per pixel; half the squared
error summed over the 1,024 pixels, which the Fisher information is of, is 512 times that.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.formats import MIB
from lafq.quantization.model import bits_per_weight, dequantize_, nbytes
from lafq.study import damage
from lafq.study.budget.methods import bits_of, is_allocated, mib_at
from lafq.study.diffusion import training
from lafq.study.diffusion.unet import quantizable
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, BUDGET_KEY, Row, quantized
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


def measure_candidates(
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
    outputs, full = training.held_out_outputs(model, noise, digits, first), nbytes(model, {})
    found, errors = [], {}
    for row in tqdm(rows, desc="measured damage", unit="row", leave=False):
        small, size = dequantize_(quantized(model, row, seed)), nbytes(model, row.plan)
        own, rise = damage.output_errors(small, outputs, noise, first)
        errors[row[:5]] = own
        key = row.budget_key | {"budget_mib": mib_at(model, row.bits)}
        stored = {
            "mem_mib": size / MIB,
            "mem_share": size / full,
            "bits_per_weight": bits_of(model, row.plan),
        }
        damages = {
            "predicted": predicted_damage(model, small, validation) / HALF_PIXELS
        } | damage.output_mse(own, rise, seed)
        found.append(key | stored | damages)
    int8 = [own for key, own in errors.items() if key[:1] + key[2:] == UNIFORM_INT8]
    for row, numbers in zip(rows, found, strict=True):
        own = errors[row[:5]]
        references = {
            "over_int8": int8[0] if int8 else None,
            "over_global": errors.get(("global", *row[1:5])),
        }
        for name, reference in references.items():
            ratio = (
                (math.nan,) * 3
                if reference is None
                else damage.ratio_of_means(own, reference, seed)
            )
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
    """Bits per weight of every weight tensor in the allocator's candidates of a granularity.

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


def images(
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


def with_fid(table: pd.DataFrame, evidence: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of `measure_candidates` with fid_mnist_delta, _low, _high and n_images, empty
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
