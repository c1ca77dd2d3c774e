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
from lafq.quantization.checks import channel_view, check_estimates, check_plan, check_values
from lafq.quantization.entropy_coding import compress_parts
from lafq.quantization.formats import FORMATS, FP16_MAX, MIB, unshrunk_scale
from lafq.quantization.model import nbytes, weights_sha256, with_quantized
from lafq.quantization.plan import Allocation, Plan, Recipe
from lafq.quantization.quantized_weight import QuantizedWeight
from lafq.quantization.rounding import Factor, damage, factor, rounded

ROUNDS = 16
CLOSE = 0.003  # the share of the budget that the file may leave
FINEST = 2**14  # steps in a channel's largest weight: with error feedback codes stay within INT16
COARSEST = 200.0  # log2 of a number at which every weight rounds to 0
INTEGERS = sorted((f for f in FORMATS.values() if f.levels % 2), key=lambda f: f.bits)


class _Rows(NamedTuple):
    """A weight tensor as rows (R, C), and what its steps and its damage follow from; unit: (R,),
    the steps for the number 1.
    """

    values: Tensor
    fisher: Tensor
    view: ChannelView
    factors: list[Factor] | None
    unit: Tensor

    def steps(self, log_step: float) -> Tensor:
        """FP16 steps (R,): never so fine that codes exceed INT16's, nor coarser than what rounds
        every weight to 0.
        """
        largest = self.values.abs().amax(1).double()
        steps = (2.0**log_step * self.unit).clamp(largest / FINEST, 3 * largest)
        return torch.where(largest > 0, steps, 1).clamp(2**-24, FP16_MAX).half()

    def rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The rows as rounded with these steps (R,), and the damage of each (R,)."""
        if self.factors is None:
            rows = (self.values / scale[:, None]).round_().mul_(scale[:, None])
            return rows, damage(rows - self.values, self.fisher)
        qmax = torch.full_like(scale, INTEGERS[-1].qmax)
        rows, quadratic = rounded(self.values, scale[:, None], qmax, self.factors)
        return rows, 0.5 * self.fisher.mean(1).double() * quadratic


class _Trial(NamedTuple):
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
    """`allocate` for a file: the steps of least predicted damage with which the model's
    entropy-coded file takes `file_mib` MiB (2**20 bytes).

    Args:
        model: any network with FP32 weights.
        sensitivity: as `sensitivity.estimate_sensitivity` gives it; parameters that it does not
            name, and vectors, stay in FP32.
        file_mib: of the whole file that `save_quantized(..., compress=True)` writes; up to 0.3 % of
            it stay unused.

    Returns the plan, with its rounding recipe: `quantize(model, plan)`. In memory its codes are
    bit-packed, each channel in the narrowest integer format that holds them, so the plan's nbytes
    exceed its file_bytes; bits_per_weight in its report are those of the file. Raises ValueError as
    `check_plan`; for Fisher values that do not fit, weights that are not finite, and a budget below
    what is possible, naming the smallest.
    """
    model = unwrapped(model)
    tensors, budget = _prepared(model, sensitivity), file_mib * MIB + 0.5
    with (
        TemporaryDirectory() as folder,
        tqdm(total=ROUNDS, desc="steps", unit="file", leave=False, disable=not progress) as bar,
    ):
        search = _Search(model, tensors, Path(folder) / "tried.safetensors", budget, bar)
        best = search.run(_first_guess(tensors, budget))
    rows = [_report(name, best) for name in tensors]
    recipe = Recipe(unshrunk_scale, sensitivity.fisher, sensitivity.curvature)
    plan, total = Plan(best.plan, recipe, weights_sha256(model)), sum(best.damages.values())
    return Allocation(plan, nbytes(model, plan), total, pd.DataFrame(rows), best.file_bytes)


def _prepared(model: nn.Module, sensitivity: Sensitivity) -> dict[str, _Rows]:
    fisher, curvature = sensitivity.fisher, sensitivity.curvature
    parameters = check_estimates(model, fisher, curvature)
    names = [n for n in fisher if parameters[n].ndim > 1]
    if not names:
        raise ValueError("give the Fisher values of one parameter with two dimensions at least")
    check_plan(model, dict.fromkeys(names, "int8"))
    check_values(model, dict.fromkeys(names, "int8"))
    tensors = {}
    for name in names:
        view = channel_view(model, name)
        values, f = (view.of(t.detach().cpu()) for t in (parameters[name], fisher[name]))
        parts = factor(curvature[name].cpu()) if name in curvature else None
        matters = f.mean(1).double() * (
            1.0 if parts is None else torch.cat([h.pivots for h in parts]).mean().item()
        )
        tensors[name] = _Rows(values, f, view, parts, matters.clamp_min(1e-300).rsqrt())
    return tensors


def _first_guess(tensors: dict[str, _Rows], budget: float) -> float:
    """The number at which Gaussian weights would take the budget: log2(1 + 2 pi e (deviation /
    step)^2) / 2 bits each.
    """
    low, high = -60.0, 60.0
    deviations = {n: t.values.double().square().mean(1).sqrt() for n, t in tensors.items()}
    for _ in range(40):
        middle, bits = (low + high) / 2, 0.0
        for name, tensor in tensors.items():
            ratio = deviations[name] / tensor.steps(middle).double()
            each = 0.5 * torch.log2(1 + 2 * math.pi * math.e * ratio.square())
            bits += tensor.view.size[1] * each.sum().item()
        low, high = (middle, high) if bits / 8 > budget else (low, middle)
    return high


class _Search(NamedTuple):
    """Secants between a file too large and one that fits."""

    model: nn.Module
    tensors: dict[str, _Rows]
    path: Path
    budget: float
    bar: tqdm

    def run(self, log_step: float) -> _Trial:
        """The finest steps tried whose file fits in the budget; ValueError where none does."""
        fits, too_large, stride = None, None, 0.5
        for turn in range(ROUNDS):
            trial = self.trial(log_step)
            if trial.file_bytes > self.budget:
                too_large = trial
            else:
                fits = trial
            if fits is not None and fits.file_bytes >= (1 - CLOSE) * self.budget:
                break
            if fits is None or too_large is None:
                log_step += stride if fits is None else -stride
                log_step, stride = max(min(log_step, COARSEST), -COARSEST), 2 * stride
                continue
            above, below = (math.log(t.file_bytes / self.budget) for t in (too_large, fits))
            # By secant, aiming a little below the budget; by halves every third time, where sizes
            # do not fall evenly.
            secant = min(max((above + CLOSE / 2) / (above - below), 0.02), 0.98)
            share = 0.5 if turn % 3 == 2 else secant
            log_step = too_large.log_step + share * (fits.log_step - too_large.log_step)
        if fits is None:
            smallest = math.ceil(self.trial(COARSEST).file_bytes / MIB * 1e4) / 1e4
            raise ValueError(
                f"a file of {self.budget / MIB:.4g} MiB cannot be met: the smallest possible is "
                f"{smallest} MiB"
            )
        return fits

    def trial(self, log_step: float) -> _Trial:
        """Round every tensor with the steps of this number and write the file."""
        plan, stored, damages = Plan(), {}, {}
        for name, tensor in self.tensors.items():
            steps = tensor.steps(log_step)
            rows, of_rows = tensor.rounded(steps.float())
            codes = (rows / steps.float()[:, None]).round_().abs().amax(1).tolist()
            formats = tuple(next(f.name for f in INTEGERS if code <= f.qmax) for code in codes)
            plan[name] = WeightSpec(formats, steps=steps)
            view, damages[name] = tensor.view, of_rows.sum().item()
            stored[name] = QuantizedWeight.of(view.back(rows), plan[name], view)
        small = with_quantized(self.model, stored)
        save_quantized(self.path, small, self.model, compress=True)
        self.bar.update()
        return _Trial(log_step, plan, stored, damages, self.path.stat().st_size)


def _report(name: str, trial: _Trial) -> dict:
    stored = trial.stored[name]
    counts, weights = stored.code_counts(), math.prod(stored.view.shape)
    parts, _ = compress_parts(dict(stored.named_buffers()), counts)
    formats = trial.plan[name].format
    return {
        "parameter": name,
        "weights": weights,
        "bits_per_weight": 8 * sum(tensor.nbytes for tensor in parts.values()) / weights,
        "formats": ", ".join(f"{formats.count(f)} rows {f}" for f in FORMATS if f in counts),
        "kept": 0,
        "damage": trial.damages[name],
    }
