"""A packed model as a file, and back: safetensors that are checked in full when read."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lafq.networks import held, own_defaults, plain_name, unwrapped
from lafq.quantization.channels import ChannelView
from lafq.quantization.model import tied, weights_sha256, with_quantized
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.tensors import load_tensors, save_tensors

# Versions 2 and 3 brought coded streams and groups; version 4 has no `width` in its metadata.
FORMAT_VERSION = 4


@own_defaults()
def save_quantized(
    path: Path | str, packed: nn.Module, source: nn.Module, compress: bool = False
) -> None:
    """Write a packed copy as safetensors; `source` is the model it was made of, whose fingerprint
    goes along.

    >>> from tempfile import mkdtemp
    >>> from lafq.quantization.model import quantize
    >>> layer, path = nn.Linear(4, 2), Path(mkdtemp()) / "small.safetensors"
    >>> save_quantized(path, quantize(layer, {"weight": "int4"}), source=layer)
    >>> load_quantized(path, nn.Linear(4, 2)).weight.shape
    torch.Size([2, 4])

    compress: entropy-code the integers (`entropy_coding`). Nothing is lost, and the loaded model
    takes the same memory. The metadata holds the format version, the plan in words, the
    source's sha256, and a checksum of the whole file. Raises ValueError for a state that is no
    parameter or buffer, and for a name that would be taken for a part of a planned parameter.
    """
    file, packed, tensors, plan, places, cast = _named(path), unwrapped(packed), {}, {}, (), {}
    for place, weight in packed.named_modules():
        if isinstance(weight, QuantizedWeight):
            owner, _, parameter = place.removesuffix(".0").rpartition("parametrizations.")
            name, places = owner + parameter, (*places, place.removesuffix("0"))
            name = plain_name(packed, name)
            dtype = packed.get_submodule(places[-1][:-1]).original.dtype
            cast |= {name: str(dtype).removeprefix("torch.")} if dtype != torch.float32 else {}
            parts, plan[name] = file_parts(weight, compress)
            tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
    state = held(packed)
    of_modules = {plain_name(packed, n) for n in state}
    for name, value in packed.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor: leave it out of the model's state_dict")
        if plain_name(packed, name) not in of_modules:
            raise ValueError(f"{name} of the state_dict is no parameter: register it as a buffer")
    rest = {plain_name(packed, n): t for n, t in state.items() if not n.startswith(places)}
    for name in rest:
        if planned := [p for p in plan if name.startswith(f"{p}/")]:
            raise ValueError(f"{name} is named like a part of {planned[0]}: rename it")
    tensors |= rest
    about = {"format_version": FORMAT_VERSION, "source": weights_sha256(source), "plan": plan}
    if shared := tied(tensors):
        about["tied"] = shared
        tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    about |= {"cast": cast} if cast else {}
    save_tensors(file, tensors, sealed=True, **about)


@own_defaults()
def load_quantized(path: Path | str, model: nn.Module, source: str | None = None) -> nn.Module:
    """The quantized copy that `save_quantized` wrote; `model` gives the architecture (its weights
    are not used, "meta" will do).

    source: the fingerprint of the weights it must have been made of; None takes any.
    Raises FileNotFoundError when there is no file, ValueError when it is damaged in any place, of a
    newer version, of another model, or of other source weights.
    """
    path, model = _named(path), unwrapped(model)
    tensors, about = load_tensors(path, "`save_quantized`", sealed=True)
    _check_origin(path, about, source)
    packed = {name: _restored(path, name, about["plan"][name], tensors) for name in about["plan"]}
    tied_to = about.get("tied", {})
    tensors |= {name: tensors[first] for name, first in tied_to.items()}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    shapes |= {n: p.view.shape for n, p in packed.items()}
    names = {plain_name(model, n): n for n in held(model)}
    expected = {plain_name(model, n): tuple(t.shape) for n, t in held(model).items()}
    if shapes != expected:
        name = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
        there, here = (of.get(name, "absent") for of in (shapes, expected))
        raise ValueError(
            f"{path} is of another model: {name} is {there} there, {here} in the model"
        )
    casts = {n: getattr(torch, dtype) for n, dtype in about.get("cast", {}).items()}
    loaded = with_quantized(model, {names[n]: weight for n, weight in packed.items()})
    for name, dtype in casts.items():
        owner, _, attribute = names[name].rpartition(".")
        original = loaded.get_submodule(owner).parametrizations[attribute].original
        original.data = original.data.to(dtype)
    for name, tensor in tensors.items():
        owner, _, attribute = names[name].rpartition(".")
        _put(loaded.get_submodule(owner), attribute, tensor)
    for name, first in tied_to.items():
        (owner, _, attribute), (other, _, its) = (names[n].rpartition(".") for n in (name, first))
        setattr(loaded.get_submodule(owner), attribute, getattr(loaded.get_submodule(other), its))
    if lost := [n for n, b in loaded.named_buffers() if b.is_meta]:
        raise ValueError(f"no file holds {lost[0]}, a non-persistent buffer: build it on the CPU")
    return loaded


def _named(path: Path | str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"a {type(path).__name__} stands in the place of a path: name a file")
    return Path(path).expanduser()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a parameter or buffer its values, in place where it has any: lists may hold it too."""
    old = getattr(module, name)
    if not old.is_meta:
        old.data = tensor
    elif name in module._buffers:
        module._buffers[name] = tensor
    else:
        setattr(module, name, nn.Parameter(tensor, old.requires_grad))


def _check_origin(path: Path, about: dict[str, Any], source: str | None) -> None:
    version = about.get("format_version", 0)
    if not version:
        raise ValueError(f"{path} is no packed model: give a file that `save_quantized` wrote")
    if version > FORMAT_VERSION:
        known = f"this lafq reads up to {FORMAT_VERSION}"
        raise ValueError(f"{path} has format version {version}, {known}: update lafq")
    if source not in (None, about["source"]):
        made_of = f"weights {about['source'][:12]}, not of {source[:12]}"
        raise ValueError(f"{path} was made of {made_of}: pack these and save again")


def file_parts(weight: QuantizedWeight, compress: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds of a quantized weight: its parts, and its entry of the plan in words."""
    parts, words = dict(weight.named_buffers()), weight.describe()
    if compress and (counts := weight.code_counts()):
        parts, coded = _coder().compress_parts(parts, counts)
        words |= {"coded": coded} if coded else {}
    return parts, words


def _coder() -> ModuleType:
    try:
        return import_module("lafq.quantization.entropy_coding")
    except ImportError as error:
        raise ValueError(f"entropy-coded files need Python's lzma ({error}): install it") from error


def _restored(
    path: Path, name: str, words: dict[str, Any], tensors: dict[str, Tensor]
) -> QuantizedWeight:
    """What `file_parts` was given, its parts taken out of a file's tensors."""
    places = [n for n in tensors if n.startswith(f"{name}/")]
    parts = {n.removeprefix(f"{name}/"): tensors.pop(n) for n in places}
    coded = words.pop("coded", None)
    try:
        parts = parts if coded is None else _coder().expand_parts(parts, coded)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({name}: {error}): save it again") from None
    weight = QuantizedWeight(
        parts, ChannelView(tuple(words["shape"]), words["groups"], words.get("axis", 0))
    )
    if weight.describe() != words:
        raise ValueError(f"{path} holds {name} in another form than its plan says: save it again")
    return weight
