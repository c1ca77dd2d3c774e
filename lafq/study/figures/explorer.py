"""00_explore: one setting of rule, amount, granularity and format -> its plan, bytes, kept weights,
predicted damage and digits.

Sensitivity is estimated on the spot from few digits, so no file of another notebook is needed.
Damage is predicted from other digits than the plan and its rounding are made from: on its own few
draws an allocation would look three times better than it is.
"""

import html
import io
import math
from contextlib import redirect_stderr
from typing import NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lafq.allocation.allocate import frontiers_of, solve_budget
from lafq.allocation.frontiers import StorageOption
from lafq.allocation.rules import GRANULARITIES, by_granularity, keep_above
from lafq.allocation.rules import RULES as SCORES
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import bits_per_weight, dequantize_, kept_weights, nbytes, quantize
from lafq.quantization.plan import Plan, make_plan
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import layer_of, quantizable
from lafq.study.figures import plots
from lafq.study.figures.fisher_plots import short_name
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.poster import group_of
from lafq.study.rows import keep_ratio, kept_share, measured_sensitivity
from lafq.study.workspace import Workspace

RULES = {
    "global": "global: one threshold for all layers",
    "group": "group: one for each of Layer 1-2, 3-5, 6",
    "mean_std": "mean and std of each layer",
    "ratio": "ratio: the same of every layer",
    "allocator": "allocator: the best within a size",
}
LOW = [name for name in STUDY_FORMATS if name != "fp32"]
AMPLIFIED = 8  # differences of images are drawn this many times as bright
SIZE = (12.5, 7)  # inches


class Setting(NamedTuple):
    """What the sliders say.

    amount: the share of the weights, channels or tensors that is kept in FP32 (of "ratio": of each
    layer's); of the allocator the size, as a share of FP32's bytes. granularity: "tensor",
    "channel" or "weight" (of the allocator: channels, and single weights in FP16). format: of what
    is not kept; the allocator chooses its formats itself.
    """

    rule: str = "ratio"
    amount: float = 0.1
    granularity: str = "weight"
    format: str = "int3"


class Subject(NamedTuple):
    """What is explored: a model, its sensitivity, and how digits are drawn from it.

    calibration: what plans and rounding are made from; validation: from other digits, what damage
    is predicted from. digits: of the FP32 model, uint8 (N, 32, 32). int8: predicted damage of
    uniform INT8. fronts: of the allocator, by granularity, filled in as they are asked for.
    """

    work: Workspace
    model: nn.Module
    calibration: Sensitivity
    validation: Sensitivity
    sampling: Sampling
    digits: np.ndarray
    int8: float
    fronts: dict[str, dict[str, list[StorageOption]]]


class Outcome(NamedTuple):
    """What a setting leads to.

    threshold: in words; nbytes: stored, of the whole model; kept: share of the six layers' weights
    in FP32; damage: predicted mean squared change of the output per pixel; by_tensor: columns
    parameter, layer, kept_share, bits_per_weight; digits: uint8 (N, 32, 32), from the same noise as
    the subject's.
    """

    setting: Setting
    threshold: str
    plan: Plan
    nbytes: int
    kept: float
    damage: float
    by_tensor: pd.DataFrame
    digits: np.ndarray


def subject(work: Workspace, width: int, sampling: Sampling, samples: int) -> Subject:
    """The trained model of a profile, explored with few digits; prints what its sensitivity is
    estimated from.

    Raises FileNotFoundError without weights, ValueError for numbers out of range.
    """
    model = load_model(work, width)
    if samples < 1:
        raise ValueError(
            f"Fisher information from {samples} digits was asked for: at least one is needed"
        )
    others = -(-samples // 2)
    print(
        f"true Fisher information: from {samples} digits; damage: from {others} other digits "
        f"(10_damage uses more)"
    )
    found = [
        measured_sensitivity(model, n, sampling.seed + i) for i, n in enumerate((samples, others))
    ]
    return subject_of(work, model, *found, sampling)


def subject_of(
    work: Workspace,
    model: nn.Module,
    calibration: Sensitivity,
    validation: Sensitivity,
    sampling: Sampling,
) -> Subject:
    """The subject of a model whose sensitivity is at hand."""
    digits = ImageStore(work).draw(model, sampling).images[:, 0].numpy()
    int8 = dequantize_(quantize(model, dict.fromkeys(quantizable(model), "int8")))
    return Subject(
        work,
        model,
        calibration,
        validation,
        sampling,
        digits,
        predicted_damage(model, int8, validation) / HALF_PIXELS,
        {},
    )


def plan_of(subject: Subject, setting: Setting) -> tuple[str, Plan]:
    """The threshold in words, and the plan; the allocator's is rounded with error feedback.

    Raises ValueError, in one sentence, for a setting that no slider can have, and for a size that
    the allocator cannot meet.
    """
    model, (rule, amount, granularity, format) = subject.model, setting
    for name, value, known in (
        ("rule", rule, RULES),
        ("granularity", granularity, GRANULARITIES),
        ("format", format, LOW),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    if not 0 <= amount <= 1:
        raise ValueError(
            f"amount {amount} is outside [0, 1]: it is the share that is kept, or the share of "
            f"FP32's bytes"
        )
    fisher = {name: subject.calibration.fisher[name] for name in quantizable(model)}
    if rule != "allocator":
        axes = {n: 1 for n in fisher if channel_view(model, n).groups}
        words, keep = kept(by_granularity(fisher, granularity, axes), rule, amount)
        return words, make_plan(keep, format)
    granularity = "mixed" if granularity == "weight" else granularity
    if granularity not in subject.fronts:
        known = subject.calibration._replace(fisher=fisher)
        subject.fronts[granularity] = frontiers_of(
            model, known, granularity, STUDY_FORMATS, progress=False
        )
    budget, fronts = amount * nbytes(model, {}) / MIB, subject.fronts[granularity]
    plan = solve_budget(model, fronts, budget, subject.calibration.recipe)
    return f"size at most {amount:.1%} of FP32", plan


def kept(scores: dict[str, Tensor], rule: str, share: float) -> tuple[str, dict[str, Tensor]]:
    """The threshold of a rule that keeps this share of the scores (more where scores are equal), in
    words and as `keep` masks.
    """
    if rule == "ratio":
        return f"ratio = {share:.3g}", keep_ratio(scores, share)
    name = {"global": "tau", "group": "factor", "mean_std": "k"}[rule]
    scores = SCORES[rule](scores, layer_of, group_of)
    values = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    count = math.floor(share * len(values) + 1e-9)
    threshold = values[count - 1].item() if count else math.inf
    return f"{name} = {threshold:.3g}", keep_above(scores, threshold)


def outcome(subject: Subject, setting: Setting) -> Outcome:
    """Everything that is shown of a setting; raises as `plan_of`."""
    words, plan = plan_of(subject, setting)
    model = subject.model
    whole = dequantize_(quantize(model, plan))
    digits = ImageStore(subject.work).draw(whole, subject.sampling).images[:, 0].numpy()
    damage = predicted_damage(model, whole, subject.validation) / HALF_PIXELS
    stored, share = nbytes(model, plan), kept_share(model, plan)
    return Outcome(setting, words, plan, stored, share, damage, by_tensor(model, plan), digits)


def by_tensor(model: nn.Module, plan: Plan) -> pd.DataFrame:
    """Share of the weights that a plan leaves in FP32, and stored bits per weight, of every weight
    tensor.
    """
    columns = {"parameter": [], "layer": [], "kept_share": [], "bits_per_weight": []}
    for name, w in quantizable(model).items():
        columns["parameter"].append(name)
        columns["layer"].append(layer_of(name))
        columns["kept_share"].append(kept_weights(model, plan, name) / w.numel())
        columns["bits_per_weight"].append(bits_per_weight(model, plan, [name]))
    return pd.DataFrame(columns)


def labels(subject: Subject, found: Outcome) -> list[str]:
    """What is stored, what is kept, and the predicted damage."""
    full, times = nbytes(subject.model, {}), found.damage / subject.int8
    size = f"stored {found.nbytes / MIB:.2f} of {full / MIB:.2f} MiB ({found.nbytes / full:.1%})"
    low = "" if found.setting.rule == "allocator" else f", rest {found.setting.format}"
    over = f"{times:,.0f}" if times >= 10 else f"{times:.2g}"
    return [
        size,
        f"in FP32: {found.kept:.1%} of the weights{low} ({found.threshold})",
        f"predicted damage {found.damage:.2g} ({over} x uniform INT8)",
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
    axes[0].set(ylabel="in FP32 (%)", ylim=(0, 100), yticks=[0, 25, 50, 75, 100])
    axes[1].set(ylabel="bits per weight", ylim=(0, 34), yticks=[0, 8, 16, 24, 32])
    axes[0].set_xlim(-0.6, len(table) - 0.4)
    for layer, rows in table.groupby("layer"):
        axes[0].text(rows.index.to_numpy().mean(), 104, layer, ha="center")
    if not found.kept:
        style = {"ha": "center", "va": "center", "backgroundcolor": "white"}
        axes[0].text(len(table) / 2, 50, "no weight in FP32", **style)
    short = [short_name(name).split(".", 1)[1] for name in table["parameter"]]
    axes[1].set_xticks(table.index, short, rotation=60, ha="right", fontsize=8)
    stored, kept, damage = labels(subject, found)
    rule = f"{found.setting.rule} by {found.setting.granularity}"
    above.suptitle(f"{rule}; {kept}\n{stored}; {damage}", fontsize=11)
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
    wide = {"layout": ipywidgets.Layout(width="25em")}
    rule, granularity, low = (
        ipywidgets.Dropdown(options=options, value=value, description=name, **wide)
        for name, options, value in (
            ("rule", [(words, rule) for rule, words in RULES.items()], setting.rule),
            ("granularity", GRANULARITIES, setting.granularity),
            ("format", LOW, setting.format),
        )
    )
    amount = ipywidgets.FloatSlider(
        setting.amount, min=0, max=1, step=0.005, readout_format=".1%", **wide
    )
    amount.continuous_update = False
    text, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")

    def label() -> None:
        low.disabled = rule.value == "allocator"
        amount.description = "size" if low.disabled else "kept"

    def show(found: Outcome) -> None:
        text.value = html.escape("; ".join(labels(subject, found)))
        picture.value = png(subject, found)

    def changed(_: dict) -> None:
        label()
        text.value = "computing ..."
        try:
            # A progress bar drawn outside any cell would end in JupyterLab's log.
            with redirect_stderr(io.StringIO()):
                values = (control.value for control in (rule, amount, granularity, low))
                show(outcome(subject, Setting(*values)))
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
