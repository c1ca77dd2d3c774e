"""A workspace: the folders of one profile, and the device that computes for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from lafq.study import paths
from lafq.study.device import compute_on

CPU = torch.device("cpu")


def profile_parameters(profile: str) -> dict[str, Any]:
    """The parameters of a profile; ValueError, naming the known ones, for an unknown profile."""
    known = {path.stem: path for path in sorted(paths.PROFILES.glob("*.yaml"))}
    if profile not in known:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(known)}")
    content = yaml.safe_load(known[profile].read_text())
    return {name: value for name, value in content.items() if name.isupper()}


@dataclass(frozen=True)
class Workspace:
    """Where a profile has its tables, figures and images, and what computes them.

    compute: whether tables are computed now, or loaded. keep: images are kept in
    results/<profile>/samples instead of in build/, found by their provenance (`images.samples`).
    scheduler: address of a Dask scheduler whose workers draw images ("": none).
    """

    profile: str
    device: torch.device = CPU
    compute: bool = False
    keep: bool = False
    scheduler: str = ""

    @classmethod
    def open(cls, profile: str, threads: int, device: str = "auto", **settings: bool | str) -> Self:
        """Check the profile, fix the number of threads and choose the device ("auto": a CUDA GPU
        where one is visible).

        settings: compute, keep and scheduler.
        Raises ValueError for an unknown profile, RuntimeError when CUDA is asked for and absent.
        """
        profile_parameters(profile)
        return cls(profile, compute_on(threads, device), **settings)

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> Self:
        """The workspace that a profile's parameters describe, which computes."""
        p = parameters
        settings = {"compute": True, "keep": p["KEEP"], "scheduler": p["SCHEDULER"]}
        return cls.open(p["PROFILE"], p["THREADS"], p["DEVICE"], **settings)

    @property
    def results(self) -> Path:
        """Tables, weights and records."""
        return paths.RESULTS / self.profile

    @property
    def figures(self) -> Path:
        """Figures, as png and svg."""
        return paths.FIGURES / self.profile

    @property
    def build(self) -> Path:
        """What can be computed again: executed notebooks, cached images, checkpoints."""
        return paths.BUILD / self.profile
