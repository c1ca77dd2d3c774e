"""Whether plans, Fisher values and curvatures fit a model; how its parameters fall into output
channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lafq.quantization.channels import ChannelView, weight_spec
from lafq.quantization.formats import FP16_MAX, least_absmax
from lafq.quantization.plan import Entries


def check_plan(model: nn.Module, plan: Entries) -> None:
    """Raise ValueError, in one sentence, for a plan that does not fit the model."""
    parameters = check_names(model, plan, "the plan names")
    for name, entry in plan.items():
        p = parameters[name]
        if shared := [n for n, q in parameters.items() if q is p and n != name]:
            raise ValueError(f"{name} is shared with {shared[0]}: leave it out of the plan")
        if p.dtype != torch.float32:
            raise ValueError(
                f"{name} is {p.dtype}: plans start from FP32 weights, call model.float() first"
            )
        if not p.numel():
            raise ValueError(
                f"{name} is empty, of shape {tuple(p.shape)}: leave it out of the plan"
            )
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.RNNBase):
            raise ValueError(
                f"{name} is of a recurrent layer, which keeps FP32 copies of its weights: leave it "
                f"out of the plan"
            )
        channel_view(model, name).check(name, entry)


def check_values(model: nn.Module, plan: Entries) -> None:
    """Raise ValueError, in one sentence, for weights that are not finite, or planned ones that are
    too large or small for FP16.
    """
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{name} holds NaN or infinite weights: it cannot be quantized")
        if name not in plan:
            continue
        largest, spec = p.abs().max().item(), weight_spec(plan[name])
        # Steps that are given are stored as they are.
        scaled = [f for f in spec.formats if spec.steps is None or not f.is_integer]
        if 0 < largest < max(map(least_absmax, scaled), default=0.0):
            raise ValueError(
                f"{name} holds weights of {largest:.1g} at most, too small for FP16 numbers and "
                f"scales: leave it out of the plan"
            )
        if largest > FP16_MAX:
            raise ValueError(
                f"{name} holds weights beyond +-{FP16_MAX:.0f}, FP16's range: leave it out of the "
                f"plan"
            )


def check_names(model: nn.Module, named: Iterable[str], what: str) -> dict[str, nn.Parameter]:
    """The parameters by name; ValueError for a name that is none of theirs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in named if name not in parameters]:
        raise ValueError(
            f"{what} {unknown[0]!r}, which the model lacks: see model.named_parameters()"
        )
    return parameters


def check_estimates(
    model: nn.Module, fisher: dict[str, Tensor], curvature: dict[str, Tensor]
) -> dict[str, nn.Parameter]:
    """The parameters by name; ValueError, in one sentence, for Fisher values of another shape than
    their weight's, below 0, infinite or NaN, and for a curvature that does not fit its parameter's
    columns or is not finite.
    """
    parameters = check_names(model, fisher, "the Fisher values name")
    for name, values in fisher.items():
        shape = parameters[name].shape
        if values.shape != shape or not ((values >= 0) & torch.isfinite(values)).all():
            raise ValueError(
                f"the Fisher values of {name} must be finite, of its shape {tuple(shape)} and none "
                "below 0 or NaN"
            )
    check_names(model, curvature, "the curvature names")
    for name, values in curvature.items():
        columns = channel_view(model, name).size[1]
        size = values.shape[-1] if values.ndim == 3 and values.shape[-1] else columns
        fits = values.shape[-2:] == (size, size) and values.shape[:-2].numel() * size == columns
        if not fits or not torch.isfinite(values).all():
            raise ValueError(
                f"the curvature of {name} must be finite and of shape {(columns, columns)} or in "
                f"blocks of these columns, it has {tuple(values.shape)}"
            )
    return parameters


def channel_view(model: nn.Module, name: str) -> ChannelView:
    """How a parameter falls into output channels."""
    module = model.get_submodule(name.rpartition(".")[0])
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) and name.endswith("weight")
    return ChannelView(
        tuple(module.get_parameter(name.rpartition(".")[2]).shape),
        module.groups if transposed else 0,
    )
