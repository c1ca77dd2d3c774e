"""Run the notebooks: `python -m lafq.run reproduce | resume | publish`, the verbs of the Makefile.

reproduce computes everything of a profile anew (only the Inception weights and reference features are kept), resume
continues an interrupted run, publish re-executes notebooks/ from the committed results. Executed notebooks go to
build/<profile>/, the parameters and versions to results/<profile>/record.json, times to timing.json beside it.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from papermill.exceptions import PapermillExecutionError

from lafq import paths
from lafq.files import replacing

PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pandas")
QUIET_KERNEL = ["--IPKernelApp.log_level=40"]


def profile_parameters(profile: str) -> dict[str, Any]:
    """The parameters of a profile; ValueError, naming the known ones, for an unknown profile."""
    path = paths.PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in paths.PROFILES.glob("*.yaml")))
        raise ValueError(f"unknown profile {profile!r}: choose one of {known}")
    return yaml.safe_load(path.read_text())


def notebooks(only: str = "") -> list[Path]:
    """The numbered notebooks in order, or those whose name begins with `only`."""
    found = sorted(path for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb") if path.name.startswith(only))
    if not found:
        raise ValueError(f"no notebook's name begins with {only!r}: see notebooks/")
    return found


def declared(notebook: Path) -> dict[str, Any]:
    """The parameters a notebook's `parameters` cell declares, with their defaults as source text."""
    return {name: info["default"] for name, info in papermill.inspect_notebook(str(notebook)).items()}


def check(profile: str, overrides: dict[str, Any], selected: list[Path]) -> dict[str, Any]:
    """The profile's parameters with the overrides; ValueError for a parameter that no notebook declares."""
    parameters = profile_parameters(profile) | overrides
    known = set().union(*(declared(path) for path in selected))
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown parameter {unknown[0]}: the notebooks declare {', '.join(sorted(known))}")
    return parameters


def execute(profile: str, overrides: dict[str, Any], only: str = "") -> None:
    """Run the notebooks with papermill into build/<profile>/, writing record.json and timing.json as each is done."""
    selected = notebooks(only)
    parameters = check(profile, overrides, selected)
    build = paths.BUILD / profile
    build.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for path in selected:
        used = {name: value for name, value in parameters.items() if name in declared(path)}
        print(f"{path.stem} ({profile}) ...", flush=True)
        start = time.monotonic()
        output = build / path.name
        streams = {"progress_bar": False, "stderr_file": sys.stderr, "extra_arguments": QUIET_KERNEL}
        papermill.execute_notebook(path, output, used, cwd=paths.NOTEBOOKS, **streams)
        _clean(output)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        _update(paths.RESULTS / profile / "record.json", "notebooks", path.stem, used)
        _update(
            paths.RESULTS / profile / "timing.json", "notebooks", path.stem, {"seconds": round(seconds), "peak_mib": round(peak)}
        )
        print(f"{path.stem}: {seconds:.0f} s, peak {peak:,.0f} MiB -> build/{profile}/{path.name}", flush=True)
    minutes = (time.monotonic() - began) / 60
    folders = f"tables in results/{profile}, figures in figures/{profile}, executed notebooks in build/{profile}"
    print(f"done in {minutes:.1f} minutes: {folders}")


def publish(only: str = "") -> None:
    """Execute notebooks/ in place as they are committed: COMPUTE false, everything loaded from results/."""
    os.environ["TQDM_DISABLE"] = "1"
    for path in notebooks(only):
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, record_timing=False, extra_arguments=QUIET_KERNEL)
        client.resources = {"metadata": {"path": str(paths.NOTEBOOKS)}}
        client.execute()
        _clean(path, notebook)
        print(f"notebooks/{path.name}: refreshed from results/")


def _clean(path: Path, notebook: nbformat.NotebookNode | None = None) -> None:
    """Write a notebook without what names this run or machine: papermill's record, times, progress bars, versions."""
    notebook = notebook or nbformat.read(path, as_version=4)
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    with replacing(path) as temporary, temporary.open("w") as file:
        nbformat.write(notebook, file)


def _update(path: Path, section: str, key: str, value: Any) -> None:
    record = json.loads(path.read_text()) if path.is_file() else {}
    record |= {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    record["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    record.setdefault(section, {})[key] = value
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def choose_profile(asked: str) -> str:
    """The profile asked for, else paper where a CUDA GPU is visible and mini elsewhere; says which and why."""
    if asked:
        return asked
    chosen, reason = ("paper", "a CUDA GPU is visible") if torch.cuda.is_available() else ("mini", "no CUDA GPU is visible")
    print(f"profile {chosen}: {reason} (PROFILE=smoke, mini or paper overrides)")
    return chosen


def main() -> int:
    """Parse the verb and run it; errors are one sentence and exit status 1, with earlier results left as they were."""
    parser = argparse.ArgumentParser(prog="lafq.run")
    parser.add_argument("verb", choices=["reproduce", "resume", "publish"])
    parser.add_argument("--profile", default="")
    parser.add_argument("--only", default="", help="run only notebooks whose name begins with this, e.g. 03")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a parameter (YAML)")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "15")
    try:
        if arguments.verb == "publish":
            publish(arguments.only)
            # Imported here because it draws on every table, which only a publisher has.
            from lafq import readme

            readme.refresh()
            print("README.md: numbers refreshed from results/")
            return 0
        profile = choose_profile(arguments.profile)
        overrides = {k: yaml.safe_load(v) for k, _, v in (item.partition("=") for item in arguments.set)}
        check(profile, overrides, notebooks(arguments.only))
        if arguments.verb == "reproduce" and not arguments.only:
            shutil.rmtree(paths.BUILD / profile, ignore_errors=True)
        execute(profile, {"COMPUTE": True, **overrides}, arguments.only)
    except (PapermillExecutionError, CellExecutionError) as error:
        print(f"stopped: {error.ename}: {error.evalue}\nmend this, then `make resume` goes on from here", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
