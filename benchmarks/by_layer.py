"""Other libraries on a network that they may not be able to quantize as a whole, layer by layer."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.quantization.model import resident_bytes

Quantizer = Callable[[nn.Module, dict[str, Tensor]], tuple[nn.Module, int]]


def by_layer(quantize_in_place: Callable[[nn.Module], None]) -> Quantizer:
    """Quantize one layer at a time with a library that works on whole modules; count the layers
    left in FP32.
    """

    def alone(layer: nn.Module, x: Tensor) -> nn.Module:
        small = nn.Sequential(copy.deepcopy(layer))
        quantize_in_place(small)
        small(x)
        if stored_bytes(small) >= resident_bytes(layer):
            raise ValueError("it is no smaller")
        return small[0]

    def quantized(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, int]:
        result, left = copy.deepcopy(model), 0
        for name, x in inputs.items():
            try:
                result.set_submodule(name, alone(model.get_submodule(name), x))
            except Exception as error:  # whatever a library does with a layer that it cannot handle
                left += 1
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                tqdm.write(f"  {name} stays FP32: {reason}")
        return result.eval(), left

    return quantized


def quanto(name: str) -> Callable[[nn.Module], None]:
    """With the defaults of the library."""
    from optimum import quanto as library

    def apply(module: nn.Module) -> None:
        library.quantize(module, weights=getattr(library, name))
        library.freeze(module)

    return apply


def torchao(bits: int) -> Callable[[nn.Module], None]:
    """With the defaults of the library, which on a CPU keep a byte for each code."""
    from torchao import quantization

    # Not Int8WeightOnlyConfig: that runs no convolution.
    config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"))
    return lambda module: quantization.quantize_(
        module, config, lambda m, _: not isinstance(m, nn.Sequential)
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, looking into tensor subclasses."""
    return sum(parts(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor))


def parts(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def layer_inputs(model: nn.Module, names: Iterable[str], *arguments: Tensor) -> dict[str, Tensor]:
    """What each layer that has one of these weights is given in a forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[name] = arguments[0].detach()

    layers = {n: model.get_submodule(n) for n in (n.removesuffix(".weight") for n in names)}
    hooks = [m.register_forward_pre_hook(partial(keep, n)) for n, m in layers.items()]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return seen
