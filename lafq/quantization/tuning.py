"""After rounding, fit the biases and norms, so that the output comes near the unquantized model's
again.

They are stored anyway, so this adds no storage. Rounding shifts each layer's output a little in the
mean, which Nagel et al. (2019, "Data-free quantization", section 4.2) correct in closed form, a
layer at a time. Here all of them are fitted together by gradient descent on the squared change of
the whole network's output; Li et al. (2024, "Norm tweaking") fit norms block by block.
"""

from collections.abc import Iterable
from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor, nn

from lafq.networks import arguments_of, checked_output, evaluating, unwrapped
from lafq.quantization.formats import FP16_MAX

PEAK = 3e-4
WARMUP = 0.1  # share of the steps
BATCH = 32


def tune(
    model: nn.Module, packed: nn.Module, batches: Iterable[tuple[Tensor, ...] | Tensor], steps: int
) -> nn.Module:
    """Fit, in place, the biases and norms of a quantized copy of `model`; returns it. The quantized
    weights stay as they are.

    batches: arguments of the model (or its one argument), one batch per step of Adam (Kingma and Ba
    2015), whose rate rises over the first tenth of the steps and then falls linearly to zero. Both
    models run in evaluation mode. A vector that the plan stores in one format is fitted and stored
    in it again; one that it stores in several stays as it is. Raises ValueError for no steps, fewer
    batches than steps, nothing to fit, and a batch whose outputs are not finite; the copy is then
    as it was.
    """
    model, whole = unwrapped(model), packed
    packed = unwrapped(packed)
    if steps < 1 or not _tunable(model, packed):
        raise ValueError("tuning needs one step at least, and a model that has biases or norms")
    with evaluating(model, gradients=True):
        fitted = _fit(model, packed, batches, steps)
    with torch.no_grad():
        for name, value in fitted.items():
            place = _place(packed, name)
            limited = value.clamp(-FP16_MAX, FP16_MAX) if place.dtype == torch.float16 else value
            place.copy_(limited.view_as(place))
    return whole


def _fit(
    model: nn.Module, packed: nn.Module, batches: Iterable[tuple[Tensor, ...] | Tensor], steps: int
) -> dict[str, Tensor]:
    """The fitted vectors, by name."""
    small = deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for name, p in small.named_parameters():
            p.copy_(_stored(packed, name))
    free = {name: p.requires_grad_(True) for name, p in _tunable(small, packed).items()}
    optimizer = torch.optim.Adam(free.values(), lr=PEAK)
    device, done, warm = next(model.parameters()).device, 0, max(1, round(WARMUP * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps)
    )
    for batch in islice(batches, steps):
        arguments = arguments_of(batch, device)
        with torch.no_grad():
            expected = checked_output(model(*arguments), len(arguments[0]))
        optimizer.zero_grad()
        loss = (small(*arguments) - expected).square().mean()
        if not torch.isfinite(loss):
            raise ValueError(f"batch {done} gives outputs that are not finite: leave it out")
        loss.backward()
        optimizer.step()
        rate.step()
        done += 1
    if done < steps:
        raise ValueError(
            f"{steps} steps of tuning need as many batches, and there were {done}: give more "
            f"batches or fewer steps"
        )
    return {name: value.detach() for name, value in free.items()}


def _tunable(model: nn.Module, packed: nn.Module) -> dict[str, nn.Parameter]:
    vectors = {name: p for name, p in model.named_parameters() if p.ndim < 2}
    return {name: p for name, p in vectors.items() if _place(packed, name) is not None}


def _stored(packed: nn.Module, name: str) -> Tensor:
    owner, _, vector = name.rpartition(".")
    return getattr(packed.get_submodule(owner), vector)


def _place(packed: nn.Module, name: str) -> Tensor | None:
    """Where a quantized copy has a vector: its parameter, or its one stored part; None where it is
    stored in several.
    """
    owner, _, vector = name.rpartition(".")
    module = packed.get_submodule(owner)
    if vector not in getattr(module, "parametrizations", {}):
        return getattr(module, vector)
    parts = list(module.parametrizations[vector][0].buffers())
    return parts[0] if len(parts) == 1 else None
