"""A workspace: the folders of one profile, the device that computes for it, and its tables, images
and figures as files. LAFQ_OUTPUT names another folder to hold results/ and figures/.
"""

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
import yaml

from lafq.tensors import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
BUILD = ROOT / "build"
OUTPUT = Path(os.environ.get("LAFQ_OUTPUT") or ROOT)
RESULTS = OUTPUT / "results"
FIGURES = OUTPUT / "figures"

DEVICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")
MODELS = {"smoke": "profile smoke", "small": "width 16", "paper": "width 64"}


def profile_parameters(profile: str) -> dict[str, Any]:
    """The parameters of a profile; ValueError for an unknown one."""
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if profile not in known:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(known)}")
    content = yaml.safe_load(known[profile].read_text()).items()
    return {name: value for name, value in content if name.isupper()}


@dataclass(frozen=True)
class Workspace:
    """Where a profile has its tables, figures and images, and what computes them.

    compute: tables are computed now, not loaded. keep: images are kept by their recipe
    (`images.sampling`). scheduler: address of a Dask scheduler whose workers draw ("": none).
    """

    profile: str
    device: torch.device = CPU
    compute: bool = False
    keep: bool = False
    scheduler: str = ""

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> Self:
        """The workspace that a profile's parameters describe, which computes."""
        device = compute_on(parameters["THREADS"], parameters["DEVICE"])
        return cls(parameters["PROFILE"], device, True, parameters["KEEP"], parameters["SCHEDULER"])

    @property
    def results(self) -> Path:
        """Tables, weights and records."""
        return RESULTS / self.profile

    @property
    def figures(self) -> Path:
        """Figures, as png and svg."""
        return FIGURES / self.profile

    @property
    def build(self) -> Path:
        """What can be computed again: executed notebooks, cached images, checkpoints."""
        return BUILD / self.profile


def open_workspace(
    profile: str, compute: bool, threads: int, device: str, **settings: bool | str
) -> Workspace:
    """The workspace of a notebook; prints where its tables come from. settings: keep, scheduler."""
    set_style()
    profile_parameters(profile)
    if compute:
        print(f"COMPUTE is true: everything below is computed now and written to results/{profile}")
    else:
        made_by = "as the last `make reproduce` wrote them"
        print(f"COMPUTE is false: tables and images are loaded from results/{profile}, {made_by}")
    return Workspace(profile, compute_on(threads, device), compute, **settings)


def compute_on(threads: int, device: str = "auto") -> torch.device:
    """Fix the number of threads (at most the cores) and how FP32 is computed; choose the device.

    "auto": a CUDA GPU where one is visible. ValueError for another device, RuntimeError for CUDA
    that is asked for and absent.
    """
    from dask.system import CPU_COUNT  # reads the limits of a container too

    if device not in DEVICES:
        raise ValueError(f"DEVICE is {device!r}: choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("DEVICE is cuda, but no CUDA GPU is visible: set DEVICE to auto or cpu")
    if threads > CPU_COUNT:
        print(f"threads: {CPU_COUNT} instead of {threads}, one per available core")
    torch.set_num_threads(min(threads, CPU_COUNT))
    # Quantization is judged in FP32 compute: TF32 keeps 10 mantissa bits, as FP16 does.
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def kind_of_machine() -> str:
    """What decides the last bits of an image: processor, vector instructions, threads, torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    content = cpuinfo.read_text() if cpuinfo.is_file() else ""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", content, re.MULTILINE))
    processor = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        processor = f"{processor} {fields['cpu family']}/{fields['model']}".lstrip()
    instructions = torch.backends.cpu.get_cpu_capability()
    if "amx_tile" in fields.get("flags", "").split():
        instructions += " AMX"
    threads = torch.get_num_threads()
    return f"{processor}, {instructions}, {threads} threads, torch {torch.__version__}"


def save_table(work: Workspace, name: str, table: pd.DataFrame) -> None:
    """Write results/<profile>/<name>.csv, six significant digits."""
    with atomic_write(work.results / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def load_table(work: Workspace, name: str) -> pd.DataFrame:
    """Read results/<profile>/<name>.csv; FileNotFoundError names the remedy when there is none."""
    path = _existing(work, f"{name}.csv")
    return pd.read_csv(path, dtype={"setting": str}, keep_default_na=False, na_values=[""])


def load_optional(work: Workspace, name: str) -> pd.DataFrame | None:
    """`load_table`, or None where there is none."""
    return load_table(work, name) if (work.results / f"{name}.csv").is_file() else None


def compute_or_load(work: Workspace, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table results/<profile>/<name>.csv, made first where the workspace computes."""
    if work.compute:
        save_table(work, name, make())
    return load_table(work, name)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file of arrays by name."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_images(work: Workspace, name: str) -> dict[str, np.ndarray]:
    """The images, uint8 (N, 32, 32) by key, of results/<profile>/<name>.npz."""
    with np.load(_existing(work, f"{name}.npz")) as file:
        return dict(file)


def set_style() -> None:
    """From here on tables show sentences whole, and figures have the style of all notebooks."""
    import seaborn as sns

    pd.options.display.max_colwidth = None
    layout = {"figure.constrained_layout.use": True}
    sns.set_theme(style="whitegrid", palette="colorblind", rc=layout)


def save_figure(
    work: Workspace,
    name: str,
    figure: "Figure",
    note: str = "",
    pixels: bool = False,
    model: str = "",
) -> None:
    """Write figures/<profile>/<name>.png and, unless it is made of pixels, .svg; without dates, so
    that equal figures are equal bytes. Below stand the model (by default the profile's) and a note.
    """
    import matplotlib

    below = "; ".join(part for part in (model or MODELS.get(work.profile, ""), note) if part)
    figure.text(1, -0.01, below, ha="right", va="top", fontsize=8, color="0.35")
    kinds = {"png": {"Software": None}} | ({} if pixels else {"svg": {"Date": None}})
    how = {"dpi": 150, "bbox_inches": "tight"}
    for suffix, metadata in kinds.items():
        path = work.figures / f"{name}.{suffix}"
        with matplotlib.rc_context({"svg.hashsalt": name}), atomic_write(path) as temporary:
            figure.savefig(temporary, format=suffix, metadata=metadata, **how)


def _existing(work: Workspace, name: str) -> Path:
    path = work.results / name
    if not path.is_file():
        published = work.profile == "published"  # the scores of the authors' images
        verb = "evidence PUBLISHED=path" if published else f"reproduce PROFILE={work.profile}"
        raise FileNotFoundError(f"results/{work.profile}/{name} is missing: `make {verb}` makes it")
    return path
