"""Spend the bytes of an entropy-coded file: one number decides how finely every channel of a model
is rounded.

Codes have no limit here, so a channel's step s is free: halving it costs one bit per weight and
quarters its damage. With error feedback that damage is c/2 * sum_k D_k * s^2 / 12, c the channel's
mean Fisher value and D the pivots of its curvature (`rounding`). A byte then saves the same damage
everywhere when c * mean(D) * s^2 is one number for all channels (Shannon 1959; "reverse
water-filling", Cover and Thomas, section 10.3): steps are coarse where weights matter little, and
all weights of a channel round to 0 where they hardly matter. The number follows from the budget by
search, on files as written.
"""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.fisher.sensitivity import Sensitivity
from lafq.networks import unwrapped
from lafq.quantization.channels import ChannelView, WeightSpec
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.checks import (
    channel_view,
    check_curvature,
    check_fisher,
    check_names,
    check_plan,
    check_values,
)
from lafq.quantization.entropy_coding import compress_parts
from lafq.quantization.formats import FORMATS, FP16_MAX, MIB, absmax_scale, unshrunk_scale
from lafq.quantization.model import nbytes, weights_sha256, with_quantized
from lafq.quantization.plan import Allocation, Plan, Recipe
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.quantization.rounding import Factor, damage, factor, rounded

ROUNDS = 16
CLOSE = 0.003  # the share of the budget that the file may leave
FINEST = (
    2**14
)  # steps in a channel's largest weight; with error feedback codes then stay within INT16
COARSEST = 200.0  # log2 of a number at which every weight rounds to 0
INTEGERS = sorted((f for f in FORMATS.values() if f.levels % 2), key=lambda f: f.bits)


class _Tensor(NamedTuple):
    """A weight tensor as rows (R, C), and what its steps and its damage follow from; unit: (R,),
    the steps for the number 1.
    """

    values: Tensor
    fisher: Tensor
    view: ChannelView
    factor: Factor | None
    unit: Tensor


class _Tried(NamedTuple):
    """What a number gives, its base-2 logarithm first: plan, stored weights, predicted damage by
    name, and the file's bytes.
    """

    log_step: float
    plan: Plan
    stored: dict[str, QuantizedWeight]
    damages: dict[str, float]
    file_bytes: int


@torch.no_grad()
def allocate_coded(
    model: nn.Module, sensitivity: Sensitivity, file_mib: float, progress: bool = True
) -> Allocation:
    """Choose the steps of least predicted damage with which the model's entropy-coded file takes
    `file_mib` MiB (2**20 bytes).

    Args:
        model: any network with FP32 weights.
        sensitivity: as `sensitivity.estimate_sensitivity` gives it; parameters that it does not
            name, and vectors, stay in FP32.
        file_mib: of the whole file that `save_quantized(..., compress=True)` writes; up to 0.3 % of
            it stay unused.

    Returns the plan, with its rounding recipe: `quantize(model, plan)`. In memory its codes are
    bit-packed, each channel in the narrowest integer format that holds them, so the plan's nbytes
    exceed its file_bytes. Columns of its report: as `plan.Allocation`, bits_per_weight in the
    file. Raises ValueError as `check_plan`; for Fisher values that do not fit, weights that are not
    finite, and a budget below what is possible, naming the smallest.

    >>> import torch
    >>> from lafq import estimate_sensitivity
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> batches = [torch.randn(8, 64) for _ in range(32)]
    >>> sensitivity = estimate_sensitivity(model, batches, seed=0)
    >>> plan = allocate_coded(model, sensitivity, file_mib=0.005, progress=False)
    >>> plan.file_bytes <= 0.005 * 2**20 < plan.nbytes + 2000, sorted(plan)
    (True, ['0.weight', '2.weight'])
    """
    model = unwrapped(model)
    parts = _prepared(model, sensitivity)
    budget = file_mib * MIB + 0.5
    with (
        TemporaryDirectory() as folder,
        tqdm(total=ROUNDS, desc="steps", unit="file", leave=False, disable=not progress) as bar,
    ):

        def tried(log_step: float) -> _Tried:
            bar.update()
            return _tried(model, parts, log_step, Path(folder) / "tried.safetensors")

        found = _search(tried, _first_guess(parts, budget), budget)
    rows = [_report(name, part.values.numel(), found) for name, part in parts.items()]
    recipe = Recipe(unshrunk_scale, sensitivity.fisher, sensitivity.curvature)
    total = sum(found.damages.values())
    plan = Plan(found.plan, recipe, weights_sha256(model))
    return Allocation(plan, nbytes(model, plan), total, pd.DataFrame(rows), found.file_bytes)


def _prepared(model: nn.Module, sensitivity: Sensitivity) -> dict[str, _Tensor]:
    parameters = check_names(model, sensitivity.fisher, "the Fisher values name")
    names = [n for n in sensitivity.fisher if parameters[n].ndim > 1]
    if not names:
        raise ValueError("give the Fisher values of one parameter with two dimensions at least")
    plan = dict.fromkeys(names, "int8")
    check_plan(model, plan)
    check_values(model, plan)
    check_curvature(model, sensitivity.curvature)
    found = {}
    for name in names:
        check_fisher(name, parameters[name], sensitivity.fisher[name])
        view = channel_view(model, name)
        values, fisher = (
            view.of(t.detach().cpu()) for t in (parameters[name], sensitivity.fisher[name])
        )
        curvature = sensitivity.curvature.get(name)
        own = None if curvature is None else factor(curvature.cpu())
        matters = fisher.mean(1).double() * (1.0 if own is None else own.pivots.mean().item())
        found[name] = _Tensor(values, fisher, view, own, matters.clamp_min(1e-300).rsqrt())
    return found


def _steps(part: _Tensor, log_step: float) -> Tensor:
    """FP16 steps (R,): never so fine that codes exceed INT16's, nor coarser than what rounds every
    weight to 0.
    """
    largest = part.values.abs().amax(1).double()
    steps = (2.0**log_step * part.unit).clamp(largest / FINEST, 3 * largest)
    return torch.where(largest > 0, steps, 1).clamp(2**-24, FP16_MAX).half()


def _tried(model: nn.Module, parts: dict[str, _Tensor], log_step: float, path: Path) -> _Tried:
    """Round every tensor with the steps of this number and write the file."""
    plan, stored, damages = Plan(), {}, {}
    for name, part in parts.items():
        steps = _steps(part, log_step)
        scale = steps.float()
        if part.factor is None:
            rows = (part.values / scale[:, None]).round_().mul_(scale[:, None])
            own = damage(rows - part.values, part.fisher)
        else:
            rows, quadratic = rounded(
                part.values, scale, torch.full_like(scale, INTEGERS[-1].qmax), part.factor
            )
            own = 0.5 * part.fisher.mean(1).double() * quadratic
        largest = (rows / scale[:, None]).round_().abs().amax(1).tolist()
        formats = tuple(next(f.name for f in INTEGERS if code <= f.qmax) for code in largest)
        plan[name] = WeightSpec(formats, steps=steps)
        stored[name] = QuantizedWeight.of(
            part.view.back(rows), plan[name], part.view, absmax_scale, None
        )
        damages[name] = own.sum().item()
    save_quantized(path, with_quantized(model, stored), model, compress=True)
    return _Tried(log_step, plan, stored, damages, path.stat().st_size)


def _first_guess(parts: dict[str, _Tensor], budget: float) -> float:
    """The number at which Gaussian weights would take the budget: log2(1 + 2 pi e (deviation /
    step)^2) / 2 bits each.
    """
    low, high = -60.0, 60.0
    spread = {name: part.values.double().square().mean(1).sqrt() for name, part in parts.items()}
    for _ in range(40):
        middle = (low + high) / 2
        ratios = {
            name: spread[name] / _steps(part, middle).double() for name, part in parts.items()
        }
        bits = sum(part.view.size[1] * _gaussian_bits(ratios[name]) for name, part in parts.items())
        low, high = (middle, high) if bits / 8 > budget else (low, middle)
    return high


def _gaussian_bits(ratio: Tensor) -> float:
    return (0.5 * torch.log2(1 + 2 * math.pi * math.e * ratio.square())).sum().item()


def _search(tried: Callable[[float], _Tried], first: float, budget: float) -> _Tried:
    """The finest steps found whose file fits in the budget, by secants between a file too large and
    one that fits.
    """
    fits, too_large, at, stride = None, None, first, 0.5
    for turn in range(ROUNDS):
        now = tried(at)
        if now.file_bytes > budget:
            too_large = now
        else:
            fits = now
        if fits is not None and fits.file_bytes >= (1 - CLOSE) * budget:
            break
        if fits is None or too_large is None:
            at = max(min(at + (stride if fits is None else -stride), COARSEST), -COARSEST)
            stride *= 2
            continue
        above, below = (math.log(t.file_bytes / budget) for t in (too_large, fits))
        # By secant, aiming a little below the budget; by halves every third time, where sizes do
        # not fall evenly.
        share = (
            0.5 if turn % 3 == 2 else min(max((above + CLOSE / 2) / (above - below), 0.02), 0.98)
        )
        at = too_large.log_step + share * (fits.log_step - too_large.log_step)
    if fits is None:
        smallest = math.ceil(tried(COARSEST).file_bytes / MIB * 1e4) / 1e4
        raise ValueError(
            f"a file of {budget / MIB:.4g} MiB cannot be met: the smallest possible is {smallest} "
            f"MiB"
        )
    return fits


def _report(name: str, weights: int, found: _Tried) -> dict:
    counts = found.stored[name].code_counts()
    parts, _ = compress_parts(dict(found.stored[name].named_buffers()), counts)
    size = sum(tensor.nbytes for tensor in parts.values())
    formats = ", ".join(
        f"{found.plan[name].format.count(f)} rows {f}" for f in FORMATS if f in counts
    )
    row = {
        "parameter": name,
        "weights": weights,
        "bits_per_weight": 8 * size / weights,
        "formats": formats,
    }
    return row | {"kept": 0, "damage": found.damages[name]}
