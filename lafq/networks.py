"""Run and copy a model of the user's: its arguments, its output, and no trace left in it."""

import builtins
import copy
import dis
import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

PARALLEL = nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # names of the module inside a wrapper


@contextmanager
def own_defaults() -> Iterator[None]:
    """The CPU, FP32 and no autocast inside, whatever the caller has set."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """The model in evaluation mode; afterwards its modules and parameters are as they were.

    gradients: they can be taken inside, even where the caller has switched them off, and buffers
    are as they were, too.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    counts = [
        (m, n, b, b.clone())
        for m in (model.modules() if gradients else ())
        for n, b in m._buffers.items()
        if b is not None
    ]
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
        for module, name, buffer, value in counts:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s, a data-parallel or an averaging wrapper; ValueError for
    no module, and for one whose weights are not all its own.
    """
    if not isinstance(model, nn.Module):
        kind = f"the model is a {type(model).__name__}"
        raise ValueError(f"{kind}: check the order of the arguments")
    while hasattr(model, "_orig_mod") or isinstance(model, PARALLEL):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    kinds = {kind.__name__ for m in model.modules() for kind in type(m).__mro__}
    if kinds & {"ScriptModule", "_StatefulGraphModule"}:
        raise ValueError("the model is scripted or exported: give the module that it was made of")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"{name} has no shape yet: run the model on a batch first")
        if p.layout != torch.strided:
            raise ValueError(f"{name} is {p.layout}: make it dense first")
        if type(p.data) is not Tensor or "_fsdp_wrapped_module" in name:
            kind = type(p.data).__name__ if type(p.data) is not Tensor else "shard"
            raise ValueError(f"{name} is a {kind}: give the model with its whole weights in FP32")
    return model


def held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers as the modules hold them, not as `state_dict` tells."""
    tensors = {}
    for place, module in model.named_modules(remove_duplicate=False):
        lost = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in lost:
                tensors[f"{place}.{name}".removeprefix(".")] = tensor.detach()
    return tensors


def plain_name(model: nn.Module, name: str) -> str:
    """The name that a parameter would have without the wrappers inside the model."""
    kept, module = [], model
    for part in name.split("."):
        if part not in WRAPPED and not (part == "module" and isinstance(module, PARALLEL)):
            kept.append(part)
        module = module._modules.get(part) if isinstance(module, nn.Module) else None
    return ".".join(kept)


def copied(model: nn.Module, stand_ins: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """A deep copy that runs without the original.

    stand_ins: by the id of a parameter what the copy has in its place, so that it is not copied.
    Raises ValueError where a part cannot be copied; where a function, hook or weak reference of the
    copy leads to a part of the original; and where a stand-in is held by more than its module.
    """
    try:
        result = copy.deepcopy(model, dict(stand_ins or {}))
    except (RuntimeError, TypeError) as error:
        advice = "remove pruning, the old weight_norm or a kept activation from it first"
        raise ValueError(f"the model cannot be copied ({error}): {advice}") from error
    parts = {id(p): n for n, p in (*model.named_modules(), *model.named_parameters())}
    allowed = {id(module._parameters) for module in result.modules()}
    replaced = {id(p): parts[i] for i, p in (stand_ins or {}).items()}
    for holder, found in _reached(result):
        name = parts.get(id(found)) or (id(holder) not in allowed and replaced.get(id(found)))
        if name or found is model:
            part = f"holds {name or 'the model'}, which a copy would not quantize"
            raise ValueError(f"a function, hook or list of the model {part}: take it from `self`")
    for module in result.modules():
        give_own_class(module)
    return result


def give_own_class(module: nn.Module) -> None:
    """A deepcopy shares the class that a parametrization made, which the next one would change."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        content = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, content)


def _reached(start: object) -> Iterator[tuple[object, object]]:
    """What an object leads to, with what holds it: by attributes, containers, closures, partials,
    methods, weak references and globals that a function reads; not into modules of Python.
    """
    seen, stack = {}, [(None, start)]
    while stack:
        holder, found = stack.pop()
        yield holder, found
        # Of the type, as a proxy may compute `__class__`.
        if id(found) in seen or issubclass(type(found), ModuleType | type | CodeType):
            continue
        if isinstance(found, dict) and ("__builtins__" in found or found is vars(builtins)):
            continue
        seen[id(found)] = found
        inside = [o for o in gc.get_referents(found) if gc.is_tracked(o)]
        if isinstance(found, weakref.ref):
            inside.append(found())
        if type(found) is FunctionType and not str(found.__module__).startswith("torch."):
            inside += _globals_of(found)
        stack += [(found, o) for o in inside]


def _globals_of(function: FunctionType) -> Iterable[object]:
    """The globals that a function reads, without functions of other Python modules."""
    codes, names, known = [function.__code__], set(), function.__globals__
    while codes:
        code = codes.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    read = [known[n] for n in names & known.keys()]
    return [o for o in read if type(o) is not FunctionType or o.__globals__ is known]


class Checkpointed(nn.Module):
    """A network whose calls keep their arguments alone and are computed again in the backward pass:
    a loop over it takes the memory of one call.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The network's output; ValueError where it changes an argument, as it runs twice."""
        before = [(a, a._version) for a in arguments if isinstance(a, Tensor)]
        output = checkpoint(self.network, *arguments, use_reentrant=False, **options)
        if any(a._version != version for a, version in before):
            raise ValueError("the model changes its input in place: let it work on a copy")
        return output

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
    chosen = {name: available[name] for name in names}
    for name, p in chosen.items():
        if p.is_complex() or not p.is_floating_point():
            raise ValueError(f"{name} is {p.dtype}: name parameters of real numbers alone")
        if p.is_inference() or p.is_meta:
            made = "has no values ('meta')" if p.is_meta else "was made in inference mode"
            raise ValueError(f"{name} {made}: build and load the model without that")
    return chosen


@contextmanager
def differentiating() -> Iterator[None]:
    """Forward and backward passes; ValueError for checkpoints whose gradients would be lost."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "None of the inputs have requires_grad")
            yield
    except (UserWarning, RuntimeError) as error:
        if "None of the inputs" not in str(error) and "Checkpointing is not" not in str(error):
            raise
        lost = "the model's activation checkpoints are reentrant, which loses gradients"
        raise ValueError(f"{lost}: checkpoint with use_reentrant=False") from error


def listed(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches; ValueError for one tensor, which would be taken sample by sample."""
    if isinstance(batches, Tensor):
        raise ValueError("the batches are one tensor: give several, as in inputs.split(8)")
    return batches


def arguments_of(
    batch: object, device: torch.device, function: Callable[..., Any] | None = None
) -> list[Any]:
    """The model's arguments in a batch, copies of its tensors on the device.

    function: what takes them; only arguments that it requires are taken from a batch. Raises
    ValueError for a batch that is neither a tensor (B, ...) nor a tuple of so many arguments that
    begins with one.
    """
    arguments = (batch,) if isinstance(batch, Tensor) else batch
    listed = isinstance(arguments, tuple | list) and arguments
    if not listed or not isinstance(arguments[0], Tensor) or not arguments[0].ndim:
        wanted = "one tensor (B, ...), or a tuple that begins with one, or wrap the model"
        raise ValueError(f"a batch is a {type(batch).__name__}: give {wanted}")
    if function is not None:
        _check_count(len(arguments), function)
    return [a.detach().to(device, copy=True) if isinstance(a, Tensor) else a for a in arguments]


def _check_count(count: int, function: Callable[..., Any]) -> None:
    """A second item that is a label must not become a mask."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    takes = inspect.signature(function).parameters.values()
    required = [p.name for p in takes if p.kind in kinds and p.default is p.empty]
    some = any(p.kind is p.VAR_POSITIONAL for p in takes)
    if count < len(required) or (count > max(1, len(required)) and not some):
        wanted = f"takes {len(required)} without a default ({', '.join(required)})"
        advice = "leave labels out, or wrap the model"
        raise ValueError(f"a batch has {count} items, and the model {wanted}: {advice}")


def checked_output(output: object, samples: int) -> Tensor:
    """The output for so many samples, complex numbers as pairs; ValueError unless it is one tensor
    (samples, ...).
    """
    if not isinstance(output, Tensor):
        kind = f"a {type(output).__name__}"
        raise ValueError(f"the model's output is {kind}: wrap the model so that it is one tensor")
    if output.shape[:1] != (samples,):
        wrong = f"output has shape {tuple(output.shape)} for {samples} samples"
        raise ValueError(f"the model's {wrong}: its first axis must be the batch")
    if torch.is_grad_enabled() and not output.requires_grad:
        remedy = "is it computed under torch.no_grad or inference_mode, or detached?"
        raise ValueError(f"the output does not depend on the named weights: {remedy}")
    return torch.view_as_real(output) if output.is_complex() else output


@torch.no_grad()
def check_repeats(output: Tensor, again: Tensor) -> None:
    """ValueError where two outputs for one batch differ by more than rounding."""
    if (again - output).norm() > 1e-3 * output.norm():
        own = "two calls of `through` with one batch differ: it draws random numbers of its own"
        raise ValueError(f"{own}, pass its noise in with the batch")
