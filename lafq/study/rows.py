"""The rows of every table: what made a model (rule, setting, format, granularity, rounding), its
quantization plan, and the functions that make the rows; those of a budget: `budget_rows`.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.allocation.rules import RULES, Scores, by_granularity, keep_above, threshold_grid
from lafq.quantization.channels import ChannelView, counted_bytes, weight_spec
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, get_format
from lafq.quantization.model import dequantize_, kept_weights, nbytes, quantize
from lafq.quantization.plan import Entries, Plan, as_plan, make_plan
from lafq.quantization.tuning import BATCH, tune
from lafq.rng import generator
from lafq.study import poster
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import GROUPS, group_of, layer_of, mnist, quantizable

KEY = ["rule", "setting", "format", "granularity", "rounding"]
BUDGET_KEY = ["rule", "format", "granularity", "rounding", "budget_bits"]
SYMBOLS = {"global": "tau", "group": "factor", "mean_std": "k"}  # of thresholds; a ratio has none


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
    chosen = torch.randint(weight_count(model), (count,), generator=generator(0))
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
    return sum(kept_weights(model, plan, n) for n in quantizable(model)) / weight_count(model)


def weight_count(model: nn.Module) -> int:
    """Weights of the six layers."""
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
    share = kept.double() / weight_count(model)
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
