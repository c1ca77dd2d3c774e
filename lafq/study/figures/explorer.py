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
from matplotlib.figure import Figure
from torch import Tensor, cat, nn

from lafq.allocation.allocate import Frontier, frontiers_of, solve_budget
from lafq.allocation.rules import GRANULARITIES, RULES, by_granularity, keep_above
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.checks import channel_view
from lafq.quantization.formats import MIB, STUDY_FORMATS
from lafq.quantization.model import bits_per_weight, dequantize_, kept_weights, nbytes, quantize
from lafq.quantization.plan import Plan, make_plan
from lafq.study.damage import HALF_PIXELS
from lafq.study.diffusion.subject import layer_of, load_model, quantizable
from lafq.study.figures import plots, text
from lafq.study.figures.fisher_plots import short_name
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import SYMBOLS, Row, measured_sensitivity, rule_scores, sizes
from lafq.study.workspace import Workspace

OPTIONS = {"rule": (*RULES, "allocator"), "granularity": GRANULARITIES}
OPTIONS["format"] = tuple(name for name in STUDY_FORMATS if name != "fp32")
AMPLIFIED = 8  # differences of images are drawn this many times as bright
SIZE = (12.5, 7)  # inches
COLUMNS = {"rule": text.name, "threshold or size": "setting", "granularity": "granularity"}
COLUMNS |= {"format": "format", "kept in FP32": ("kept_share", ".1%")}
COLUMNS |= {"MiB stored": ("mem_mib", ".2f"), "of FP32": ("mem_share", ".1%")}
COLUMNS |= {"predicted damage": ("damage", ".2g"), "of uniform INT8's": ("over_int8", ",.4g")}


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


class Outcome(NamedTuple):
    """What a setting leads to.

    numbers: one row, COLUMNS. by_tensor: columns parameter, layer, kept_share, bits_per_weight.
    digits: uint8 (N, 32, 32), from the same noise as those of the FP32 model.
    """

    setting: Setting
    plan: Plan
    numbers: pd.DataFrame
    by_tensor: pd.DataFrame
    digits: np.ndarray


class Subject:
    """A model that is explored.

    calibration: what plans and rounding are made from; validation: from other digits, what damage
    is predicted from.
    """

    def __init__(
        self,
        work: Workspace,
        model: nn.Module,
        calibration: Sensitivity,
        validation: Sensitivity,
        sampling: Sampling,
    ) -> None:
        self.work, self.model, self.sampling = work, model, sampling
        self.calibration, self.validation = calibration, validation
        self.digits = self.drawn(model)
        int8 = quantize(model, dict.fromkeys(quantizable(model), "int8"))
        self.int8 = self.damage(dequantize_(int8))
        self.frontiers: dict[str, dict[str, Frontier]] = {}

    def drawn(self, model: nn.Module) -> np.ndarray:
        """Digits of a model, uint8 (N, 32, 32)."""
        return ImageStore(self.work).draw(model, self.sampling).images[:, 0].numpy()

    def damage(self, model: nn.Module) -> float:
        """Predicted mean squared change of the output per pixel."""
        return predicted_damage(self.model, model, self.validation) / HALF_PIXELS

    def row(self, setting: Setting) -> Row:
        """The row of a setting; the allocator's is rounded with error feedback.

        Raises ValueError for a setting that no slider can have, and for a size that the allocator
        cannot meet.
        """
        for name, values in OPTIONS.items():
            if (value := getattr(setting, name)) not in values:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(values)}")
        rule, amount, granularity, low = setting
        if not 0 <= amount <= 1:
            raise ValueError(
                f"amount {amount} is outside [0, 1]: it is the share that is kept, or the share of "
                f"FP32's bytes"
            )
        fisher = {name: self.calibration.fisher[name] for name in quantizable(self.model)}
        if rule == "allocator":
            granularity = "mixed" if granularity == "weight" else granularity
            plan = self.allocated(fisher, amount, granularity)
            return Row("allocate", f"{amount:.1%}", "any", granularity, "feedback", plan)
        axes = {name: 1 for name in fisher if channel_view(self.model, name).groups}
        scores = rule_scores(rule, by_granularity(fisher, granularity, axes))
        threshold = threshold_of(scores, rule, amount)
        words = f"{SYMBOLS[rule]}={threshold:.3g}" if rule in SYMBOLS else f"{amount:.3g}"
        plan = make_plan(keep_above(scores, threshold), low)
        return Row(rule, words, low, granularity, "nearest", plan)

    def allocated(self, fisher: dict[str, Tensor], share: float, granularity: str) -> Plan:
        """The allocator's plan for a share of FP32's bytes."""
        if granularity not in self.frontiers:
            known = self.calibration._replace(fisher=fisher)
            self.frontiers[granularity] = frontiers_of(
                self.model, known, granularity, STUDY_FORMATS, progress=False
            )
        budget, fronts = share * nbytes(self.model, {}) / MIB, self.frontiers[granularity]
        return solve_budget(self.model, fronts, budget, self.calibration.recipe)

    def outcome(self, setting: Setting) -> Outcome:
        """Everything that is shown of a setting; raises as `row`."""
        row, model = self.row(setting), self.model
        plan, small = row.plan, dequantize_(quantize(model, row.plan))
        damages = {"damage": self.damage(small), "over_int8": self.damage(small) / self.int8}
        tensors = [
            (
                n,
                layer_of(n),
                kept_weights(model, plan, n) / w.numel(),
                bits_per_weight(model, plan, [n]),
            )
            for n, w in quantizable(model).items()
        ]
        columns = ["parameter", "layer", "kept_share", "bits_per_weight"]
        by_tensor = pd.DataFrame(tensors, columns=columns)
        numbers = sizes(model, [plan]).assign(**row.key, **damages)
        return Outcome(setting, plan, numbers, by_tensor, self.drawn(small))


def subject(work: Workspace, width: int, sampling: Sampling, samples: int) -> Subject:
    """The trained model of a profile with its sensitivity from so many digits, for the damage from
    half as many others.

    Raises FileNotFoundError without weights, ValueError for numbers out of range.
    """
    model, seed = load_model(work, width), sampling.seed
    calibration = measured_sensitivity(model, samples, seed)
    validation = measured_sensitivity(model, -(-samples // 2), seed + 1)
    return Subject(work, model, calibration, validation, sampling)


def threshold_of(scores: dict[str, Tensor], rule: str, share: float) -> float:
    """The threshold of a rule that keeps this share of the scores (more where scores are equal)."""
    if rule == "ratio":
        return 1 - share
    values = cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    count = math.floor(share * len(values) + 1e-9)
    return values[count - 1].item() if count else math.inf


def draw(figure: Figure, subject: Subject, outcome: Outcome) -> None:
    """The numbers; share kept and bits per weight of every weight tensor; digits of both models,
    and how they differ.
    """
    top, above, below = figure.subfigures(3, 1, height_ratios=[0.25, 1.5, 1])
    numbers, ax = text.table(outcome.numbers, COLUMNS), top.subplots()
    ax.axis("off")
    style = {"cellLoc": "center", "loc": "center", "edges": "open"}
    cells = ax.table(numbers.to_numpy(), colLabels=numbers.columns, **style)
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    axes, table = above.subplots(2, 1, sharex=True), outcome.by_tensor
    colours = dict(zip(table["layer"].unique(), sns.color_palette(), strict=False))
    for ax, values in zip(axes, (100 * table["kept_share"], table["bits_per_weight"]), strict=True):
        ax.bar(table.index, values, color=table["layer"].map(colours))
        ax.grid(False, axis="x")
    axes[0].set(ylabel="in FP32 (%)", ylim=(0, 100), yticks=[0, 25, 50, 75, 100])
    axes[1].set(ylabel="bits per weight", ylim=(0, 34), yticks=[0, 8, 16, 24, 32])
    axes[0].set_xlim(-0.6, len(table) - 0.4)
    for layer, rows in table.groupby("layer"):
        axes[0].text(rows.index.to_numpy().mean(), 104, layer, ha="center")
    short = [short_name(name).split(".", 1)[1] for name in table["parameter"]]
    axes[1].set_xticks(table.index, short, rotation=60, ha="right", fontsize=8)
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


def panel(subject: Subject, first: Outcome) -> ipywidgets.VBox:
    """Sliders and, below them, numbers and picture of the setting they stand at, at first that of
    `first`.
    """
    wide = {"layout": ipywidgets.Layout(width="25em")}
    rule, granularity, low = (
        ipywidgets.Dropdown(
            options=names, value=getattr(first.setting, name), description=name, **wide
        )
        for name, names in OPTIONS.items()
    )
    amount = ipywidgets.FloatSlider(first.setting.amount, min=0, max=1, step=0.005, **wide)
    amount.readout_format, amount.continuous_update = ".1%", False
    controls = rule, amount, granularity, low
    words, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")

    def show(outcome: Outcome) -> None:
        words.value = text.table(outcome.numbers, COLUMNS).T.to_html(header=False)
        picture.value = png(subject, outcome)

    def label() -> None:
        low.disabled = rule.value == "allocator"
        amount.description = "size" if low.disabled else "kept"

    def changed(_: dict) -> None:
        label()
        words.value = "computing ..."
        try:
            # A progress bar drawn outside any cell would end in JupyterLab's log.
            with redirect_stderr(io.StringIO()):
                show(subject.outcome(Setting(*(control.value for control in controls))))
        except (ValueError, OSError, RuntimeError) as error:
            words.value = html.escape(
                f"Not possible: {error}; the picture is still that of the last setting"
            )

    for control in controls:
        control.observe(changed, "value")
    label()
    show(first)
    rows = [ipywidgets.HBox([rule, amount]), ipywidgets.HBox([granularity, low])]
    return ipywidgets.VBox([*rows, words, picture])
