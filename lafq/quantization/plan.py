"""A quantization plan: the format of every planned parameter, and how weights are rounded."""

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lafq.quantization.channels import WeightSpec, weight_spec
from lafq.quantization.formats import ScaleRule, absmax_scale, get_format

if TYPE_CHECKING:
    import pandas as pd

Entries = dict[str, str | WeightSpec]


class Recipe(NamedTuple):
    """How weights are rounded.

    scale: a rule of `formats`. fisher: by parameter name, Fisher values of its shape, which weight
    the error where the rule asks for it. curvature: by parameter name, (C, C) or in blocks
    (B, S, S), for the C weights of an output channel; the weights named are rounded with error
    feedback, the others to the nearest code.
    """

    scale: ScaleRule = absmax_scale
    fisher: dict[str, Tensor] | None = None
    curvature: dict[str, Tensor] | None = None


PLAIN = Recipe()


class Plan(Entries):
    """A dictionary {parameter: format or WeightSpec} with its rounding recipe.

    source: sha256 of the weights that it was made for (`model.weights_sha256`), or "" for any.
    """

    def __init__(
        self, entries: Entries | None = None, recipe: Recipe = PLAIN, source: str = ""
    ) -> None:
        super().__init__(entries or {})
        self.recipe, self.source = recipe, source

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the entries, masks and steps included; not of the recipe."""
        content = hashlib.sha256()
        for name in sorted(self):
            format, mask, keep_format, steps, group = weight_spec(self[name])
            content.update(repr((name, format, keep_format, group)).encode())
            for tensor in (mask, steps):
                values = torch.empty(0) if tensor is None else tensor.detach().cpu().flatten()
                content.update(repr(tuple(values.shape)).encode())
                content.update(values.view(torch.uint8).numpy().tobytes())
        return content.hexdigest()


class Allocation(Plan):
    """A plan within a budget.

    nbytes: of the whole model under the plan. damage: predicted, half the squared error summed over
    the output; too low where plan and rounding fit the noise of few draws
    (`sensitivity.predicted_damage` predicts from others). file_bytes: of the entropy-coded file,
    where the plan was made for one; else 0. report: one row per parameter, columns parameter,
    weights, bits_per_weight, formats, kept (single weights in FP16), damage.
    """

    def __init__(
        self, plan: Plan, nbytes: int, damage: float, report: "pd.DataFrame", file_bytes: int = 0
    ) -> None:
        super().__init__(plan, plan.recipe, plan.source)
        self.nbytes, self.damage, self.report, self.file_bytes = nbytes, damage, report, file_bytes


def make_plan(keep_mask: dict[str, Tensor], format: str, keep_format: str = "fp32") -> Plan:
    """Plan to store the weights where the mask is True in `keep_format`, the others in `format`.

    keep_mask: by parameter name a boolean tensor, 0-dim for the whole tensor, (output channels,)
    for channels, or of the weight's shape. A tensor kept whole in FP32 is left out of the plan.
    """
    get_format(format), get_format(keep_format)
    plan = Plan()
    for name, mask in keep_mask.items():
        if not mask.any():
            plan[name] = format
        elif mask.all():
            plan |= {name: keep_format} if keep_format != "fp32" else {}
        elif mask.ndim == 1:
            plan[name] = WeightSpec(tuple(keep_format if k else format for k in mask.tolist()))
        else:
            plan[name] = WeightSpec(format, mask, keep_format)
    return plan
