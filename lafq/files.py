"""Files are written to a temporary name and then renamed: a full disk or a killed run leaves the old file intact.

Tensors go to safetensors, with a metadata record that loading checks.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it replaces `path`, on failure it is removed.

    Raises OSError with one sentence when the file cannot be written (a full disk, a read-only folder).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}): make room or choose a writable folder, then `make resume`; "
            "the files already there are unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write named tensors and a metadata record (any JSON values) as safetensors."""
    with replacing(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, {"lafq": json.dumps(metadata)})


def load_tensors(path: Path, made_by: str, **expected: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors by name, and the metadata record.

    made_by: what makes the file, for the error ("01_train").
    Raises FileNotFoundError when there is none, ValueError when it is damaged or its metadata is not as `expected`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run {made_by} first, which makes it")
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["lafq"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a lafq file ({error}): delete it and run {made_by} again") from None
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(f"{path} was made with {key}={metadata.get(key)}, not {value}: delete it and run {made_by} again")
    return tensors, metadata
