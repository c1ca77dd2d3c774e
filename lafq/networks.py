"""Run a model of the user's: its arguments, its output, and no trace left in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modules and parameters are as they were.

    gradients: they can be taken inside, even where the caller has switched them off.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        with ExitStack() as stack:
            if gradients:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, required in flags:
            p.requires_grad_(required)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s or a data-parallel wrapper; ValueError for no module."""
    if not isinstance(model, nn.Module):
        kind = f"a {type(model).__name__} stands in the place of the model"
        raise ValueError(f"{kind}: check the order of the arguments")
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while hasattr(model, "_orig_mod") or isinstance(model, parallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


class Checkpointed(nn.Module):
    """A network whose calls keep their arguments alone and are computed again in the backward pass:
    a loop over it takes the memory of one call.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The network's output."""
        return checkpoint(self.network, *arguments, use_reentrant=False, **options)

    def __getattr__(self, name: str) -> Any:
        """What a loop asks of the network beside its output."""
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["network"], name)


def named(model: nn.Module, names: list[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names; ValueError for an unknown name, or none."""
    available = dict(model.named_parameters())
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        wrong = f"the model has no parameter {unknown[0]!r}" if unknown else "no parameter is named"
        raise ValueError(f"{wrong}: give names of model.named_parameters()")
    return {name: available[name] for name in names}


def arguments_of(batch: object, device: torch.device) -> list[Any]:
    """The model's arguments in a batch, tensors on the device; ValueError for a batch that is
    neither a tensor (B, ...) nor a tuple of arguments that begins with one.
    """
    arguments = (batch,) if isinstance(batch, Tensor) else batch
    listed = isinstance(arguments, tuple | list) and arguments
    if not listed or not isinstance(arguments[0], Tensor) or not arguments[0].ndim:
        wanted = "one tensor (B, ...), or a tuple that begins with one, or wrap the model"
        raise ValueError(f"a batch is a {type(batch).__name__}: give {wanted}")
    # A tensor made in inference mode cannot be part of a backward pass.
    return [
        (a.clone() if a.is_inference() else a).to(device) if isinstance(a, Tensor) else a
        for a in arguments
    ]


def checked_output(output: object, samples: int) -> Tensor:
    """The output for so many samples; ValueError unless it is one tensor (samples, ...)."""
    if not isinstance(output, Tensor):
        kind = f"a {type(output).__name__}"
        raise ValueError(f"the model's output is {kind}: wrap the model so that it is one tensor")
    if output.shape[:1] != (samples,):
        wrong = f"output has shape {tuple(output.shape)} for {samples} samples"
        raise ValueError(f"the model's {wrong}: its first axis must be the batch")
    if torch.is_grad_enabled() and not output.requires_grad:
        remedy = "is it computed under torch.no_grad, or detached?"
        raise ValueError(f"the output does not depend on the named weights: {remedy}")
    return output


@torch.no_grad()
def check_repeats(output: Tensor, again: Tensor) -> None:
    """ValueError where two outputs for one batch differ by more than rounding."""
    if (again - output).norm() > 1e-3 * output.norm():
        own = "two calls of `through` with one batch differ: it draws random numbers of its own"
        raise ValueError(f"{own}, pass its noise in with the batch")
