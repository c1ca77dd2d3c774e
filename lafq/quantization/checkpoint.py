"""A packed model as a file, and back: safetensors that say what they are, and are checked in full
when read.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lafq.networks import unwrapped
from lafq.quantization.channels import ChannelView
from lafq.quantization.entropy_coding import compress_parts, expand_parts
from lafq.quantization.model import tied, weights_sha256, with_quantized
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.tensors import load_tensors, save_tensors

# Versions 2 and 3 brought coded streams and groups; version 4 has no `width` in its metadata.
FORMAT_VERSION = 4


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
    tensor, and for a name that would be taken for a part of a planned parameter.
    """
    packed, plan, chains, tensors = unwrapped(packed), {}, {}, {}
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedWeight):
            chain = name.removesuffix(".0")
            owner, _, parameter = chain.rpartition("parametrizations.")
            planned = chains[chain] = owner + parameter
            parts, plan[planned] = dict(module.named_buffers()), module.describe()
            if compress and (counts := module.code_counts()):
                parts, coded = compress_parts(parts, counts)
                plan[planned] |= {"coded": coded} if coded else {}
            tensors |= {f"{planned}/{part}": tensor for part, tensor in parts.items()}
    for name, tensor in packed.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is no tensor, and a file of tensors cannot hold it: leave it out of the "
                f"model's state_dict"
            )
        if name.rpartition(".")[0] in chains or name.rpartition(".0.")[0] in chains:
            continue
        if planned := [p for p in plan if name.startswith(f"{p}/")]:
            raise ValueError(
                f"{name} has the name of a part of {planned[0]}: rename it, or leave {planned[0]} "
                f"out of the plan"
            )
        tensors[name] = tensor
    about = {"format_version": FORMAT_VERSION, "source": weights_sha256(source), "plan": plan}
    if shared := tied(tensors):
        about["tied"] = shared
        tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    save_tensors(Path(path), tensors, sealed=True, **about)


def load_quantized(path: Path | str, model: nn.Module, source: str | None = None) -> nn.Module:
    """The quantized copy that `save_quantized` wrote; `model` gives the architecture (its weights
    are not used, "meta" will do).

    source: the fingerprint of the weights it must have been made of; None takes any.
    Raises FileNotFoundError when there is no file, ValueError when it is damaged in any place, of a
    newer version, of another model, or of other source weights.
    """
    path, model = Path(path), unwrapped(model)
    tensors, about = load_tensors(path, "`save_quantized`", sealed=True)
    _check_origin(path, about, source)
    packed = {
        name: _unpacked(path, name, words, _pop_parts(tensors, name))
        for name, words in about["plan"].items()
    }
    tensors |= {name: tensors[first] for name, first in about.get("tied", {}).items()}
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    shapes |= {n: p.view.shape for n, p in packed.items()}
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if shapes != expected:
        name = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
        raise ValueError(
            f"{path} is of another model: {name} is {shapes.get(name, 'absent')} there, "
            f"{expected.get(name, 'absent')} in the model"
        )
    loaded = with_quantized(model, packed)
    loaded.load_state_dict(tensors, strict=False, assign=True)
    for name, first in about.get("tied", {}).items():
        (owner, _, attribute), (other, _, its) = name.rpartition("."), first.rpartition(".")
        setattr(loaded.get_submodule(owner), attribute, getattr(loaded.get_submodule(other), its))
    if lost := [n for n, b in loaded.named_buffers() if b.is_meta]:
        raise ValueError(
            f"{lost[0]} is a non-persistent buffer, which no file holds: build the model on the "
            f"CPU, not on meta"
        )
    return loaded


def _check_origin(path: Path, about: dict[str, Any], source: str | None) -> None:
    if (version := about.get("format_version", 0)) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this lafq reads up to {FORMAT_VERSION}: update "
            f"lafq"
        )
    if not version:
        raise ValueError(f"{path} is no packed model: give a file that `save_quantized` wrote")
    if source not in (None, about["source"]):
        raise ValueError(
            f"{path} was made of weights {about['source'][:12]}, not of {source[:12]}: pack these "
            f"and save again"
        )


def _pop_parts(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Take the stored parts of a planned parameter out of a file's tensors."""
    start = f"{name}/"
    return {n.removeprefix(start): tensors.pop(n) for n in list(tensors) if n.startswith(start)}


def _unpacked(
    path: Path, name: str, words: dict[str, Any], parts: dict[str, Tensor]
) -> QuantizedWeight:
    coded = words.pop("coded", None)
    try:
        parts = parts if coded is None else expand_parts(parts, coded)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({name}: {error}): save it again") from None
    weight = QuantizedWeight(parts, ChannelView(tuple(words["shape"]), words["groups"]))
    if weight.describe() != words:
        raise ValueError(f"{path} holds {name} in another form than its plan says: save it again")
    return weight
