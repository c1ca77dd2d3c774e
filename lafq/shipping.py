"""Trained weights too large for a repository, packed by the allocator to be shipped instead."""

from typing import Any

import pandas as pd
from torch import nn

from lafq import allocation, evaluation, paths, report, storage
from lafq.experiment import PACKED
from lafq.formats import unbiased
from lafq.plans import Configuration
from lafq.quantize import pack
from lafq.true_fisher import Sensitivity

HEADER = 1.005


def ship(model: nn.Module, known: Sensitivity, profile: str, budget_mib: float, **settings: Any) -> pd.DataFrame:
    """Write results/<profile>/packed.safetensors, at most `budget_mib` MiB, and measure what that costs.

    settings: those of `evaluation.in_many`. Returns its rows, of the unquantized and of
    the packed model (`delta_fid_mnist` with its interval is what shipping costs).
    Raises ValueError, as `allocation.choose`, for a budget below the smallest possible size.
    """
    # A hundredth of a percent to two thousandths of a file are its header.
    found = allocation.choose(
        model, allocation.frontiers_of(model, known.fisher, "mixed", curvature=known.curvature), budget_mib / HEADER
    )
    row = Configuration("shipped", f"{budget_mib:g} MiB", "mixed", "mixed", found.plan)

    def store(configuration: Configuration) -> nn.Module:
        return pack(model, configuration.plan, unbiased, known.fisher, known.curvature)

    table, _ = evaluation.in_many(model, [row], profile, store=store, **settings)
    storage.save(paths.RESULTS / profile / PACKED, store(row), model)
    return table


def sentence(profile: str) -> str:
    """How the weights of a profile are shipped, and what the packing cost where they are packed."""
    if not (paths.RESULTS / profile / "06_shipped.csv").is_file():
        return f"The weights of profile {profile} are shipped as they were trained."
    row = report.load_table(profile, "06_shipped").iloc[-1]
    low, high = row["delta_fid_mnist_low"], row["delta_fid_mnist_high"]
    return (
        f"The weights of profile {profile} are shipped in {row['mem_mib']:.2f} MiB ({row['mem_share']:.1%} of FP32): FID (MNIST "
        f"features) changes by {row['delta_fid_mnist']:+.3f} [{low:+.3f}, {high:+.3f}], N = {row['n_images']:.0f}."
    )
