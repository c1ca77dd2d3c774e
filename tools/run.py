"""Run the notebooks: `python -m tools.run reproduce | resume | publish`, the verbs of the Makefile.

reproduce computes everything of a profile anew (only Inception's weights and reference features are
kept), resume goes on with the last run as it was asked for, publish re-executes notebooks/ from
results/ and refreshes the README's numbers. Executed notebooks and timing.json go to
build/<profile>/, the parameters and versions to results/<profile>/record.json.
"""

import argparse
import json
import logging
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
from jsonschema import Draft202012Validator
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lafq.study import workspace
from lafq.study.diffusion import weights
from lafq.study.images import cluster
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import atomic_write, remove_leftovers
from tools import compare, cost
from tools.notebooks import QUIET_KERNEL, clean, declared, notebooks
from tools.publishing import publish, published

PACKAGES = ("torch", "torchvision", "torch-fidelity", "numpy", "pandas")
SCHEMA = yaml.safe_load(Path(__file__).with_name("parameters.yaml").read_text())
LAST = "last_run.json"


def check(profile: str, overrides: dict[str, Any], selected: list[Path]) -> dict[str, Any]:
    """The profile's parameters with the overrides; ValueError for a name no notebook declares or a
    value out of range.
    """
    parameters = profile_parameters(profile) | overrides
    known = set().union(*(declared(path) for path in selected))
    everywhere = known.union(*(declared(path) for path in notebooks()))
    for names, allowed in ((overrides, known), (parameters, everywhere)):
        if unknown := sorted(set(names) - allowed):
            raise ValueError(
                f"unknown parameter {unknown[0]}: the notebooks declare "
                f"{', '.join(sorted(allowed))}"
            )
    for error in Draft202012Validator(SCHEMA).iter_errors(parameters):
        name, *inside = map(str, error.absolute_path)
        where = f"{name} ({SCHEMA['properties'][name]['description']})"
        raise ValueError(
            f"{where} is wrong{' at ' + '.'.join(inside) if inside else ''}: {error.message}"
        )
    if overrides.get("COMPUTE") and not parameters["TRAIN"]:
        try:
            weights.check_weights(
                Workspace(profile), parameters["WIDTH"], parameters["SEED"], parameters["TRAINING"]
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, {cost.training_time(parameters)}") from None
    if parameters["SCHEDULER"]:
        cluster.connect(parameters["SCHEDULER"]).close()
    return parameters


def execute(profile: str, overrides: dict[str, Any], only: str = "", anew: bool = True) -> None:
    """Run the notebooks with papermill into build/<profile>/, writing record.json as each is done.

    anew: drop what an earlier run had sampled into build/ (and, where 01_train shall train, its
    checkpoint) and time the notebooks. Images in results/<profile>/samples are never dropped.
    """
    selected = notebooks(only, profile)
    parameters = check(profile, overrides, selected)
    work = Workspace(profile)
    build = work.build
    if anew:
        compare.keep_aside(work)
        shutil.rmtree(build / "samples", ignore_errors=True)
        if parameters["TRAIN"] and selected[0].stem == "01_train":
            (build / "checkpoint.safetensors").unlink(missing_ok=True)
    for folder in (work.results, work.figures, build):
        remove_leftovers(folder)
    build.mkdir(parents=True, exist_ok=True)
    print(cost.estimate(profile, parameters, [path.stem for path in selected]), flush=True)
    began = time.monotonic()
    for path in selected:
        used = {name: value for name, value in parameters.items() if name in declared(path)}
        print(f"{path.stem} ({profile}) ...", flush=True)
        start = time.monotonic()
        output = build / path.name
        streams = {
            "progress_bar": False,
            "stderr_file": sys.stderr,
            "extra_arguments": QUIET_KERNEL,
        }
        papermill.execute_notebook(path, output, used, cwd=workspace.NOTEBOOKS, **streams)
        clean(output)
        seconds, peak = time.monotonic() - start, _peak_mib()
        _update(work.results / "record.json", path.stem, used)
        if anew:
            _update(
                build / "timing.json",
                path.stem,
                {"seconds": round(seconds), "peak_mib_so_far": round(peak)},
            )
        print(
            f"{path.stem}: {seconds:.0f} s, peak so far {peak:,.0f} MiB -> "
            f"build/{profile}/{path.name}",
            flush=True,
        )
    minutes = (time.monotonic() - began) / 60
    folders = f"tables in results/{profile}, figures in figures/{profile}, executed notebooks in build/{profile}"
    print(f"done in {minutes:.1f} minutes: {folders}")
    compare.report(work)
    print("`make publish` refreshes notebooks/ and README.md from these results")


def _peak_mib() -> float:
    """Largest resident memory of any notebook's process so far, MiB (the system counts KiB, macOS
    bytes).
    """
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _update(path: Path, key: str, value: Any) -> None:
    record = json.loads(path.read_text()) if path.is_file() else {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record |= {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **{name: version(name) for name in PACKAGES},
    }
    record.setdefault("notebooks", {})[key] = value
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def main() -> int:
    """Parse the verb and run it; errors are one sentence and exit status 1, with earlier results
    left as they were.
    """
    parser = argparse.ArgumentParser(prog="tools.run")
    parser.add_argument("verb", choices=["reproduce", "resume", "publish", "published"])
    parser.add_argument("--profile", default="")
    parser.add_argument(
        "--only", default="", help="run only notebooks whose name begins with this, e.g. 03"
    )
    parser.add_argument(
        "--weights",
        default="",
        help="trained weights to use, a file that 01_train wrote (ema.safetensors)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter (YAML)",
    )
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "15")
    # What stops a notebook is said below, in one sentence.
    for name in ("traitlets", "papermill"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        if arguments.verb == "published":
            print(published())
        elif arguments.verb == "publish":
            publish(arguments.only)
            refresh_pages()
        else:
            run(arguments)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what was finished is kept, and `make resume` goes on from here",
            file=sys.stderr,
        )
        return 130
    except DeadKernelError:
        print(
            "stopped: the notebook's process died, most likely for want of memory: free some, or "
            "lower SAMPLING_BATCH in "
            "notebooks/profiles; then `make resume` goes on from here",
            file=sys.stderr,
        )
        return 1
    except (PapermillExecutionError, CellExecutionError) as error:
        print(
            f"stopped: {error.ename}: {error.evalue}\nmend this, then `make resume` goes on from "
            f"here",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def refresh_pages() -> None:
    """Bring the numbers of README and model card up to date."""
    # Imported here because it draws on every table, which only a publisher has.
    from tools import crate, readme

    readme.refresh()
    crate.write()
    print(
        "README.md, docs/ and results/MODEL_CARD.md: numbers refreshed from results/; "
        "ro-crate-metadata.json written"
    )


def _override(item: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE; ValueError when it is anything else."""
    name, equals, value = item.partition("=")
    try:
        return name, yaml.safe_load(value) if equals else {}[name]
    except (yaml.YAMLError, KeyError):
        raise ValueError(f"--set {item!r} is not NAME=VALUE with a value in YAML") from None


def run(arguments: argparse.Namespace) -> None:
    """Check what is asked for, remember it for `resume`, and execute it."""
    overrides = dict(_override(item) for item in arguments.set)
    asked = {"profile": arguments.profile, "overrides": overrides, "only": arguments.only}
    last = workspace.BUILD / LAST
    if arguments.verb == "resume" and last.is_file() and not any(asked.values()):
        try:
            asked = json.loads(last.read_text())
        except ValueError:
            raise ValueError(f"{last} is damaged: delete it, and name what to run") from None
        print(f"resuming the last run: {asked}")
    asked["profile"] = asked["profile"] or "mini"
    asked["overrides"] = {"COMPUTE": True, **asked["overrides"]}
    if arguments.weights:
        p = profile_parameters(asked["profile"])
        weights.take_weights(
            Workspace(asked["profile"]),
            Path(arguments.weights),
            p["WIDTH"],
            p["SEED"],
            p["TRAINING"],
        )
    check(asked["profile"], asked["overrides"], notebooks(asked["only"], asked["profile"]))
    with atomic_write(last) as temporary:
        temporary.write_text(json.dumps(asked))
    execute(**asked, anew=arguments.verb == "reproduce")


if __name__ == "__main__":
    sys.exit(main())
