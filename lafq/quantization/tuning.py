"""After rounding, fit the biases and norms, so that the output comes near the unquantized model's again.

They stay FP32 whatever the plan, so this takes no byte. Rounding shifts each layer's output a little in the mean, which Nagel et
al. (2019, "Data-free quantization", section 4.2) correct in closed form, a layer at a time. Here all of them are fitted together by
gradient descent on the squared change of the whole network's output; Li et al. (2024, "Norm tweaking") fit norms block by block.
"""

from collections.abc import Iterable
from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor, nn

PEAK = 3e-4
WARMUP = 0.1  # share of the steps
BATCH = 32


def tune(model: nn.Module, packed: nn.Module, batches: Iterable[tuple[Tensor, ...]], steps: int) -> nn.Module:
    """Fit, in place, the biases and norms of a packed copy of `model`; returns it. The quantized weights stay as they are.

    batches: arguments of the model, one batch a step of Adam (Kingma and Ba 2015), whose rate rises over the first tenth of the
    steps and then falls linearly to zero.
    Raises ValueError for fewer batches than steps.
    """
    small = deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in small.named_parameters():
            owner, _, own = name.rpartition(".")
            p.copy_(getattr(packed.get_submodule(owner), own))
    free = {name: p.requires_grad_(True) for name, p in small.named_parameters() if p.ndim < 2}
    optimizer = torch.optim.Adam(free.values(), lr=PEAK)
    device, done, warm = next(model.parameters()).device, 0, max(1, round(WARMUP * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps))
    for batch in islice(batches, steps):
        arguments = [a.to(device) for a in batch]
        with torch.no_grad():
            expected = model(*arguments)
        optimizer.zero_grad()
        (small(*arguments) - expected).square().mean().backward()
        optimizer.step()
        rate.step()
        done += 1
    if done < steps:
        raise ValueError(f"{steps} steps of tuning need as many batches, and there were {done}: give more batches or fewer steps")
    with torch.no_grad():
        for name, p in packed.named_parameters():
            if name in free:
                p.copy_(free[name])
    return packed
