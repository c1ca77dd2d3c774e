"""The diagonal empirical Fisher information of a noise-prediction network, per weight and per timestep.

For one sample (image x0, timestep t, noise eps) the loss is l = 1/2 * sum over the 1,024 pixels of
(eps - eps_theta(x_t, t))^2, the negative log-likelihood of eps under a unit Gaussian around the prediction. Then

    F_i = mean over samples of (d l / d w_i)^2,

the *empirical* Fisher (gradients at the data, not at draws from the model), normalized by the number of samples alone.
Gradients are taken sample by sample (torch.func.vmap over grad): the square of a batch gradient is another quantity.
Timesteps are stratified: every bin of consecutive timesteps gets the same number of samples, t uniform within it.
"""

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lafq.diffusion.noising import add_noise, unit_interval
from lafq.diffusion.unet import TIMESTEPS
from lafq.rng import generator

GRADIENT_BYTES = 2**29
BLOCKS = 10


class Fisher(NamedTuple):
    """weights: F of every weight, by parameter name, in the parameter's shape.

    timesteps: mean F of a tensor within a timestep bin, one row a bin and tensor, columns `parameter, layer, weights,
    t_low, t_high, fisher` (weights: their number in the tensor; t_high inclusive).

    blocks: the same by block of samples (BLOCKS of each bin), so that intervals can resample them: one row per tensor, bin and
    block, columns `parameter, t_low, block, samples, fisher`.
    """

    weights: dict[str, Tensor]
    timesteps: pd.DataFrame
    blocks: pd.DataFrame


def sample_loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """l of one sample: x (the noised image) and noise (1, 32, 32), t () -> scalar."""
    eps = functional_call(model, parameters, (x[None], t[None]))[0]
    return 0.5 * (noise - eps).square().sum()


def samples_at_once(gradient_bytes: int) -> int:
    """How many single-sample gradients of that many bytes fit in 512 MiB: 16 at most, 1 at least."""
    return max(1, min(16, GRADIENT_BYTES // gradient_bytes))


def empirical_fisher(
    model: nn.Module, names: list[str], images: Tensor, *, samples: int, bins: int, seed: int, chunk: int | None = None
) -> Fisher:
    """Diagonal empirical Fisher of the named parameters, `samples` draws spread evenly over `bins` timestep bins.

    images: uint8 (N, 1, 32, 32), drawn from with replacement. chunk: samples whose gradients are held at once; by
    default as many as fit in 512 MiB, so the memory needed is that, one accumulator and the model.
    Raises ValueError for an unknown name, too few samples or bins, or gradients that are not finite.
    """
    available = dict(model.named_parameters())
    if unknown := [n for n in names if n not in available]:
        raise ValueError(f"the model has no parameter {unknown[0]!r}: names are those of model.named_parameters()")
    if not names:
        raise ValueError("no parameter is named: give the names whose Fisher information is wanted")
    if not 1 <= bins <= TIMESTEPS or samples < bins:
        raise ValueError(f"{samples} samples over {bins} timestep bins: give every bin at least one sample")
    model.eval()
    chosen = {n: available[n].detach() for n in names}
    rest = {n: p.detach() for n, p in available.items() if n not in chosen}
    first = next(iter(available.values()))
    per_sample = sum(p.nbytes for p in chosen.values())
    chunk = chunk or samples_at_once(per_sample)

    def loss(part: dict[str, Tensor], x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return sample_loss(model, part | rest, x, t, noise)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    total = {n: torch.zeros_like(p) for n, p in chosen.items()}
    edges = [round(b * TIMESTEPS / bins) for b in range(bins + 1)]
    counts = [samples // bins + (b < samples % bins) for b in range(bins)]
    rows, blocks = [], []
    bar = tqdm(total=samples, desc="Fisher", unit="sample", leave=False)
    for b, count in enumerate(counts):
        g = generator(seed, b)
        t = torch.randint(edges[b], edges[b + 1], (count,), generator=g)
        x0 = unit_interval(images[torch.randint(len(images), (count,), generator=g)]).to(first)
        noise = torch.randn(x0.shape, generator=g, dtype=torch.float32).to(first)
        x, t = add_noise(x0, t.to(first.device), noise), t.to(first.device)
        in_bin, by_sample = dict.fromkeys(names, 0.0), {n: torch.empty(count, dtype=x0.dtype) for n in names}
        for part in torch.arange(count).split(chunk):
            with sdpa_kernel(SDPBackend.MATH):
                squares = {n: v.detach().square() for n, v in gradients(chosen, x[part], t[part], noise[part]).items()}
            for name, square in squares.items():
                by_sample[name][part] = square.flatten(1).mean(1).cpu()
                value = square.sum(0)
                total[name] += value
                in_bin[name] += value.mean().item()
            bar.update(len(part))
        for name, value in in_bin.items():
            layer, size = name.split(".", 1)[0], chosen[name].numel()
            rows.append((name, layer, size, edges[b], edges[b + 1] - 1, value / count))
            parts = [part for part in by_sample[name].tensor_split(BLOCKS) if len(part)]
            blocks += [(name, edges[b], i, len(part), part.mean().item()) for i, part in enumerate(parts)]
    bar.close()
    weights = {n: value / samples for n, value in total.items()}
    if bad := [n for n, f in weights.items() if not torch.isfinite(f).all()]:
        raise ValueError(f"the Fisher information of {bad[0]} is not finite: the weights are damaged or diverged")
    timesteps = pd.DataFrame(rows, columns=["parameter", "layer", "weights", "t_low", "t_high", "fisher"])
    return Fisher(weights, timesteps, pd.DataFrame(blocks, columns=["parameter", "t_low", "block", "samples", "fisher"]))
