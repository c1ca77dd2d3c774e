"""Spend the bytes of an entropy-coded file: one number decides how finely every channel of a model
is rounded.

Codes have no limit here, so a channel's step s is free: halving it costs one bit per weight and
quarters its damage. With error feedback that damage is c/2 * sum_k D_k * s^2 / 12, c the channel's
mean Fisher value and D the pivots of its curvature (`rounding`). A byte then saves the same damage
everywhere when c * mean(D) * s^2 is one number for all channels (Shannon 1959; "reverse
water-filling", Cover and Thomas, section 10.3): steps are coarse where weights matter little, and
all weights of a channel round to 0 where they hardly matter. The number follows from the budget by
search, by the lengths that files are predicted to have.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lafq.allocation.frontiers import Rows, StorageOption, planned
from lafq.fisher.sensitivity import Sensitivity
from lafq.networks import unwrapped
from lafq.quantization.channels import WeightSpec
from lafq.quantization.checkpoint import coded_bytes, save_quantized
from lafq.quantization.checks import check_estimates, check_plan, check_values
from lafq.quantization.formats import FORMATS, FP16_MAX, MIB
from lafq.quantization.model import with_quantized
from lafq.quantization.plan import Allocation
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.quantization.rounding import damage, rounded

FILES = 16  # tried in search of the budget, at most
CLOSE = 0.003  # the share of the budget that the file may leave
FINEST = 2**14  # steps in a channel's largest weight: with error feedback codes stay within INT16
COARSEST = 200.0  # log2 of a number at which every weight rounds to 0
INTEGERS = sorted((f for f in FORMATS.values() if f.levels % 2), key=lambda f: f.bits)


class _Trial(NamedTuple):
    """What the number 2**log_step gives; choices: by name its bytes in the file, the damage that is
    predicted, and the entry.
    """

    log_step: float
    packed: nn.Module
    choices: dict[str, StorageOption]
    file_bytes: int


@torch.no_grad()
def allocate_coded(
    model: nn.Module, sensitivity: Sensitivity, file_mib: float, progress: bool = True
) -> Allocation:
    """`allocate` for a file: the steps of least predicted damage with which the model's
    entropy-coded file takes `file_mib` MiB (2**20 bytes), or up to 0.3 % less.

    Parameters without Fisher values, and vectors, stay in FP32. In memory the codes are bit-packed,
    each channel in the narrowest integer format that holds them, so the plan's nbytes exceed its
    file_bytes; bits_per_weight in its report are those of the file. Raises ValueError as
    `check_plan`; for Fisher values that do not fit, weights that are not finite, and a budget below
    what is possible, naming the smallest.
    """
    model = unwrapped(model)
    parameters = check_estimates(model, sensitivity.fisher, sensitivity.curvature)
    names = [name for name in sensitivity.fisher if parameters[name].ndim > 1]
    if not names:
        raise ValueError("give the Fisher values of one parameter with two dimensions at least")
    check_plan(model, dict.fromkeys(names, "int8"))
    check_values(model, dict.fromkeys(names, "int8"))
    tensors = {name: Rows.of(model, name, sensitivity) for name in names}
    budget = file_mib * MIB + 0.5  # half a byte: MiB are not exact
    turns = tqdm(range(FILES), "steps", leave=False, unit="file", disable=not progress)
    best = _search(partial(_trial, model, tensors), _first_guess(tensors, budget), budget, turns)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        save_quantized(path, best.packed, model, compress=True)
        return planned(model, best.choices, sensitivity.recipe, path.stat().st_size)


def _steps(rows: Rows, log_step: float) -> Tensor:
    """FP16 steps (R,), within what INT16 can hold and what rounds every weight to 0."""
    pivots = [torch.ones(1)] if rows.factors is None else [h.pivots for h in rows.factors]
    matters = (rows.fisher.mean(1).double() * torch.cat(pivots).mean().item()).clamp_min(1e-300)
    largest = rows.values.abs().amax(1).double()
    steps = (2.0**log_step * matters.rsqrt()).clamp(largest / FINEST, 3 * largest)
    return torch.where(largest > 0, steps, 1).clamp(2**-24, FP16_MAX).half()


def _first_guess(tensors: dict[str, Rows], budget: float) -> float:
    """Where Gaussian weights, log2(1 + 2 pi e (deviation / step)^2) / 2 bits each, fill it."""
    low, high = -60.0, 60.0
    deviations = {n: rows.values.double().square().mean(1).sqrt() for n, rows in tensors.items()}
    for _ in range(40):
        middle, bits = (low + high) / 2, 0.0
        for name, rows in tensors.items():
            ratio = deviations[name] / _steps(rows, middle).double()
            each = 0.5 * torch.log2(1 + 2 * math.pi * math.e * ratio.square())
            bits += rows.view.size[1] * each.sum().item()
        low, high = (middle, high) if bits / 8 > budget else (low, middle)
    return high


def _search(
    trial: Callable[[float], _Trial], log_step: float, budget: float, turns: Iterable[int]
) -> _Trial:
    """The finest steps tried whose file fits in the budget; ValueError where none does."""
    fits, too_large, stride = None, None, 0.5
    for turn in turns:
        tried = trial(log_step)
        fits, too_large = (fits, tried) if tried.file_bytes > budget else (tried, too_large)
        if fits is not None and fits.file_bytes >= (1 - CLOSE) * budget:
            break
        if fits is None or too_large is None:
            log_step += stride if fits is None else -stride
            log_step, stride = max(min(log_step, COARSEST), -COARSEST), 2 * stride
            continue
        above, below = (math.log(t.file_bytes / budget) for t in (too_large, fits))
        # By secant, aiming a little below the budget; by halves every third time, where sizes do
        # not fall evenly.
        secant = min(max((above + CLOSE / 2) / (above - below), 0.02), 0.98)
        share = 0.5 if turn % 3 == 2 else secant
        log_step = too_large.log_step + share * (fits.log_step - too_large.log_step)
    if fits is None:
        smallest = math.ceil(trial(COARSEST).file_bytes / MIB * 1e4) / 1e4
        unmet = f"a file of {budget / MIB:.4g} MiB cannot be met"
        raise ValueError(f"{unmet}: the smallest possible is {smallest} MiB")
    return fits


def _trial(model: nn.Module, tensors: dict[str, Rows], log_step: float) -> _Trial:
    """Round every tensor with the steps of this number and predict the file."""
    stored, entries, damages = {}, {}, {}
    for name, rows in tensors.items():
        steps = _steps(rows, log_step)
        values, by_row = _rounded(rows, steps.float())
        codes = (values / steps.float()[:, None]).round_().abs().amax(1).tolist()
        formats = tuple(next(f.name for f in INTEGERS if code <= f.qmax) for code in codes)
        entries[name], damages[name] = WeightSpec(formats, steps=steps), by_row.sum().item()
        stored[name] = QuantizedWeight.of(rows.view.back(values), entries[name], rows.view)
    packed = with_quantized(model, stored)
    file_bytes, shares = coded_bytes(packed)
    choices = {n: StorageOption(shares[n], damages[n], entry) for n, entry in entries.items()}
    return _Trial(log_step, packed, choices, file_bytes)


def _rounded(rows: Rows, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (R, C) as rounded with these steps (R,), and the damage of each row (R,)."""
    if rows.factors is None:
        values = (rows.values / steps[:, None]).round_().mul_(steps[:, None])
        return values, damage(values - rows.values, rows.fisher)
    qmax = torch.full_like(steps, INTEGERS[-1].qmax)
    values, quadratic = rounded(rows.values, steps[:, None], qmax, rows.factors)
    return values, rows.damage(quadratic)
