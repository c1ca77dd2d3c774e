"""Do groups of weights with a scale each pay, and four levels at 2 bits? `make benchmark` writes results/benchmarks/groups.csv.

Uniform formats with error feedback on the diffusion model of width 16: one scale per output channel, or per group of consecutive
weights of it. Damage on held-out digits and noise that no plan has seen. `decibels` and `decibels_per_bit` compare with one scale
per channel: an extra bit per weight quarters the damage (6 dB), so groups pay where they give more.
"""

import math

import torch
from running import write
from torch import Tensor, nn

from lafq.device import compute_on
from lafq.diffusion.mnist import mnist
from lafq.diffusion.noising import noised_batches
from lafq.diffusion.unet import quantizable
from lafq.diffusion.weights import load_model
from lafq.evaluation import scoring
from lafq.fisher.monte_carlo import Sensitivity, estimate_sensitivity
from lafq.paper.budget_study.budget import FRESH, FRESH_SEED
from lafq.quantization.checks import channel_view
from lafq.quantization.error_feedback import Factor, factor
from lafq.quantization.formats import FORMATS, Format, nearest_code, unshrunk_scale
from lafq.workspace import Workspace

LOW, SIZES = ("midrise2", "int2", "int3", "int4"), (0, 128, 64, 32)  # 0: one scale per channel
SAMPLES, DIGITS = 512, 300


def rounded(values: Tensor, scales: Tensor, qmax: float, factor: Factor) -> Tensor:
    """`error_feedback.round_with_error_feedback` with a scale for every weight, both (R, C)."""
    exact, scales = values[:, factor.order].T.contiguous(), scales[:, factor.order].T
    wanted = exact.clone()
    for k, column in enumerate(wanted):
        column.copy_(nearest_code(column / scales[k], qmax) * scales[k])
        wanted[k + 1 :].addr_(factor.upper[k, k + 1 :], exact[k] - column)
    return wanted[factor.order.argsort()].T


def grouped(model: nn.Module, known: Sensitivity, low: Format, size: int) -> tuple[nn.Module, float]:
    """A copy with all layers' weights in a format, one scale per group of at most `size` weights, and its bits per weight."""
    copy, bits, count = load_model(Workspace("mini"), model.width), 0, 0
    for name, weight in quantizable(model).items():
        view = channel_view(model, name)
        rows, fisher = view.of(weight), view.of(known.fisher[name])
        length = rows.shape[1]
        own = next(s for s in range(min(size or length, length), 0, -1) if length % s == 0)
        scales = unshrunk_scale(rows.reshape(-1, own), low.qmax, fisher.reshape(-1, own)).float()
        spread = scales.view(len(rows), -1).repeat_interleave(own, 1)
        copy.get_parameter(name).copy_(view.back(rounded(rows, spread, low.qmax, factor(known.curvature[name]))))
        bits, count = bits + low.bits * rows.numel() + 16 * scales.numel(), count + rows.numel()
    return copy, bits / count


@torch.no_grad()
def rows() -> list[dict]:
    """One row per format and size of group."""
    model = load_model(Workspace("mini"), 16)
    known = estimate_sensitivity(model, noised_batches(mnist(train=True)[0], SAMPLES, 0), 0)
    outputs = scoring.held_out_outputs(model, FRESH_SEED, DIGITS, FRESH)
    table = []
    for low in LOW:
        first = len(table)
        for size in SIZES:
            copy, bits = grouped(model, known, FORMATS[low], size)
            damage = scoring.output_errors(copy, outputs, FRESH_SEED, FRESH)[0].mean().item()
            row = {"format": low, "group": size or "channel", "bits_per_weight": bits, "damage": damage}
            if size:
                gain, more = 10 * math.log10(table[first]["damage"] / damage), bits - table[first]["bits_per_weight"]
                row |= {"decibels": gain, "decibels_per_bit": gain / more}
            table.append(row)
    return table


if __name__ == "__main__":
    compute_on(2, "cpu")
    write("groups", rows())
