"""Run the notebooks: `python -m tools.run VERB`, the verbs of the Makefile.

reproduce computes a profile anew, but kept images and Inception's view of the real digits
(`images.reference`); resume goes on with the last run, publish writes notebooks/ and pages from
results/. Executed notebooks go to build/<profile>/, what they ran with to record.json.
"""

import argparse
import json
import logging
import math
import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill
import torch
import yaml
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lafq.study import workspace
from lafq.study.diffusion import subject
from lafq.study.images import cluster, sampling
from lafq.study.images.sampling import ImageStore
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import remove_leftovers
from tools import verify
from tools.pages import notebooks
from tools.publish import QUIET_KERNEL, clean, declared, publish, published, write_text

PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pandas")
MAY_BE_ZERO = ("SEED", "INCEPTION_REFERENCE", "TRAINING.warmup", "TRAINING.decay")
LAST = "last_run.json"
RSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
RESUME = "`make resume` goes on from here"
DIED = "the notebook's process died, most likely for want of memory: lower SAMPLING_BATCH"


def fits(name: str, value: Any, declared: Any) -> None:
    """ValueError, with the parameter's name, unless a value has the declared type and range."""
    kind = type(declared)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} is {value!r}: it must be of type {kind.__name__}")
    if kind is dict:
        if missing := sorted(declared.keys() - value.keys()):
            raise ValueError(f"{name} is {value!r}: it must name {missing[0]} too")
        for key in declared:
            fits(f"{name}.{key}", value[key], declared[key])
    elif kind is list:
        if not value:
            raise ValueError(f"{name} is []: it must have at least one value")
        for item in value:
            fits(name, item, declared[0])
    elif kind in (int, float):
        low = 0 if kind is float or name in MAY_BE_ZERO else 1
        high = 1 if "RATIO" in name.upper() else math.inf
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}: it must lie in [{low}, {high}]")


def check(profile: str, overrides: dict[str, Any], selected: list[Path]) -> dict[str, Any]:
    """The profile's parameters with the overrides; an error for a name that no notebook declares, a
    value that does not fit its declaration, and missing weights.
    """
    known = {name: value for path in selected for name, value in declared(path).items()}
    every = {name: value for path in notebooks() for name, value in declared(path).items()} | known
    p = profile_parameters(profile)
    if overrides.get("PROFILE", profile) != profile:
        raise ValueError(f"PROFILE is set beside profile {profile}: name one, with --profile")
    for names, allowed in ((overrides, known), (p, every)):
        if unknown := sorted(set(names) - set(allowed)):
            names = ", ".join(sorted(allowed))
            raise ValueError(f"unknown parameter {unknown[0]}: the notebooks declare {names}")
    p |= overrides
    for name, value in p.items():
        fits(name, value, every[name])
    if overrides.get("COMPUTE") and not p["TRAIN"]:
        subject.check_weights(Workspace(profile), p)
    if p["SCHEDULER"]:
        cluster.connect(p["SCHEDULER"]).close()
    return p


def execute(profile: str, parameters: dict[str, Any], selected: list[Path], anew: bool) -> None:
    """Run the notebooks into build/<profile>/, writing record.json as each is done.

    anew: drop the samples and sensitivities (and checkpoint, where 01_train shall train) that an
    earlier run left in build/, and time the notebooks. results/<profile>/samples is never dropped.
    """
    work = Workspace(profile)
    for folder in (work.results, work.figures, work.build):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to: give yourself the right to")
        remove_leftovers(folder)
    if anew:
        verify.keep_aside(work)
        for kept in ("samples", "sensitivity"):
            shutil.rmtree(work.build / kept, ignore_errors=True)
        (work.build / sampling.COUNTED).unlink(missing_ok=True)
        if parameters["TRAIN"] and selected[0].stem == "01_train":
            (work.build / subject.CHECKPOINT).unlink(missing_ok=True)
    for path in selected:
        used = {name: value for name, value in parameters.items() if name in declared(path)}
        print(f"{path.stem} ({profile}) ...", flush=True)
        start, output = time.monotonic(), work.build / path.name
        how = {"cwd": workspace.NOTEBOOKS, "progress_bar": False, "stderr_file": sys.stderr}
        papermill.execute_notebook(path, output, used, extra_arguments=QUIET_KERNEL, **how)
        clean(output)
        seconds = round(time.monotonic() - start)
        peak = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / RSS_PER_MIB)
        _update(work.results / "record.json", path.stem, used)
        if anew:
            timed = {"seconds": seconds, "peak_mib_so_far": peak}
            _update(work.build / "timing.json", path.stem, timed)
        print(f"{path.stem}: {seconds} s, peak so far {peak:,} MiB, {output}", flush=True)
    print(f"tables: {work.results}\nfigures: {work.figures}\nexecuted notebooks: {work.build}")
    verify.report(work)
    print("`make publish` refreshes notebooks/ and README.md from these results")
    _update(work.results / "record.json", "images", ImageStore(work).drawn_by())
    counts = ImageStore(work).counts().items()
    print("images:", ", ".join(f"{count:,} {how}" for how, count in counts))


def _update(path: Path, key: str, value: Any) -> None:
    """Write a notebook's value, or under "images" which machine drew which kept rows."""
    record = json.loads(path.read_text()) if path.is_file() else {"notebooks": {}}
    record |= {name: version(name) for name in PACKAGES}
    record |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    record["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    (record if key == "images" else record["notebooks"])[key] = value
    write_text(path, json.dumps(record, indent=2, sort_keys=True) + "\n")


def _override(item: str) -> tuple[str, Any]:
    name, _, value = item.partition("=")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {item!r} is not NAME=VALUE with a value in YAML") from None


def run(arguments: argparse.Namespace) -> None:
    """Check what is asked for, remember it for `resume`, and execute it."""
    overrides = dict(_override(item) for item in arguments.set)
    asked = {"profile": arguments.profile, "overrides": overrides, "only": arguments.only}
    last = workspace.BUILD / LAST
    if arguments.verb == "resume" and last.is_file() and not any(asked.values()):
        try:
            found = json.loads(last.read_text())
            asked = {key: type(value)(found[key]) for key, value in asked.items()}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{last} is damaged: delete it, and name what to run") from None
        print(f"resuming the last run: {asked}")
    asked["profile"] = profile = asked["profile"] or "paper"
    asked["overrides"] = {"COMPUTE": True, **asked["overrides"]}
    selected = notebooks(asked["only"], profile)
    parameters = check(profile, asked["overrides"], selected)
    write_text(last, json.dumps(asked))
    execute(profile, parameters, selected, anew=arguments.verb == "reproduce")


def main() -> int:
    """Parse the verb and run it; errors are one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="tools.run")
    parser.add_argument("verb", choices=["reproduce", "resume", "publish", "published"])
    parser.add_argument("--profile", default="")
    parser.add_argument("--only", default="", help="run only notebooks that begin so, e.g. 03")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE, a value in YAML")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "15")
    # What stops a notebook is told below, in one sentence.
    for name in ("traitlets", "papermill"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        if arguments.verb == "published":
            print(published())
        elif arguments.verb == "publish":
            publish(arguments.only)
        else:
            run(arguments)
        return 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was finished is kept, and {RESUME}", file=sys.stderr)
        return 130
    except DeadKernelError:
        reason = f"{DIED}; then {RESUME}"
    except (PapermillExecutionError, CellExecutionError) as error:
        reason = f"{error.ename}: {error.evalue}\nmend this, then {RESUME}"
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error)
    print(f"stopped: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
