"""This project's quantizer against optimum-quanto and torchao on our U-Net: `make benchmark` writes the table.

Each library quantizes, layer by layer, the 34 weight tensors of the six layers as it can; a layer it leaves alone, cannot
quantize or cannot run afterwards stays FP32 and is counted. Width 16 has the shipped weights, width 64 seeded random ones.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq import paths
from lafq.allocation.thresholds import keep_ratio
from lafq.diffusion.mnist import HELD_OUT, mnist
from lafq.diffusion.noising import add_noise, unit_interval
from lafq.diffusion.unet import TIMESTEPS, UNet, quantizable
from lafq.diffusion.weights import load_model
from lafq.io import atomic_write
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import absmax_scale, weighted_mse_scale
from lafq.quantization.model import quantize, resident_bytes
from lafq.quantization.plan import Recipe, make_plan
from lafq.quantization.weight_spec import WeightSpec
from lafq.rng import generator
from lafq.workspace import Workspace

ROUNDS = {16: 9, 64: 3}
BATCH = 100
THREADS = 2
Quantizer = Callable[[nn.Module, dict[str, Tensor]], tuple[nn.Module, int]]


def ours(low: str) -> Quantizer:
    """This project, all weights in one format."""
    return lambda model, inputs: (quantize(model, dict.fromkeys(quantizable(model), low)), 0)


def by_layer(quantize_in_place: Callable[[nn.Module], None]) -> Quantizer:
    """Quantize one layer at a time with a library that works on whole modules; count the layers left in FP32."""

    def quantized(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, int]:
        result, left = copy.deepcopy(model), 0
        for layer in inputs:
            alone = nn.Sequential(copy.deepcopy(model.get_submodule(layer)))
            try:
                quantize_in_place(alone)
                alone(inputs[layer])
                done = stored_bytes(alone) < resident_bytes(model.get_submodule(layer))
            except Exception as error:  # whatever a library does with a layer that it cannot handle
                done = False
                tqdm.write(f"  {layer} stays FP32: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            left += not done
            if done:
                result.set_submodule(layer, alone[0])
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
    return lambda module: quantization.quantize_(module, config, lambda m, _: not isinstance(m, nn.Sequential))


def candidates() -> dict[tuple[str, str], Quantizer]:
    """By (library, format): a function that gives the quantized model and the number of layers left in FP32."""
    return {
        **{("lafq", low): ours(low) for low in ("fp16", "int8", "int6", "int4", "int3", "int2")},
        **{("optimum-quanto", f"int{bits}"): by_layer(quanto(f"qint{bits}")) for bits in (8, 4, 2)},
        **{("torchao", f"int{bits}"): by_layer(torchao(bits)) for bits in (8, 4, 3, 2)},
    }


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, looking into tensor subclasses."""
    return sum(parts(t) for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor))


def parts(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def noised_digits() -> tuple[Tensor, Tensor]:
    """A batch of held-out digits, noised to timesteps spread over all of them."""
    x0 = unit_interval(mnist(train=False)[0][HELD_OUT][:BATCH])
    t = torch.linspace(0, TIMESTEPS - 1, BATCH).long()
    x = add_noise(x0, t, torch.randn(x0.shape, generator=generator(0, 1)))
    return x.contiguous(memory_format=torch.channels_last), t


def layer_inputs(model: nn.Module, names: Iterable[str], *arguments: Tensor) -> dict[str, Tensor]:
    """What each layer that has one of these weights is given in a forward pass."""
    seen: dict[str, Tensor] = {}
    layers = [name.removesuffix(".weight") for name in names]
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0].detach())) for n in layers
    ]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return seen


def seconds(model: nn.Module, x: Tensor, t: Tensor) -> float:
    """Wall time of one forward pass."""
    start = time.perf_counter()
    model(x, t)
    return time.perf_counter() - start


@torch.no_grad()
def rows(width: int) -> list[dict]:
    """One row a library and format; times are medians of ratios to an FP32 forward pass run just before."""
    torch.manual_seed(0)
    model = load_model(Workspace("mini"), width) if width == 16 else UNet(width).eval().to(memory_format=torch.channels_last)
    x, t = noised_digits()
    inputs = layer_inputs(model, quantizable(model), x[:2], t[:2])
    expected, table = model(x, t), []
    for (library, low), quantizer in tqdm(candidates().items(), desc=f"width {width}"):
        quantized, left = quantizer(model, inputs)
        error = (quantized(x, t) - expected).square().mean().item()
        pairs = [(seconds(model, x, t), seconds(quantized, x, t)) for _ in range(ROUNDS[width])]
        table.append(
            {
                "library": library,
                "version": version(library),
                "width": width,
                "format": low,
                "bytes_ratio": stored_bytes(quantized) / resident_bytes(model),
                "output_mse": error,
                "time_ratio": statistics.median(b / a for a, b in pairs),
                "layers_left_fp32": left,
            }
        )
    return table


def packing(width: int) -> list[dict]:
    """One row a plan and scale rule: seconds to pack a model of that width, the median of three."""
    torch.manual_seed(0)
    model = UNet(width).eval()
    weights = quantizable(model)
    scores = {n: torch.rand(w.shape) for n, w in weights.items()}
    mixed = itertools.cycle(("int2", "int3", "int4", "int6", "int8", "fp16", "fp32"))
    channels = {n: tuple(itertools.islice(mixed, channel_view(model, n).size[0])) for n in weights}
    plans = {
        **{low: dict.fromkeys(weights, low) for low in ("fp16", "int8", "int6", "int4", "int3", "int2")},
        "channels in seven formats": {n: WeightSpec(low) for n, low in channels.items()},
        "35 % of single weights kept, int8": make_plan(keep_ratio(scores, 0.35), "int8"),
        "both, 2 % kept in fp16": {n: WeightSpec(channels[n], keep, "fp16") for n, keep in keep_ratio(scores, 0.02).items()},
    }
    table = []
    for (name, plan), rule in itertools.product(plans.items(), (absmax_scale, weighted_mse_scale)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            quantize(model, plan, Recipe(rule, scores if rule is weighted_mse_scale else None))
            times.append(time.perf_counter() - start)
        scale = "absmax" if rule is absmax_scale else "Fisher-weighted least squares"
        table.append({"width": width, "plan": name, "scale": scale, "seconds": statistics.median(times)})
    return table


def write(name: str, rows: list[dict]) -> None:
    """Write and print one table."""
    table, path = pd.DataFrame(rows), paths.RESULTS / "benchmarks" / f"{name}.csv"
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.4g")
    print(table.to_string(index=False))
    print(f"written: {path.relative_to(paths.ROOT)}")


def main() -> None:
    """Write and print the two tables."""
    torch.set_num_threads(THREADS)
    write("packing", packing(64))
    write("quantizers", list(itertools.chain.from_iterable(rows(width) for width in ROUNDS)))


if __name__ == "__main__":
    main()
