"""The diagonal empirical Fisher information of any network, per weight.

For one sample with the target y the loss is l = 1/2 * sum over the outputs of (y - f(x))^2, the
negative log-likelihood of y under a unit Gaussian around the output. Then

    F_i = mean over samples of (d l / d w_i)^2,

the *empirical* Fisher (gradients at the data, not at draws from the model), normalized by the
number of samples alone. Gradients are taken sample by sample (torch.func.vmap over grad): the
square of a batch gradient is another quantity.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lafq.networks import arguments_of, checked_output, evaluating, named

GRADIENT_BYTES = 2**29
Arguments = tuple[Tensor, ...]


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
    batches: Iterable[tuple[Arguments, Tensor]],
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
    chunk = chunk or samples_at_once(sum(p.nbytes for p in chosen.values()))
    by_batch, by_sample = [], []
    with evaluating(model, gradients=True):
        total = {name: torch.zeros_like(p) for name, p in chosen.items()}
        squares_of = _squared_gradients(model, chosen, rest)
        for batch, y in batches:
            (target,) = arguments_of(y, y.device)
            arguments = arguments_of(batch, target.device)
            sums, means = dict.fromkeys(names, 0.0), {n: [] for n in names}
            for part in torch.arange(len(target)).split(chunk):
                squares = squares_of(tuple(a[part] for a in arguments), target[part])
                for name, square in squares.items():
                    means[name].append(square.flatten(1).mean(1).cpu())
                    value = square.sum(0)
                    total[name] += value
                    sums[name] += value.mean().item()
            by_batch.append({n: value / len(target) for n, value in sums.items()})
            by_sample.append({n: torch.cat(parts) for n, parts in means.items()})
    samples = sum(len(each[names[0]]) for each in by_sample)
    if not samples:
        raise ValueError("no batch was given: Fisher information needs at least one sample")
    by_weight = {name: value / samples for name, value in total.items()}
    if bad := [n for n, f in by_weight.items() if not torch.isfinite(f).all()]:
        raise ValueError(
            f"the Fisher information of {bad[0]} is not finite: the weights are damaged or diverged"
        )
    return EmpiricalFisher(by_weight, by_batch, by_sample)


def sample_loss(
    model: nn.Module, parameters: dict[str, Tensor], arguments: Arguments, target: Tensor
) -> Tensor:
    """l of one sample: arguments and target without the batch axis -> scalar."""
    output = checked_output(
        functional_call(model, parameters, tuple(a[None] for a in arguments)), 1
    )[0]
    if output.shape != target.shape:
        raise ValueError(
            f"the model's output for one sample has shape {tuple(output.shape)}, the target "
            f"{tuple(target.shape)}"
        )
    return 0.5 * (target - output).square().sum()


def samples_at_once(gradient_bytes: int) -> int:
    """How many single-sample gradients of that many bytes fit in 512 MiB, 1 to 16."""
    return max(1, min(16, GRADIENT_BYTES // gradient_bytes))


def _squared_gradients(
    model: nn.Module, chosen: dict[str, Tensor], rest: dict[str, Tensor]
) -> Callable[[Arguments, Tensor], dict[str, Tensor]]:
    """A function of (arguments, target) that gives every sample's squared gradient, (B, ...) by
    parameter name.
    """
    gradients = vmap(
        grad(lambda part, *sample: sample_loss(model, part | rest, *sample)), in_dims=(None, 0, 0)
    )

    def squares(arguments: Arguments, target: Tensor) -> dict[str, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return {n: g.detach().square() for n, g in gradients(chosen, arguments, target).items()}

    return squares
