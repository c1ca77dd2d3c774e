"""Spend a byte budget where the Fisher information says: a format for every tensor, channel or
weight of a model.

Each parameter has a frontier of choices (bytes, predicted damage); one of each is to be taken, of
least total damage within the
budget: the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger 2004, chapter 11). It is
solved by dynamic programming on rounded bytes, which exchanges then improve; a test holds the
result within 2 % of an integer program's optimum.
"""

import math

import numpy as np
import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from lafq.allocation.pareto import ALLOCATED, StorageOption, pareto_front
from lafq.fisher.sensitivity import Sensitivity
from lafq.networks import unwrapped
from lafq.quantization.channels import weight_spec
from lafq.quantization.checks import channel_view, check_curvature, check_fisher, check_plan
from lafq.quantization.formats import DEFAULT_FORMATS, FORMATS, MIB, get_format, unshrunk_scale
from lafq.quantization.model import nbytes, weights_sha256
from lafq.quantization.plan import Entries, Plan, Recipe

EXCHANGES = 200
CELLS, WORK = 2**16, 2**24
NEAREST = Recipe(unshrunk_scale)


class Allocation(Plan):
    """A plan within a budget, with what is known of it.

    nbytes: of the whole model under the plan; damage: the predicted rise of half the squared error,
    summed over the output. It is too low where plan and rounding fit the noise of few draws
    (`prediction.predicted_damage` predicts from others).
    file_bytes: of the entropy-coded file, where the plan was made for one (`coded.allocate_coded`);
    else 0.
    report: one row per parameter, columns parameter, weights, bits_per_weight, formats, kept
    (single weights in FP16), damage.
    """

    def __init__(
        self,
        entries: Entries,
        recipe: Recipe,
        source: str,
        nbytes: int,
        damage: float,
        report: pd.DataFrame,
        file_bytes: int = 0,
    ) -> None:
        super().__init__(entries, recipe, source)
        self.nbytes, self.damage, self.report, self.file_bytes = nbytes, damage, report, file_bytes


def allocate(
    model: nn.Module,
    sensitivity: Sensitivity,
    budget_mib: float,
    granularity: str = "mixed",
    formats: tuple[str, ...] = DEFAULT_FORMATS,
    progress: bool = True,
    groups: tuple[int, ...] = (),
) -> Allocation:
    """Choose the formats of least predicted damage that store the whole model in `budget_mib` MiB
    (2**20 bytes) or less.

    Args:
        model: any network with FP32 weights.
        sensitivity: as `sensitivity.estimate_sensitivity` gives it; parameters that it does not
            name stay in FP32. Without a curvature, weights are planned for rounding to the nearest
            code; with it, for error feedback.
        budget_mib: of all that must be stored, biases, norms, scales and masks included.
        granularity: "tensor", "channel" or "mixed" (channels, and single weights in FP16 where that
            pays).
        groups: numbers of consecutive weights that may share a scale, as (128, 64, 32); none: a
            scale per channel. Each takes as long again.

    Returns the plan, with its rounding recipe: `quantize(model, plan)`.
    Raises ValueError as `check_plan`; for an unknown granularity or format, Fisher values that do
    not fit, and a budget below what is possible, naming the smallest.

    >>> import torch
    >>> from lafq import estimate_sensitivity
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> sensitivity = estimate_sensitivity(model, [(torch.randn(8, 64),) for _ in range(4)], seed=0)
    >>> plan = allocate(model, sensitivity, budget_mib=0.005, progress=False)
    >>> plan.nbytes <= 0.005 * 2**20, sorted(plan)
    (True, ['0.weight', '2.weight'])
    """
    model = unwrapped(model)
    fronts = frontiers_of(
        model, sensitivity.fisher, granularity, formats, progress, sensitivity.curvature, groups
    )
    return solve_budget(
        model,
        fronts,
        budget_mib,
        recipe=Recipe(unshrunk_scale, sensitivity.fisher, sensitivity.curvature),
    )


def frontiers_of(
    model: nn.Module,
    fisher: dict[str, Tensor],
    granularity: str,
    formats: tuple[str, ...] = DEFAULT_FORMATS,
    progress: bool = True,
    curvature: dict[str, Tensor] | None = None,
    groups: tuple[int, ...] = (),
) -> dict[str, list[StorageOption]]:
    """The frontier of every parameter that `fisher` names: made once, it serves any number of
    budgets.
    """
    model = unwrapped(model)
    if granularity not in ALLOCATED:
        raise ValueError(
            f"unknown granularity {granularity!r}: choose one of {', '.join(ALLOCATED)}"
        )
    for name in formats:
        get_format(name)
    if any(group < 1 for group in groups):
        raise ValueError(f"groups are {groups}: give numbers of weights of at least 1, or none")
    if not fisher or not {"fp32", "fp16"} & set(formats):
        raise ValueError(
            "give the Fisher values of one parameter at least, and fp32 or fp16 among the formats"
        )
    check_plan(model, dict.fromkeys(fisher, "fp16"))
    parameters = dict(model.named_parameters())
    for name, values in fisher.items():
        check_fisher(name, parameters[name], values)
    check_curvature(model, curvature or {})
    bar = tqdm(
        fisher.items(),
        desc="damage by format",
        unit="tensor",
        leave=False,
        **({} if progress else {"disable": True}),
    )
    found = {}
    for name, values in bar:
        common = (curvature or {}).get(name)
        sides = (parameters[name].detach().cpu(), values.detach().cpu(), channel_view(model, name))
        found[name] = pareto_front(
            *sides, granularity, formats, None if common is None else common.cpu(), groups
        )
    return found


def solve_budget(
    model: nn.Module,
    frontiers: dict[str, list[StorageOption]],
    budget_mib: float,
    recipe: Recipe = NEAREST,
) -> Allocation:
    """One choice of every frontier, of least total damage within the budget.

    recipe: the rounding that the frontiers were made for, which the plan carries.
    """
    model = unwrapped(model)
    rest = nbytes(model, dict.fromkeys(frontiers, "fp32")) - sum(
        4 * model.get_parameter(n).numel() for n in frontiers
    )
    budget = budget_mib * MIB + 0.5 - rest  # half a byte: MiB are not exact
    least = sum(choices[0].nbytes for choices in frontiers.values())
    if not budget >= least:
        smallest = math.ceil((least + rest) / MIB * 1e4) / 1e4
        raise ValueError(
            f"a budget of {budget_mib} MiB cannot be met: the smallest possible is {smallest} MiB"
        )
    lists = list(frontiers.values())
    taken = local_search(lists, knapsack_dp(lists, budget), budget)
    chosen = {name: choices[i] for (name, choices), i in zip(frontiers.items(), taken, strict=True)}
    plan = {name: c.entry for name, c in chosen.items() if c.entry != "fp32"}
    rows = [_report(name, model.get_parameter(name).numel(), c) for name, c in chosen.items()]
    total = sum(c.damage for c in chosen.values())
    return Allocation(
        plan, recipe, weights_sha256(model), nbytes(model, plan), total, pd.DataFrame(rows)
    )


def knapsack_dp(lists: list[list[StorageOption]], budget: float) -> list[int]:
    """Dynamic programming over the bytes beyond the smallest choices, rounded up to cells of what
    is left of the budget.
    """
    grid = min(CELLS, WORK // sum(len(choices) for choices in lists))
    cell = max(budget - sum(choices[0].nbytes for choices in lists), 1) / grid
    best = np.zeros(grid + 1)
    taken = []
    for choices in lists:
        cells = [math.ceil((c.nbytes - choices[0].nbytes) / cell) for c in choices]
        options = np.full((len(choices), grid + 1), np.inf)
        for option, more, c in zip(options, cells, choices, strict=True):
            if more <= grid:
                option[more:] = best[: grid + 1 - more] + c.damage
        taken.append((options.argmin(0), cells))
        best = options.min(0)
    left, found = grid, []
    for chosen, cells in reversed(taken):
        found.append(int(chosen[left]))
        left -= cells[found[-1]]
    return found[::-1]


def local_search(lists: list[list[StorageOption]], taken: list[int], budget: float) -> list[int]:
    """Improve a choice: while the damage falls, change one parameter, or two at once, within the
    budget.
    """
    owner = np.repeat(np.arange(len(lists)), [len(choices) for choices in lists])
    size = np.array([c.nbytes for choices in lists for c in choices], dtype=float)
    damage = np.array([c.damage for choices in lists for c in choices])
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    current = starts + np.array(taken)
    for _ in range(EXCHANGES):
        more, change = size - size[current][owner], damage - damage[current][owner]
        left = budget - size[current].sum()
        single = np.where(more <= left, change, 0)
        partner = _best_partner(more, change, owner, left)
        both = np.where(partner < 0, 0, change + change[partner])
        first = both.argmin()
        if min(single.min(), both[first]) >= -1e-12 * damage[current].sum():
            break
        for j in [single.argmin()] if single.min() <= both[first] else [first, partner[first]]:
            current[owner[j]] = j
    return (current - starts).tolist()


def _best_partner(
    more: np.ndarray, change: np.ndarray, owner: np.ndarray, left: float
) -> np.ndarray:
    """For each change of one parameter the change of another one of least damage that fits with it,
    or -1.

    Changes are sorted by bytes. Those that fit with a given one then come first, and the best of
    them is known, with the best of another owner, in case both are of the same parameter.
    """
    by_bytes = np.argsort(more, kind="stable")
    changes, owners, one, two = change.tolist(), owner.tolist(), -1, -1
    best = [(one, two)]
    for j in by_bytes.tolist():
        if one < 0 or changes[j] < changes[one]:
            one, two = j, two if one >= 0 and owners[one] == owners[j] else one
        elif owners[j] != owners[one] and (two < 0 or changes[j] < changes[two]):
            two = j
        best.append((one, two))
    found = np.array(best)[np.searchsorted(more[by_bytes], left - more, side="right")]
    same = (found[:, 0] >= 0) & (owner[found[:, 0]] == owner)
    return np.where(same, found[:, 1], found[:, 0])


def _report(name: str, weights: int, choice: StorageOption) -> dict:
    low, kept, _, _, group = weight_spec(choice.entry)
    rows = [low] if isinstance(low, str) else low
    counts = {f: rows.count(f) for f in FORMATS if f in rows}
    formats = (
        next(iter(counts))
        if len(counts) == 1
        else ", ".join(f"{n} rows {f}" for f, n in counts.items())
    )
    formats += f", groups of {group}" if group else ""
    row = {
        "parameter": name,
        "weights": weights,
        "bits_per_weight": 8 * choice.nbytes / weights,
        "formats": formats,
    }
    return row | {"kept": 0 if kept is None else int(kept.sum()), "damage": choice.damage}
