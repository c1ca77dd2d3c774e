"""Every committed notebook under what Binder gives: one core and 2 GiB. Part of `make benchmark`;
Linux only.

The notebook's processes may use one core (their affinity) and hold 2 GiB of data each
(RLIMIT_DATA); what needs more fails.
seconds: from start to the last cell, imports included. peak_mib: the largest resident set of a
process, that of the kernel.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from shared import in_a_process, run, write

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


def measured(path: Path, output: str) -> dict:
    """One notebook, its figures written to the folder `output`."""
    how = {"environment": {"LAFQ_OUTPUT": output, "TQDM_DISABLE": "1"}, "preexec_fn": confine}
    start = time.perf_counter()
    kib = in_a_process("-c", EXECUTE, path, workspace.NOTEBOOKS, **how)
    took = {"seconds": round(time.perf_counter() - start, 1), "peak_mib": round(kib / 1024, 1)}
    return {"notebook": path.stem, "cores": 1, "limit_mib": LIMIT // 2**20, **took}


def main() -> None:
    """Write and print results/benchmarks/binder.csv."""
    paths = sorted(workspace.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(workspace.RESULTS, os.path.join(folder, "results"))
        write("binder", [measured(path, folder) for path in paths])


if __name__ == "__main__":
    sys.exit(run(main))
