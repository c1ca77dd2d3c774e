"""The picture and the sliders of 00_explore."""

import html
import io
from contextlib import redirect_stderr

import ipywidgets
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from lafq.allocation.rules import GRANULARITIES
from lafq.quantization.formats import MIB
from lafq.quantization.model import nbytes
from lafq.study.figures import plots
from lafq.study.figures.explore import LOW, RULES, Outcome, Setting, Subject, outcome

AMPLIFIED = 8  # differences of images are drawn this many times as bright
SIZE = (12.5, 7)  # inches


def sentences(subject: Subject, found: Outcome) -> list[str]:
    """What is stored, what is kept, and the predicted damage."""
    full, times = nbytes(subject.model, {}), found.damage / subject.int8
    rest = (
        "the formats are chosen"
        if found.setting.rule == "allocator"
        else f"the rest {found.setting.format}"
    )
    return [
        f"{found.nbytes / MIB:.2f} MiB stored of {full / MIB:.2f} ({found.nbytes / full:.1%} of "
        f"FP32)",
        f"{found.kept:.1%} of the weights kept in FP32, {rest} ({found.threshold})",
        f"Predicted damage {found.damage:.2g}: "
        f"{f'{times:,.0f}' if times >= 10 else f'{times:.2g}'} times uniform INT8's",
    ]


def draw(figure: Figure, subject: Subject, found: Outcome) -> None:
    """Share kept and bits per weight of every weight tensor; below, digits of both models, and how
    they differ.
    """
    above, below = figure.subfigures(2, 1, height_ratios=[1.6, 1])
    axes, table = above.subplots(2, 1, sharex=True), found.by_tensor
    colours = dict(zip(table["layer"].unique(), sns.color_palette(), strict=False))
    for ax, values in zip(axes, (100 * table["kept_share"], table["bits_per_weight"]), strict=True):
        ax.bar(table.index, values, color=table["layer"].map(colours))
        ax.grid(False, axis="x")
    axes[0].set(
        ylabel="in FP32 (%)",
        ylim=(0, 100),
        yticks=[0, 25, 50, 75, 100],
        xlim=(-0.6, len(table) - 0.4),
    )
    axes[1].set(ylabel="bits per weight", ylim=(0, 34), yticks=[0, 8, 16, 24, 32])
    for layer, rows in table.groupby("layer"):
        axes[0].text(rows.index.to_numpy().mean(), 104, layer, ha="center")
    if not found.kept:
        axes[0].text(
            len(table) / 2,
            50,
            "No weight is kept in FP32",
            ha="center",
            va="center",
            backgroundcolor="white",
        )
    short = [
        name.split(".", 1)[1].removesuffix(".weight").replace("attention", "attn")
        for name in table["parameter"]
    ]
    axes[1].set_xticks(table.index, short, rotation=60, ha="right", fontsize=8)
    stored, kept, damage = sentences(subject, found)
    above.suptitle(
        f"{stored}. {damage}.\nRule {found.setting.rule}, per {found.setting.granularity}: {kept}",
        fontsize=11,
    )
    before, after = subject.digits.astype(int), found.digits.astype(int)
    off = (AMPLIFIED * np.abs(after - before)).clip(0, 255)
    titles = ("FP32 model", "Quantized, from the same noise", f"Difference, x {AMPLIFIED}")
    for ax, images, title in zip(below.subplots(1, 3), (before, after, off), titles, strict=True):
        plots.digits(ax, images, len(images) // (2 - len(images) % 2), title)
    below.supxlabel(f"{len(before)} digits, {subject.sampling.steps} sampling steps", fontsize=9)


def png(subject: Subject, found: Outcome) -> bytes:
    """The figure as the panel shows it."""
    figure, content = Figure(figsize=SIZE, layout="constrained"), io.BytesIO()
    draw(figure, subject, found)
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()


def panel(subject: Subject, first: Outcome) -> ipywidgets.VBox:
    """Sliders and, below them, text and picture of the setting they stand at, at first that of
    `first`.
    """
    setting = first.setting
    wide = ipywidgets.Layout(width="25em")
    rules = [(words, name) for name, words in RULES.items()]
    rule = ipywidgets.Dropdown(options=rules, value=setting.rule, description="rule", layout=wide)
    amount = ipywidgets.FloatSlider(
        setting.amount, min=0, max=1, step=0.005, readout_format=".1%", layout=wide
    )
    amount.continuous_update = False
    granularity = ipywidgets.Dropdown(
        options=GRANULARITIES, value=setting.granularity, description="granularity", layout=wide
    )
    low = ipywidgets.Dropdown(options=LOW, value=setting.format, description="format", layout=wide)
    text, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")

    def label() -> None:
        low.disabled = rule.value == "allocator"
        amount.description = "size" if low.disabled else "kept"

    def show(found: Outcome) -> None:
        text.value = html.escape(". ".join(sentences(subject, found)))
        picture.value = png(subject, found)

    def changed(_: dict) -> None:
        label()
        text.value = "computing ..."
        try:
            # A progress bar drawn outside any cell would end in JupyterLab's log.
            with redirect_stderr(io.StringIO()):
                show(
                    outcome(
                        subject, Setting(rule.value, amount.value, granularity.value, low.value)
                    )
                )
        except (ValueError, OSError, RuntimeError) as error:
            text.value = html.escape(
                f"Not possible: {error}; the picture is still that of the last setting"
            )

    for control in (rule, amount, granularity, low):
        control.observe(changed, "value")
    label()
    show(first)
    return ipywidgets.VBox(
        [ipywidgets.HBox([rule, amount]), ipywidgets.HBox([granularity, low]), text, picture]
    )
