"""The plans of 06_budget: uniform formats, the allocator's (tuned or not), and threshold rules at
the same bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lafq.allocation import allocate as solver
from lafq.allocation.coded import allocate_coded
from lafq.allocation.frontiers import ALLOCATED
from lafq.allocation.rules import by_layer, keep_global, relative_to_group, standardized
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.formats import MIB, STUDY_FORMATS, unshrunk_scale
from lafq.quantization.model import bits_per_weight, nbytes
from lafq.quantization.plan import Plan, Recipe, make_plan
from lafq.rng import generator
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import quantizable
from lafq.study.rows import Row

INTEGERS = ("int2", "int3", "int4", "int6", "int8")
# The names that figures and pages still use.
FEEDBACK = "error feedback"
CODED = "allocator, entropy-coded"
ALL_WEIGHTS = ("allocate_all", "feedback")
ABLATIONS = (("allocate", "nearest"), ALL_WEIGHTS)
RULES = ("global", "group", "ratio", "mean_std", "magnitude", "random")


def budget_row(
    rule: str, format: str, granularity: str, rounding: str, bits: float, plan: Plan
) -> Row:
    """A plan of 06_budget, made for a budget in bits per weight."""
    return Row(rule, f"{bits:.3f}", format, granularity, rounding, plan, bits=bits)


def measured_sensitivity(
    model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """Sensitivity of all weights, the input and output convolutions' too, from so many noised
    training digits.

    Not shrunk, and with all output channels in every pass: with so many passes that changes the
    damage little (results/benchmarks/passes.csv), and the tables of `make evidence`, which take
    hours, were made so.
    """
    batches = noised_batches(mnist(train=True)[0], samples, seed)
    return estimate_sensitivity(model, batches, seed, shrink=False, channels=channels)


def made(samples: int, seed: int) -> dict[str, Any]:
    """What the provenance of images says of plans that are made from `measured_sensitivity` and
    rounded with error feedback.
    """
    return {
        "rounding": "error feedback, unshrunk scales",
        "fisher": {"kind": "Monte Carlo", "samples": samples, "seed": seed},
    }


def mib_at(model: nn.Module, bits: float) -> float:
    """MiB of the whole model when the weights of the six layers take this many bits each, the rest
    FP32.
    """
    weights = sum(w.numel() for w in quantizable(model).values())
    return (nbytes(model, {}) - 4 * weights + bits * weights / 8) / MIB


def bits_of(model: nn.Module, plan: Plan) -> float:
    """Stored bits per weight of the six layers, scales and masks included."""
    return bits_per_weight(model, plan, quantizable(model))


def uniform(model: nn.Module, calibration: Sensitivity) -> list[Row]:
    """All weights in one format: rounded as everywhere, and with the allocator's scales and error
    feedback.
    """
    plans = {low: Plan(dict.fromkeys(quantizable(model), low)) for low in (*INTEGERS, "fp16")}
    bits = {low: bits_of(model, plan) for low, plan in plans.items()}
    recipe = Recipe(unshrunk_scale, calibration.fisher, calibration.curvature)
    return [
        *(budget_row("uniform", f, "tensor", "nearest", bits[f], plans[f]) for f in plans),
        *(
            budget_row("uniform", f, "tensor", "feedback", bits[f], Plan(plans[f], recipe))
            for f in INTEGERS
        ),
    ]


def allocated(
    model: nn.Module,
    calibration: Sensitivity,
    bits: list[float],
    granularities: tuple[str, ...] = ALLOCATED,
    ablations: tuple[tuple[str, str], ...] = ABLATIONS,
) -> list[Row]:
    """The allocator at these granularities and budgets.

    ablations: rule and rounding of "mixed" plans beside: to the nearest code, or with all weights
    to choose from.
    A budget below the smallest possible size is left out, and a line says so.
    """
    layers, rows = {name: calibration.fisher[name] for name in quantizable(model)}, []
    kinds = [("allocate", "feedback", granularity) for granularity in granularities]
    for rule, rounding, granularity in [*kinds, *((*kind, "mixed") for kind in ablations)]:
        fisher = calibration.fisher if rule == "allocate_all" else layers
        curvature = calibration.curvature if rounding == "feedback" else None
        frontiers = solver.frontiers_of(
            model, fisher, granularity, STUDY_FORMATS, curvature=curvature
        )
        recipe = Recipe(unshrunk_scale, calibration.fisher, curvature)
        for b in bits:
            try:
                plan = solver.solve_budget(model, frontiers, mib_at(model, b), recipe=recipe)
            except ValueError:
                print(f"{rule}, {rounding}, {granularity}: {b:.2f} bits per weight cannot be met")
                continue
            rows.append(budget_row(rule, "any", granularity, rounding, b, plan))
    return rows


def coded(model: nn.Module, calibration: Sensitivity, bits: list[float]) -> list[Row]:
    """The steps that `allocate_coded` chooses for all weights, in files of as many bytes as
    `mib_at` counts for these bits.

    A budget below the smallest possible file is left out, and a line says so.
    """
    rows = []
    for b in bits:
        try:
            plan = allocate_coded(model, calibration, mib_at(model, b), progress=False)
        except ValueError:
            print(f"entropy-coded: a file of {b:.2f} bits per weight cannot be met")
            continue
        rows.append(budget_row("allocate", "coded", "channel", "feedback", b, plan))
    return rows


def beside_coded(rows: list[Row]) -> list[Row]:
    """The rows that the coded ones are compared with: uniform formats, and the allocator that has
    all weights to choose from.
    """
    return [row for row in rows if row.rule in ("uniform", "allocate_all") and row.bits < 10]


def tuned(rows: list[Row], bits: list[float], steps: int) -> list[Row]:
    """The allocator's rows of granularity "mixed" at these budgets, with biases and norms tuned for
    so many steps.
    """
    chosen = [row for row in rows if is_allocated(row) and row.bits in bits]
    return [row._replace(rounding="tuned", tuned=steps) for row in chosen]


def is_allocated(row: Row, granularity: str = "mixed") -> bool:
    """Whether the allocator chose the row's formats, and rounded it with error feedback."""
    return row[:1] + row[2:5] == ("allocate", "any", granularity, "feedback")


def thresholds(
    model: nn.Module,
    calibration: Sensitivity,
    bits: list[float],
    seed: int,
    rules: Sequence[str] = RULES,
) -> list[Row]:
    """The poster's four rules, and the same with magnitude or random scores: single weights kept,
    up to the same bytes.

    What is not kept goes to the largest integer format below the budget, what is kept stays FP16
    (FP32 where even all FP16 fits).
    Every plan comes twice: with the usual scales and nearest codes, and rounded as the allocator's
    plans are.
    """
    g, fisher = generator(seed), {name: calibration.fisher[name] for name in quantizable(model)}
    scores = {
        "global": fisher,
        "group": relative_to_group(fisher),
        "ratio": _rank_in_layer(fisher),
        "mean_std": standardized(fisher),
        "magnitude": {n: w.abs() for n, w in quantizable(model).items()},
        "random": {n: torch.rand(f.shape, generator=g) for n, f in fisher.items()},
    }
    recipe, rows = Recipe(unshrunk_scale, calibration.fisher, calibration.curvature), []
    for b in bits:
        fitting = [f for f in (*INTEGERS, "fp16") if bits_of(model, dict.fromkeys(fisher, f)) < b]
        for name in rules if fitting else ():
            high = "fp32" if fitting[-1] == "fp16" else "fp16"
            plan = at_bytes(model, scores[name], fitting[-1], high, mib_at(model, b))
            for rounding, rounded in (("nearest", plan), ("feedback", Plan(plan, recipe))):
                rows.append(budget_row(name, fitting[-1], "weight", rounding, b, rounded))
    return rows


def at_bytes(
    model: nn.Module, scores: dict[str, Tensor], low: str, high: str, budget_mib: float
) -> Plan:
    """Keep as `high` the single weights of highest score, as many as fit in the budget, and send
    the others to `low`.
    """
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    fits, too_many = 0, len(values)
    while too_many - fits > len(values) / 2**16:
        count = (fits + too_many) // 2
        if (
            nbytes(model, make_plan(keep_global(scores, values[count].item()), low, high))
            <= budget_mib * MIB
        ):
            fits = count
        else:
            too_many = count
    threshold = values[fits].item() if fits else float("inf")
    return make_plan(keep_global(scores, threshold), low, high)


def _rank_in_layer(fisher: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every weight the share of its layer's weights with lower Fisher values: a threshold on
    these is the ratio rule.
    """
    result = {}
    for layer in by_layer(fisher).values():
        flat = torch.cat([f.flatten() for f in layer.values()]).cpu()
        rank = torch.empty(len(flat), dtype=torch.float64)
        rank[flat.argsort(stable=True)] = torch.from_numpy(np.linspace(0, 1, len(flat)))
        parts = rank.split([f.numel() for f in layer.values()])
        result |= {n: part.view(f.shape) for (n, f), part in zip(layer.items(), parts, strict=True)}
    return result
