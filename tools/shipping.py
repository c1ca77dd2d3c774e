"""The weights of a profile in an entropy-coded file, small enough to be committed: `make packed
PROFILE=paper`.

Writes results/<profile>/packed.safetensors and packed.csv, with the row of the packed model beside
that of the FP32 weights.
"""

import argparse
import sys
from typing import Any

import pandas as pd
from torch import nn

from lafq.allocation.coded import allocate_coded
from lafq.fisher.sensitivity import CHANNELS, Sensitivity
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize_, quantize
from lafq.study import workspace
from lafq.study.damage import output_errors, output_mse
from lafq.study.diffusion.subject import PACKED, load_model
from lafq.study.diffusion.training import held_out_outputs
from lafq.study.images.evaluate import evaluate
from lafq.study.images.sampling import Sampling
from lafq.study.rows import BASELINE, Row, made, measured_sensitivity
from lafq.study.workspace import Workspace, profile_parameters

SHIPPED_MIB = 13.0
OTHER_NOISE = 1


def ship(
    work: Workspace,
    model: nn.Module,
    known: Sensitivity,
    file_mib: float,
    origin: dict[str, Any],
    sampling: Sampling,
    inception_reference: int = 0,
) -> pd.DataFrame:
    """Write results/<profile>/packed.safetensors, at most `file_mib` MiB, and measure what that
    costs.

    origin: what the recipe of its images says besides the size (`rows.made`). Returns the rows of
    `evaluate.evaluate`, of the FP32 weights and of the packed ones, with `damage`, the mean squared
    change of the model's output on held-out digits, and its 95 % interval. Raises ValueError, as
    `allocate_coded`, for a file below the smallest possible size.
    """
    plan = allocate_coded(model, known, file_mib)
    small = quantize(model, plan)
    save_quantized(work.results / PACKED, small, model, compress=True)
    rows = [
        BASELINE._replace(inception=True),
        Row(
            "allocate",
            f"{file_mib:g} MiB",
            "coded",
            "channel",
            "feedback",
            plan,
            inception=True,
            made=origin,
        ),
    ]
    table, _ = evaluate(work, model, rows, sampling, inception_reference)
    seed = sampling.seed + OTHER_NOISE
    outputs = held_out_outputs(model, seed)
    damage = [
        output_mse(*output_errors(m, outputs, seed), seed) for m in (model, dequantize_(small))
    ]
    return table.join(pd.DataFrame(damage)[["damage", "damage_low", "damage_high"]])


def main() -> int:
    """Pack the weights of a profile; errors are one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="tools.shipping")
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--mib", type=float, default=SHIPPED_MIB)
    args = parser.parse_args()
    try:
        p = profile_parameters(args.profile)
        work = Workspace.of(p)
        model = load_model(work, p["WIDTH"])
        samples, seed = p["TRUE_FISHER_SAMPLES"], p["SEED"]
        known = measured_sensitivity(model, samples, seed, CHANNELS)
        origin = made(samples, seed)
        sampling = Sampling(p["IMAGES"], p["SAMPLING_STEPS"], seed, p["SAMPLING_BATCH"])
        workspace.save_table(
            work,
            "packed",
            ship(work, model, known, args.mib, origin, sampling, p["INCEPTION_REFERENCE"]),
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(f"written: results/{args.profile}/{PACKED}, packed.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
