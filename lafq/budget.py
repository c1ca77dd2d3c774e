"""06_budget: every method at every budget, the damage that was predicted and the damage that was measured.

The unit of all damages here is the mean squared change of the output a pixel; half the squared error summed over the 1,024
pixels, which the Fisher information is of, is 512 times that.
"""

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from lafq import scoring
from lafq.allocation import MIB
from lafq.feedback import damage
from lafq.methods import Row, bits_of, mib_at, packed
from lafq.precision import stored_bytes
from lafq.quantize import Plan, nbytes, rows_of, unpack
from lafq.samples import sampled
from lafq.true_fisher import Sensitivity
from lafq.unet import quantizable

HALF_PIXELS = 512
IMAGES = 7
COLUMNS = [
    *("method", "unit", "budget_bits", "budget_mib", "mem_mib", "mem_share", "bits_per_weight", "predicted"),
    *("damage", "damage_low", "damage_high", "delta_loss"),
]


def judged(model: nn.Module, rows: list[Row], known: Sensitivity, judge: Sensitivity, seed: int, digits: int) -> pd.DataFrame:
    """Bytes, predicted and measured damage of every row, columns as COLUMNS; measured on so many held-out digits.

    known: what plans and rounding are made from; judge: from other draws, what damage is predicted from, since on the draws
    that it was fitted to a plan looks better than it is. The prediction knows nothing of tuning.
    """
    outputs, full, found = scoring.held_out_outputs(model, seed, digits), nbytes(model, {}), []
    for row in tqdm(rows, desc="measured damage", unit="row", leave=False):
        small = unpack(packed(model, row, known, seed))
        size = nbytes(model, row.plan)
        key = {"method": row.method, "unit": row.unit, "budget_bits": round(row.bits, 3), "budget_mib": mib_at(model, row.bits)}
        stored = {"mem_mib": size / MIB, "mem_share": size / full, "bits_per_weight": bits_of(model, row.plan)}
        damages = {"predicted": predicted(model, small, judge)} | scoring.output_damage(small, outputs, seed)
        found.append(key | stored | damages)
    return pd.DataFrame(found)[COLUMNS]


def predicted(model: nn.Module, small: nn.Module, known: Sensitivity) -> float:
    """Predicted damage of a quantized model whose weights are unpacked, a pixel."""
    total = 0.0
    for name, values in known.fisher.items():
        rows = rows_of(model, name)
        change = rows.of(small.get_parameter(name).detach() - model.get_parameter(name).detach()).cpu()
        total += damage(change, rows.of(values).cpu(), known.curvature[name].cpu()).sum().item()
    return total / HALF_PIXELS


def reports(model: nn.Module, fisher: dict[str, Tensor], rows: list[Row], unit: str = "mixed") -> pd.DataFrame:
    """Bits a weight of every weight tensor in the rows of a unit.

    Columns budget_bits, parameter, fisher (the tensor's mean), bits_per_weight.
    """

    def bits(name: str, plan: Plan) -> float:
        rows = rows_of(model, name)
        return 8 * stored_bytes(rows, plan.get(name, "fp32")) / fisher[name].numel()

    found = [
        (round(row.bits, 3), name, fisher[name].mean().item(), bits(name, row.plan))
        for row in rows
        if row.method == "allocator" and row.unit == unit
        for name in quantizable(model)
    ]
    return pd.DataFrame(found, columns=["budget_bits", "parameter", "fisher", "bits_per_weight"])


def images(
    model: nn.Module, known: Sensitivity, rows: list[Row], profile: str, *, bits: list[float], steps: int, seed: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """A few images of the unquantized model and of the allocator's plans (unit mixed) for these bits, from the same noise.

    Returns a row a model, columns method, threshold, format, unit, mem_mib, sample, and uint8 images (7, 32, 32) by sample.
    """
    chosen = [row for b in bits for row in rows if row.method == "allocator" and row.unit == "mixed" and abs(row.bits - b) < 1e-6]
    models = {"32 bits": (model, {})}
    models |= {f"{row.bits:g} bits": (unpack(packed(model, row, known, seed)), row.plan) for row in chosen}
    found, samples = [], {}
    for name, (own, plan) in models.items():
        key, generated, _ = sampled(own, profile, IMAGES, steps, seed, name)
        samples[key] = generated[:, 0].numpy()
        method, low = ("allocator", "mixed") if plan else ("baseline", "fp32")
        found.append((method, name, low, low, nbytes(model, plan) / MIB, key))
    return pd.DataFrame(found, columns=["method", "threshold", "format", "unit", "mem_mib", "sample"]), samples
