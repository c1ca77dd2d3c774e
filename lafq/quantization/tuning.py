"""After rounding, fit the biases and norms, so that the output comes near the unquantized model's
again.

They are stored anyway, so this adds no storage. Rounding shifts each layer's output a little in the
mean, which Nagel et al. (2019, "Data-free quantization", section 4.2) correct in closed form, a
layer at a time. Here all of them are fitted together by gradient descent on the squared change of
the whole network's output; Li et al. (2024, "Norm tweaking") fit norms block by block.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from lafq.networks import arguments_of, checked_output, copied, evaluating, held, listed, unwrapped
from lafq.quantization.model import dequantize

PEAK = 3e-4
WARMUP = 0.1  # share of the steps
BATCH = 32

Batches = Iterable[tuple[Tensor, ...] | Tensor]


def tune(model: nn.Module, packed: nn.Module, batches: Batches, steps: int) -> nn.Module:
    """Fit, in place, the biases and norms of a quantized copy of `model`; returns it. The quantized
    weights stay as they are.

    batches: arguments of the model (or its one argument), one batch per step of Adam (Kingma and Ba
    2015), whose rate rises over the first tenth of the steps and then falls linearly to zero. Both
    models run in evaluation mode. A vector that the plan stores in one format is fitted and stored
    in it again; one that it stores in several stays as it is. Raises ValueError for no steps, fewer
    batches than steps, nothing to fit, and a batch whose outputs are not finite; the copy is then
    as it was.
    """
    model, places = unwrapped(model), _places(unwrapped(model), unwrapped(packed))
    if steps < 1 or not places:
        raise ValueError("tuning needs one step at least, and a model that has biases or norms")
    with evaluating(model, gradients=True):
        small, whole = copied(model).requires_grad_(False), held(dequantize(packed))
        for name, tensor in held(small).items():
            tensor.copy_(whole[name])
        vectors = {name: small.get_parameter(name).requires_grad_(True) for name in places}
        _fit(model, small, list(vectors.values()), batches, steps)
    with torch.no_grad():
        for name, place in places.items():
            limit = torch.finfo(place.dtype).max
            place.copy_(vectors[name].clamp(-limit, limit).view_as(place))
    return packed


def _fit(
    model: nn.Module, small: nn.Module, vectors: list[Tensor], batches: Batches, steps: int
) -> None:
    optimizer, done = torch.optim.Adam(vectors, lr=PEAK), 0
    device, warm = next(model.parameters()).device, max(1, round(WARMUP * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps)
    )
    for done, batch in enumerate(islice(listed(batches), steps), 1):
        arguments, again = (arguments_of(batch, device, model.forward) for _ in range(2))
        with torch.no_grad():
            expected = checked_output(model(*arguments), len(arguments[0]))
        optimizer.zero_grad()
        loss = (checked_output(small(*again), len(expected)) - expected).square().mean()
        if not torch.isfinite(loss):
            raise ValueError(f"batch {done - 1} gives outputs that are not finite: leave it out")
        loss.backward()
        optimizer.step()
        rate.step()
    if done < steps:
        raise ValueError(f"{steps} steps of tuning need as many batches, and there were {done}")


def _places(model: nn.Module, packed: nn.Module) -> dict[str, Tensor]:
    """Where a quantized copy has each vector: its parameter, or its one stored part."""
    places = {}
    for name in (n for n, p in model.named_parameters() if p.ndim < 2):
        owner, _, vector = name.rpartition(".")
        module = packed.get_submodule(owner)
        parts = [getattr(module, vector)]
        if vector in getattr(module, "parametrizations", {}):
            parts = list(module.parametrizations[vector][0].buffers())
        if len(parts) == 1:
            places[name] = parts[0]
    return places
