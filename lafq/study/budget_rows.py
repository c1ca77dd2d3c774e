"""Rows of a budget in bits per weight, and the sensitivity that their plans are made from."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from lafq.allocation import allocate as solver
from lafq.allocation.coded import allocate_coded
from lafq.allocation.frontiers import ALLOCATED
from lafq.allocation.rules import RULES, Scores, keep_above
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity, predicted_damage
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import bits_per_weight, dequantize_, nbytes, quantize, weights_sha256
from lafq.quantization.plan import Entries, Plan, make_plan
from lafq.rng import generator
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import GROUPS, group_of, layer_of, mnist, quantizable
from lafq.study.rows import FEEDBACK, Row, rule_scores, weight_count
from lafq.study.workspace import Workspace
from lafq.tensors import load_tensors, save_tensors

INTEGERS = ("int2", "int3", "int4", "int6", "int8")
VARIANTS = (("allocate", "nearest"), ("allocate_all", "feedback"))  # of the allocator
RULES_AT_BITS = ("global", "group", "ratio", "mean_std", "magnitude", "random")


def measured_sensitivity(
    model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """Sensitivity of all weights, the input and output convolutions' too, from so many noised
    training digits. Not shrunk, and with all output channels in every pass: with so many passes
    that changes the damage little (results/benchmarks/passes.csv), and kept tables were made so.
    """
    batches = noised_batches(mnist(train=True)[0], samples, seed)
    return estimate_sensitivity(model, batches, seed, shrink=False, channels=channels)


def kept_sensitivity(
    work: Workspace, model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """`measured_sensitivity`, kept for whoever needs it next."""
    name = f"{weights_sha256(model)[:12]}_{samples}_{seed}_{channels or 'all'}"
    return kept(work, name, lambda: measured_sensitivity(model, samples, seed, channels))


def kept(work: Workspace, name: str, make: Callable[[], Sensitivity]) -> Sensitivity:
    """What `make` estimates, kept under this name in build/<profile>/sensitivity."""
    file = f"{name}.safetensors"
    paths = [work.build / "sensitivity" / f"{part}_{file}" for part in ("fisher", "curvature")]
    if not all(path.is_file() for path in paths):
        for path, tensors in zip(paths, make(), strict=False):
            save_tensors(path, tensors)
    return Sensitivity(*(load_tensors(path, "budget")[0] for path in paths))


def made(samples: int, seed: int) -> dict[str, Any]:
    """What recipes say of plans from `measured_sensitivity`, rounded with error feedback."""
    fisher = {"kind": "Monte Carlo", "samples": samples, "seed": seed}
    return {"rounding": FEEDBACK, "fisher": fisher}


def mib_at(model: nn.Module, bits: float) -> float:
    """MiB of the whole model with so many bits per weight in the six layers, and the rest FP32."""
    weights = weight_count(model)
    return (nbytes(model, {}) - 4 * weights + bits * weights / 8) / MIB


def bits_of(model: nn.Module, plan: Plan | Entries) -> float:
    """Stored bits per weight of the six layers, scales and masks included."""
    return bits_per_weight(model, plan, quantizable(model))


def at_bits(
    rule: str, format: str, granularity: str, rounding: str, bits: float, plan: Plan
) -> Row:
    """The row of a plan that was made for a budget in bits per weight."""
    return Row(rule, f"{bits:.3f}", format, granularity, rounding, plan, bits=bits)


def uniform_at_bits(model: nn.Module, sensitivity: Sensitivity) -> list[Row]:
    """All weights in one format, rounded as everywhere, and then as the allocator's plans are."""
    plans = {low: Plan(dict.fromkeys(quantizable(model), low)) for low in (*INTEGERS, "fp16")}
    rounded = {low: Plan(plans[low].entries, sensitivity.recipe) for low in INTEGERS}
    return [
        at_bits("uniform", low, "tensor", rounding, bits_of(model, plan), plan)
        for rounding, by_format in (("nearest", plans), ("feedback", rounded))
        for low, plan in by_format.items()
    ]


def _within(
    model: nn.Module, key: tuple[str, ...], bits: Sequence[float], solve: Callable[[float], Plan]
) -> list[Row]:
    """The rows of the plans that `solve` makes for budgets, which it takes in MiB; a line tells of
    a budget below the smallest possible size.
    """
    rows = []
    for b in bits:
        try:
            rows.append(at_bits(*key, b, solve(mib_at(model, b))))
        except ValueError:
            print(f"{', '.join(key)}: {b:.2f} bits per weight cannot be met")
    return rows


def allocated_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    granularities: Sequence[str] = ALLOCATED,
    variants: Sequence[tuple[str, str]] = VARIANTS,
) -> list[Row]:
    """The allocator at these granularities and budgets, and its variants at granularity "mixed"."""
    layers, rows = {name: sensitivity.fisher[name] for name in quantizable(model)}, []
    kinds = [("allocate", "feedback", granularity) for granularity in granularities]
    for rule, rounding, granularity in [*kinds, *((*kind, "mixed") for kind in variants)]:
        fisher = sensitivity.fisher if rule == "allocate_all" else layers
        known = Sensitivity(fisher, sensitivity.curvature if rounding == "feedback" else {})
        frontiers = solver.frontiers_of(model, known, granularity, STUDY_FORMATS)
        solve = partial(solver.solve_budget, model, frontiers, recipe=known.recipe)
        rows += _within(model, (rule, "any", granularity, rounding), bits, solve)
    return rows


def coded_at_bits(model: nn.Module, sensitivity: Sensitivity, bits: Sequence[float]) -> list[Row]:
    """What `allocate_coded` chooses, in files of the bytes that `mib_at` counts for these bits."""
    solve = partial(allocate_coded, model, sensitivity, progress=False)
    return _within(model, ("allocate", "coded", "channel", "feedback"), bits, solve)


def is_allocated(row: Row, granularity: str = "mixed") -> bool:
    """Whether the allocator chose the row's formats, and rounded it with error feedback."""
    return row[:1] + row[2:5] == ("allocate", "any", granularity, "feedback")


def tuned_rows(rows: list[Row], bits: Sequence[float], steps: int) -> list[Row]:
    """The allocator's "mixed" rows at these budgets, biases and norms tuned for so many steps."""
    chosen = [row for row in rows if is_allocated(row) and row.bits in bits]
    return [row._replace(rounding="tuned", tuned=steps) for row in chosen]


def rules_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    seed: int,
    rules: Sequence[str] = RULES_AT_BITS,
) -> list[Row]:
    """The poster's four rules, and magnitude or random scores: single weights kept, of equal bytes.

    What is not kept goes to the largest integer format below the budget, what is kept stays FP16
    (FP32 where even all FP16 fits). Every plan comes with nearest codes and with error feedback.
    """
    weights, g = quantizable(model), generator(seed)
    fisher = {name: sensitivity.fisher[name] for name in weights}
    scores = {rule: rule_scores(rule, fisher) for rule in RULES}
    scores["ratio"] = _from_0_to_1(scores["ratio"])
    scores["magnitude"] = {n: w.abs() for n, w in weights.items()}
    scores["random"] = {n: torch.rand(f.shape, generator=g) for n, f in fisher.items()}
    rows = []
    for b in bits:
        low, high = _formats(model, b)
        for rule in rules if low else ():
            plan = at_bytes(model, scores[rule], low, high, mib_at(model, b))
            rounded = {"nearest": plan, "feedback": Plan(plan.entries, sensitivity.recipe)}
            rows += [at_bits(rule, low, "weight", how, b, p) for how, p in rounded.items()]
    return rows


def _formats(model: nn.Module, bits: float) -> tuple[str, str]:
    """The largest integer format below a budget, or FP16, "" where there is none; and that of the
    weights that are kept.
    """
    names = quantizable(model)
    fitting = [f for f in (*INTEGERS, "fp16") if bits_of(model, dict.fromkeys(names, f)) < bits]
    low = fitting[-1] if fitting else ""
    return low, "fp32" if low == "fp16" else "fp16"


def free_groups(model: nn.Module, sensitivity: Sensitivity, bits: float) -> Row:
    """A threshold for each group of layers, all free, at a budget: those of least predicted damage,
    found by halving steps along each, from one threshold for all. Rounded with error feedback.
    """
    low, high = _formats(model, bits)
    fisher = {name: sensitivity.fisher[name] for name in quantizable(model)}

    def planned(octaves: dict[str, float]) -> tuple[float, Plan]:
        scores = {n: f * 2 ** octaves[group_of(n)] for n, f in fisher.items()}
        plan = at_bytes(model, scores, low, high, mib_at(model, bits))
        plan = Plan(plan.entries, sensitivity.recipe)
        return predicted_damage(model, dequantize_(quantize(model, plan)), sensitivity), plan

    octaves = dict.fromkeys(GROUPS, 0.0)
    (least, best), step = planned(octaves), 4.0
    while step > 0.2:
        moved = [octaves | {g: octaves[g] + s} for g in [*GROUPS][1:] for s in (step, -step)]
        tried = {i: planned(m) for i, m in enumerate(moved)}
        i = min(tried, key=lambda i: tried[i][0])
        if tried[i][0] < least:
            octaves, (least, best) = moved[i], tried[i]
        else:
            step /= 2
    return at_bits("free", low, "weight", "feedback", bits, best)


def at_bytes(model: nn.Module, scores: Scores, low: str, high: str, budget_mib: float) -> Plan:
    """The weights of highest score in the format `high`, as many as fit, the others in `low`."""
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    plan, fits, too_many = make_plan(keep_above(scores, math.inf), low, high), 0, len(values)
    while too_many - fits > max(1, len(values) / 2**16):
        count = (fits + too_many) // 2
        larger = make_plan(keep_above(scores, values[count].item()), low, high)
        if nbytes(model, larger) <= budget_mib * MIB:
            plan, fits = larger, count
        else:
            too_many = count
    return plan


def _from_0_to_1(ratio_scores: Scores) -> Scores:
    """The shares of `ratio_score`, r / n of rank r, as r / (n - 1) in every layer: so the kept
    images of this rule at a budget were made.
    """
    count = pd.Series({name: score.numel() for name, score in ratio_scores.items()})
    n = count.groupby(layer_of).transform("sum").to_dict()
    return {name: s * n[name] / max(n[name] - 1, 1) for name, s in ratio_scores.items()}
