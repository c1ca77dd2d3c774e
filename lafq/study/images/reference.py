"""What FID needs of the real digits under Inception, as a committed file: their features take
minutes, and are too large to commit.

The covariance is kept as standard deviations and correlations of 12 bits, which moves FID by 3e-5.
`make verify` computes the features again. KID needs the features themselves, so rows that are
scored by this file have none.
"""

import hashlib
import json
import zipfile
import zlib

import numpy as np
from torch import Tensor

from lafq.study import workspace
from lafq.study.images.metrics import Reference

NAME = "inception/reference.npz"
LEVELS = 2**11 - 1  # of a correlation's absolute value


def digest(images: Tensor) -> str:
    """Hexadecimal sha256 of uint8 images."""
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def save_reference(reference: Reference, digits: Tensor, weights: str) -> None:
    """Write the statistics of these digits' features, of a network with the sha256 `weights`."""
    sigma = np.asarray(reference.statistics["sigma"], dtype=float)
    deviation = np.sqrt(sigma.diagonal())
    upper = np.triu_indices(len(sigma), 1)
    levels = np.rint((sigma / np.outer(deviation, deviation))[upper] * LEVELS).astype(np.int16)
    arrays = {"mu": np.asarray(reference.statistics["mu"], dtype=np.float32)}
    arrays |= {"deviation": deviation.astype(np.float32)}
    # Two planes of bytes: the high one compresses.
    arrays |= {"high": (levels >> 8).astype(np.int8), "low": (levels & 255).astype(np.uint8)}
    record = {"digits": digest(digits), "weights": weights}
    arrays["record"] = np.array(json.dumps(record))
    workspace.save_arrays(workspace.RESULTS / NAME, arrays)


def load_reference(digits: Tensor, weights: str) -> Reference | None:
    """What `save_reference` wrote; None where there is no file, or one of others; ValueError for a
    damaged one.
    """
    path = workspace.RESULTS / NAME
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            arrays = dict(file)
        record = json.loads(str(arrays["record"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        remedy = f"`git checkout -- {path}` restores it"
        raise ValueError(f"{path} is damaged: {remedy}") from None
    if record != {"digits": digest(digits), "weights": weights}:
        return None
    deviation = arrays["deviation"].astype(float)
    correlation = np.eye(len(deviation))
    upper = np.triu_indices(len(deviation), 1)
    correlation[upper] = ((arrays["high"].astype(int) << 8) + arrays["low"]) / LEVELS
    correlation.T[upper] = correlation[upper]
    sigma = correlation * np.outer(deviation, deviation)
    print(f"real digits: statistics of their features from results/{NAME}")
    return Reference(None, {"mu": arrays["mu"], "sigma": sigma})
