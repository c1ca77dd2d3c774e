"""The sliders: one setting of rule, amount, granularity, format -> its plan, bytes, kept weights,
predicted damage and digits, all computed on the spot from few digits.

Damage is predicted from other digits than the plan and its rounding are made from: on its own few
draws an allocation would look three times better than it is.
"""

import html
import io
import math
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from ipywidgets import HTML, Dropdown, FloatSlider, HBox, Image, Layout, VBox
from matplotlib.figure import Figure
from torch import Tensor, cat, nn

from lafq.allocation.allocate import Frontier, frontiers_of, solve_budget
from lafq.allocation.rules import GRANULARITIES, RULES, by_granularity, keep_above
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import bits_per_weight, dequantize_, kept_weights, nbytes, quantize
from lafq.quantization.plan import Plan, make_plan
from lafq.study.budget_rows import measured_sensitivity
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion.subject import layer_of, load_model, quantizable
from lafq.study.figures import plots, text
from lafq.study.figures.fisher_plots import short_name
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import SYMBOLS, Row, rule_scores, sizes
from lafq.study.workspace import Workspace

OPTIONS = {"rule": (*RULES, "allocator"), "granularity": GRANULARITIES}
OPTIONS["format"] = tuple(name for name in STUDY_FORMATS if name != "fp32")
AMPLIFIED = 8  # differences of images are drawn this many times as bright
SIZE = (12.5, 7)  # inches
COLUMNS = {"rule": text.name, "threshold or size": "setting", "granularity": "granularity"}
COLUMNS |= {"format": "format", "kept in FP32": ("kept_share", ".1%")}
COLUMNS |= {"MiB stored": ("mem_mib", ".2f"), "of FP32": ("mem_share", ".1%")}
COLUMNS |= {"predicted damage": ("damage", ".2g"), "times uniform INT8's": ("over_int8", ",.4g")}


class Setting(NamedTuple):
    """What the sliders say.

    amount: the share of the weights, channels or tensors that is kept in FP32 (of "ratio": of each
    layer's); of the allocator the size, as a share of FP32's bytes. At granularity "weight" the
    allocator takes channels, and single weights in FP16; it chooses the formats itself.
    """

    rule: str = "ratio"
    amount: float = 0.1
    granularity: str = "weight"
    format: str = "int3"


class Outcome(NamedTuple):
    """What a setting leads to; numbers: one row, COLUMNS; digits: uint8, from FP32's noise."""

    setting: Setting
    plan: Plan
    numbers: pd.DataFrame
    by_tensor: pd.DataFrame
    digits: np.ndarray


@dataclass
class Subject:
    """A model that is explored: plans are made from `calibration`, damage from `validation`."""

    work: Workspace
    model: nn.Module
    calibration: Sensitivity
    validation: Sensitivity
    sampling: Sampling
    frontiers: dict[str, dict[str, Frontier]] = field(default_factory=dict)  # by granularity

    def __post_init__(self) -> None:
        self.digits = self.drawn(self.model)
        int8 = quantize(self.model, dict.fromkeys(quantizable(self.model), "int8"))
        self.int8_damage = self.damage(dequantize_(int8))

    def drawn(self, model: nn.Module) -> np.ndarray:
        """Digits of a model, uint8 (N, 32, 32)."""
        return ImageStore(self.work).draw(model, self.sampling).images[:, 0].numpy()

    def damage(self, model: nn.Module) -> float:
        """Predicted mean squared change of the output per pixel."""
        return predicted_damage(self.model, model, self.validation) / HALF_PIXELS

    def row(self, setting: Setting) -> Row:
        """The row of a setting; ValueError for one that no slider has, or a size not to be met."""
        for name, values in OPTIONS.items():
            if (value := getattr(setting, name)) not in values:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(values)}")
        rule, amount, granularity, low = setting
        if not 0 <= amount <= 1:
            raise ValueError(f"amount {amount} is outside [0, 1]: a share kept, or of FP32's bytes")
        fisher = self.calibration.fisher
        if rule == "allocator":
            granularity = "mixed" if granularity == "weight" else granularity
            plan = self.allocated(amount, granularity)
            return Row("allocate", f"{amount:.1%}", "any", granularity, "feedback", plan)
        axes = {name: 1 for name in fisher if channel_view(self.model, name).groups}
        scores = rule_scores(rule, by_granularity(fisher, granularity, axes))
        threshold = threshold_of(scores, rule, amount)
        words = f"{SYMBOLS[rule]}={threshold:.3g}" if rule in SYMBOLS else f"{amount:.3g}"
        plan = make_plan(keep_above(scores, threshold), low)
        return Row(rule, words, low, granularity, "nearest", plan)

    def allocated(self, share: float, granularity: str) -> Plan:
        """The allocator's plan for a share of FP32's bytes."""
        model, known = self.model, self.calibration
        if granularity not in self.frontiers:
            frontiers = frontiers_of(model, known, granularity, STUDY_FORMATS, progress=False)
            self.frontiers[granularity] = frontiers
        budget = share * nbytes(model, {}) / MIB
        return solve_budget(model, self.frontiers[granularity], budget, known.recipe)

    def outcome(self, setting: Setting) -> Outcome:
        """Everything that is shown of a setting; raises as `row`."""
        row, model, weights = self.row(setting), self.model, quantizable(self.model)
        small = dequantize_(quantize(model, row.plan))
        damage = self.damage(small)
        damages = {"damage": damage, "over_int8": damage / self.int8_damage}
        numbers = sizes(model, [row.plan]).assign(**row.key, **damages)
        by_tensor = pd.DataFrame({"parameter": list(weights), "layer": map(layer_of, weights)})
        kept = [kept_weights(model, row.plan, n) / w.numel() for n, w in weights.items()]
        bits = [bits_per_weight(model, row.plan, [n]) for n in weights]
        by_tensor = by_tensor.assign(kept_share=kept, bits_per_weight=bits)
        return Outcome(setting, row.plan, numbers, by_tensor, self.drawn(small))


def subject(work: Workspace, width: int, sampling: Sampling, samples: int) -> Subject:
    """The trained model of a profile, calibrated on so many digits, validated on half as many."""
    model, seed = load_model(work, width), sampling.seed
    known = measured_sensitivity(model, samples, seed)
    calibration = known._replace(fisher={name: known.fisher[name] for name in quantizable(model)})
    validation = measured_sensitivity(model, -(-samples // 2), seed + 1)
    return Subject(work, model, calibration, validation, sampling)


def threshold_of(scores: dict[str, Tensor], rule: str, share: float) -> float:
    """The threshold of a rule that keeps this share of the scores (more where scores are equal)."""
    if rule == "ratio":
        return 1 - share
    values = cat([s.flatten() for s in scores.values()])
    count = math.floor(share * len(values) + 1e-9)
    return values.topk(count).values[-1].item() if count else math.inf


def draw(figure: Figure, subject: Subject, outcome: Outcome) -> None:
    """The numbers; kept share and bits of every weight tensor; both models' digits, and changes."""
    top, middle, below = figure.subfigures(3, 1, height_ratios=[0.25, 1.5, 1])
    numbers, ax = text.table(outcome.numbers, COLUMNS), top.subplots()
    ax.axis("off")
    style = {"cellLoc": "center", "loc": "center", "edges": "open"}
    cells = ax.table(numbers.to_numpy(), colLabels=numbers.columns, **style)
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    (kept, bits), table = middle.subplots(2, 1, sharex=True), outcome.by_tensor
    colours = dict(zip(table["layer"].unique(), sns.color_palette(), strict=False))
    for ax, values in ((kept, 100 * table["kept_share"]), (bits, table["bits_per_weight"])):
        ax.bar(table.index, values, color=table["layer"].map(colours))
        ax.grid(False, axis="x")
    kept.set(ylabel="in FP32 (%)", ylim=(0, 100), yticks=[0, 25, 50, 75, 100])
    bits.set(ylabel="bits per weight", ylim=(0, 34), yticks=[0, 8, 16, 24, 32])
    kept.set_xlim(-0.6, len(table) - 0.4)
    for layer, rows in table.groupby("layer"):
        kept.text(rows.index.to_numpy().mean(), 104, layer, ha="center")
    short = [short_name(name).split(".", 1)[1] for name in table["parameter"]]
    bits.set_xticks(table.index, short, rotation=60, ha="right", fontsize=8)
    before, after = subject.digits, outcome.digits
    off = plots.brighter(abs(after - before.astype(int)), AMPLIFIED)
    titles = ("FP32 model", "Quantized, from the same noise", f"Difference, x {AMPLIFIED}")
    for ax, images, title in zip(below.subplots(1, 3), (before, after, off), titles, strict=True):
        plots.digits(ax, images, len(images) // (2 - len(images) % 2), title)
    below.supxlabel(f"{len(before)} digits, {subject.sampling.steps} sampling steps", fontsize=9)


def png(subject: Subject, outcome: Outcome) -> bytes:
    """The figure as the panel shows it."""
    figure, content = Figure(figsize=SIZE, layout="constrained"), io.BytesIO()
    draw(figure, subject, outcome)
    figure.savefig(content, format="png", dpi=90)
    return content.getvalue()


def panel(subject: Subject, first: Outcome) -> VBox:
    """Sliders, at first at the setting of `first`, and below them its numbers and picture."""
    wide = {"layout": Layout(width="25em")}
    rule, granularity, low = (
        Dropdown(options=names, value=getattr(first.setting, name), description=name, **wide)
        for name, names in OPTIONS.items()
    )
    amount = FloatSlider(first.setting.amount, min=0, max=1, step=0.005, **wide)
    amount.readout_format, amount.continuous_update = ".1%", False
    controls, words, picture = (rule, amount, granularity, low), HTML(), Image(format="png")

    def show(_: object = None) -> None:
        low.disabled = rule.value == "allocator"
        amount.description = "size" if low.disabled else "kept"
        words.value = "computing ..."
        try:
            # A progress bar drawn outside any cell would end in JupyterLab's log.
            with redirect_stderr(io.StringIO()):
                outcome = subject.outcome(Setting(*(control.value for control in controls)))
            picture.value = png(subject, outcome)
            words.value = text.table(outcome.numbers, COLUMNS).T.to_html(header=False)
        except (ValueError, OSError, RuntimeError) as error:
            words.value = html.escape(f"Not possible: {error}; the picture is the last setting's")

    for control in controls:
        control.observe(show, "value")
    show()
    return VBox([HBox([rule, amount]), HBox([granularity, low]), words, picture])
