"""Spend bytes where the Fisher information says: a format for every tensor, channel or weight.

Each parameter has a frontier of choices, of b bytes and damage d; one of each is taken, of least
total damage within the budget B: the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger
2004, chapter 11). At a price p per byte every parameter by itself takes the choice of least
d + p b; one price for all makes the bytes fit. With the excess e = d + p b - min(d + p b) of a
choice

    total damage = bound + sum of e + p (B - total bytes),

where no plan within B does less than the bound. So what the price leaves of B is filled with
choices of small excess, by search over sums of them.
"""

import math

import numpy as np
from torch import nn
from tqdm import tqdm

from lafq.allocation.coded import allocate_coded
from lafq.allocation.frontiers import ALLOCATED, Rows, StorageOption, frontier, planned, undominated
from lafq.fisher.sensitivity import Sensitivity
from lafq.networks import own_defaults, unwrapped
from lafq.quantization.checks import check_estimates, check_plan
from lafq.quantization.formats import DEFAULT_FORMATS, MIB, ScaleRule, get_format, unshrunk_scale
from lafq.quantization.model import nbytes
from lafq.quantization.plan import Allocation, Recipe

CLOSE = 1e-3  # the share of the damage that a plan may lie above the bound without a search
SUMS = 4096  # that the search keeps

Frontier = list[StorageOption]


@own_defaults()
def allocate(
    model: nn.Module,
    sensitivity: Sensitivity,
    *,
    memory_mib: float | None = None,
    file_mib: float | None = None,
    granularity: str = "mixed",
    formats: tuple[str, ...] = DEFAULT_FORMATS,
    groups: tuple[int, ...] = (),
    progress: bool = True,
) -> Allocation:
    """Plan of least predicted damage for a size in memory, or for that of an entropy-coded file.

    Args:
        model: any network with FP32 weights.
        sensitivity: as `estimate_sensitivity` gives it; parameters that it does not name stay in
            FP32. Without a curvature, weights are planned for rounding to the nearest code; with
            it, for error feedback.
        memory_mib: MiB (2**20 bytes) of all that must be stored, biases, norms, scales and masks
            included. The next three arguments are for it alone.
        file_mib: MiB of the file that `save_quantized(..., compress=True)` writes
            (`coded.allocate_coded`).
        granularity: "tensor", "channel" or "mixed" (channels, and single weights in FP16 where that
            pays).
        formats: to choose from.
        groups: numbers of consecutive weights that may share a scale, as (128, 64, 32); none: a
            scale per channel. Each takes as long again.

    Returns the plan, with its rounding recipe: `quantize(model, plan)`.
    Raises ValueError unless one of the two sizes is given; as `check_plan`; for an unknown
    granularity or format, Fisher values that do not fit, and a size below what is possible, naming
    the smallest.

    >>> import torch
    >>> from lafq import estimate_sensitivity
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> sensitivity = estimate_sensitivity(model, [(torch.randn(8, 64),) for _ in range(4)], seed=0)
    >>> plan = allocate(model, sensitivity, memory_mib=0.005, progress=False)
    >>> plan.nbytes <= 0.005 * 2**20, sorted(plan.entries)
    (True, ['0.weight', '2.weight'])
    """
    model = unwrapped(model)
    if (memory_mib is None) == (file_mib is None):
        raise ValueError("give memory_mib or file_mib: a plan is made for one of these sizes")
    if file_mib is not None:
        return allocate_coded(model, sensitivity, file_mib, progress)
    frontiers = frontiers_of(model, sensitivity, granularity, formats, groups, progress)
    return solve_budget(model, frontiers, memory_mib, sensitivity.recipe)


def frontiers_of(
    model: nn.Module,
    sensitivity: Sensitivity,
    granularity: str = "mixed",
    formats: tuple[str, ...] = DEFAULT_FORMATS,
    groups: tuple[int, ...] = (),
    progress: bool = True,
    scale: ScaleRule = unshrunk_scale,
) -> dict[str, Frontier]:
    """`allocate`'s frontier of every parameter that has Fisher values, good for any budget; scale:
    the rule of `formats` by which it will be rounded.
    """
    model, fisher = unwrapped(model), sensitivity.fisher
    if granularity not in ALLOCATED:
        choices = ", ".join(ALLOCATED)
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {choices}")
    known = [get_format(name) for name in formats]
    if any(group < 1 for group in groups):
        raise ValueError(f"groups are {groups}: give numbers of weights of at least 1, or none")
    if not fisher or not {"fp32", "fp16"} & set(formats):
        wanted = "the Fisher values of one parameter at least, and fp32 or fp16 among the formats"
        raise ValueError(f"give {wanted}")
    check_plan(model, dict.fromkeys(fisher, "fp16"))
    check_estimates(model, fisher, sensitivity.curvature)
    names = tqdm(fisher, "damage by format", leave=False, unit="tensor", disable=not progress)
    rows = ((name, Rows.of(model, name, sensitivity)._replace(scale=scale)) for name in names)
    return {name: frontier(tensor, granularity, known, groups) for name, tensor in rows}


def solve_budget(
    model: nn.Module, frontiers: dict[str, Frontier], memory_mib: float, recipe: Recipe
) -> Allocation:
    """`allocate`, from frontiers; recipe: the rounding that they were made for."""
    model, fronts = unwrapped(model), list(frontiers.values())
    rest = nbytes(model, {}) - sum(4 * model.get_parameter(n).numel() for n in frontiers)
    budget = memory_mib * MIB + 0.5 - rest  # half a byte: MiB are not exact
    least = sum(front[0].nbytes for front in fronts)
    if not budget >= least:
        smallest = math.ceil((least + rest) / MIB * 1e4) / 1e4
        unmet = f"a budget of {memory_mib} MiB cannot be met"
        raise ValueError(f"{unmet}: the smallest possible is {smallest} MiB")
    taken = filled(fronts, budget, *one_price(fronts, budget))
    choices = {n: front[i] for (n, front), i in zip(frontiers.items(), taken, strict=True)}
    return planned(model, choices, recipe)


def one_price(fronts: list[Frontier], budget: float) -> tuple[list[int], float]:
    """What each parameter takes at the least price per byte at which all fit, and that price."""
    steps = []  # along the lower convex hull of each frontier, of which some price takes a corner
    for i, front in enumerate(fronts):
        sizes, damages = np.array([choice[:2] for choice in front]).T
        corner = 0
        while corner < len(front) - 1:
            more = sizes[corner + 1 :] - sizes[corner]
            saved = (damages[corner] - damages[corner + 1 :]) / more
            step = len(saved) - 1 - int(saved[::-1].argmax())  # of equal ones the farthest
            corner += step + 1
            steps.append((saved[step], i, corner, more[step]))
    steps.sort(key=lambda step: -step[0])
    taken, left = [0] * len(fronts), budget - sum(front[0].nbytes for front in fronts)
    for price, i, corner, more in steps:
        if more > left:
            return taken, price
        taken[i], left = corner, left - more
    return taken, 0.0


def filled(fronts: list[Frontier], budget: float, taken: list[int], price: float) -> list[int]:
    """The choices of least damage within the budget, by search from those taken at a price."""
    start = [front[i] for front, i in zip(fronts, taken, strict=True)]
    left = budget - sum(choice.nbytes for choice in start)
    lost = price * left  # above the bound
    if lost <= CLOSE * sum(choice.damage for choice in start):
        return taken
    near = [_near(front, choice, price, lost) for front, choice in zip(fronts, start, strict=True)]
    order = sorted(range(len(near)), key=lambda i: len(near[i][0]))
    least = [near[i][0].min() for i in order]
    more, excess, trail = np.zeros(1), np.zeros(1), []  # of the sums over parameters so far
    for place, i in enumerate(order):
        more = np.add.outer(more, near[i][0]).ravel()
        excess = np.add.outer(excess, near[i][1]).ravel()
        fits = more <= left  # with the others as they are
        lost = (excess + price * (left - more))[fits].min(initial=lost)
        index = np.flatnonzero((excess <= lost) & (more <= left - sum(least[place + 1 :])))
        index = index[undominated(more[index], excess[index] - price * more[index])]
        if len(index) > SUMS:
            index = _spread(index, more[index], excess[index])
        trail.append(np.divmod(index, len(near[i][0])))
        more, excess = more[index], excess[index]
    best, taken = int((excess - price * more).argmin()), list(taken)
    for i, (parents, choices) in zip(reversed(order), reversed(trail), strict=True):
        taken[i], best = int(near[i][2][choices[best]]), int(parents[best])
    return taken


def _spread(index: np.ndarray, more: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """Of SUMS equal ranges of bytes the sum of least excess in each: the least of all hardly spend,
    and miss the best plan where the price leaves much of the budget.
    """
    ranges = ((more - more.min()) * (SUMS - 1) / np.ptp(more)).astype(int)
    order = np.lexsort((excess, ranges))
    return index[order[np.diff(ranges[order], prepend=-1) > 0]]


def _near(
    front: Frontier, taken: StorageOption, price: float, lost: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the choices of no more excess than is lost: bytes more than is taken, excess, number."""
    more = np.array([choice.nbytes - taken.nbytes for choice in front], dtype=float)
    excess = np.array([choice.damage - taken.damage for choice in front]) + price * more
    index = np.flatnonzero(excess <= lost)
    return more[index], excess[index].clip(0), index
