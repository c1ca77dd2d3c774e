"""The tables of 07_audit and 12_noise as a reader sees them, and what follows from them."""

import pandas as pd

from lafq.study import workspace
from lafq.study.figures.tables import format_table
from lafq.study.published_images import UNQUANTIZED
from lafq.study.workspace import Workspace

LEVEL = 0.05
UNTRAINED, OWN_INPUT, BY_TENSOR = (
    "untrained network (R2)",
    "loss against the input, one image, t = 1 (R3)",
    "weight tensor as the unit (R4)",
)


def choices_shown(choices: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """What each choice of Fisher values keeps, and what the ratio rule on them does to FID and
    loss.

    choices: `released_code.fisher_choices`; rows: 07_audit, INT8 with intervals.
    """
    shown = choices[["choice", "rank_correlation", "kept_in_common"]].round(2)
    columns = ["threshold", "delta_fid_mnist", "delta_loss"]
    by_choice = format_table(rows, columns).assign(choice=rows["threshold"].str.partition(", ")[2])
    shown = shown.merge(by_choice.drop(columns="threshold"), on="choice")
    return shown.assign(delta_loss_int4=choices["delta_loss_int4"].map("{:+.2e}".format))


def choices_said(rows: pd.DataFrame, choices: pd.DataFrame) -> str:
    """What the choice of Fisher values does to the denoising loss.

    rows: 07_audit, INT8 with intervals; choices: 07_fisher_choices, INT4 without.
    """
    around = (rows["delta_loss_low"] <= 0) & (rows["delta_loss_high"] >= 0)
    least = choices.loc[choices["delta_loss_int4"].idxmin()]
    return (
        f"INT8: the interval of `delta_loss` contains 0 in {around.sum()} of {len(rows)} rows. "
        f"INT4: "
        f"`delta_loss_int4` is smallest with the Fisher values of {least['choice']} "
        f"({least['delta_loss_int4']:+.2e}; no interval was taken)."
    )


def protocol_shown(table: pd.DataFrame, *choices: str) -> pd.DataFrame:
    """The rows of a table of `released_code.protocol_choices` that speak of these choices, as they are
    shown.
    """
    rows = table[table["choice"].str.contains("|".join(choices))].reset_index(drop=True)
    shown = rows.round(2).astype(object).where(rows.notna(), "")
    shown["choice"] = (
        shown["choice"]
        .replace(r" \(R1.*\)", "", regex=True)
        .replace(
            r", real digits 28x28 \(R6; (\d+) of them\)",
            r", \1 real digits (R6: 28x28)",
            regex=True,
        )
    )
    ends = [
        f" [{low:+.2f}, {high:+.2f}]" if low == low else ""
        for low, high in rows[["change_low", "change_high"]].to_numpy()
    ]
    shown["change"] = [
        f"{change:+.2f}{interval}" for change, interval in zip(rows["change"], ends, strict=True)
    ]
    shown = shown.drop(columns=["change_low", "change_high"])
    return shown.rename(columns={"here": "our protocol", "released": "with the released choice"})


def published_scores(table: pd.DataFrame) -> pd.DataFrame:
    """`published_images.scores` as it is shown: one row per set, mean +- standard deviation over
    the blocks of N.
    """

    def cell(row: pd.Series, name: str) -> str:
        spread = "" if pd.isna(row[f"{name}_sd"]) else f" +- {row[f'{name}_sd']:.2g}"
        return "" if pd.isna(row[name]) else f"{row[name]:.4g}{spread}"

    cells = table.assign(
        **{name: [cell(row, name) for _, row in table.iterrows()] for name in ("fid", "kid", "is")}
    )
    return cells[["features", "set", "n", "blocks", "fid", "kid", "is"]].rename(
        columns={"fid": "FID", "kid": "KID", "is": "IS"}
    )


def compared_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`published_images.compared` as it is shown; p values are corrected (Holm), but for the
    control's.
    """
    p = {
        name: table[f"{name}_holm"].fillna(table[name]).map("{:.2g}".format)
        for name in ("kid_p", "classes_p")
    }
    digit = [f"{r.digit}: {r.share:.1%} against {r.share_fp32:.1%}" for r in table.itertuples()]
    shown = table[["set", "images", "images_fp32"]].assign(
        fid_to_fp32=table["fid_to_fp32"].round(1), **p
    )
    return shown.assign(
        **{"largest difference (digit: its share in the set against FP32's)": digit}
    )


def published_sets(table: pd.DataFrame) -> str:
    """Which published sets a test tells from another draw of the unquantized one: a sentence on
    `published_images.compared`.
    """
    sets = table.iloc[1:].assign(least=table[["kid_p_holm", "classes_p_holm"]].min(axis=1))
    told, alike = sets[sets["least"] < LEVEL], sets[sets["least"] >= LEVEL]
    said = (
        f"We tested {len(sets)} published image sets against the {UNQUANTIZED} set, by KID (kernel "
        f"distance) and by how often "
        f"each digit occurs. The tests found no difference for {len(alike)} sets "
        f"({', '.join(alike['set'])}; smallest corrected "
        f"p: {alike['least'].min():.2f})."
    )
    for row in told.itertuples():
        said += (
            f" The {row.set} set differs (p = {row.kid_p_holm:.2g} for KID, "
            f"{row.classes_p_holm:.1g} for the digits): the digit "
            f"{row.digit} is on {row.share:.1%} of its images, but on {row.share_fp32:.1%} of "
            f"{UNQUANTIZED}'s. Noise alone does "
            "not explain this."
        )
    return said


def images_of_r1(protocol: pd.DataFrame, images: int) -> str:
    """What the released sampling does to a quantized row: a sentence on `released_code.protocol_choices`
    of so many images.
    """
    row = protocol[protocol["choice"].str.contains("R1")].iloc[-1]
    ends = f"[{-row['change_high']:+.2f}, {-row['change_low']:+.2f}]"
    return (
        "As released, the code draws images with the unquantized weights (R1): from the same "
        "noise, INT8 changes FID by "
        f"{row['released']:.2f}. By our protocol INT8 changes FID by {row['here']:+.2f} {ends} "
        f"({row['features']} features, "
        f"N = {images})."
    )


def fisher_of_r2(choices: pd.DataFrame, ratio: str) -> str:
    """What the Fisher values of an untrained network have in common with ours: a sentence on
    `released_code.fisher_choices`.
    """
    row = choices.set_index("choice").loc[UNTRAINED]
    return (
        "The code computes the Fisher values of an untrained network (R2). Such values have a rank "
        "correlation of "
        f"{row['rank_correlation']:.2f} with ours (mean over layers). With both sets of values, "
        f"ratio {ratio} keeps "
        f"{row['kept_in_common']:.0%} of the same weights (by chance: {float(ratio):.0%})."
    )


def conclusions(work: Workspace) -> pd.DataFrame:
    """R1 to R7, each with its effect in the tables of 07_audit: columns choice, released code, its
    effect.
    """
    choices = workspace.load_table(work, "07_fisher_choices").set_index("choice")
    groups, limited = (
        workspace.load_table(work, "07_groups"),
        workspace.load_table(work, "07_clamped_loss").iloc[0],
    )
    protocol = workspace.load_table(work, "07_protocol")
    ratio = workspace.load_table(work, "07_audit")["threshold"].iloc[0].partition(",")[0]
    judge = protocol["features"].iloc[-1]  # Inception, where it is to be had
    rows = protocol[protocol["features"] == judge]

    def fisher(choice: str) -> str:
        row = choices.loc[choice]
        common = f"overlap with the weights that we keep (ratio {ratio}): {row['kept_in_common']:.0%}, by chance {float(ratio):.0%}"
        return (
            f"mean rank correlation with our Fisher values: {row['rank_correlation']:.2f}; {common}"
        )

    def scored(choice: str) -> str:
        found = rows[rows["choice"].str.contains(choice)]
        if found.empty:
            return "not measured without Inception"
        row = found.iloc[0]
        what = row["choice"].split(" (")[0].split(",")[0] + (
            " (500 real digits)" if choice == "R6" else ""
        )
        return f"{what}: {row['released']:.2f} with this choice, {row['here']:.2f} by our protocol ({judge})"

    none = groups[groups["tensors_kept"] == 0]["group"]
    kept = f"no tensor of {', '.join(none)}" if len(none) else "tensors of every group"
    said = [
        (
            "R1",
            "images are drawn from the EMA weights; the code quantizes other weights",
            scored("R1"),
        ),
        ("R2", "Fisher values of an untrained network", fisher(UNTRAINED)),
        ("R3", "a loss between output and input, one image, t = 1", fisher(OWN_INPUT)),
        ("R4", "one Fisher value per weight tensor", fisher(BY_TENSOR)),
        (
            "R5",
            "group compares Fisher values with mean squared weights; mean_std clips weights at "
            "limits from Fisher values",
            f"group keeps {kept}; mean_std raises the denoising loss from "
            f"{limited['as trained']:.3f} to {limited['limited']:.3f}",
        ),
        ("R6", "real digits are 28x28", scored("R6")),
        ("R7", "no seed: every row has other noise", scored("R7")),
    ]
    return pd.DataFrame(said, columns=["choice", "released code", "its effect"])
