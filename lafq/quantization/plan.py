"""A quantization plan: the format of every planned parameter, and how weights are rounded."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
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


class Plan:
    """A format or WeightSpec by parameter name (`entries`), with its rounding recipe.

    source: sha256 of the weights that it was made for (`model.parameters_sha256`), or "" for any.
    It is no mapping: a merge of dictionaries would lose the recipe and the source.
    """

    def __init__(
        self, entries: Entries | None = None, recipe: Recipe = PLAIN, source: str = ""
    ) -> None:
        self._entries, self.recipe, self.source = dict(entries or {}), recipe, source

    @property
    def entries(self) -> Mapping[str, str | WeightSpec]:
        """By parameter name, read only."""
        return MappingProxyType(self._entries)

    def with_entries(self, entries: Entries) -> "Plan":
        """The plan with these entries instead of its own, rounded as before."""
        return Plan(self._entries | entries, self.recipe, self.source)

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of the entries, masks and steps included; not of the recipe."""
        content = hashlib.sha256()
        for name in sorted(self._entries):
            format, mask, keep_format, steps, group = weight_spec(self._entries[name])
            content.update(repr((name, format, keep_format, group)).encode())
            for tensor in (mask, steps):
                values = torch.empty(0) if tensor is None else tensor.detach().cpu().flatten()
                content.update(repr(tuple(values.shape)).encode())
                content.update(values.view(torch.uint8).numpy().tobytes())
        return content.hexdigest()


def as_plan(plan: Plan | Entries) -> Plan:
    """A plan, or entries rounded to the nearest code; ValueError for anything else."""
    if not isinstance(plan, Plan | dict):
        wrong = f"the plan is a {type(plan).__name__}"
        raise ValueError(f"{wrong}: give a Plan, or formats by parameter name")
    return plan if isinstance(plan, Plan) else Plan(plan)


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
        super().__init__(plan.entries, plan.recipe, plan.source)
        self.nbytes, self.damage, self.report, self.file_bytes = nbytes, damage, report, file_bytes


def make_plan(keep_mask: dict[str, Tensor], format: str, keep_format: str = "fp32") -> Plan:
    """Plan to store the weights where the mask is True in `keep_format`, the others in `format`.

    keep_mask: by parameter name a boolean tensor, 0-dim for the whole tensor, (output channels,)
    for channels, or of the weight's shape. A tensor kept whole in FP32 is left out of the plan.
    """
    get_format(format), get_format(keep_format)
    entries: Entries = {}
    for name, mask in keep_mask.items():
        if not mask.any():
            entries[name] = format
        elif mask.all():
            entries |= {name: keep_format} if keep_format != "fp32" else {}
        elif mask.ndim == 1:
            entries[name] = WeightSpec(tuple(keep_format if k else format for k in mask.tolist()))
        else:
            entries[name] = WeightSpec(format, mask, keep_format)
    return Plan(entries)
