"""Number formats, and a quantized copy of a model whose stored bytes can be counted and written.

A precision plan names, for each parameter to be stored in less than FP32, a format or a pair (mask, format): where the
mask is True the weight stays FP32. Parameters outside the plan stay FP32. Integers are symmetric with one FP32 scale an
output channel: w is stored as round(w / s) in -127..127 with s = max |w| / 127 over the channel's quantized weights.

`pack` gives the tensors that are stored; `unpack` computes the weights that are sampled from out of those, in a copy.
"""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lafq.files import load_tensors, save_tensors

BITS = {"fp32": 32, "fp16": 16, "int8": 8}
Plan = dict[str, "str | tuple[Tensor, str]"]


def make_plan(keep: dict[str, Tensor], low: str) -> Plan:
    """The plan that keeps in FP32 what `keep` says (True; 0-dim for a whole tensor) and stores the rest as `low`.

    Masks are left out where a tensor is kept, or quantized, as a whole: nothing need be stored for them.
    """
    plan: Plan = {}
    for name, mask in keep.items():
        if not mask.any():
            plan[name] = check_format(low)
        elif not mask.all():
            plan[name] = (mask, check_format(low))
    return plan


def check_format(name: str) -> str:
    """The name itself; ValueError when it is no known format."""
    if name not in BITS:
        raise ValueError(f"unknown format {name!r}: choose one of {', '.join(BITS)}")
    return name


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError for a parameter the model lacks, an unknown format, or a mask of another shape."""
    parameters = dict(model.named_parameters())
    for name in plan:
        if name not in parameters:
            raise ValueError(f"the plan names {name!r}, which the model lacks: see model.named_parameters()")
        mask, low = _entry(plan, name)
        check_format(low)
        if mask is not None and mask.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}: "
                "give one boolean a weight"
            )


def nbytes(model: nn.Module, plan: Plan) -> int:
    """Bytes that must be stored for all parameters under the plan: values, scales and one-bit masks."""
    check_plan(model, plan)
    total = 0
    for name, p in model.named_parameters():
        mask, low = _entry(plan, name)
        kept = 0 if mask is None else int(mask.sum())
        total += kept * 4 + (p.numel() - kept) * BITS[low] // 8
        total += 0 if mask is None else math.ceil(p.numel() / 8)
        total += p.shape[_channel_axis(model, name)] * 4 if low == "int8" else 0
    return total


def pack(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors to store: `name/format` the values, `name/scale`, and, with a mask, `name/mask` (bits) and `name/kept`.

    Raises ValueError as `check_plan`, and for weights that are NaN or infinite.
    """
    check_plan(model, plan)
    packed = {}
    for name, p in model.named_parameters():
        p = p.detach()
        if not torch.isfinite(p).all():
            raise ValueError(f"{name} holds NaN or infinite weights: it cannot be quantized")
        mask, low = _entry(plan, name)
        if mask is not None:
            mask = mask.to(p.device)
            packed |= {f"{name}/mask": _to_bits(mask), f"{name}/kept": p[mask]}
        if low == "int8":
            axis = _channel_axis(model, name)
            scale = _absmax_scale(p if mask is None else p.masked_fill(mask, 0), axis)
            codes = (p / _along(scale, axis, p)).round().clamp(-127, 127).to(torch.int8)
            packed |= {f"{name}/int8": codes if mask is None else codes[~mask], f"{name}/scale": scale}
        else:
            values = p.half() if low == "fp16" else p
            packed[f"{name}/{low}"] = values if mask is None else values[~mask]
    return packed


@torch.no_grad()
def unpack(packed: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """A copy of `model`, in evaluation mode, with the weights that `packed` stands for (computed in FP32).

    Raises ValueError when `packed` is of a model of another shape.
    """
    quantized = copy.deepcopy(model).eval()
    for name, p in quantized.named_parameters():
        low = next((f for f in BITS if f"{name}/{f}" in packed), None)
        if low is None:
            raise ValueError(f"the stored weights lack {name}: they belong to another model")
        values, mask = packed[f"{name}/{low}"].float(), packed.get(f"{name}/mask")
        if mask is not None:
            kept = _from_bits(mask, p)
            _check_size(name, values, int((~kept).sum()))
            full = torch.zeros(p.shape, device=values.device)
            full[~kept] = values
            values = full
        _check_size(name, values, p.numel())
        values = values.view(p.shape)
        if low == "int8":
            axis = _channel_axis(model, name)
            values = values * _along(packed[f"{name}/scale"], axis, p)
        if mask is not None:
            values[kept] = packed[f"{name}/kept"]
        p.copy_(values)
    return quantized


def save(path: Path, model: nn.Module, plan: Plan) -> None:
    """Write the packed model as safetensors, its width in the metadata."""
    save_tensors(path, pack(model, plan), width=model.width)


def load(path: Path, model: nn.Module, made_by: str = "`quantize.save`") -> nn.Module:
    """A copy of `model` with the weights of a packed file; ValueError for a damaged file or another width."""
    packed, _ = load_tensors(path, made_by, width=model.width)
    return unpack(packed, model)


def _entry(plan: Plan, name: str) -> tuple[Tensor | None, str]:
    """The mask (None without one) and the format of a parameter, FP32 when the plan does not name it."""
    entry = plan.get(name, "fp32")
    return entry if isinstance(entry, tuple) else (None, entry)


def _channel_axis(model: nn.Module, name: str) -> int:
    """The axis of the output channels: 1 in a transposed convolution, else 0."""
    return int(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd))


def _absmax_scale(weight: Tensor, axis: int) -> Tensor:
    absmax = weight.abs().amax([i for i in range(weight.ndim) if i != axis])
    return torch.where(absmax > 0, absmax / 127, torch.ones_like(absmax))


def _along(scale: Tensor, axis: int, weight: Tensor) -> Tensor:
    return scale.view([-1 if i == axis else 1 for i in range(weight.ndim)])


def _to_bits(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.cat((flat, flat.new_zeros(-len(flat) % 8))).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1).to(torch.uint8)


def _from_bits(bits: Tensor, weight: Tensor) -> Tensor:
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    _check_size("a mask", flat[:, 0], math.ceil(weight.numel() / 8))
    return flat.view(-1)[: weight.numel()].bool().view(weight.shape)


def _check_size(name: str, values: Tensor, size: int) -> None:
    if values.numel() != size:
        raise ValueError(f"{name} has {values.numel()} stored values, the model needs {size}: they are of another model")
