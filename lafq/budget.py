"""06_budget: every method at every budget, the damage that was predicted and the damage that was measured.

The unit of all damages here is the mean squared change of the output a pixel; half the squared error summed over the 1,024
pixels, which the Fisher information is of, is 512 times that.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq import allocation, scoring
from lafq.allocation import MIB
from lafq.data import mnist
from lafq.feedback import damage
from lafq.formats import ScaleRule, absmax, unbiased
from lafq.frontier import UNITS
from lafq.precision import stored_bytes
from lafq.quantize import Plan, make_plan, nbytes, pack, rows_of, unpack
from lafq.samples import sampled
from lafq.seeds import generator
from lafq.thresholds import by_layer, keep_global, relative_to_group
from lafq.true_fisher import Sensitivity, noised_batches, sensitivity
from lafq.unet import quantizable

HALF_PIXELS = 512
IMAGES = 7
INTEGERS = ("int2", "int3", "int4", "int6", "int8")
FEEDBACK = "error feedback"
COLUMNS = [
    *("method", "unit", "budget_bits", "budget_mib", "mem_mib", "mem_share", "bits_per_weight", "predicted"),
    *("damage", "damage_low", "damage_high", "delta_loss"),
]


class Row(NamedTuple):
    """A plan to judge: which method made it, at which unit and for how many bits a weight, its scale rule, and whether
    weights are rounded with error feedback."""

    method: str
    unit: str
    bits: float
    plan: Plan
    scale: ScaleRule = absmax
    feedback: bool = False


def measured_sensitivity(model: nn.Module, samples: int, seed: int) -> Sensitivity:
    """`true_fisher.sensitivity` of all weights, the input and output convolutions' too, on so many noised training digits."""
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    return sensitivity(model, names, noised_batches(mnist(train=True)[0], samples, seed), seed)


def quantized(model: nn.Module, row: Row, known: Sensitivity) -> nn.Module:
    """The model under a row's plan, in FP32 with the quantized values."""
    return unpack(pack(model, row.plan, row.scale, known.fisher, known.curvature if row.feedback else None))


def mib_at(model: nn.Module, bits: float) -> float:
    """MiB of the whole model when the weights of the six layers take this many bits each, the rest FP32."""
    weights = sum(w.numel() for w in quantizable(model).values())
    return (nbytes(model, {}) - 4 * weights + bits * weights / 8) / MIB


def bits_of(model: nn.Module, plan: Plan) -> float:
    """Stored bits a weight of the six layers, scales and masks included."""
    weights = quantizable(model)
    stored = sum(stored_bytes(rows_of(model, n), plan.get(n, "fp32")) for n in weights)
    return 8 * stored / sum(w.numel() for w in weights.values())


def uniform(model: nn.Module) -> list[Row]:
    """All weights in one format: rounded as everywhere, and with the allocator's scales and error feedback."""
    plans = {low: dict.fromkeys(quantizable(model), low) for low in (*INTEGERS, "fp16")}
    found = [Row("uniform", "tensor", bits_of(model, plan), plan) for plan in plans.values()]
    fed_back = [Row(f"uniform, {FEEDBACK}", "tensor", bits_of(model, plans[f]), plans[f], unbiased, True) for f in INTEGERS]
    return found + fed_back


def allocated(model: nn.Module, known: Sensitivity, bits: list[float], units: tuple[str, ...] = UNITS) -> list[Row]:
    """The allocator at these units and budgets; at unit mixed also without error feedback, and with all weights to choose from.

    A budget below a unit's smallest size is left out, and a line says so.
    """
    rows, layers = [], {name: known.fisher[name] for name in quantizable(model)}
    methods = [("allocator", unit, layers, known.curvature) for unit in units]
    methods += [
        ("allocator, nearest code", "mixed", layers, None),
        ("allocator, all weights", "mixed", known.fisher, known.curvature),
    ]
    for method, unit, fisher, curvature in methods:
        frontiers = allocation.frontiers_of(model, fisher, unit, curvature=curvature)
        for b in bits:
            try:
                found = allocation.choose(model, frontiers, mib_at(model, b))
            except ValueError:
                print(f"{method}, unit {unit}: {b:.2f} bits a weight cannot be met")
                continue
            rows.append(Row(method, unit, b, found.plan, unbiased, curvature is not None))
    return rows


def thresholds(model: nn.Module, fisher: dict[str, Tensor], bits: list[float], seed: int) -> list[Row]:
    """The paper's three rules, and weights of large magnitude or at random, single weights kept at the same bytes.

    What is not kept goes to the largest integer format below the budget, what is kept stays FP16 (FP32 where even all FP16 fits).
    """
    g, fisher = generator(seed), {name: fisher[name] for name in quantizable(model)}
    scores = {
        "global": fisher,
        "group": relative_to_group(fisher),
        "ratio": _rank_in_layer(fisher),
        "magnitude": {n: w.abs() for n, w in quantizable(model).items()},
        "random": {n: torch.rand(f.shape, generator=g) for n, f in fisher.items()},
    }
    rows = []
    for b in bits:
        fitting = [f for f in (*INTEGERS, "fp16") if bits_of(model, dict.fromkeys(fisher, f)) < b]
        if fitting:
            high = "fp32" if fitting[-1] == "fp16" else "fp16"
            rows += [Row(name, "weight", b, at_bytes(model, s, fitting[-1], high, mib_at(model, b))) for name, s in scores.items()]
    return rows


def at_bytes(model: nn.Module, scores: dict[str, Tensor], low: str, high: str, budget_mib: float) -> Plan:
    """Keep as `high` the single weights of highest score, as many as fit in the budget, and send the others to `low`."""
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    fits, too_many = 0, len(values)
    while too_many - fits > len(values) / 2**16:
        count = (fits + too_many) // 2
        if nbytes(model, make_plan(keep_global(scores, values[count].item()), low, high)) <= budget_mib * MIB:
            fits = count
        else:
            too_many = count
    cut = values[fits].item() if fits else float("inf")
    return make_plan(keep_global(scores, cut), low, high)


def judged(model: nn.Module, rows: list[Row], known: Sensitivity, judge: Sensitivity, seed: int, digits: int) -> pd.DataFrame:
    """Bytes, predicted and measured damage of every row, columns as COLUMNS; measured on so many held-out digits.

    known: what plans and rounding are made from; judge: from other draws, what damage is predicted from, since by the draws that a
    plan is fitted to it looks better than it is.
    """
    outputs, full, found = scoring.held_out_outputs(model, seed, digits), nbytes(model, {}), []
    for row in tqdm(rows, desc="measured damage", unit="row", leave=False):
        small = quantized(model, row, known)
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
    models = {"32 bits": (model, {})} | {f"{row.bits:g} bits": (quantized(model, row, known), row.plan) for row in chosen}
    found, samples = [], {}
    for name, (own, plan) in models.items():
        key, generated = sampled(own, profile, IMAGES, steps, seed, name)
        samples[key] = generated[:, 0].numpy()
        method, low = ("allocator", "mixed") if plan else ("baseline", "fp32")
        found.append((method, name, low, low, nbytes(model, plan) / MIB, key))
    return pd.DataFrame(found, columns=["method", "threshold", "format", "unit", "mem_mib", "sample"]), samples


def _rank_in_layer(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every weight the share of its layer's weights with lower Fisher values: a cut of these is the ratio rule."""
    result = {}
    for layer in by_layer(fisher).values():
        flat = torch.cat([f.flatten() for f in layer.values()]).cpu()
        rank = torch.empty(len(flat), dtype=torch.float64)
        rank[flat.argsort(stable=True)] = torch.from_numpy(np.linspace(0, 1, len(flat)))
        parts = rank.split([f.numel() for f in layer.values()])
        result |= {n: part.view(f.shape) for (n, f), part in zip(layer.items(), parts, strict=True)}
    return result
