"""A packed model as a file, and back: safetensors that are checked in full when read."""

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lafq.networks import held, own_defaults, plain_name, unwrapped
from lafq.quantization.channels import ChannelView
from lafq.quantization.entropy_coding import Block, Coding, decode, decode_lzma
from lafq.quantization.formats import get_format, pack_bits
from lafq.quantization.model import tied, weights_sha256, with_quantized
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.tensors import file_bytes, load_tensors, save_tensors

# Versions 2 and 3 brought coded streams and groups; version 4 has no `width` in its metadata, and
# version 5 has one stream for all codes.
FORMAT_VERSION = 5
STREAM = "~coded"  # the last in a file
MADE_BY = "`save_quantized`"


@own_defaults()
def save_quantized(
    path: Path | str,
    packed: nn.Module,
    source: nn.Module,
    compress: bool = False,
    notes: dict[str, Any] | None = None,
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
    takes the same memory. notes: JSON values that go along. The metadata holds them, the format
    version, the plan in words, the source's sha256, and a checksum of the whole file. Raises
    ValueError for a state that is no parameter or buffer, and for a name that would be taken for a
    part of a planned parameter.
    """
    file, (tensors, about, coding) = _named(path), _contents(packed, compress)
    if notes:
        about["notes"] = notes
    if coding:
        stream, about["coded"] = coding.stream()
        tensors[STREAM] = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    save_tensors(file, tensors, sealed=True, source=weights_sha256(source), **about)


def coded_bytes(packed: nn.Module) -> tuple[int, dict[str, int]]:
    """Bytes of the file that `save_quantized(..., compress=True)` writes, and of each planned
    parameter in it, up to `entropy_coding.SPARE` too many. Nothing is coded for it.
    """
    tensors, about, coding = _contents(packed, compress=True)
    about["coded"], empty = coding.known(2**32 - 1), torch.empty(0, dtype=torch.uint8)
    other = file_bytes(tensors | {STREAM: empty}, sealed=True, source="0" * 64, **about)
    return other + coding.nbytes, _shares(tensors, about["plan"], coding)


def file_contents(path: Path | str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Without a model, of every tensor of a file: tensor, format, weights, bytes; and the notes.
    Raises FileNotFoundError and ValueError as `load_quantized`.
    """
    path = _named(path)
    tensors, about = load_tensors(path, MADE_BY, sealed=True)
    _check_origin(path, about, None)
    whole, plan, coding = dict(tensors), copy.deepcopy(about["plan"]), None
    weights = [weight for _, weight in _restored(path, about, tensors)]
    if "coded" in about:
        codes = [of for weight in weights for of in weight.codes().items()]
        coding = Coding([Block(of.numpy(), get_format(f)) for f, of in codes])
    shares = _shares(whole, plan, coding).items()
    rows = [(n, ", ".join(plan[n]["formats"]), math.prod(plan[n]["shape"]), of) for n, of in shares]
    rows += [(n, str(t.dtype)[6:], t.numel(), t.nbytes) for n, t in tensors.items()]
    names = "tensor", "format", "weights", "bytes"
    return [dict(zip(names, row, strict=True)) for row in rows], about.get("notes", {})


def _shares(
    tensors: dict[str, Tensor], plan: dict[str, Any], coding: Coding | None
) -> dict[str, int]:
    """Bytes of each planned parameter in a file of these tensors."""
    bits, shares = iter(coding.bits if coding else ()), {}
    for name, words in plan.items():
        coded = sum(next(bits) for _ in words["coded"]) if coding else 0
        stored = sum(t.nbytes for n, t in tensors.items() if n.rpartition("/")[0] == name)
        shares[name] = stored + math.ceil(coded / 8)
    return shares


def _contents(
    packed: nn.Module, compress: bool
) -> tuple[dict[str, Tensor], dict[str, Any], Coding | None]:
    """A file's tensors but for the stream, its metadata but for the source, and the stream's."""
    packed, tensors, plan, places, blocks, cast = unwrapped(packed), {}, {}, (), [], {}
    for place, weight in packed.named_modules():
        if isinstance(weight, QuantizedWeight):
            owner, _, parameter = place.removesuffix(".0").rpartition("parametrizations.")
            name, places = owner + parameter, (*places, place.removesuffix("0"))
            name = plain_name(packed, name)
            dtype = packed.get_submodule(places[-1][:-1]).original.dtype
            cast |= {name: str(dtype).removeprefix("torch.")} if dtype != torch.float32 else {}
            parts, plan[name] = dict(weight.named_buffers()), weight.describe()
            codes = weight.codes() if compress else {}
            if compress:
                plan[name]["coded"] = {f: list(of.shape) for f, of in codes.items()}
            blocks += [Block(of.cpu().numpy(), get_format(f)) for f, of in codes.items()]
            tensors |= {f"{name}/{part}": t for part, t in parts.items() if part not in codes}
    state = held(packed)
    of_modules = {plain_name(packed, n) for n in state}
    for name, value in packed.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor: leave it out of the model's state_dict")
        if plain_name(packed, name) not in of_modules:
            raise ValueError(f"{name} of the state_dict is no parameter: register it as a buffer")
    rest = {plain_name(packed, n): t for n, t in state.items() if not n.startswith(places)}
    for name in rest:
        if planned := [p for p in (*plan, STREAM) if f"{name}/".startswith(f"{p}/")]:
            raise ValueError(f"{name} is named like a part of {planned[0]}: rename it")
    tensors |= rest
    about = {"format_version": FORMAT_VERSION, "plan": plan}
    if shared := tied(tensors):
        about["tied"] = shared
        tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    about |= {"cast": cast} if cast else {}
    return tensors, about, Coding(blocks) if compress else None


@own_defaults()
def load_quantized(path: Path | str, model: nn.Module, source: str | None = None) -> nn.Module:
    """The quantized copy that `save_quantized` wrote; `model` gives the architecture (its weights
    are not used, "meta" will do).

    source: the fingerprint of the weights it must have been made of; None takes any.
    Raises FileNotFoundError when there is no file, ValueError when it is damaged in any place, of a
    newer version, of another model, or of other source weights.
    """
    path, model = _named(path), unwrapped(model)
    tensors, about = load_tensors(path, MADE_BY, sealed=True)
    _check_origin(path, about, source)
    packed = dict(_restored(path, about, tensors))
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
        raise ValueError(f"the path is a {type(path).__name__}: name a file")
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


def _restored(
    path: Path, about: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, QuantizedWeight]]:
    """By name what `save_quantized` was given, taken out of a file's tensors."""
    for name, parts in _parts(path, about, tensors).items():
        words = about["plan"][name]
        words.pop("coded", None)
        view = ChannelView(tuple(words["shape"]), words["groups"], words.get("axis", 0))
        weight = QuantizedWeight(parts, view)
        if weight.describe() != words:
            wrong = "in another form than its plan says: save it again"
            raise ValueError(f"{path} holds {name} {wrong}")
        yield name, weight


def _parts(
    path: Path, about: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The stored parts of each quantized weight, its codes packed again."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in about["plan"]}
    for name in list(tensors):
        owner, _, part = name.rpartition("/")
        if owner in found:
            found[owner][part] = tensors.pop(name)
    try:
        if "coded" in about:
            places = [(n, f, of) for n, w in about["plan"].items() for f, of in w["coded"].items()]
            sizes = [(get_format(f), *of) for _, f, of in places]
            blocks = decode(tensors.pop(STREAM).numpy().tobytes(), about["coded"], sizes)
            for (name, f, _), (codes, format) in zip(places, blocks, strict=True):
                found[name][f] = pack_bits(torch.from_numpy(codes).flatten(), format.bits)
            return found
        for name, words in about["plan"].items():
            if coded := words.get("coded"):
                found[name] = decode_lzma(found[name], coded)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): save it again") from None
    return found
