"""A quantization plan: the format of every planned parameter, and how the weights are rounded into it."""

from typing import NamedTuple

from torch import Tensor

from lafq.quantization.formats import ScaleRule, absmax_scale
from lafq.quantization.weight_spec import WeightSpec

Entries = dict[str, str | WeightSpec]


class Recipe(NamedTuple):
    """How weights are rounded.

    scale: a rule of `formats`. fisher: by parameter name, Fisher values of its shape, which weight the error where the rule asks
    for it. curvature: by parameter name, (C, C) for the C weights of an output channel; the weights named are rounded with error
    feedback, the others to the nearest code.
    """

    scale: ScaleRule = absmax_scale
    fisher: dict[str, Tensor] | None = None
    curvature: dict[str, Tensor] | None = None


PLAIN = Recipe()


class Plan(Entries):
    """A dictionary {parameter: format or WeightSpec} that knows its rounding recipe and the weights that it was made for.

    source: sha256 of these weights (`model.weights_sha256`), or "" for a plan that fits any weights of these names and shapes.
    """

    def __init__(self, entries: Entries | None = None, recipe: Recipe = PLAIN, source: str = "") -> None:
        super().__init__(entries or {})
        self.recipe, self.source = recipe, source
