"""The rows of every table: what made a model (rule, setting, format, granularity, rounding), its
quantization plan, and the functions that make the rows of each table.

03 to 05 and 08 have uniform formats and the poster's threshold rules; 06, 09 and 11 have models
of a budget in bits per weight: uniform formats, the allocator's, and threshold rules that fill it.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation import allocate as solver
from lafq.allocation.coded import allocate_coded
from lafq.allocation.frontiers import ALLOCATED
from lafq.allocation.rules import RULES, by_granularity, keep_above, threshold_grid
from lafq.fisher.sensitivity import Sensitivity, estimate_sensitivity
from lafq.quantization.channels import counted_bytes
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS, get_format, unshrunk_scale
from lafq.quantization.model import bits_per_weight, kept_weights, nbytes, quantize
from lafq.quantization.plan import Entries, Plan, Recipe, make_plan
from lafq.quantization.tuning import BATCH, tune
from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import layer_of, quantizable

KEY = ["rule", "setting", "format", "granularity", "rounding"]
BUDGET_KEY = ["rule", "format", "granularity", "rounding", "budget_bits"]

# Symbols of the thresholds; a ratio has none.
SYMBOLS = {"global": "tau", "group": "factor", "mean_std": "k"}
INTEGERS = ("int2", "int3", "int4", "int6", "int8")
# Rule and rounding of the allocator's variants.
VARIANTS = (("allocate", "nearest"), ("allocate_all", "feedback"))
RULES_AT_BITS = ("global", "group", "ratio", "mean_std", "magnitude", "random")


class Row(NamedTuple):
    """A model to evaluate: its key in every table, and its quantization plan.

    rule: what chose the plan: "baseline", "uniform", a threshold rule, "allocate", or
    "allocate_all" where the allocator may also choose for the input and output convolutions.
    setting: the rule's threshold, ratio or bits per weight, as text.
    format: the low format; "any" where the allocator chose, "coded" in an entropy-coded file.
    rounding: "none", "nearest" (code), "feedback" (error feedback), or "tuned" (feedback, then
    biases and norms for `tuned` steps).
    inception: whether Inception features are computed for it. target: how the threshold was found
    from the Fisher values ("" where the threshold itself is given). made: what the recipe of its
    images says of rounding and Fisher information, where that is not as in the paper's rows
    (`recipe`). bits: the budget in bits per weight (0: none).
    """

    rule: str
    setting: str
    format: str
    granularity: str
    rounding: str
    plan: Entries
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


# How recipes spell rules and roundings. Keys of kept images are made of these words, and images
# take hours: none may change.
NEAREST_CODE = "nearest code, scale of the largest weight"
FEEDBACK = "error feedback, unshrunk scales"
RECIPE_ROUNDING = {"nearest": "", "feedback": ", error feedback"}
RECIPE_ALLOCATOR = {"nearest": ", nearest code", "feedback": "", "tuned": ", tuned"}


def recipe(
    row: Row, weights: str, fisher: dict[str, int], names: Collection[str] = ()
) -> dict[str, Any]:
    """How the weights of a row are made from the FP32 weights with the sha256 `weights`.

    fisher: samples, bins and seed of the empirical Fisher information. names: of all weights that
    the uniform rows quantize. A plan that stores them all alike is the uniform row, or the
    baseline, whatever rule made it. An allocator's plan is named by its sha256, except by the
    solver before `allocate`, whose rows are kept without.
    """
    low = {entry for entry in row.plan.values() if isinstance(entry, str)}
    if not row.plan and names:
        row = BASELINE
    elif row.rounding == "nearest" and len(low) == 1 and row.plan == dict.fromkeys(names, *low):
        row = Row("uniform", "all", low.pop(), "tensor", "nearest", row.plan)
    words = {
        "weights": weights,
        "rule": _rule_in_recipes(row),
        "threshold": row.setting,
        "format": "bits" if row.bits else row.format,
        "granularity": row.granularity,
        "rounding": NEAREST_CODE,
    }
    if row.rule in ("baseline", "uniform"):
        return words
    if row.format == "coded":
        words |= {"rule": "shipped", "format": "entropy-coded"}
    words |= {
        "threshold": row.target or row.setting,
        "kept": "fp32",
        "fisher": {"kind": "empirical", **fisher},
    }
    if row.rule in ("allocate", "allocate_all") and row.plan:
        words["plan"] = Plan(row.plan).sha256
    return words | (row.made or {})


def _rule_in_recipes(row: Row) -> str:
    if row.rule == "allocate_all":
        return "allocator, all weights"
    if row.rule == "allocate":
        return f"allocator{RECIPE_ALLOCATOR[row.rounding]}"
    return row.rule + RECIPE_ROUNDING.get(row.rounding, "")


def by_budget(table: pd.DataFrame) -> pd.DataFrame:
    """A table of rows with the budget in bits per weight (BUDGET_KEY) in place of the setting."""
    table = table.rename(columns={"setting": "budget_bits"})
    return table[[*BUDGET_KEY, *table.columns.drop(BUDGET_KEY)]]


def quantized(model: nn.Module, row: Row, seed: int) -> nn.Module:
    """The quantized copy of a model under a row's plan, tuned on noised training digits where the
    row says so.
    """
    small = quantize(model, row.plan)
    if row.tuned:
        # Plans are made from the digits of `seed` and validated on those of seed + 1.
        tune(
            model,
            small,
            noised_batches(mnist(train=True)[0], row.tuned * BATCH, seed + 2, BATCH),
            row.tuned,
        )
    return small


def sizes(model: nn.Module, plans: list[Entries]) -> pd.DataFrame:
    """Kept share of the six layers' weights, stored MiB of the whole model and their share of
    FP32's, one row per plan.
    """
    full, stored = nbytes(model, {}), [nbytes(model, plan) for plan in plans]
    columns = {"kept_share": [kept_share(model, plan) for plan in plans]}
    return pd.DataFrame(
        columns | {"mem_mib": [n / MIB for n in stored], "mem_share": [n / full for n in stored]}
    )


def kept_share(model: nn.Module, plan: Entries) -> float:
    """Share of the six layers' weights that the plan leaves in FP32."""
    weights = quantizable(model)
    return sum(kept_weights(model, plan, n) for n in weights) / sum(
        w.numel() for w in weights.values()
    )


def rule_scores(
    rule: str, fisher: dict[str, Tensor], granularity: str = "weight"
) -> dict[str, Tensor]:
    """A rule's scores of Fisher values, with the poster's layers and groups."""
    return RULES[rule](by_granularity(fisher, granularity), layer_of, poster.group_of)


def group_means(fisher: dict[str, Tensor]) -> dict[str, float]:
    """Mean Fisher value over the units of each of the poster's groups."""
    units: dict[str, list[Tensor]] = {group: [] for group in poster.GROUPS}
    for name, values in fisher.items():
        units[poster.group_of(name)].append(values.reshape(-1))
    return {group: torch.cat(values).mean().item() for group, values in units.items()}


def size_sweep(
    model: nn.Module, scores: dict[str, Tensor], format: str, granularity: str, count: int
) -> pd.DataFrame:
    """Size of the plan at every threshold of `threshold_grid`: columns format, granularity,
    threshold, kept_share, mem_mib, mem_share.

    scores: one value per weight, or per weight tensor. kept_share: of the weights of the six
    layers; mem_mib: of the whole model. Only numbers of kept weights are counted, no masks built,
    which takes seconds at width 64; a test holds the sizes equal to those of the plans (`sizes`).
    """
    values, weights = threshold_grid(scores, count), quantizable(model)
    thresholds = torch.tensor(values, dtype=next(iter(scores.values())).dtype)
    full, all_weights = nbytes(model, {}), sum(w.numel() for w in weights.values())
    total = torch.zeros(len(values), dtype=torch.int64)
    rest = full - 4 * sum(weights[n].numel() for n in scores)
    stored = torch.full((len(values),), rest, dtype=torch.int64)
    for name, score in scores.items():
        size, view = weights[name].numel(), channel_view(model, name)
        ascending = score.flatten().cpu().sort().values
        kept = (score.numel() - torch.searchsorted(ascending, thresholds)) * (size // score.numel())
        total += kept
        kept_by_channel = torch.zeros(view.size[0], dtype=torch.int64)
        channels = {get_format(format): torch.arange(view.size[0])}
        for i, number in enumerate(kept.tolist()):
            # In one format, bytes depend on the sum of the kept weights alone: all of them stand in
            # channel 0.
            kept_by_channel[0] = number
            stored[i] += (
                4 * size if number == size else counted_bytes(view, channels, kept_by_channel)
            )
    return pd.DataFrame(
        {
            "format": format,
            "granularity": granularity,
            "threshold": values,
            "kept_share": (total.double() / all_weights).numpy(),
            "mem_mib": (stored.double() / MIB).numpy(),
            "mem_share": (stored.double() / full).numpy(),
        }
    )


def size_table(
    model: nn.Module, rule: str, fisher: dict[str, Tensor], kinds: list[list[str]], count: int
) -> pd.DataFrame:
    """`size_sweep` of a rule for several kinds, each a format and a granularity."""
    sweeps = [
        size_sweep(model, rule_scores(rule, fisher, granularity), format, granularity, count)
        for format, granularity in kinds
    ]
    return pd.concat(sweeps, ignore_index=True)


def nearest_size(sweeps: pd.DataFrame, share: float) -> pd.DataFrame:
    """Of every (format, granularity) the row of `size_sweep` whose share of the baseline's bytes is
    nearest to `share`; a column `target` says so in words.
    """
    kinds = [sweeps["format"], sweeps["granularity"]]
    nearest = sweeps.loc[(sweeps["mem_share"] - share).abs().groupby(kinds).idxmin()]
    counts = sweeps.groupby(kinds)["threshold"].transform("size")[nearest.index]
    # These words stand for the threshold in recipes, as its last digits differ between machines: do
    # not reword them.
    words = [f"nearest to {share:.4f} of FP32 of {n} cuts" for n in counts]
    return nearest.assign(target=words).reset_index(drop=True)


def threshold_rows(
    rule: str, fisher: dict[str, Tensor], chosen: pd.DataFrame, inception: bool = False
) -> list[Row]:
    """A rule's row at every threshold of `nearest_size`; what scores at least the threshold is
    kept.
    """
    rows = []
    for cut in chosen.itertuples():
        setting = f"{SYMBOLS[rule]}={cut.threshold:.3g}"
        masks = keep_above(rule_scores(rule, fisher, cut.granularity), cut.threshold)
        plan = make_plan(masks, cut.format)
        key = rule, setting, cut.format, cut.granularity, "nearest"
        rows.append(Row(*key, plan, inception, cut.target))
    return rows


def uniform_rows(model: nn.Module, formats: Sequence[str] = ("fp16", "int8")) -> list[Row]:
    """All weights of the six layers in one format: the rows that go with every table."""
    plans = {low: dict.fromkeys(quantizable(model), low) for low in formats}
    return [
        Row("uniform", "all", low, "tensor", "nearest", plan, inception=True)
        for low, plan in plans.items()
    ]


def keep_ratio(fisher: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Per layer the floor(ratio * n) of n units of highest Fisher value; ValueError outside
    [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(
            f"ratio {ratio} is outside [0, 1]: it is the share of a layer's units to keep"
        )
    return keep_above(RULES["ratio"](fisher, layer_of, poster.group_of), 1 - ratio)


def ratio_rows(
    fisher: dict[str, Tensor],
    ratios: Sequence[float],
    coarse: Sequence[float] = (),
    formats: Sequence[str] = ("int8",),
    granularities: Sequence[str] = ("weight",),
) -> list[Row]:
    """The ratio rule: the paper's ratios, and coarse ones by weight; Inception by weight for the
    paper's.
    """
    rows = []
    for granularity in granularities:
        by_weight, values = granularity == "weight", by_granularity(fisher, granularity)
        for low in formats:
            for ratio in sorted({*ratios, *(coarse if by_weight else ())}):
                plan = make_plan(keep_ratio(values, ratio), low)
                key = "ratio", f"{ratio:.2f}", low, granularity, "nearest"
                rows.append(Row(*key, plan, inception=by_weight and ratio in ratios))
    return rows


def published_rows(
    model: nn.Module, fisher: dict[str, Tensor], ratios: Sequence[float], count: int
) -> list[Row]:
    """The rows of the poster's table in INT8 on single weights, beside the baseline and both
    uniform formats.

    Global, group-wise and mean/std thresholds are taken at the paper's share of bytes, the nearest
    of `count` thresholds.
    """
    rows = [BASELINE._replace(inception=True), *uniform_rows(model)]
    for rule, share in poster.TARGET_SHARE.items():
        sizes = size_table(model, rule, fisher, [["int8", "weight"]], count)
        rows += threshold_rows(rule, fisher, nearest_size(sizes, share), inception=True)
    return rows + ratio_rows(fisher, ratios)


def claimed_rows(model: nn.Module, fisher: dict[str, Tensor], count: int) -> list[Row]:
    """The rows C3 and C4 speak of, in INT8: the baseline, uniform FP16, the group row at the
    paper's size, the ratios.
    """
    sizes = size_table(model, "group", fisher, [["int8", "weight"]], count)
    group = threshold_rows("group", fisher, nearest_size(sizes, poster.TARGET_SHARE["group"]))
    ratios = ratio_rows(fisher, poster.RATIOS)
    return [BASELINE, *uniform_rows(model, ("fp16",)), *group, *ratios]


def measured_sensitivity(
    model: nn.Module, samples: int, seed: int, channels: int | None = None
) -> Sensitivity:
    """Sensitivity of all weights, the input and output convolutions' too, from so many noised
    training digits.

    Not shrunk, and with all output channels in every pass: with so many passes that changes the
    damage little (results/benchmarks/passes.csv), and the tables of `make evidence`, which take
    hours, were made so.
    """
    batches = noised_batches(mnist(train=True)[0], samples, seed)
    return estimate_sensitivity(model, batches, seed, shrink=False, channels=channels)


def made(samples: int, seed: int) -> dict[str, Any]:
    """What recipes say of plans that are made from `measured_sensitivity` and rounded with error
    feedback.
    """
    return {
        "rounding": FEEDBACK,
        "fisher": {"kind": "Monte Carlo", "samples": samples, "seed": seed},
    }


def mib_at(model: nn.Module, bits: float) -> float:
    """MiB of the whole model when the weights of the six layers take this many bits each, the rest
    FP32.
    """
    weights = sum(w.numel() for w in quantizable(model).values())
    return (nbytes(model, {}) - 4 * weights + bits * weights / 8) / MIB


def bits_of(model: nn.Module, plan: Plan) -> float:
    """Stored bits per weight of the six layers, scales and masks included."""
    return bits_per_weight(model, plan, quantizable(model))


def at_bits(
    rule: str, format: str, granularity: str, rounding: str, bits: float, plan: Plan
) -> Row:
    """The row of a plan that was made for a budget in bits per weight."""
    return Row(rule, f"{bits:.3f}", format, granularity, rounding, plan, bits=bits)


def uniform_at_bits(model: nn.Module, sensitivity: Sensitivity) -> list[Row]:
    """All weights in one format: rounded as everywhere, and with the allocator's scales and error
    feedback.
    """
    plans = {low: Plan(dict.fromkeys(quantizable(model), low)) for low in (*INTEGERS, "fp16")}
    bits = {low: bits_of(model, plan) for low, plan in plans.items()}
    feedback = Recipe(unshrunk_scale, sensitivity.fisher, sensitivity.curvature)
    rounded = {low: Plan(plans[low], feedback) for low in INTEGERS}
    return [
        at_bits("uniform", low, "tensor", rounding, bits[low], plan)
        for rounding, by_format in (("nearest", plans), ("feedback", rounded))
        for low, plan in by_format.items()
    ]


def allocated_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    granularities: Sequence[str] = ALLOCATED,
    variants: Sequence[tuple[str, str]] = VARIANTS,
) -> list[Row]:
    """The allocator at these granularities and budgets, and its variants at granularity "mixed".

    A budget below the smallest possible size is left out, and a line says so.
    """
    layers, rows = {name: sensitivity.fisher[name] for name in quantizable(model)}, []
    kinds = [("allocate", "feedback", granularity) for granularity in granularities]
    for rule, rounding, granularity in [*kinds, *((*kind, "mixed") for kind in variants)]:
        fisher = sensitivity.fisher if rule == "allocate_all" else layers
        curvature = sensitivity.curvature if rounding == "feedback" else None
        frontiers = solver.frontiers_of(
            model, fisher, granularity, STUDY_FORMATS, curvature=curvature
        )
        how = Recipe(unshrunk_scale, sensitivity.fisher, curvature)
        for b in bits:
            try:
                plan = solver.solve_budget(model, frontiers, mib_at(model, b), recipe=how)
            except ValueError:
                print(f"{rule}, {rounding}, {granularity}: {b:.2f} bits per weight cannot be met")
                continue
            rows.append(at_bits(rule, "any", granularity, rounding, b, plan))
    return rows


def coded_at_bits(model: nn.Module, sensitivity: Sensitivity, bits: Sequence[float]) -> list[Row]:
    """The steps that `allocate_coded` chooses for all weights, in files of as many bytes as
    `mib_at` counts for these bits.
    """
    rows = []
    for b in bits:
        try:
            plan = allocate_coded(model, sensitivity, mib_at(model, b), progress=False)
        except ValueError:
            print(f"entropy-coded: a file of {b:.2f} bits per weight cannot be met")
            continue
        rows.append(at_bits("allocate", "coded", "channel", "feedback", b, plan))
    return rows


def is_allocated(row: Row, granularity: str = "mixed") -> bool:
    """Whether the allocator chose the row's formats, and rounded it with error feedback."""
    return row[:1] + row[2:5] == ("allocate", "any", granularity, "feedback")


def tuned_rows(rows: list[Row], bits: Sequence[float], steps: int) -> list[Row]:
    """The allocator's rows of granularity "mixed" at these budgets, with biases and norms tuned for
    so many steps.
    """
    chosen = [row for row in rows if is_allocated(row) and row.bits in bits]
    return [row._replace(rounding="tuned", tuned=steps) for row in chosen]


def rules_at_bits(
    model: nn.Module,
    sensitivity: Sensitivity,
    bits: Sequence[float],
    seed: int,
    rules: Sequence[str] = RULES_AT_BITS,
) -> list[Row]:
    """The poster's four rules, and the same with magnitude or random scores: single weights kept,
    up to the same bytes.

    What is not kept goes to the largest integer format below the budget, what is kept stays FP16
    (FP32 where even all FP16 fits). Every plan comes twice: with the usual scales and nearest
    codes, and rounded as the allocator's plans are.
    """
    weights, g = quantizable(model), generator(seed)
    fisher = {name: sensitivity.fisher[name] for name in weights}
    scores = {rule: rule_scores(rule, fisher) for rule in RULES}
    scores["ratio"] = _from_0_to_1(scores["ratio"])
    scores["magnitude"] = {n: w.abs() for n, w in weights.items()}
    scores["random"] = {n: torch.rand(f.shape, generator=g) for n, f in fisher.items()}
    feedback, rows = Recipe(unshrunk_scale, sensitivity.fisher, sensitivity.curvature), []
    for b in bits:
        fitting = [f for f in (*INTEGERS, "fp16") if bits_of(model, dict.fromkeys(fisher, f)) < b]
        for rule in rules if fitting else ():
            low, high = fitting[-1], "fp32" if fitting[-1] == "fp16" else "fp16"
            plan = at_bytes(model, scores[rule], low, high, mib_at(model, b))
            for rounding, rounded in (("nearest", plan), ("feedback", Plan(plan, feedback))):
                rows.append(at_bits(rule, low, "weight", rounding, b, rounded))
    return rows


def at_bytes(
    model: nn.Module, scores: dict[str, Tensor], low: str, high: str, budget_mib: float
) -> Plan:
    """Keep as `high` the single weights of highest score, as many as fit in the budget, and send
    the others to `low`.
    """
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    fits, too_many = 0, len(values)
    while too_many - fits > len(values) / 2**16:
        count = (fits + too_many) // 2
        if (
            nbytes(model, make_plan(keep_above(scores, values[count].item()), low, high))
            <= budget_mib * MIB
        ):
            fits = count
        else:
            too_many = count
    threshold = values[fits].item() if fits else float("inf")
    return make_plan(keep_above(scores, threshold), low, high)


def _from_0_to_1(ratio_scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shares of `ratio_score`, r / n of rank r, as r / (n - 1) in every layer: so the kept
    images of this rule at a budget were made.
    """
    counts: dict[str, int] = {}
    for name, score in ratio_scores.items():
        counts[layer_of(name)] = counts.get(layer_of(name), 0) + score.numel()
    n = {name: counts[layer_of(name)] for name in ratio_scores}
    return {name: s * n[name] / max(n[name] - 1, 1) for name, s in ratio_scores.items()}
