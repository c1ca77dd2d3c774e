"""Sentences that follow from the tables: a verdict for each claim of the paper, and what the rows show."""

import pandas as pd

from lafq import paper

EXPECTED_RANGE = 2.847  # of eight draws of a Gaussian, in standard deviations: the sweep has eight ratios


def verdict_c1(timesteps: pd.DataFrame) -> str:
    """C1, later reverse steps (t near 0) have higher Fisher values, judged on `fisher, t_low, weights` rows.

    Holds when the mean over all weights falls with t: rank correlation below -0.9 and the first bin the highest.
    """
    mean = _mean_by(timesteps, "t_low")
    rho = mean.reset_index(drop=True).corr(pd.Series(mean.index), method="spearman")
    verdict = "holds" if rho < -0.9 and mean.idxmax() == mean.index.min() else "does not hold"
    return (
        f"C1 (later reverse steps have higher Fisher values) {verdict}: the rank correlation of mean Fisher with t is "
        f"{rho:.2f}; the bin nearest t = 0 has {mean.iloc[0] / mean.iloc[-1]:,.4g} times the mean of the bin nearest 999."
    )


def verdict_c2(timesteps: pd.DataFrame) -> str:
    """C2, Layers 1 and 2 have notably higher Fisher values than layers 3-6, judged on `fisher, layer, weights` rows.

    Holds when both layers' means exceed twice every other layer's, partly when their joint mean does.
    """
    mean = _mean_by(timesteps, "layer")
    front, rest = mean[["Layer1", "Layer2"]], mean.drop(["Layer1", "Layer2"])
    joint = timesteps[timesteps["layer"].isin(front.index)]
    others = timesteps[timesteps["layer"].isin(rest.index)]
    ratio = _mean_by(joint.assign(all=0), "all").item() / _mean_by(others.assign(all=0), "all").item()
    holds = front.min() > 2 * rest.max()
    verdict = "holds" if holds else "holds in part" if ratio > 2 else "does not hold"
    order = ", ".join(f"{name} {value:.3g}" for name, value in mean.sort_values(ascending=False).items())
    return (
        f"C2 (Layers 1 and 2 have notably higher Fisher values) {verdict}: the mean a weight is {ratio:.3g} times that of "
        f"layers 3-6; by layer, highest first: {order}."
    )


def verdict_c3(table: pd.DataFrame, metric: str, noise: float = float("nan")) -> str:
    """C3, the best ratio lies in 0.35-0.40, judged on the poster's ratios of one unit and format (lower is better).

    Cannot be told when the range over the ratios is below that of as many draws of noise alone. noise: the metric's
    standard deviation over draws of other noise, from one model.
    """
    sweep = table[(table["method"] == "ratio") & table["threshold"].isin([f"{r:.2f}" for r in paper.RATIOS])]
    values = sweep.set_index(sweep["threshold"].astype(float))[metric].sort_index()
    best, spread = values.idxmin(), values.max() - values.min()
    ties = values.index[values == values.min()]
    inside = all(paper.BEST_RATIOS[0] <= r <= paper.BEST_RATIOS[1] for r in ties)
    verdict = "holds" if inside else "does not hold"
    by_chance = EXPECTED_RANGE * noise
    if spread < by_chance:
        verdict = "cannot be told"
    against = "" if pd.isna(noise) else f", where other noise alone gives {by_chance:.3g} (standard deviation {noise:.3g})"
    return (
        f"C3 (the best ratio lies in 0.35-0.40) {verdict} by {metric}, {sweep['format'].iloc[0]}, unit "
        f"{sweep['unit'].iloc[0]}: lowest at {best:.2f}; range over the ratios {spread:.3g}{against}."
    )


def c3_sentences(table: pd.DataFrame, quality: pd.DataFrame) -> list[str]:
    """C3 for every unit and format of a ratio sweep on MNIST features, and on Inception where there are values.

    The noise of FID on MNIST features is its standard deviation over the blocks of `experiment.quality`, where they have
    as many images as the rows; that of Inception FID was measured on the authors' published images.
    """
    noise = noise_of_fid(table, quality)
    sweep = table[(table["method"] == "ratio") & table["threshold"].isin([f"{r:.2f}" for r in paper.RATIOS])]
    sentences = []
    for _, rows in sweep.groupby(["format", "unit"]):
        sentences.append(verdict_c3(rows, "fid_mnist", noise))
        if rows["fid_inception"].notna().all():
            sentences.append(verdict_c3(rows, "fid_inception", paper.FID_NOISE))
    return sentences


def published_ratio_sizes() -> str:
    """The poster's memory for its ratios beside what keeping that share of the weights in FP32, the rest in FP16, takes."""
    rows = [p for p in paper.POSTER if p.method == "ratio" and p.mem_mib]
    least = next(p.mem_mib for p in paper.README if p.method == "uniform")
    found = []
    for row in rows:
        share, needed = row.mem_mib / paper.BASELINE_MIB, (1 + float(row.threshold)) / 2
        below = ", less than all weights in FP16 take" if row.mem_mib < least else ""
        found.append(f"{row.threshold}: {share:.1%} of FP32 published{below}, at least {needed:.1%} by that rule")
    return "The poster's memory does not follow from keeping the ratio in FP32 and the rest in FP16: " + "; ".join(found) + "."


def nearest_size(table: pd.DataFrame, method: str, share: float) -> str:
    """Which size was reached beside the paper's, and what share of the weights it keeps, for each format and unit."""
    rows = table[table["method"] == method].drop_duplicates(["format", "unit"])
    found = [f"{r.format}, unit {r.unit}: {r.mem_share:.1%} ({r.kept_share:.1%} of the weights kept)" for r in rows.itertuples()]
    return f"{method}: the paper's size is {share:.1%} of FP32; nearest reachable here: " + "; ".join(found) + "."


def against_baseline(table: pd.DataFrame) -> str:
    """How far each format moves FID on MNIST features from the FP32 baseline, over all rows sampled from the same noise."""
    baseline = table[table["method"] == "baseline"]["fid_mnist"].item()
    rows = table[~table["format"].eq("fp32")]
    moves = (rows["fid_mnist"] - baseline).groupby(rows["format"]).agg(["min", "max"])
    found = [f"{low} by {m['min']:+.3f} to {m['max']:+.3f}" for low, m in moves.iterrows()]
    return f"Against the FP32 baseline's FID (MNIST features) of {baseline:.2f}, same noise: " + ", ".join(found) + "."


def noise_of_fid(table: pd.DataFrame, quality: pd.DataFrame) -> float:
    """Standard deviation of FID on MNIST features over the blocks that have as many images as the table's rows, else NaN."""
    return quality[quality["n_images"] == table["n_images"].iloc[0]]["fid_mnist"].std()


def scale(table: pd.DataFrame, quality: pd.DataFrame) -> str:
    """One line for a figure: how much a draw of other noise moves the FID of one model, beside what the axis shows."""
    noise = noise_of_fid(table, quality)
    return "one draw of the noise" if pd.isna(noise) else f"same noise in every row; other noise moves FID by +-{noise:.1f} (1 sd)"


def training_quality(quality: pd.DataFrame) -> str:
    """The unquantized model's metrics on all check images, and their spread over disjoint blocks."""
    whole, blocks = quality.iloc[0], quality.iloc[1:]
    return (
        f"{whole['n_images']} images: is_mnist {whole['is_mnist']:.2f}, FID (MNIST features) {whole['fid_mnist']:.2f}. "
        f"In {len(blocks)} blocks of {blocks['n_images'].iloc[0]}: is_mnist {blocks['is_mnist'].mean():.2f} +- "
        f"{blocks['is_mnist'].std():.2f}, FID {blocks['fid_mnist'].mean():.2f} +- {blocks['fid_mnist'].std():.2f}."
    )


def _mean_by(timesteps: pd.DataFrame, column: str) -> pd.Series:
    """Mean Fisher a weight by a column, tensors weighted by their number of weights."""
    weighted = timesteps.assign(total=timesteps["fisher"] * timesteps["weights"]).groupby(column)[["total", "weights"]]
    sums = weighted.sum()
    return sums["total"] / sums["weights"]
