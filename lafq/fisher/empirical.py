"""The diagonal empirical Fisher information of any network, per weight.

For one sample with the target y the loss is l = 1/2 * sum over the outputs of (y - f(x))^2, the
negative log-likelihood of y under a unit Gaussian around the output. Then

    F_i = mean over samples of (d l / d w_i)^2,

the *empirical* Fisher (gradients at the data, not at draws from the model), normalized by the
number of samples alone. Gradients are taken sample by sample (torch.func.vmap over grad): the
square of a batch gradient is another quantity.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lafq.networks import arguments_of, checked_output, evaluating, named

GRADIENT_BYTES = 2**29


class EmpiricalFisher(NamedTuple):
    """by_weight: F of every weight, by parameter name, in the parameter's shape.

    by_batch: of every batch, by parameter name, F averaged over samples and weights. by_sample: the
    same of every sample, (B,).
    """

    by_weight: dict[str, Tensor]
    by_batch: list[dict[str, float]]
    by_sample: list[dict[str, Tensor]]


def empirical_fisher(
    model: nn.Module,
    names: list[str],
    batches: Iterable[tuple[tuple[Tensor, ...] | Tensor, Tensor]],
    chunk: int | None = None,
) -> EmpiricalFisher:
    """Estimate the diagonal empirical Fisher information of the named parameters.

    Args:
        model: any network; called as `model(*arguments)`.
        names: parameters, as in `model.named_parameters()`.
        batches: pairs of the model's arguments (or its one argument), each (B, ...), and the target
            (B, ...), of the output's shape, on the model's device.
        chunk: samples whose gradients are held at once; None: as many as fit in 512 MiB, so the
            memory needed is that, one accumulator and the model.

    The model runs in evaluation mode. Raises ValueError for an unknown name, no name, no batch, an
    output that is not one tensor with the batch as its first axis, a target of another shape, or
    gradients that are not finite.
    """
    chosen = {name: p.detach() for name, p in named(model, names).items()}
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in chosen}
    gradients = vmap(grad(partial(_loss, model, rest)), in_dims=(None, 0, 0))
    chunk = chunk or samples_at_once(sum(p.nbytes for p in chosen.values()))
    by_batch, by_sample = [], []
    with evaluating(model, gradients=True), sdpa_kernel(SDPBackend.MATH):
        total = {name: torch.zeros_like(p) for name, p in chosen.items()}
        for batch, y in batches:
            (target,) = arguments_of(y, y.device)
            parts = [a.split(chunk) for a in (target, *arguments_of(batch, target.device))]
            sums, means = dict.fromkeys(names, 0.0), {name: [] for name in names}
            for part, *arguments in zip(*parts, strict=True):
                for name, gradient in gradients(chosen, tuple(arguments), part).items():
                    square = gradient.detach().square()
                    means[name].append(square.flatten(1).mean(1).cpu())
                    value = square.sum(0)
                    total[name] += value
                    sums[name] += value.mean().item()
            by_batch.append({name: value / len(target) for name, value in sums.items()})
            by_sample.append({name: torch.cat(parts) for name, parts in means.items()})
    samples = sum(len(each[names[0]]) for each in by_sample)
    check_sums(total, samples)
    return EmpiricalFisher({n: f / samples for n, f in total.items()}, by_batch, by_sample)


def samples_at_once(gradient_bytes: int) -> int:
    """How many single-sample gradients of that many bytes fit in 512 MiB, 1 to 16."""
    return max(1, min(16, GRADIENT_BYTES // gradient_bytes))


def check_sums(sums: dict[str, Tensor], samples: int) -> None:
    """Raise ValueError for Fisher values, summed over samples, that are of none or not finite."""
    if not samples:
        raise ValueError("no batch was given: Fisher information needs at least one sample")
    if bad := [name for name, f in sums.items() if not torch.isfinite(f).all()]:
        raise ValueError(f"the Fisher information of {bad[0]} is not finite: check the weights")


def _loss(
    model: nn.Module,
    rest: dict[str, Tensor],
    chosen: dict[str, Tensor],
    arguments: tuple[Tensor, ...],
    target: Tensor,
) -> Tensor:
    """l of one sample: arguments and target without the batch axis -> scalar."""
    one = tuple(a[None] for a in arguments)
    output = checked_output(functional_call(model, chosen | rest, one), 1)[0]
    if output.shape != target.shape:
        shapes = f"{tuple(output.shape)}, the target {tuple(target.shape)}"
        raise ValueError(f"the model's output for one sample has shape {shapes}")
    return 0.5 * (target - output).square().sum()
