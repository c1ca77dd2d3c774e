"""What a quantized model costs to run: `make benchmark` writes results/benchmarks/running.csv.

The trained diffusion models of width 16 and 64, one forward pass, batches of 1 and 100 noised
digits. Packed models unpack one layer at a time; "dequantized" was unpacked when it was loaded.
Times are medians of ratios to an FP32 pass run just before.
"""

import copy
import sys
from collections.abc import Callable

import torch
from shared import PROFILES, run, time_ratio, write
from torch import Tensor, nn
from tqdm import tqdm

from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, quantize, resident_bytes
from lafq.rng import generator
from lafq.study.diffusion.ddpm import add_noise, unit_interval
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.diffusion.unet import TIMESTEPS, quantizable
from lafq.study.workspace import Workspace

ROUNDS = {(16, 1): 15, (16, 100): 5, (64, 1): 5, (64, 100): 1}
FORMATS = ("fp16", "int8", "int4", "int2")


def noised_digits(count: int) -> tuple[Tensor, Tensor]:
    """Held-out digits, noised to timesteps spread over all of them."""
    x0 = unit_interval(mnist(train=False)[0][HELD_OUT][:count])
    t = torch.linspace(0, TIMESTEPS - 1, count).long()
    x = add_noise(x0, t, torch.randn(x0.shape, generator=generator(0, 1)))
    return x.contiguous(memory_format=torch.channels_last), t


def bfloat16(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The model computing under autocast, its weights in FP32."""

    def forward(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, t).float()

    return forward


@torch.no_grad()
def rows(width: int) -> list[dict]:
    """One row per model: MiB in memory, damage, and its time over FP32's for each batch."""
    model = load_model(Workspace(PROFILES[width]), width)
    small = {low: quantize(model, dict.fromkeys(quantizable(model), low)) for low in FORMATS}
    runs = {f"{low}, packed": (m, resident_bytes(m)) for low, m in small.items()}
    runs["int8, dequantized"] = (dequantize_(small["int8"]), resident_bytes(model))
    runs["bfloat16 compute"] = (bfloat16(copy.deepcopy(model)), resident_bytes(model))
    x, t = noised_digits(100)
    expected, table = model(x, t), []
    for name, (forward, size) in tqdm(runs.items(), desc=f"width {width}"):
        row = {"width": width, "model": name, "mem_mib": size / MIB}
        row["damage"] = (forward(x, t) - expected).square().mean().item()
        for batch in (1, 100):
            ratio = time_ratio(ROUNDS[width, batch], forward, model, x[:batch], t[:batch])
            row[f"time_batch_{batch}"] = ratio
        table.append(row)
    return table


def main() -> None:
    """Write and print the table; the poster's width only where its weights are."""
    table = rows(16)
    write("running", table)
    try:
        write("running", table + rows(64))
    except FileNotFoundError as error:
        print(f"without width 64: {error}")


if __name__ == "__main__":
    sys.exit(run(main))
