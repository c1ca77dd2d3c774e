"""The rows of every table: what made a model (rule, setting, format, granularity, rounding), its
quantization plan, and the functions that make the rows of each table.

03 to 05 have uniform formats and the poster's threshold rules; budget and files have models
of a budget in bits per weight: uniform formats, the allocator's, and threshold rules that fill it.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation import allocate as solver
from lafq.allocation.coded import allocate_coded
from lafq.allocation.frontiers import ALLOCATED
from lafq.allocation.rules import RULES, Scores, by_granularity, keep_above, threshold_grid
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity, predicted_damage
from lafq.quantization.channels import ChannelView, counted_bytes, weight_spec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS, get_format
from lafq.quantization.model import (
    bits_per_weight,
    dequantize_,
    kept_weights,
    nbytes,
    quantize,
    weights_sha256,
)
from lafq.quantization.plan import Entries, Plan, as_plan, make_plan
from lafq.quantization.tuning import BATCH, tune
from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import GROUPS, group_of, layer_of, mnist, quantizable
from lafq.study.workspace import Workspace
from lafq.tensors import load_tensors, save_tensors

KEY = ["rule", "setting", "format", "granularity", "rounding"]
BUDGET_KEY = ["rule", "format", "granularity", "rounding", "budget_bits"]

SYMBOLS = {"global": "tau", "group": "factor", "mean_std": "k"}  # of thresholds; a ratio has none
INTEGERS = ("int2", "int3", "int4", "int6", "int8")
VARIANTS = (("allocate", "nearest"), ("allocate_all", "feedback"))  # of the allocator
RULES_AT_BITS = ("global", "group", "ratio", "mean_std", "magnitude", "random")


class Row(NamedTuple):
    """A model to evaluate: its key in every table, and its quantization plan.

    rule: "baseline", "uniform", a threshold rule, "allocate", or "allocate_all" where the allocator
    may also choose for the input and output convolutions. setting: the rule's threshold, ratio or
    bits per weight, as text. format: the low format; "any" where the allocator chose, "coded" in an
    entropy-coded file. rounding: "none", "nearest" (code), "feedback" (error feedback), or "tuned"
    (feedback, then biases and norms for `tuned` steps). inception: whether it has Inception
    features. target: how the threshold was found from the Fisher values, if it was. made: what its
    recipe says of rounding and Fisher information, unlike the paper's rows. bits: per weight or 0.
    """

    rule: str
    setting: str
    format: str
    granularity: str
    rounding: str
    plan: Plan | Entries
    inception: bool = False
    target: str = ""
    made: dict[str, Any] | None = None
    bits: float = 0.0
    tuned: int = 0

    @property
    def key(self) -> dict[str, str]:
        """Its columns KEY."""
        return dict(zip(KEY, self, strict=False))

    @property
    def budget_key(self) -> dict[str, str | float]:
        """Its columns BUDGET_KEY."""
        key = self.key | {"budget_bits": round(self.bits, 3)}
        return {name: key[name] for name in BUDGET_KEY}


BASELINE = Row("baseline", "none", "fp32", "none", "none", {})

# How recipes spell roundings and the allocator's variants. Keys of kept images are made of these
# words, and images take hours: none may change.
NEAREST_CODE = "nearest code, scale of the largest weight"
FEEDBACK = "error feedback, unshrunk scales"
ALLOCATORS = {
    ("allocate", "nearest"): "allocator, nearest code",
    ("allocate", "feedback"): "allocator",
    ("allocate", "tuned"): "allocator, tuned",
    ("allocate_all", "feedback"): "allocator, all weights",
}


def recipe(
    row: Row, weights: str, fisher: dict[str, int], names: Collection[str] = ()
) -> dict[str, Any]:
    """How the weights of a row are made from the FP32 weights with the sha256 `weights`.

    fisher: samples, bins and seed of the empirical Fisher information. names: of all weights that
    the uniform rows quantize. A plan that stores them all alike is the uniform row, or the
    baseline, whatever rule made it. An allocator's plan is named by its sha256, except by the
    solver before `allocate`, whose rows are kept without.
    """
    entries = as_plan(row.plan).entries
    low = {entry for entry in entries.values() if isinstance(entry, str)}
    if not entries and names:
        row = BASELINE
    elif row.rounding == "nearest" and len(low) == 1 and entries == dict.fromkeys(names, *low):
        row = Row("uniform", "all", low.pop(), "tensor", "nearest", row.plan)
    feedback = ", error feedback" if row.rounding == "feedback" else ""
    words = {
        "weights": weights,
        "rule": ALLOCATORS.get((row.rule, row.rounding), row.rule + feedback),
        "threshold": row.target or row.setting,
        "format": "bits" if row.bits else row.format,
        "granularity": row.granularity,
        "rounding": NEAREST_CODE,
    }
    if row.rule in ("baseline", "uniform"):
        return words
    if row.format == "coded":
        words |= {"rule": "shipped", "format": "entropy-coded"}
    words |= {"kept": "fp32", "fisher": {"kind": "empirical", **fisher}}
    if row.rule in ("allocate", "allocate_all") and entries:
        words["plan"] = as_plan(row.plan).sha256
    return words | (row.made or {})


def quantized(model: nn.Module, row: Row, seed: int) -> nn.Module:
    """The copy of a model quantized under a row's plan, tuned where the row says so, in FP32."""
    return dequantize_(packed(model, row, seed))


def packed(model: nn.Module, row: Row, seed: int) -> nn.Module:
    """That copy with its weights in stored form only, as a file has them."""
    small = quantize(model, row.plan)
    if row.tuned:
        # Plans are made from the digits of `seed` and validated on those of seed + 1.
        digits = noised_batches(mnist(train=True)[0], row.tuned * BATCH, seed + 2, BATCH)
        tune(model, small, digits, row.tuned)
    return small


def mask_sample(model: nn.Module, rows: Sequence[Row], count: int = 2**17) -> dict[str, np.ndarray]:
    """Of every row of a threshold rule, by rule and setting, which of `count` weights, drawn with
    replacement, it keeps, as packed bits: what a run on another machine is compared with.
    """
    weights, bits = quantizable(model), {}
    chosen = torch.randint(_weights(model), (count,), generator=generator(0))
    for row in rows:
        if row.rule in RULES:
            kept = torch.cat([_kept(row.plan, n, w.shape).flatten() for n, w in weights.items()])
            bits[f"{row.rule} {row.target or row.setting}"] = np.packbits(kept[chosen].numpy())
    return bits


def _kept(plan: Plan | Entries, name: str, shape: torch.Size) -> Tensor:
    """Which weights of a tensor a plan keeps in FP32."""
    entries = as_plan(plan).entries
    if name not in entries:
        return torch.ones(shape, dtype=torch.bool)
    mask = weight_spec(entries[name]).keep_mask
    return torch.zeros(shape, dtype=torch.bool) if mask is None else mask.cpu().expand(shape)


def sizes(model: nn.Module, plans: list[Plan | Entries]) -> pd.DataFrame:
    """Of every plan the kept share of the six layers' weights, and MiB and share of all bytes."""
    kept = [kept_share(model, plan) for plan in plans]
    return _with_bytes({"kept_share": kept}, [nbytes(model, plan) for plan in plans], model)


def _with_bytes(columns: dict[str, Any], stored: list[int], model: nn.Module) -> pd.DataFrame:
    full, of_plans = nbytes(model, {}), pd.Series(stored, dtype=float)
    return pd.DataFrame(columns | {"mem_mib": of_plans / MIB, "mem_share": of_plans / full})


def kept_share(model: nn.Module, plan: Plan | Entries) -> float:
    """Share of the six layers' weights that the plan leaves in FP32."""
    return sum(kept_weights(model, plan, n) for n in quantizable(model)) / _weights(model)


def _weights(model: nn.Module) -> int:
    return sum(w.numel() for w in quantizable(model).values())


def rule_scores(rule: str, fisher: Scores, granularity: str = "weight") -> Scores:
    """A rule's scores of Fisher values, with the poster's layers and groups."""
    return RULES[rule](by_granularity(fisher, granularity), layer_of, group_of)


def group_means(fisher: Scores) -> dict[str, float]:
    """Mean Fisher value over the units of each of the poster's groups."""
    units: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, values in fisher.items():
        units[group_of(name)].append(values.reshape(-1))
    return {group: torch.cat(values).mean().item() for group, values in units.items()}


def size_sweep(
    model: nn.Module, scores: Scores, format: str, granularity: str, count: int
) -> pd.DataFrame:
    """`sizes` of the plans at every threshold of `threshold_grid`, with the columns format,
    granularity and threshold in front. scores: one value per weight, or per weight tensor.
    """
    values, weights = threshold_grid(scores, count), quantizable(model)
    thresholds = torch.tensor(values, dtype=next(iter(scores.values())).dtype)
    kept = torch.zeros(len(values), dtype=torch.int64)
    stored = kept + nbytes(model, {}) - 4 * sum(weights[n].numel() for n in scores)
    for name, score in scores.items():
        ascending = score.flatten().cpu().sort().values
        units = score.numel() - torch.searchsorted(ascending, thresholds)
        of_tensor = units * (weights[name].numel() // score.numel())
        view = channel_view(model, name)
        stored += torch.tensor([_bytes(view, format, n) for n in of_tensor.tolist()])
        kept += of_tensor
    key = {"format": format, "granularity": granularity, "threshold": values}
    share = kept.double() / _weights(model)
    return _with_bytes(key | {"kept_share": share.numpy()}, stored.tolist(), model)


def _bytes(view: ChannelView, format: str, kept: int) -> int:
    """Bytes of a tensor in one format, so many of whose weights are kept in FP32."""
    if kept == math.prod(view.size):
        return 4 * kept
    # In one format the bytes depend on the sum alone: all kept weights are put in channel 0.
    by_channel = torch.zeros(view.size[0], dtype=torch.int64)
    by_channel[0] = kept
    return counted_bytes(view, {get_format(format): torch.arange(len(by_channel))}, by_channel)


def size_table(
    model: nn.Module, rule: str, fisher: Scores, kinds: list[list[str]], count: int
) -> pd.DataFrame:
    """`size_sweep` of a rule for several kinds, each a format and a granularity."""
    sweeps = [
        size_sweep(model, rule_scores(rule, fisher, granularity), format, granularity, count)
        for format, granularity in kinds
    ]
    return pd.concat(sweeps, ignore_index=True)


def nearest_size(sweeps: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every format and granularity the row of `size_sweep` nearest to a share of FP32's bytes;
    its column `target` says so in words.
    """
    kinds = [sweeps["format"], sweeps["granularity"]]
    nearest = sweeps.loc[(sweeps["mem_share"] - share).abs().groupby(kinds).idxmin()]
    counts = sweeps.groupby(kinds)["threshold"].transform("size")[nearest.index]
    # These words stand for the threshold in recipes, as its last digits differ between machines: do
    # not reword them.
    words = [f"nearest to {share:.4f} of FP32 of {n} cuts" for n in counts]
    return nearest.assign(target=words).reset_index(drop=True)


def threshold_rows(
    rule: str, fisher: Scores, chosen: pd.DataFrame, inception: bool = False
) -> list[Row]:
    """A rule's row at every threshold of `nearest_size`: what scores at least that is kept."""
    rows = []
    for cut in chosen.itertuples():
        masks = keep_above(rule_scores(rule, fisher, cut.granularity), cut.threshold)
        setting = f"{SYMBOLS.get(rule, rule)}={cut.threshold:.3g}"
        key = rule, setting, cut.format, cut.granularity, "nearest"
        rows.append(Row(*key, make_plan(masks, cut.format), inception, cut.target))
    return rows


def uniform_rows(model: nn.Module, formats: Sequence[str] = ("fp16", "int8")) -> list[Row]:
    """All weights of the six layers in one format: the rows that go with every table."""
    key, names = ("tensor", "nearest"), quantizable(model)
    plans = {low: dict.fromkeys(names, low) for low in formats}
    return [Row("uniform", "all", f, *key, plan, inception=True) for f, plan in plans.items()]


def keep_ratio(fisher: Scores, ratio: float) -> dict[str, Tensor]:
    """Per layer the floor(ratio * n) of n units of highest Fisher value, ratio in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio {ratio} is outside [0, 1], the share of a layer's units to keep")
    return keep_above(rule_scores("ratio", fisher), 1 - ratio)


def ratio_rows(
    fisher: Scores, ratios: Sequence[float], kinds: Sequence[Sequence[str]] = (("int8", "weight"),)
) -> list[Row]:
    """The ratio rule for kinds, each a format and a granularity; Inception by weight only."""
    rows = []
    for low, granularity in kinds:
        values, by_weight = by_granularity(fisher, granularity), granularity == "weight"
        for ratio in sorted(ratios):
            key = "ratio", f"{ratio:.2f}", low, granularity, "nearest"
            plan = make_plan(keep_ratio(values, ratio), low)
            rows.append(Row(*key, plan, inception=by_weight))
    return rows


def published_rows(
    model: nn.Module, fisher: Scores, ratios: Sequence[float], count: int
) -> list[Row]:
    """The rows of the poster's table in INT8 on single weights, beside the baseline and both
    uniform formats; of `count` thresholds of a rule the nearest to the paper's share of bytes.
    """
    rows = [BASELINE._replace(inception=True), *uniform_rows(model)]
    for rule, share in poster.TARGET_SHARE.items():
        sizes = size_table(model, rule, fisher, [["int8", "weight"]], count)
        rows += threshold_rows(rule, fisher, nearest_size(sizes, share), inception=True)
    return rows + ratio_rows(fisher, ratios)


def claimed_rows(model: nn.Module, fisher: Scores, count: int) -> list[Row]:
    """Of `published_rows`, with all ratios, those that C3 and C4 compare, and the baseline."""
    rows = published_rows(model, fisher, poster.RATIOS, count)
    return [r for r in rows if r.rule in ("baseline", "group", "ratio") or r.format == "fp16"]


def measured_sensitivity(
    model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """Sensitivity of all weights, the input and output convolutions' too, from so many noised
    training digits. Not shrunk, and with all output channels in every pass: with so many passes
    that changes the damage little (results/benchmarks/passes.csv), and kept tables were made so.
    """
    batches = noised_batches(mnist(train=True)[0], samples, seed)
    return estimate_sensitivity(model, batches, seed, shrink=False, channels=channels)


def kept_sensitivity(
    work: Workspace, model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """`measured_sensitivity`, kept for whoever needs it next."""
    name = f"{weights_sha256(model)[:12]}_{samples}_{seed}_{channels or 'all'}"
    return kept(work, name, lambda: measured_sensitivity(model, samples, seed, channels))


def kept(work: Workspace, name: str, make: Callable[[], Sensitivity]) -> Sensitivity:
    """What `make` estimates, kept under this name in build/<profile>/sensitivity."""
    file = f"{name}.safetensors"
    paths = [work.build / "sensitivity" / f"{part}_{file}" for part in ("fisher", "curvature")]
    if not all(path.is_file() for path in paths):
        for path, tensors in zip(paths, make(), strict=False):
            save_tensors(path, tensors)
    return Sensitivity(*(load_tensors(path, "budget")[0] for path in paths))


def made(samples: int, seed: int) -> dict[str, Any]:
    """What recipes say of plans from `measured_sensitivity`, rounded with error feedback."""
    fisher = {"kind": "Monte Carlo", "samples": samples, "seed": seed}
    return {"rounding": FEEDBACK, "fisher": fisher}


def mib_at(model: nn.Module, bits: float) -> float:
    """MiB of the whole model with so many bits per weight in the six layers, and the rest FP32."""
    weights = _weights(model)
    return (nbytes(model, {}) - 4 * weights + bits * weights / 8) / MIB


def bits_of(model: nn.Module, plan: Plan | Entries) -> float:
    """Stored bits per weight of the six layers, scales and masks included."""
    return bits_per_weight(model, plan, quantizable(model))


def at_bits(
    rule: str, format: str, granularity: str, rounding: str, bits: float, plan: Plan
) -> Row:
    """The row of a plan that was made for a budget in bits per weight."""
    return Row(rule, f"{bits:.3f}", format, granularity, rounding, plan, bits=bits)


def uniform_at_bits(model: nn.Module, sensitivity: Sensitivity) -> list[Row]:
    """All weights in one format, rounded as everywhere, and then as the allocator's plans are."""
    plans = {low: Plan(dict.fromkeys(quantizable(model), low)) for low in (*INTEGERS, "fp16")}
    rounded = {low: Plan(plans[low].entries, sensitivity.recipe) for low in INTEGERS}
    return [
        at_bits("uniform", low, "tensor", rounding, bits_of(model, plan), plan)
        for rounding, by_format in (("nearest", plans), ("feedback", rounded))
        for low, plan in by_format.items()
    ]


def _within(
    model: nn.Module, key: tuple[str, ...], bits: Sequence[float], solve: Callable[[float], Plan]
) -> list[Row]:
    """The rows of the plans that `solve` makes for budgets, which it takes in MiB; a line tells of
    a budget below the smallest possible size.
    """
    rows = []
    for b in bits:
        try:
            rows.append(at_bits(*key, b, solve(mib_at(model, b))))
        except ValueError:
            print(f"{', '.join(key)}: {b:.2f} bits per weight cannot be met")
    return rows


def allocated_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    granularities: Sequence[str] = ALLOCATED,
    variants: Sequence[tuple[str, str]] = VARIANTS,
) -> list[Row]:
    """The allocator at these granularities and budgets, and its variants at granularity "mixed"."""
    layers, rows = {name: sensitivity.fisher[name] for name in quantizable(model)}, []
    kinds = [("allocate", "feedback", granularity) for granularity in granularities]
    for rule, rounding, granularity in [*kinds, *((*kind, "mixed") for kind in variants)]:
        fisher = sensitivity.fisher if rule == "allocate_all" else layers
        known = Sensitivity(fisher, sensitivity.curvature if rounding == "feedback" else {})
        frontiers = solver.frontiers_of(model, known, granularity, STUDY_FORMATS)
        solve = partial(solver.solve_budget, model, frontiers, recipe=known.recipe)
        rows += _within(model, (rule, "any", granularity, rounding), bits, solve)
    return rows


def coded_at_bits(model: nn.Module, sensitivity: Sensitivity, bits: Sequence[float]) -> list[Row]:
    """What `allocate_coded` chooses, in files of the bytes that `mib_at` counts for these bits."""
    solve = partial(allocate_coded, model, sensitivity, progress=False)
    return _within(model, ("allocate", "coded", "channel", "feedback"), bits, solve)


def is_allocated(row: Row, granularity: str = "mixed") -> bool:
    """Whether the allocator chose the row's formats, and rounded it with error feedback."""
    return row[:1] + row[2:5] == ("allocate", "any", granularity, "feedback")


def tuned_rows(rows: list[Row], bits: Sequence[float], steps: int) -> list[Row]:
    """The allocator's "mixed" rows at these budgets, biases and norms tuned for so many steps."""
    chosen = [row for row in rows if is_allocated(row) and row.bits in bits]
    return [row._replace(rounding="tuned", tuned=steps) for row in chosen]


def rules_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    seed: int,
    rules: Sequence[str] = RULES_AT_BITS,
) -> list[Row]:
    """The poster's four rules, and magnitude or random scores: single weights kept, of equal bytes.

    What is not kept goes to the largest integer format below the budget, what is kept stays FP16
    (FP32 where even all FP16 fits). Every plan comes with nearest codes and with error feedback.
    """
    weights, g = quantizable(model), generator(seed)
    fisher = {name: sensitivity.fisher[name] for name in weights}
    scores = {rule: rule_scores(rule, fisher) for rule in RULES}
    scores["ratio"] = _from_0_to_1(scores["ratio"])
    scores["magnitude"] = {n: w.abs() for n, w in weights.items()}
    scores["random"] = {n: torch.rand(f.shape, generator=g) for n, f in fisher.items()}
    rows = []
    for b in bits:
        low, high = _formats(model, b)
        for rule in rules if low else ():
            plan = at_bytes(model, scores[rule], low, high, mib_at(model, b))
            rounded = {"nearest": plan, "feedback": Plan(plan.entries, sensitivity.recipe)}
            rows += [at_bits(rule, low, "weight", how, b, p) for how, p in rounded.items()]
    return rows


def _formats(model: nn.Module, bits: float) -> tuple[str, str]:
    """The largest integer format below a budget, or FP16, "" where there is none; and that of the
    weights that are kept.
    """
    names = quantizable(model)
    fitting = [f for f in (*INTEGERS, "fp16") if bits_of(model, dict.fromkeys(names, f)) < bits]
    low = fitting[-1] if fitting else ""
    return low, "fp32" if low == "fp16" else "fp16"


def free_groups(model: nn.Module, sensitivity: Sensitivity, bits: float) -> Row:
    """A threshold for each group of layers, all free, at a budget: those of least predicted damage,
    found by halving steps along each, from one threshold for all. Rounded with error feedback.
    """
    low, high = _formats(model, bits)
    fisher = {name: sensitivity.fisher[name] for name in quantizable(model)}

    def planned(octaves: dict[str, float]) -> tuple[float, Plan]:
        scores = {n: f * 2 ** octaves[group_of(n)] for n, f in fisher.items()}
        plan = at_bytes(model, scores, low, high, mib_at(model, bits))
        plan = Plan(plan.entries, sensitivity.recipe)
        return predicted_damage(model, dequantize_(quantize(model, plan)), sensitivity), plan

    octaves = dict.fromkeys(GROUPS, 0.0)
    (least, best), step = planned(octaves), 4.0
    while step > 0.2:
        moved = [octaves | {g: octaves[g] + s} for g in [*GROUPS][1:] for s in (step, -step)]
        tried = {i: planned(m) for i, m in enumerate(moved)}
        i = min(tried, key=lambda i: tried[i][0])
        if tried[i][0] < least:
            octaves, (least, best) = moved[i], tried[i]
        else:
            step /= 2
    return at_bits("free", low, "weight", "feedback", bits, best)


def at_bytes(model: nn.Module, scores: Scores, low: str, high: str, budget_mib: float) -> Plan:
    """The weights of highest score in the format `high`, as many as fit, the others in `low`."""
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    plan, fits, too_many = make_plan(keep_above(scores, math.inf), low, high), 0, len(values)
    while too_many - fits > max(1, len(values) / 2**16):
        count = (fits + too_many) // 2
        larger = make_plan(keep_above(scores, values[count].item()), low, high)
        if nbytes(model, larger) <= budget_mib * MIB:
            plan, fits = larger, count
        else:
            too_many = count
    return plan


def _from_0_to_1(ratio_scores: Scores) -> Scores:
    """The shares of `ratio_score`, r / n of rank r, as r / (n - 1) in every layer: so the kept
    images of this rule at a budget were made.
    """
    count = pd.Series({name: score.numel() for name, score in ratio_scores.items()})
    n = count.groupby(layer_of).transform("sum").to_dict()
    return {name: s * n[name] / max(n[name] - 1, 1) for name, s in ratio_scores.items()}
