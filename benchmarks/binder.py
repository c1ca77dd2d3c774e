"""Every committed notebook under what Binder gives: one core and 2 GiB. Part of `make benchmark`;
Linux only.

The notebook's processes may use one core (their affinity) and hold 2 GiB of data each
(RLIMIT_DATA); what needs more fails.
seconds: from start to the last cell, imports included. peak_mib: the largest resident set of a
process, that of the kernel.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time

import pandas as pd
from shared import run, write

from lafq.study import workspace

LIMIT = 2 * 2**30
EXECUTE = """
import nbformat, resource, sys
from nbclient import NotebookClient

notebook, resources = nbformat.read(sys.argv[1], as_version=4), {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, resources=resources).execute()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def confine() -> None:
    """Runs in the child: one core, 2 GiB."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def measured(name: str, output: str) -> dict:
    """One notebook, its figures written to the folder `output`; RuntimeError with its last line
    where it fails.
    """
    path = workspace.NOTEBOOKS / name
    environment = {**os.environ, "LAFQ_OUTPUT": output, "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", EXECUTE, str(path), str(workspace.NOTEBOOKS)]
    start = time.perf_counter()
    done = subprocess.run(
        command, env=environment, preexec_fn=confine, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(
            f"{name} failed with one core and 2 GiB: {done.stderr.strip().splitlines()[-1]}"
        )
    return {
        "notebook": path.stem,
        "cores": 1,
        "limit_mib": LIMIT // 2**20,
        "seconds": seconds,
        "peak_mib": int(done.stdout) / 1024,
    }


def main() -> None:
    """Write and print results/benchmarks/binder.csv."""
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(workspace.RESULTS, os.path.join(folder, "results"))
        table = [
            measured(path.name, folder)
            for path in sorted(workspace.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
        ]
    write("binder", pd.DataFrame(table).round(1).to_dict("records"))


if __name__ == "__main__":
    sys.exit(run(main))
