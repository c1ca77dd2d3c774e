"""Do plans, Fisher values and curvatures fit a model? ValueError, in one sentence, if not."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lafq.quantization.channels import ChannelView, WeightSpec, weight_spec
from lafq.quantization.formats import FP16_MAX, get_format
from lafq.quantization.plan import Entries, Plan, as_plan


def check_plan(model: nn.Module, plan: Plan | Entries) -> Plan:
    """The plan; every planned parameter exists, can be quantized, and fits its entry."""
    plan = as_plan(plan)
    parameters = check_names(model, plan.entries, "the plan names")
    for name, entry in plan.entries.items():
        if why := obstacle(model, name, parameters):
            raise ValueError(f"{name} {why}: leave {name} out of the plan")
        if (dtype := parameters[name].dtype) != torch.float32:
            raise ValueError(f"{name} is {dtype}: plans want FP32, call model.float() first")
        _check_entry(name, entry, channel_view(model, name))
    return plan


def obstacle(model: nn.Module, name: str, parameters: dict[str, nn.Parameter]) -> str:
    """Why no plan can name a parameter, whatever its precision; "" where one can."""
    p = parameters[name]
    if shared := [n for n, q in parameters.items() if q is p and n != name]:
        return f"is shared with {shared[0]}"
    if not p.is_floating_point():
        return f"is {p.dtype}"
    if p.is_meta:
        return "has no values ('meta', or offloaded)"
    if not p.numel():
        return f"is empty, of shape {tuple(p.shape)}"
    recurrent = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.RNNBase)
    return "is of a recurrent layer, which keeps copies" if recurrent else ""


def _check_entry(name: str, entry: str | WeightSpec, view: ChannelView) -> None:
    if not isinstance(entry, str | WeightSpec):
        raise ValueError(f"{name} is planned as {entry!r}: give a format's name or a WeightSpec")
    format, mask, keep_format, steps, group = spec = weight_spec(entry)
    channels, length = view.size
    if group and (steps is not None or group < 1 or length % group):
        raise ValueError(f"{name}: a group of {group} must divide {length}, and go without steps")
    given = torch.ones(channels).half() if steps is None else steps
    if given.shape != (channels,) or given.dtype != torch.float16 or not (given > 0).all():
        raise ValueError(f"the steps of {name} must be {channels} FP16 numbers above 0")
    if isinstance(format, tuple) and len(format) != channels:
        raise ValueError(f"{name} has {len(format)} formats: give one for each of {channels} rows")
    if steps is None and get_format("int16") in spec.formats:
        raise ValueError(f"{name} is planned as int16: give WeightSpec's `steps`, or take fp16")
    if len(view.shape) < 2 and any(f.is_integer for f in spec.formats):
        raise ValueError(f"{name} is a vector, integers need two dimensions: take fp16 or fp32")
    if get_format(keep_format).is_integer:
        raise ValueError(f"{name} cannot keep weights in {keep_format}: choose fp32 or fp16")
    if mask is not None and (mask.shape != view.shape or mask.dtype != torch.bool):
        raise ValueError(f"the mask of {name} must be boolean, of its shape {view.shape}")


def check_values(model: nn.Module, plan: Plan | Entries) -> None:
    """All weights are finite, and the planned ones neither too large nor too small for FP16."""
    entries = as_plan(plan).entries
    for name, p in model.named_parameters():
        if not p.is_meta and not torch.isfinite(p).all():
            raise ValueError(f"{name} holds NaN or infinite weights: it cannot be quantized")
        if name not in entries:
            continue
        largest, spec = p.abs().max().item(), weight_spec(entries[name])
        # Steps that are given are stored as they are.
        scaled = [f for f in spec.formats if spec.steps is None or not f.is_integer]
        least = max((f.least_absmax for f in scaled), default=0.0)
        if 0 < largest < least or largest > FP16_MAX:
            raise ValueError(
                f"{name} holds weights up to {largest:.5g}, and FP16 numbers and scales are good "
                f"from {least:.1g} to {FP16_MAX:.0f}: leave it out of the plan"
            )


def check_names(model: nn.Module, named: Iterable[str], what: str) -> dict[str, nn.Parameter]:
    """The parameters by name; all those named are among them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if lack := [name for name in named if name not in parameters]:
        raise ValueError(f"{what} {lack[0]!r}, which the model lacks: see model.named_parameters()")
    return parameters


def check_estimates(
    model: nn.Module, fisher: dict[str, Tensor], curvature: dict[str, Tensor]
) -> dict[str, nn.Parameter]:
    """The parameters by name; Fisher values and curvatures are finite and of their shapes."""
    parameters = check_names(model, fisher, "the Fisher values name")
    for name, values in fisher.items():
        shape = parameters[name].shape
        if values.shape != shape or not ((values >= 0) & torch.isfinite(values)).all():
            wanted = f"finite, of its shape {tuple(shape)} and none below 0 or NaN"
            raise ValueError(f"the Fisher values of {name} must be {wanted}")
    check_names(model, curvature, "the curvature names")
    for name, values in curvature.items():
        columns = channel_view(model, name).size[1]
        size = values.shape[-1] if values.ndim == 3 and values.shape[-1] else columns
        blocks = values.shape[:-2].numel()
        fits = values.shape[-2:] == (size, size) and blocks == -(-columns // size)
        if not fits or not torch.isfinite(values).all():
            wanted = f"finite and of shape {(columns, columns)} or in blocks of these columns"
            raise ValueError(f"the curvature of {name} must be {wanted}")
    return parameters


def channel_view(model: nn.Module, name: str) -> ChannelView:
    """How a parameter falls into output channels."""
    owner, _, parameter = name.rpartition(".")
    module = model.get_submodule(owner)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) and parameter == "weight"
    shape = tuple(module.get_parameter(parameter).shape)
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    axis = (
        0 if convolution else next((i for i, n in enumerate(shape[:-2]) if n > 1), len(shape) - 2)
    )
    return ChannelView(shape, module.groups if transposed else 0, max(axis, 0))
