"""A precision plan becomes a model of that size: a packed copy, its bytes, and its file.

A plan names the parameters to be stored in less than FP32: `{name: format}`, or `{name:
WeightSpec(...)}` where output channels differ or single weights are kept. Parameters outside the
plan stay as they are, bit for bit.

`quantize` copies any module; the planned weights then exist in stored form only, and are unpacked
for each use, a layer at a time (a torch parametrization: whatever reads `layer.weight` gets the
FP32 weight). `dequantize` and `dequantize_` trade that memory for speed.
"""

import copy
import hashlib
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lafq.networks import unwrapped
from lafq.quantization.channels import in_fp32, stored_bytes
from lafq.quantization.checks import (
    channel_view,
    check_estimates,
    check_plan,
    check_values,
)
from lafq.quantization.formats import MIB
from lafq.quantization.plan import PLAIN, Entries, Recipe
from lafq.quantization.quantized_weight import QuantizedWeight


def nbytes(model: nn.Module, plan: Entries) -> int:
    """Bytes to store for the model under the plan: all parameters and persistent buffers, scales
    and masks. Raises ValueError as `check_plan`.
    """
    model = unwrapped(model)
    check_plan(model, plan)
    rest = _nbytes(t for n, t in _tensors(model).items() if n not in plan)
    return rest + sum(stored_bytes(channel_view(model, n), entry) for n, entry in plan.items())


@torch.no_grad()
def quantize(model: nn.Module, plan: Entries, recipe: Recipe | None = None) -> nn.Module:
    """Copy `model`, in evaluation mode, with its planned weights in their stored form only.

    Args:
        model: any network with FP32 weights; it is not changed.
        plan: the format of each planned parameter, by name.
        recipe: how to round; None: as the plan says (`Plan.recipe`), or to the nearest code with
            `formats.absmax_scale`.

    Raises ValueError as `check_plan`; for a plan that was made for other weights; for Fisher values
    of another shape or below 0, a curvature of another shape, and weights that are NaN, infinite,
    or too large or too small for FP16.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 2)
    >>> small = quantize(layer, {"weight": "int8"})
    >>> resident_bytes(layer), resident_bytes(small)
    (40, 20)
    """
    model = unwrapped(model)
    check_plan(model, plan)
    check_values(model, plan)
    if getattr(plan, "source", "") not in ("", weights_sha256(model)):
        raise ValueError(
            "the plan was made for other weights than this model's: allocate a plan for this model"
        )
    scale, fisher, curvature = recipe or getattr(plan, "recipe", PLAIN)
    fisher, curvature = fisher or {}, curvature or {}
    check_estimates(model, fisher, curvature)
    packed = {
        n: QuantizedWeight.of(
            p.detach(), plan[n], channel_view(model, n), scale, fisher.get(n), curvature.get(n)
        )
        for n, p in model.named_parameters()
        if n in plan
    }
    _warn_of_copies(model, packed)
    return with_quantized(model, packed)


def _warn_of_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Name the buffers that hold the values of one of the named weights, as converters from other
    frameworks leave them.
    """
    planned, copies = [p for p in map(model.get_parameter, names) if p.ndim > 1], {}
    for name, b in model.named_buffers():
        if any(b.shape == p.shape and torch.equal(b, p) for p in planned):
            copies[name] = b
    if copies:
        warnings.warn(
            f"{len(copies)} buffers repeat quantized weights and stay in FP32 ({next(iter(copies))}"
            f", ...; {_nbytes(copies.values()) / MIB:.2f} MiB): delete them",
            stacklevel=3,
        )


def dequantize(packed: nn.Module) -> nn.Module:
    """An ordinary model with the weights of a quantized copy, unpacked to FP32; the copy stays.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 2)
    >>> fast = dequantize(quantize(layer, {"weight": "fp16"}))
    >>> (fast.weight - layer.weight).abs().max() < 1e-3
    tensor(True)
    """
    return dequantize_(copy.deepcopy(unwrapped(packed)))


@torch.no_grad()
def dequantize_(packed: nn.Module) -> nn.Module:
    """`dequantize` in place, without the memory of a second model; returns the model."""
    packed = unwrapped(packed)
    if vars(packed).get("save_pretrained") is _refuse_save_pretrained:
        del packed.save_pretrained
    for module in packed.modules():
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], QuantizedWeight):
                _give_own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return packed


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    raise ValueError(
        "save_pretrained would lose the quantized weights: write the model with lafq.save_quantized"
    )


def _give_own_class(module: nn.Module) -> None:
    """A deepcopy shares the class that a parametrization made, and removing the parametrization
    changes that class.
    """
    shared = type(module)
    content = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


def resident_bytes(model: nn.Module) -> int:
    """Bytes in memory of the parameters and persistent buffers of a model, packed or not."""
    return _nbytes(_tensors(model).values())


def weights_sha256(model: nn.Module) -> str:
    """Hexadecimal sha256 of a model's parameters and persistent buffers (names and values)."""
    content = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        content.update(f"{name} {tuple(tensor.shape)} ".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        content.update(values.view(torch.uint8).numpy().data)
    return content.hexdigest()


def tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that share their memory with an earlier one, and that one's name."""
    first, shared = {}, {}
    for name, t in tensors.items():
        if t.numel() and not t.is_meta:
            earlier = first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), name)
            shared |= {name: earlier} if earlier != name else {}
    return shared


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, those that share their memory once."""
    named = {str(i): t for i, t in enumerate(tensors)}
    shared = tied(named)
    return sum(t.nbytes for i, t in named.items() if i not in shared)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; extra state that is no tensor has no bytes here."""
    return {n: t for n, t in unwrapped(model).state_dict().items() if isinstance(t, Tensor)}


def bits_per_weight(model: nn.Module, plan: Entries, names: Iterable[str]) -> float:
    """Stored bits per weight of the named parameters under the plan, scales and masks included."""
    views = {name: channel_view(model, name) for name in names}
    stored = sum(stored_bytes(view, plan.get(name, "fp32")) for name, view in views.items())
    return 8 * stored / sum(math.prod(view.shape) for view in views.values())


def kept_weights(model: nn.Module, plan: Entries, name: str) -> int:
    """How many weights of a parameter the plan leaves in FP32."""
    return in_fp32(channel_view(model, name), plan.get(name, "fp32"))


def with_quantized(model: nn.Module, packed: dict[str, QuantizedWeight]) -> nn.Module:
    """A copy of the model in which the named parameters are computed from their packed form."""
    parameters, stand_ins = dict(model.named_parameters()), {}
    # The copy takes an empty stand-in for each planned weight, so that the FP32 weights are never
    # copied.
    for name, p in packed.items():
        empty = torch.empty(0, device=next(p.buffers()).device)
        stand_ins[id(parameters[name])] = nn.Parameter(empty, parameters[name].requires_grad)
    try:
        result = copy.deepcopy(model, stand_ins).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the model cannot be copied ({error}): remove pruning, the old weight_norm or a kept "
            f"activation from it first"
        ) from error
    if packed and hasattr(result, "save_pretrained"):
        result.save_pretrained = _refuse_save_pretrained
    for name, p in packed.items():
        owner, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(result.get_submodule(owner), parameter, p, unsafe=True)
    return result
