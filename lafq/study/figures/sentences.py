"""Sentences that follow from the tables: what the rows show (the verdicts on the claims are in
claims.py).
"""

import math

import pandas as pd

from lafq.study import poster, published_images
from lafq.study.budget import summaries

FEATURES = {"fid_inception": "Inception", "fid_mnist": "MNIST"}


def published_ratio_sizes() -> str:
    """The poster's memory for its ratios beside what keeping that share of the weights in FP32, the
    rest in FP16, takes.
    """
    rows = [p for p in poster.POSTER if p.method == "ratio" and p.mem_mib]
    least = next(p.mem_mib for p in poster.README if p.method == "uniform")
    found = []
    for row in rows:
        share, needed = row.mem_mib / poster.BASELINE_MIB, (1 + float(row.threshold)) / 2
        below = "; below uniform FP16" if row.mem_mib < least else ""
        found.append(f"{share:.1%} at ratio {row.threshold} (at least {needed:.1%} needed{below})")
    return (
        "If a share r of the weights is FP32 and the rest FP16, the size is at least (1 + r) / 2 "
        "of FP32's bytes. The "
        "poster's sizes are smaller: " + "; ".join(found) + "."
    )


def drivers_of_fisher(timesteps: pd.DataFrame) -> str:
    """What drives C1 and C2: the share of the trace in the first bin of timesteps, and Layer2 per
    weight beside Layer6.
    """
    trace = timesteps["fisher"] * timesteps["weights"]
    first = timesteps["t_low"] == timesteps["t_low"].min()
    by_layer = (
        trace.groupby(timesteps["layer"]).sum()
        / timesteps["weights"].groupby(timesteps["layer"]).sum()
    )
    first_bin, over_layer6 = trace[first].sum() / trace.sum(), by_layer / by_layer["Layer6"]
    return (
        f"{first_bin:.0%} of all Fisher information lies at t <= "
        f"{timesteps[first]['t_high'].iloc[0]}. Fisher "
        f"information per weight: Layer1 has {over_layer6['Layer1']:.1f} and Layer2 "
        f"{over_layer6['Layer2']:.1f} times Layer6's."
    )


def layerwise_size() -> str:
    """Why C4 on size needs no test."""
    return (
        "We do not test whether thresholds by layer take fewer bytes than uniform FP16. A mix of "
        "FP32 and FP16 "
        "weights always takes more bytes than FP16 alone."
    )


def ratios_with_many_images(rows: pd.DataFrame) -> str:
    """The mean difference that C3 speaks of, and the best single ratio, in a table of INT8 rows
    with many images.
    """
    sweep = _int8_ratios(rows)
    best, (low, high) = sweep.loc[sweep["fid_mnist"].idxmin(), "threshold"], poster.BEST_RATIOS
    return (
        f"At N = {sweep['n_images'].iloc[0]:,} the mean FID (MNIST features) of the ratios in "
        f"0.35-0.40 minus that of the others "
        f"is {mean_inside_range(rows):+.2f}. The verdict on C3 tests only this mean. The best "
        f"single ratio ({best}) "
        f"is {'' if low <= float(best) <= high else 'not '}in 0.35-0.40."
    )


def mean_inside_range(rows: pd.DataFrame) -> float:
    """Mean FID (MNIST features) of the INT8 ratios that the poster calls best minus that of the
    others.
    """
    sweep = _int8_ratios(rows)
    means = (
        sweep["fid_mnist"]
        .groupby(sweep["threshold"].astype(float).between(*poster.BEST_RATIOS))
        .mean()
    )
    return means[True] - means[False]


def best_ratios(runs: pd.DataFrame) -> str:
    """The ratio of lowest FID (MNIST features) in each training run, by seed."""
    ratios = runs[runs["method"] == "ratio"].reset_index(drop=True)
    return ", ".join(ratios.loc[ratios.groupby("seed")["fid_mnist"].idxmin(), "threshold"])


def _int8_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[
        (rows["method"] == "ratio") & (rows["format"] == "int8") & (rows["granularity"] == "weight")
    ]


def published_inside(table: pd.DataFrame) -> str:
    """For how many rows of `poster.compare` the poster's difference from its baseline lies inside
    our interval.
    """
    rows = table[
        (table["method"] != "baseline")
        & table["fid_paper"].notna()
        & table["delta_fid_inception"].notna()
    ]
    published = rows["fid_paper"] - table[table["method"] == "baseline"]["fid_paper"].item()
    inside = published.between(rows["delta_fid_inception_low"], rows["delta_fid_inception_high"])
    named = ", ".join(f"{r.method} {r.threshold}" for r in rows[inside].itertuples())
    if named:
        lie = f"{(~inside).sum()} of the poster's {len(rows)} FID differences lie outside our 95 % intervals"
        return f"{lie} (same noise; inside: {named})."
    return f"Each of the poster's {len(rows)} FID differences lies outside our 95 % interval (same noise)."


def findings(
    published: pd.DataFrame, budget: pd.DataFrame, coded: pd.DataFrame, on_images: str
) -> list[str]:
    """The four findings: `poster.compare` of the rows of 08, and two tables: of rules at equal
    bytes, and of coded files.

    on_images: what `summaries.on_images` says.
    """
    return [
        by_format(published),
        against_noise(published),
        f"{summaries.best_rule(budget)} {on_images}",
        summaries.coded_sentence(coded),
    ]


def by_format(published: pd.DataFrame) -> str:
    """What uniform FP16 and INT8 do to FID, beside the poster's largest gain."""
    rows = published[published["method"] == "uniform"].set_index("format")
    said = {low: difference(rows.loc[low], "delta_fid_inception") for low in ("fp16", "int8")}
    n, steps, theirs = (
        published["n_images"].iloc[0],
        published["steps"].iloc[0],
        _published_differences(published),
    )
    ends = rows.loc[list(said), ["delta_fid_inception_low", "delta_fid_inception_high"]]
    bound = math.ceil(10 * ends.abs().to_numpy().max()) / 10
    largest = theirs.abs().idxmax()
    return (
        f"**Uniform FP16 and INT8 change FID by less than {bound:.1f}.** FP16: {said['fp16']}; "
        f"INT8: {said['int8']} (95 % "
        f"intervals; Inception features, N = {n}, {steps:,} steps, width {poster.WIDTH}). The "
        f"largest change in the poster's "
        f"table is {theirs[largest]:+.2f} (rule {published['method'][largest]})."
    )


def against_noise(published: pd.DataFrame) -> str:
    """Whether the poster's differences exceed what other noise does to FID, from the authors' own
    images.
    """
    noise, n = math.sqrt(2) * published_images.fid_noise(), published["n_images"].iloc[0]
    theirs = _published_differences(published).abs()
    return (
        f"**{(theirs < noise).sum()} of the poster's {len(theirs)} FID differences are smaller "
        f"than the effect of new noise.** "
        "The poster draws new noise for every row. The FID difference of two draws (authors' FP32 "
        "model; Inception features, "
        f"N = {n}) has standard deviation {noise:.1f}."
    )


def difference(row: pd.Series, name: str) -> str:
    """A signed value with its 95 % interval."""
    return f"{row[name]:+.2f} [{row[f'{name}_low']:+.2f}, {row[f'{name}_high']:+.2f}]"


def _published_differences(published: pd.DataFrame) -> pd.Series:
    rows = published[(published["method"] != "baseline") & published["fid_paper"].notna()]
    return rows["fid_paper"] - published[published["method"] == "baseline"]["fid_paper"].item()


def reached_sizes(table: pd.DataFrame, method: str, share: float) -> str:
    """Which size was reached beside the paper's, and what share of the weights it keeps, for each
    format and granularity.
    """
    rows = table[table["method"] == method]
    nearest = (
        (rows["mem_share"] - share)
        .abs()
        .groupby([rows["format"], rows["granularity"]], sort=False)
        .idxmin()
    )
    found = [
        f"{r.format} by {r.granularity} {r.mem_share:.1%} ({r.kept_share:.1%} of the weights stay "
        f"FP32)"
        for r in rows.loc[nearest].itertuples()
    ]
    return (
        f"{method}: the published size is {share:.1%} of FP32's. Our nearest sizes: "
        + "; ".join(found)
        + "."
    )


def changes_by_format(table: pd.DataFrame) -> str:
    """How far each format moves FID on MNIST features from the FP32 baseline, over all rows sampled
    from the same noise.
    """
    baseline = table[table["method"] == "baseline"]["fid_mnist"].item()
    rows = table[~table["format"].eq("fp32")]
    found = []
    for low, moves in (rows["fid_mnist"] - baseline).groupby(rows["format"]):
        least = f"{moves.min():+.3f}" + (f" to {moves.max():+.3f}" if len(moves) > 1 else "")
        found.append(f"{low} {least} ({len(moves)} row{'s' if len(moves) > 1 else ''})")
    n = table["n_images"].iloc[0]
    return (
        f"On MNIST features (N = {n}, the same noise) FP32 has FID {baseline:.2f}. The change: "
        + ", ".join(found)
        + "."
    )


def machines_compared(table: pd.DataFrame) -> str:
    """How far images of the same rows and noise, drawn on two kinds of machine, are from each
    other.
    """

    def found(rows: pd.DataFrame) -> str:
        equal = (rows["equal_pixels"] * rows["n_images"]).sum() / rows["n_images"].sum()
        largest = rows["largest_difference"].max()
        return f"{equal:.3%} of the pixels are equal, and the largest difference is {largest} of 255 grey levels"

    same = table["same_weights"]
    count, rows = table["n_images"].sum(), table["sample"].nunique()
    return (
        f"The committed images were drawn on one {table['machine'].iloc[0].partition(',')[0]} GPU. "
        f"We had drawn {count:,} of these "
        f"images, from {rows} rows, on CPUs before, and compared both. In the "
        f"{table[same]['sample'].nunique()} rows with the same "
        f"weights, {found(table[same])}. In the other {table[~same]['sample'].nunique()} rows the "
        f"Fisher information came from "
        f"another CPU, so a few other weights stayed in FP32. There {found(table[~same])}."
    )


def noise_caption(table: pd.DataFrame, noise: pd.DataFrame | None, metric: str) -> str:
    """The second line of a title: how much other noise moves the FID of one model at the table's N.

    noise: the table of `noise_floor.noise_floor`, where it has been made; metric: fid_inception or
    fid_mnist.
    """
    if noise is None:
        return "other noise was not measured for this model"
    rows = noise[
        (noise["features"] == FEATURES[metric])
        & (noise["images"] == "generated")
        & (noise["metric"] == "fid")
    ]
    spread = rows[rows["n"] == table["n_images"].iloc[0]]["sd"]
    return (
        f"other noise moves it by ±{spread.item():.1f}, 1 sd"
        if len(spread)
        else "other noise was not measured at this N"
    )


def training_quality(quality: pd.DataFrame | None) -> str:
    """The unquantized model's metrics on all check images, and their spread over disjoint blocks."""
    if quality is None:
        return "The spread of FID over disjoint blocks of images has not been measured for these weights."
    whole, blocks, first = quality.iloc[0], quality.iloc[1:], quality["fid_mnist"].iloc[1]
    lower = int((blocks["fid_mnist"] < first).sum())
    rank = (
        f"the lowest of the {len(blocks)} blocks"
        if lower == 0
        else f"and {lower} of the {len(blocks)} blocks have a lower one"
    )
    return (
        f"On MNIST features, N = {whole['n_images']}: IS {whole['is_mnist']:.2f}, FID "
        f"{whole['fid_mnist']:.2f}. Per block of "
        f"{blocks['n_images'].iloc[0]} of these images ({len(blocks)} blocks; mean +- standard "
        f"deviation): IS "
        f"{blocks['is_mnist'].mean():.2f} +- {blocks['is_mnist'].std():.2f}, FID "
        f"{blocks['fid_mnist'].mean():.2f} +- "
        f"{blocks['fid_mnist'].std():.2f} (FID is higher at small N). All tables use the noise of "
        f"the first block. Its FID is "
        f"{first:.2f}, {rank}."
    )
