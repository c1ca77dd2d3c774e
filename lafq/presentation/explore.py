"""00_explore: one setting of rule, amount, unit and format -> its plan, bytes, kept weights, predicted damage and digits.

Fisher information and curvature are estimated on the spot from few digits: no file of another notebook is needed, and what is
shown does not depend on which were run before. Damage is predicted from other digits than a plan and its rounding are fitted
to: by its own few draws an allocation would look three times better than it is. `panel` draws an outcome and ties it to sliders.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation.pareto import StorageOption
from lafq.allocation.solver import frontiers_of, solve_budget
from lafq.allocation.thresholds import UNITS, by_unit, keep_global, keep_ratio, relative_to_group, standardized
from lafq.diffusion import workspace
from lafq.diffusion.unet import layer_of, quantizable
from lafq.evaluation.candidates import kept_share
from lafq.evaluation.samples import cached_samples
from lafq.fisher.monte_carlo import Sensitivity
from lafq.paper.budget_study.budget import predicted
from lafq.paper.budget_study.methods import Row, bits_of, measured_sensitivity, packed
from lafq.quantization.formats import FORMATS, MIB, unshrunk_scale
from lafq.quantization.model import channel_view, dequantize, kept_weights, make_plan, nbytes
from lafq.quantization.plan import Recipe
from lafq.quantization.weight_spec import stored_bytes

RULES = {
    "global": "global: one threshold for all layers",
    "group": "group: one for each of Layer 1-2, 3-5, 6",
    "mean_std": "mean and std of each layer",
    "ratio": "ratio: the same of every layer",
    "allocator": "allocator: the best within a size",
}
LOW = [name for name in FORMATS if name != "fp32"]


class Setting(NamedTuple):
    """What the sliders say.

    amount: the share of the units that is kept in FP32 (of "ratio": of each layer's units); of the allocator the size, as a
    share of FP32's bytes. unit: "tensor", "channel" or "weight" (of the allocator: channels, and single weights in FP16).
    format: of what is not kept; the allocator chooses its formats itself.
    """

    rule: str = "ratio"
    amount: float = 0.1
    unit: str = "weight"
    format: str = "int3"


class Subject(NamedTuple):
    """What is explored: a model, its true Fisher information and curvature, and how digits are drawn from it.

    known: what plans and rounding are made from; judge: from other digits, what damage is predicted from. drawn: the arguments
    of `samples.cached_samples`; digits: what it gave for the FP32 model, uint8 (N, 32, 32).
    int8: predicted damage of uniform INT8. frontiers: of the allocator, by unit, filled in as they are asked for.
    """

    model: nn.Module
    known: Sensitivity
    judge: Sensitivity
    drawn: dict[str, int | str]
    digits: np.ndarray
    int8: float
    frontiers: dict[str, dict[str, list[StorageOption]]]


class Outcome(NamedTuple):
    """What a setting leads to.

    threshold: in words; nbytes: stored, of the whole model; kept: share of the six layers' weights in FP32; damage: predicted
    mean squared change of the output a pixel; by_tensor: columns parameter, layer, kept_share, bits_per_weight; digits: uint8
    (N, 32, 32), from the same noise as the subject's.
    """

    setting: Setting
    threshold: str
    row: Row
    nbytes: int
    kept: float
    damage: float
    by_tensor: pd.DataFrame
    digits: np.ndarray


def subject(
    profile: str, width: int, device: torch.device | str = "cpu", *, samples: int, digits: int, steps: int, seed: int
) -> Subject:
    """The trained model of a profile, explored with `digits` digits; prints where its Fisher information is from.

    Raises FileNotFoundError without weights, ValueError for numbers out of range.
    """
    model = workspace.load_model(profile, width, device)
    if samples < 1:
        raise ValueError(f"Fisher information from {samples} digits was asked for: at least one is needed")
    print(f"true Fisher information: estimated here from {samples} digits, damage from half as many others (06_budget uses more)")
    known, judge = (measured_sensitivity(model, n, seed + i) for i, n in enumerate((samples, -(-samples // 2))))
    return subject_of(model, known, judge, profile, digits=digits, steps=steps, seed=seed)


def subject_of(
    model: nn.Module, known: Sensitivity, judge: Sensitivity, profile: str, *, digits: int, steps: int, seed: int
) -> Subject:
    """The subject of a model whose sensitivity is at hand."""
    drawn = {"profile": profile, "images": digits, "steps": steps, "seed": seed}
    images = cached_samples(model, **drawn)[1]
    uniform = Row("uniform", "tensor", 8, dict.fromkeys(quantizable(model), "int8"))
    int8 = dequantize(packed(model, uniform))
    return Subject(model, known, judge, drawn, images[:, 0].numpy(), predicted(model, int8, judge), {})


def check(setting: Setting) -> None:
    """Raise ValueError, in one sentence, for a setting that no slider can have."""
    for name, value, known in (("rule", setting.rule, RULES), ("unit", setting.unit, UNITS), ("format", setting.format, LOW)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if not 0 <= setting.amount <= 1:
        raise ValueError(f"amount {setting.amount} is outside [0, 1]: it is a share of the units, or of FP32's bytes")


def row(subject: Subject, setting: Setting) -> tuple[str, Row]:
    """The threshold in words, and the plan with how its weights are rounded: the allocator's with error feedback.

    Raises ValueError as `check`, and for a size that the allocator cannot meet, naming the smallest.
    """
    check(setting)
    model, rule = subject.model, setting.rule
    fisher = {name: subject.known.fisher[name] for name in quantizable(model)}
    if rule == "allocator":
        unit = "mixed" if setting.unit == "weight" else setting.unit
        if unit not in subject.frontiers:
            subject.frontiers[unit] = frontiers_of(model, fisher, unit, progress=False, curvature=subject.known.curvature)
        recipe = Recipe(unshrunk_scale, *subject.known)
        plan = solve_budget(model, subject.frontiers[unit], setting.amount * nbytes(model, {}) / MIB, recipe=recipe)
        words = f"size at most {setting.amount:.1%} of FP32"
    else:
        axes = {n: 1 for n in fisher if channel_view(model, n).groups}
        words, keep = kept(by_unit(fisher, setting.unit, axes), rule, setting.amount)
        plan = make_plan(keep, setting.format)
    return words, Row(rule, setting.unit, bits_of(model, plan), plan)


def kept(scores: dict[str, Tensor], rule: str, share: float) -> tuple[str, dict[str, Tensor]]:
    """The threshold of a rule that keeps this share of the units (more where scores are equal), in words and as `keep` masks."""
    if rule == "ratio":
        return f"ratio = {share:.3g}", keep_ratio(scores, share)
    name, relative = {"global": ("tau", dict), "group": ("factor", relative_to_group), "mean_std": ("k", standardized)}[rule]
    cut_at = relative(scores)
    values = torch.cat([s.flatten() for s in cut_at.values()]).sort(descending=True).values
    count = math.floor(share * len(values) + 1e-9)
    cut = values[count - 1].item() if count else math.inf
    return f"{name} = {cut:.3g}", keep_global(cut_at, cut)


def outcome(subject: Subject, setting: Setting) -> Outcome:
    """Everything that is shown of a setting; raises as `row`."""
    words, chosen = row(subject, setting)
    model = subject.model
    small = dequantize(packed(model, chosen))
    images = cached_samples(small, **subject.drawn)[1]
    stored, damage = nbytes(model, chosen.plan), predicted(model, small, subject.judge)
    share, tensors = kept_share(model, chosen.plan), by_tensor(model, chosen)
    return Outcome(setting, words, chosen, stored, share, damage, tensors, images[:, 0].numpy())


def by_tensor(model: nn.Module, row: Row) -> pd.DataFrame:
    """Share of the weights that a row's plan leaves in FP32, and stored bits a weight, of every weight tensor."""
    found = [
        (
            *(name, layer_of(name), kept_weights(model, row.plan, name) / w.numel()),
            8 * stored_bytes(channel_view(model, name), row.plan.get(name, "fp32")) / w.numel(),
        )
        for name, w in quantizable(model).items()
    ]
    return pd.DataFrame(found, columns=["parameter", "layer", "kept_share", "bits_per_weight"])
