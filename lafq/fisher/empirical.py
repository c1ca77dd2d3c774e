"""The diagonal empirical Fisher information of any network, per weight.

For one sample with the target y the loss is l = 1/2 * sum over the outputs of (y - f(x))^2, the
negative log-likelihood of y under a unit Gaussian around the output. Then

    F_i = mean over samples of (d l / d w_i)^2,

the *empirical* Fisher (gradients at the data, not at draws from the model), normalized by the
number of samples alone. Gradients are taken sample by sample: the square of a batch gradient is
another quantity.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lafq.networks import arguments_of, checked_output, differentiating, evaluating, listed, named


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
) -> EmpiricalFisher:
    """Estimate the diagonal empirical Fisher information of the named parameters.

    Args:
        model: any network; called as `model(*arguments)`.
        names: parameters, as in `model.named_parameters()`.
        batches: pairs of the model's arguments (or its one argument), each (B, ...), and the target
            (B, ...), of the output's shape, on the model's device.

    The model runs in evaluation mode, with a backward pass per sample. Raises ValueError for an
    unknown name, no name, no batch, an output that is not one tensor with the batch as its first
    axis, a target of another shape, or gradients that are not finite.
    """
    names = list(names)
    chosen, by_batch, by_sample = named(model, names), [], []
    with evaluating(model, gradients=True), differentiating():
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        total = {name: torch.zeros_like(p) for name, p in chosen.items()}
        for batch, y in listed(batches):
            (target,) = arguments_of(y, y.device)
            means: dict[str, list[float]] = {name: [] for name in names}
            parts = [
                a.split(1) for a in (target, *arguments_of(batch, target.device, model.forward))
            ]
            for one_target, *arguments in zip(*parts, strict=True):
                loss = _loss(model, arguments, one_target)
                how = {"allow_unused": True, "materialize_grads": True}
                gradients = torch.autograd.grad(loss, list(chosen.values()), **how)
                for (name, square), gradient in zip(total.items(), gradients, strict=True):
                    square.addcmul_(gradient, gradient)
                    mean = torch.linalg.vector_norm(gradient).square() / gradient.numel()
                    means[name].append(mean.item())
            by_sample.append({n: torch.tensor(v, dtype=torch.float64) for n, v in means.items()})
            by_batch.append({name: values.mean().item() for name, values in by_sample[-1].items()})
    samples = sum(len(each[names[0]]) for each in by_sample)
    check_sums(total, samples)
    return EmpiricalFisher({n: f / samples for n, f in total.items()}, by_batch, by_sample)


def check_sums(sums: dict[str, Tensor], samples: int) -> None:
    """Raise ValueError for Fisher values, summed over samples, that are of none or not finite."""
    if not samples:
        raise ValueError("no batch was given: Fisher information needs at least one sample")
    if bad := [name for name, f in sums.items() if not torch.isfinite(f).all()]:
        raise ValueError(f"the Fisher information of {bad[0]} is not finite: check the weights")


def _loss(model: nn.Module, arguments: list[Tensor], target: Tensor) -> Tensor:
    """l of one sample, whose arguments and target are batches of one."""
    output = checked_output(model(*arguments), 1)
    target = torch.view_as_real(target) if target.is_complex() else target
    if output.shape != target.shape:
        shapes = f"{tuple(output.shape[1:])}, the target {tuple(target.shape[1:])}"
        raise ValueError(f"the model's output for one sample has shape {shapes}")
    return 0.5 * (target - output).square().sum()
