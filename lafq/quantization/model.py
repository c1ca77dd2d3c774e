"""A plan becomes a model of that size.

A plan names the parameters to be stored in less than FP32: `{name: format}`, or `{name:
WeightSpec(...)}` where output channels differ or single weights are kept. The others stay as they
are, bit for bit.

In the copy that `quantize` makes the planned weights exist in stored form only, and are unpacked
for each use, a layer at a time (a torch parametrization: whatever reads `layer.weight` gets the
FP32 weight). `dequantize` and `dequantize_` trade that memory for speed.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lafq.networks import copied, give_own_class, held, own_defaults, plain_name, unwrapped
from lafq.quantization.channels import stored_bytes, weight_spec
from lafq.quantization.checks import channel_view, check_estimates, check_plan, check_values
from lafq.quantization.formats import MIB, get_format
from lafq.quantization.plan import Entries, Plan, Recipe, as_plan
from lafq.quantization.quantized_weight import QuantizedWeight


@own_defaults()
def nbytes(model: nn.Module, plan: Plan | Entries) -> int:
    """Bytes of parameters, persistent buffers, scales and masks; ValueError for a wrong plan."""
    model = unwrapped(model)
    entries = check_plan(model, plan).entries
    rest = _nbytes(t for n, t in held(model).items() if n not in entries)
    return rest + sum(stored_bytes(channel_view(model, n), entry) for n, entry in entries.items())


@torch.no_grad()
@own_defaults()
def quantize(model: nn.Module, plan: Plan | Entries, recipe: Recipe | None = None) -> nn.Module:
    """Copy `model`, in evaluation mode, with its planned weights in their stored form only.

    Args:
        model: any network with FP32 weights; it is not changed.
        plan: the format of each planned parameter, by name.
        recipe: how to round; None: as the plan says (`Plan.recipe`), or to the nearest code with
            `formats.absmax_scale`.

    Raises ValueError for a plan, Fisher values or a curvature that do not fit the model, a plan
    made for other weights, and weights that are NaN, infinite, or too large or small for FP16.

    >>> from torch import nn
    >>> layer = nn.Linear(4, 2)
    >>> small = quantize(layer, {"weight": "int8"})
    >>> resident_bytes(layer), resident_bytes(small), resident_bytes(dequantize(small))
    (40, 20, 40)
    """
    model = unwrapped(model)
    plan = check_plan(model, plan)
    check_values(model, plan)
    if plan.source not in ("", parameters_sha256(model)):
        raise ValueError("the plan was made for other weights: allocate a plan for this model")
    rule, fisher, curvature = recipe or plan.recipe
    fisher, curvature = fisher or {}, curvature or {}
    check_estimates(model, fisher, curvature)
    packed = {}
    for n, p in model.named_parameters():
        if n in plan.entries:
            view, given = channel_view(model, n), (fisher.get(n), curvature.get(n))
            packed[n] = QuantizedWeight.of(p.detach(), plan.entries[n], view, rule, *given)
    _warn_of_copies(model, packed)
    return with_quantized(model, packed)


def _warn_of_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Name the buffers that repeat one of these weights, as converters of other frameworks do."""
    planned = [p for p in map(model.get_parameter, names) if p.ndim > 1]
    copies = {n: b for n, b in model.named_buffers() if any(torch.equal(b, p) for p in planned)}
    if copies:
        warnings.warn(
            f"{len(copies)} buffers repeat quantized weights and stay in FP32 ({next(iter(copies))}"
            f", ...; {_nbytes(copies.values()) / MIB:.2f} MiB): delete them",
            stacklevel=3,
        )


def dequantize(packed: nn.Module) -> nn.Module:
    """An ordinary model with the weights of a quantized copy, unpacked to FP32; the copy stays."""
    return dequantize_(copied(unwrapped(packed)))


@torch.no_grad()
@own_defaults()
def dequantize_(packed: nn.Module) -> nn.Module:
    """`dequantize` in place, without the memory of a second model; returns the model."""
    packed = unwrapped(packed)
    if vars(packed).get("save_pretrained") is _refuse_save_pretrained:
        del packed.save_pretrained
    for module in packed.modules():
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], QuantizedWeight):
                give_own_class(module)
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return packed


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    raise ValueError("save_pretrained loses quantized weights: write with lafq.save_quantized")


def resident_bytes(model: nn.Module) -> int:
    """Bytes in memory of the parameters and persistent buffers of a model, packed or not."""
    return _nbytes(held(unwrapped(model)).values())


def weights_sha256(model: nn.Module) -> str:
    """Hexadecimal sha256 of a model's parameters and persistent buffers, names and values."""
    model = unwrapped(model)
    return _sha256({plain_name(model, n): t for n, t in held(model).items()})


def parameters_sha256(model: nn.Module) -> str:
    """Hexadecimal sha256 of the parameters alone, as running a model may change its buffers."""
    return _sha256({n: p.detach() for n, p in unwrapped(model).named_parameters()})


def _sha256(tensors: dict[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
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
    return sum(t.nbytes for t in named.values()) - sum(named[i].nbytes for i in tied(named))


def bits_per_weight(model: nn.Module, plan: Plan | Entries, names: Iterable[str]) -> float:
    """Stored bits per weight of the named parameters under the plan, scales and masks included."""
    views, entries = {name: channel_view(model, name) for name in names}, as_plan(plan).entries
    stored = sum(stored_bytes(view, entries.get(name, "fp32")) for name, view in views.items())
    return 8 * stored / sum(math.prod(view.shape) for view in views.values())


def kept_weights(model: nn.Module, plan: Plan | Entries, name: str) -> int:
    """How many weights of a parameter the plan leaves in FP32."""
    view, spec = channel_view(model, name), weight_spec(as_plan(plan).entries.get(name, "fp32"))
    by_channel = spec.codes(view.size[0]) == get_format("fp32").code
    in_fp32 = by_channel[:, None].repeat(1, view.size[1])
    if spec.keep_mask is not None:
        in_fp32[view.of(spec.keep_mask).cpu()] = spec.keep_format == "fp32"
    return int(in_fp32.sum())


def with_quantized(model: nn.Module, packed: dict[str, QuantizedWeight]) -> nn.Module:
    """A copy of the model in which the named parameters are computed from their packed form."""
    stand_ins = {}  # empty ones, so that the FP32 weights are never copied
    for name, p in packed.items():
        empty, weight = torch.empty(0, device=next(p.buffers()).device), model.get_parameter(name)
        stand_ins[id(weight)] = nn.Parameter(empty, weight.requires_grad)
    result = copied(model, stand_ins).eval()
    if packed and hasattr(result, "save_pretrained"):
        result.save_pretrained = _refuse_save_pretrained
    for name, p in packed.items():
        owner, _, parameter = name.rpartition(".")
        parametrize.register_parametrization(result.get_submodule(owner), parameter, p, unsafe=True)
    return result
