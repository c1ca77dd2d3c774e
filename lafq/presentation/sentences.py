"""Sentences that follow from the tables: what the rows show (the verdicts on the claims are in claims.py)."""

import math

import pandas as pd

from lafq.paper import poster
from lafq.paper.audit import published_images
from lafq.paper.budget_study import summaries


def published_ratio_sizes() -> str:
    """The poster's memory for its ratios beside what keeping that share of the weights in FP32, the rest in FP16, takes."""
    rows = [p for p in poster.POSTER if p.method == "ratio" and p.mem_mib]
    least = next(p.mem_mib for p in poster.README if p.method == "uniform")
    found = []
    for row in rows:
        share, needed = row.mem_mib / poster.BASELINE_MIB, (1 + float(row.threshold)) / 2
        below = ", less than all weights in FP16 take" if row.mem_mib < least else ""
        found.append(f"{row.threshold}: {share:.1%} of FP32 published{below}, at least {needed:.1%} by that rule")
    return "The poster's memory does not follow from keeping the ratio in FP32 and the rest in FP16: " + "; ".join(found) + "."


def drivers_of_fisher(timesteps: pd.DataFrame) -> str:
    """What drives C1 and C2: the share of the trace in the first bin of timesteps, and Layer2 per weight beside Layer6."""
    trace = timesteps["fisher"] * timesteps["weights"]
    first = timesteps["t_low"] == timesteps["t_low"].min()
    by_layer = trace.groupby(timesteps["layer"]).sum() / timesteps["weights"].groupby(timesteps["layer"]).sum()
    first_bin, over_layer6 = trace[first].sum() / trace.sum(), by_layer / by_layer["Layer6"]
    return (
        f"{first_bin:.0%} of the trace lies at t <= {timesteps[first]['t_high'].iloc[0]}. Per weight, Layer1 has "
        f"{over_layer6['Layer1']:.1f} times the Fisher information of Layer6, and Layer2 {over_layer6['Layer2']:.1f} times."
    )


def layerwise_size() -> str:
    """Why C4 on size needs no test."""
    return (
        "C4, size: a mix of FP32 and FP16 stores more than FP16 for all weights, whatever the thresholds. "
        "That is arithmetic; there is nothing to test."
    )


def published_inside(table: pd.DataFrame) -> str:
    """For how many rows of `poster.compare` the poster's difference from its baseline lies inside our interval."""
    rows = table[(table["method"] != "baseline") & table["fid_paper"].notna() & table["delta_fid_inception"].notna()]
    published = rows["fid_paper"] - table[table["method"] == "baseline"]["fid_paper"].item()
    inside = published.between(rows["delta_fid_inception_low"], rows["delta_fid_inception_high"])
    named = ", ".join(f"{r.method} {r.threshold}" for r in rows[inside].itertuples())
    return f"Of {len(rows)} published differences from the baseline, {inside.sum()} lie inside our 95 % interval" + (
        f" ({named})." if named else "."
    )


def findings(published: pd.DataFrame, budget: pd.DataFrame) -> list[str]:
    """The four findings: `poster.compare` of the rows of 08, and the table of 06, where the rules have equal bytes."""
    return [
        by_format(published),
        f"{published_inside(published)} {against_noise(published)}",
        summaries.best_rule(budget),
        summaries.against_int8(budget),
    ]


def by_format(published: pd.DataFrame) -> str:
    """What uniform FP16 and INT8 do to FID, beside the poster's largest gain."""
    rows = published[published["method"] == "uniform"].set_index("format")
    said = {low: difference(rows.loc[low], "delta_fid_inception") for low in ("fp16", "int8")}
    n, steps = published["n_images"].iloc[0], published["steps"].iloc[0]
    return (
        f"FP16 weights change FID by {said['fp16']}, INT8 weights by {said['int8']} (N = {n}, {steps:,} sampling steps). "
        f"The poster's largest gain is {-_published_differences(published).min():.2f}."
    )


def against_noise(published: pd.DataFrame) -> str:
    """Whether the poster's differences exceed what other noise does to FID, from the authors' own images."""
    noise, n = math.sqrt(2) * published_images.fid_noise(), published["n_images"].iloc[0]
    theirs = _published_differences(published).abs()
    return (
        f"{(theirs < noise).sum()} of the poster's {len(theirs)} differences are smaller than what other noise alone does to the "
        f"FID of {n} images: {noise:.1f} (1 sd)."
    )


def difference(row: pd.Series, name: str) -> str:
    """A signed value with its 95 % interval."""
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def _published_differences(published: pd.DataFrame) -> pd.Series:
    rows = published[(published["method"] != "baseline") & published["fid_paper"].notna()]
    return rows["fid_paper"] - published[published["method"] == "baseline"]["fid_paper"].item()


def nearest_size(table: pd.DataFrame, method: str, share: float) -> str:
    """Which size was reached beside the paper's, and what share of the weights it keeps, for each format and granularity."""
    rows = table[table["method"] == method].drop_duplicates(["format", "granularity"])
    found = [
        f"{r.format} by {r.granularity}: {r.mem_share:.1%} ({r.kept_share:.1%} of the weights kept)" for r in rows.itertuples()
    ]
    return f"{method}: the paper's size is {share:.1%} of FP32; nearest reachable here: " + "; ".join(found) + "."


def against_baseline(table: pd.DataFrame) -> str:
    """How far each format moves FID on MNIST features from the FP32 baseline, over all rows sampled from the same noise."""
    baseline = table[table["method"] == "baseline"]["fid_mnist"].item()
    rows = table[~table["format"].eq("fp32")]
    moves = (rows["fid_mnist"] - baseline).groupby(rows["format"]).agg(["min", "max"])
    found = [f"{low} by {m['min']:+.3f} to {m['max']:+.3f}" for low, m in moves.iterrows()]
    return f"Against the FP32 baseline's FID (MNIST features) of {baseline:.2f}, same noise: " + ", ".join(found) + "."


def noise_of_fid(table: pd.DataFrame, quality: pd.DataFrame | None) -> float:
    """Standard deviation of FID on MNIST features over the blocks that have as many images as the table's rows, else NaN."""
    if quality is None:
        return math.nan
    return quality[quality["n_images"] == table["n_images"].iloc[0]]["fid_mnist"].std()


def scale(table: pd.DataFrame, quality: pd.DataFrame | None) -> str:
    """One line for a figure: how much a draw of other noise moves the FID of one model, beside what the axis shows."""
    noise = noise_of_fid(table, quality)
    return (
        "the same noise in every row"
        if pd.isna(noise)
        else f"same noise in every row; other noise moves FID by ±{noise:.1f} (1 sd)"
    )


def training_quality(quality: pd.DataFrame | None) -> str:
    """The unquantized model's metrics on all check images, and their spread over disjoint blocks."""
    if quality is None:
        return "The spread of FID over disjoint blocks of images has not been measured for these weights."
    whole, blocks = quality.iloc[0], quality.iloc[1:]
    return (
        f"{whole['n_images']} images: is_mnist {whole['is_mnist']:.2f}, FID (MNIST features) {whole['fid_mnist']:.2f}. "
        f"In {len(blocks)} blocks of {blocks['n_images'].iloc[0]}: is_mnist {blocks['is_mnist'].mean():.2f} +- "
        f"{blocks['is_mnist'].std():.2f}, FID {blocks['fid_mnist'].mean():.2f} +- {blocks['fid_mnist'].std():.2f}; the "
        f"first block, whose noise the tables' rows share, has {blocks['fid_mnist'].iloc[0]:.2f}, number "
        f"{int((blocks['fid_mnist'] <= blocks['fid_mnist'].iloc[0]).sum())} from below."
    )
