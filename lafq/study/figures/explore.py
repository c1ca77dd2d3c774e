"""00_explore: one setting of rule, amount, granularity and format -> its plan, bytes, kept weights,
predicted damage and digits.

Sensitivity is estimated on the spot from few digits, so no file of another notebook is needed.
Damage is predicted from other digits than the plan and its rounding are made from: on its own few
draws an allocation would look three times better than it is. `panel` draws an outcome and ties it
to sliders.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation.allocate import frontiers_of, solve_budget
from lafq.allocation.frontiers import StorageOption
from lafq.allocation.rules import GRANULARITIES, by_granularity, keep_above
from lafq.allocation.rules import RULES as SCORES
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS, unshrunk_scale
from lafq.quantization.model import bits_per_weight, dequantize_, kept_weights, nbytes, quantize
from lafq.quantization.plan import Plan, Recipe, make_plan
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import layer_of, quantizable
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.poster import group_of
from lafq.study.rows import keep_ratio, kept_share, measured_sensitivity
from lafq.study.workspace import Workspace

RULES = {
    "global": "global: one threshold for all layers",
    "group": "group: one for each of Layer 1-2, 3-5, 6",
    "mean_std": "mean and std of each layer",
    "ratio": "ratio: the same of every layer",
    "allocator": "allocator: the best within a size",
}
LOW = [name for name in STUDY_FORMATS if name != "fp32"]


class Setting(NamedTuple):
    """What the sliders say.

    amount: the share of the weights, channels or tensors that is kept in FP32 (of "ratio": of each
    layer's); of the allocator the size, as a share of FP32's bytes. granularity: "tensor",
    "channel" or "weight" (of the allocator: channels, and single weights in FP16). format: of what
    is not kept; the allocator chooses its formats itself.
    """

    rule: str = "ratio"
    amount: float = 0.1
    granularity: str = "weight"
    format: str = "int3"


class Subject(NamedTuple):
    """What is explored: a model, its sensitivity, and how digits are drawn from it.

    calibration: what plans and rounding are made from; validation: from other digits, what damage
    is predicted from. digits: of the FP32 model, uint8 (N, 32, 32). int8: predicted damage of
    uniform INT8. fronts: of the allocator, by granularity, filled in as they are asked for.
    """

    work: Workspace
    model: nn.Module
    calibration: Sensitivity
    validation: Sensitivity
    sampling: Sampling
    digits: np.ndarray
    int8: float
    fronts: dict[str, dict[str, list[StorageOption]]]


class Outcome(NamedTuple):
    """What a setting leads to.

    threshold: in words; nbytes: stored, of the whole model; kept: share of the six layers' weights
    in FP32; damage: predicted mean squared change of the output per pixel; by_tensor: columns
    parameter, layer, kept_share, bits_per_weight; digits: uint8 (N, 32, 32), from the same noise as
    the subject's.
    """

    setting: Setting
    threshold: str
    plan: Plan
    nbytes: int
    kept: float
    damage: float
    by_tensor: pd.DataFrame
    digits: np.ndarray


def subject(work: Workspace, width: int, sampling: Sampling, samples: int) -> Subject:
    """The trained model of a profile, explored with few digits; prints what its sensitivity is
    estimated from.

    Raises FileNotFoundError without weights, ValueError for numbers out of range.
    """
    model = load_model(work, width)
    if samples < 1:
        raise ValueError(
            f"Fisher information from {samples} digits was asked for: at least one is needed"
        )
    others = -(-samples // 2)
    print(
        f"true Fisher information: from {samples} digits; damage: from {others} other digits "
        f"(10_damage uses more)"
    )
    found = [
        measured_sensitivity(model, n, sampling.seed + i) for i, n in enumerate((samples, others))
    ]
    return subject_of(work, model, *found, sampling)


def subject_of(
    work: Workspace,
    model: nn.Module,
    calibration: Sensitivity,
    validation: Sensitivity,
    sampling: Sampling,
) -> Subject:
    """The subject of a model whose sensitivity is at hand."""
    digits = ImageStore(work).draw(model, sampling).images[:, 0].numpy()
    int8 = dequantize_(quantize(model, dict.fromkeys(quantizable(model), "int8")))
    return Subject(
        work,
        model,
        calibration,
        validation,
        sampling,
        digits,
        predicted_damage(model, int8, validation) / HALF_PIXELS,
        {},
    )


def plan_of(subject: Subject, setting: Setting) -> tuple[str, Plan]:
    """The threshold in words, and the plan; the allocator's is rounded with error feedback.

    Raises ValueError, in one sentence, for a setting that no slider can have, and for a size that
    the allocator cannot meet.
    """
    model, (rule, amount, granularity, format) = subject.model, setting
    for name, value, known in (
        ("rule", rule, RULES),
        ("granularity", granularity, GRANULARITIES),
        ("format", format, LOW),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if not 0 <= amount <= 1:
        raise ValueError(
            f"amount {amount} is outside [0, 1]: it is the share that is kept, or the share of "
            f"FP32's bytes"
        )
    fisher = {name: subject.calibration.fisher[name] for name in quantizable(model)}
    if rule != "allocator":
        axes = {n: 1 for n in fisher if channel_view(model, n).groups}
        words, keep = kept(by_granularity(fisher, granularity, axes), rule, amount)
        return words, make_plan(keep, format)
    granularity = "mixed" if granularity == "weight" else granularity
    if granularity not in subject.fronts:
        curvature = subject.calibration.curvature
        subject.fronts[granularity] = frontiers_of(
            model, fisher, granularity, STUDY_FORMATS, False, curvature=curvature
        )
    recipe, budget = (
        Recipe(unshrunk_scale, subject.calibration.fisher, subject.calibration.curvature),
        amount * nbytes(model, {}) / MIB,
    )
    return f"size at most {amount:.1%} of FP32", solve_budget(
        model, subject.fronts[granularity], budget, recipe=recipe
    )


def kept(scores: dict[str, Tensor], rule: str, share: float) -> tuple[str, dict[str, Tensor]]:
    """The threshold of a rule that keeps this share of the scores (more where scores are equal), in
    words and as `keep` masks.
    """
    if rule == "ratio":
        return f"ratio = {share:.3g}", keep_ratio(scores, share)
    name = {"global": "tau", "group": "factor", "mean_std": "k"}[rule]
    scores = SCORES[rule](scores, layer_of, group_of)
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    count = math.floor(share * len(values) + 1e-9)
    threshold = values[count - 1].item() if count else math.inf
    return f"{name} = {threshold:.3g}", keep_above(scores, threshold)


def outcome(subject: Subject, setting: Setting) -> Outcome:
    """Everything that is shown of a setting; raises as `plan_of`."""
    words, plan = plan_of(subject, setting)
    model = subject.model
    whole = dequantize_(quantize(model, plan))
    digits = ImageStore(subject.work).draw(whole, subject.sampling).images[:, 0].numpy()
    damage = predicted_damage(model, whole, subject.validation) / HALF_PIXELS
    stored, share = nbytes(model, plan), kept_share(model, plan)
    return Outcome(setting, words, plan, stored, share, damage, by_tensor(model, plan), digits)


def by_tensor(model: nn.Module, plan: Plan) -> pd.DataFrame:
    """Share of the weights that a plan leaves in FP32, and stored bits per weight, of every weight
    tensor.
    """
    found = [
        (
            name,
            layer_of(name),
            kept_weights(model, plan, name) / w.numel(),
            bits_per_weight(model, plan, [name]),
        )
        for name, w in quantizable(model).items()
    ]
    return pd.DataFrame(found, columns=["parameter", "layer", "kept_share", "bits_per_weight"])
