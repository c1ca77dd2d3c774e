"""Settings, times, sizes and checksums as the pages show them."""

import json

import pandas as pd

from lafq.study import poster, workspace
from lafq.study.diffusion.subject import PACKED, WEIGHTS
from lafq.study.diffusion.unet import UNet
from lafq.study.figures import sentences
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import load_tensors, sha256
from tools import cost, shipping
from tools.notebooks import notebooks


def markdown(table: pd.DataFrame) -> str:
    """A table as GitHub shows it, cells as they are printed."""
    lines = [
        table.columns.tolist(),
        ["---"] * len(table.columns),
        *table.astype(str).to_numpy().tolist(),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def blocks(work: Workspace, paper: Workspace) -> dict[str, str]:
    """The marked blocks about the model, the machine and the files."""
    _, trained = load_tensors(work.results / WEIGHTS, "01_train")
    classifier = json.loads((workspace.RESULTS / "classifier" / "classifier.json").read_text())
    timed = json.loads((work.results / "timing.json").read_text())["notebooks"].values()
    minutes, peak = (
        sum(n["seconds"] for n in timed) / 60,
        max(n["peak_mib_so_far"] for n in timed) / 1024,
    )
    quality = sentences.training_quality(workspace.load_table(work, "training_quality"))
    return {
        "cost": (
            f"`make reproduce` (width 16) took {minutes:.0f} minutes on two cores ({peak:.1f} GiB "
            f"memory)."
        ),
        "model": f"{trained['steps']:,} training steps of batch {trained['batch_size']}. {quality}",
        "classifier": (
            f"test accuracy {classifier['test_accuracy']:.2%}, {classifier['parameters']:,} "
            f"parameters, sha256 "
            f"`{classifier['sha256']}`"
        ),
        "deviations": markdown(deviations()),
        "counted": counted(),
        "machines": sentences.machines_compared(workspace.load_table(paper, "machines")),
        "timing": markdown(timing()),
        "card": card(work),
        "packed": shipping.sentence(paper),
    }


def deviations() -> pd.DataFrame:
    """What the profiles mini and paper do otherwise than the poster: setting, poster, and one
    column per profile.
    """
    published = poster.TRAINING
    settings = {
        "width of the model": f"{poster.WIDTH} ({poster.BASELINE_MIB:.2f} MiB)",
        "groups of each GroupNorm": f"{poster.WIDTH // 2}",
        "training steps of batch 64": f"{published['steps']:,} (15 epochs)",
        "Adam learning rate": f"{published['peak']:g}, constant",
        "dropout": f"{published['dropout']}",
        "EMA decay": f"{published['ema_decay']}",
        "compute in training": "FP32",
        "sampling steps": f"{poster.SAMPLING_STEPS:,}",
    }
    table = pd.DataFrame({"setting": settings.keys(), "poster": settings.values()})
    for name in ("mini", "paper"):
        p, training = profile_parameters(name), profile_parameters(name)["TRAINING"]
        rate = f"{training['peak']:g}, {training['warmup']} steps of warm-up, linear decay over the last {training['decay']:,}"
        table[f"profile {name}"] = [
            f"{p['WIDTH']} "
            f"({4 * sum(t.numel() for t in UNet(p['WIDTH']).parameters()) / 2**20:.2f} MiB)",
            f"{p['WIDTH'] // 2}",
            f"{training['steps']:,}",
            rate,
            f"{training['dropout']}",
            f"{training['ema_decay']}, warmed up",
            ("bfloat16 autocast" if training["bf16"] else "FP32")
            + (", torch.compile" if training.get("compile") else ""),
            f"{p['SAMPLING_STEPS']:,} (evenly spaced)"
            + (f"; the published rows also {p['PUBLISHED']['steps']:,}" if name == "paper" else ""),
        ]
    return table


def counted() -> str:
    """The operations of the profile paper, and how many rows they are for."""
    p = profile_parameters("paper")
    one, published, rows = cost.forward_flop(p["WIDTH"]), p["PUBLISHED"], cost.sampled_rows(p)
    strided, full = (
        p["IMAGES"] * steps * one / 1e15 for steps in (p["SAMPLING_STEPS"], published["steps"])
    )
    count, of_08 = (
        sum(rows.values()) - rows["07_audit"],
        cost.PUBLISHED_ROWS + len(published["ratios"]),
    )
    return (
        f"Training, which `TRAIN=1` repeats, takes {cost.training_flop(p) / 1e15:.1f} PFLOP "
        f"(bfloat16 autocast). 01 and 03 to 05 "
        f"have {count} rows in all, each of {p['IMAGES']} images at {p['SAMPLING_STEPS']} steps: "
        f"{strided:.2f} PFLOP per row. 08 "
        f"has {of_08} rows at {published['steps']:,} steps: {full:.2f} PFLOP per row."
    )


def timing(profiles: tuple[str, ...] = ("mini", "paper")) -> pd.DataFrame:
    """Minutes of every notebook in each profile's last timed run, and the largest memory of any;
    "not timed" without one.
    """
    names = [path.stem for path in notebooks()]
    table = pd.DataFrame({"notebook": [*names, "largest memory"]})
    for profile in profiles:
        path = Workspace(profile).results / "timing.json"
        record = json.loads(path.read_text()) if path.is_file() else {"gpu": None, "notebooks": {}}
        device = record["gpu"] or "two CPU cores"
        cells = [record["notebooks"].get(name) for name in names]
        peak = max((cell["peak_mib_so_far"] for cell in cells if cell), default=0)
        minutes = [f"{cell['seconds'] / 60:.1f} min" if cell else "not timed" for cell in cells]
        table[f"{profile}, {device}"] = [
            *minutes,
            f"{peak / 1024:.1f} GiB" if peak else "not measured",
        ]
    return table


def card(work: Workspace) -> str:
    """The shipped weights: file, what it is, size, sha256."""
    _, trained = load_tensors(work.results / WEIGHTS, "01_train")
    classifier = json.loads((workspace.RESULTS / "classifier" / "classifier.json").read_text())
    count = sum(p.numel() for p in UNet(trained["width"]).parameters())
    model = f"diffusion model, width {trained['width']}, {count:,} parameters, EMA, FP32, {trained['steps']:,} training steps"
    judge = f"digit classifier, {classifier['parameters']:,} parameters, test accuracy {classifier['test_accuracy']:.2%}"
    packed = f"diffusion model, width {poster.WIDTH}, entropy-coded by `allocate_coded`"
    files = {
        f"{work.profile}/{WEIGHTS}": model,
        f"paper/{PACKED}": packed,
        "classifier/classifier.safetensors": judge,
    }
    rows = [
        (
            f"`{name}`",
            what,
            f"{(workspace.RESULTS / name).stat().st_size:,}",
            f"`{sha256(workspace.RESULTS / name)}`",
        )
        for name, what in files.items()
    ]
    return markdown(pd.DataFrame(rows, columns=["file", "weights of", "bytes", "sha256"]))
