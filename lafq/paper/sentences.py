"""Sentences that follow from the tables: what the rows show (the verdicts on the claims are in claims.py)."""

import math

import pandas as pd

from lafq.paper import poster


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


def nearest_size(table: pd.DataFrame, method: str, share: float) -> str:
    """Which size was reached beside the paper's, and what share of the weights it keeps, for each format and granularity."""
    rows = table[table["method"] == method].drop_duplicates(["format", "granularity"])
    found = [
        f"{r.format}, granularity {r.granularity}: {r.mem_share:.1%} ({r.kept_share:.1%} of the weights kept)"
        for r in rows.itertuples()
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
