"""Files are written to a temporary name and then renamed: a full disk or a killed run leaves the
old file intact.

Tensors go to safetensors, with a metadata record that loading checks. A sealed file also carries
the sha256 of all its bytes (taken with 64 zeros in the seal's own place), which loading checks
before anything is parsed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

BLANK = "0" * 64
HEADER_LIMIT = 2**26
_COUNT = count()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path, of this writer alone; on success it replaces `path`, on failure it is
    removed. Raises OSError with one sentence when the file cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_COUNT)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_file():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}): make room or choose a writable folder, then `make "
            f"resume`; the files already there are unchanged"
        ) from error
    finally:
        with suppress(OSError):  # of a file system that has become read-only: said above
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of `atomic_write` that killed processes left below a folder."""
    for path in folder.rglob(".*.part"):
        writer = re.search(r"\.(\d+)-\d+\.part$", path.name)
        if writer and not _runs(int(writer[1])):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:  # another user's process runs, but takes no signal
        return isinstance(error, PermissionError)
    return True


def save_tensors(
    path: Path, tensors: dict[str, Tensor], *, sealed: bool = False, **metadata: Any
) -> None:
    """Write named tensors and a metadata record (any JSON values), with a seal when asked for."""
    about = _record(sealed, metadata)
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # of the user's umask; safetensors writes the owner's alone
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, about)
        temporary.chmod(mode)
        if sealed:
            _, digest, place = _seal(temporary)
            with temporary.open("r+b") as file:
                file.seek(place)
                file.write(digest.encode())


def file_bytes(tensors: dict[str, Tensor], *, sealed: bool = False, **metadata: Any) -> int:
    """Bytes of the file that `save_tensors` writes."""
    return len(save({n: t.contiguous() for n, t in tensors.items()}, _record(sealed, metadata)))


def _record(sealed: bool, metadata: dict[str, Any]) -> dict[str, str]:
    record = {"lafq": json.dumps(metadata, separators=(",", ":"))}
    return record | {"seal": BLANK} if sealed else record


def load_tensors(
    path: Path, made_by: str, *, sealed: bool = False, **expected: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors by name, and the metadata record.

    made_by: what makes the file, for the error ("01_train"); sealed: whether it must carry a seal.
    Raises FileNotFoundError when there is none, ValueError when it is damaged or its metadata is
    not as `expected`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run {made_by} first, which makes it")
    advice = f": delete it and run {made_by} again"
    with _opened(path, sealed, advice) as (file, metadata):
        # Clones, since the tensors as read keep the whole file mapped.
        tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(f"{path} was made with {key}={metadata.get(key)}, not {value}{advice}")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata record of a file, without its tensors; ValueError when it has none."""
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(
    path: Path, sealed: bool = False, advice: str = ""
) -> Iterator[tuple[safe_open, dict[str, Any]]]:
    try:
        if sealed:
            found, digest, _ = _seal(path)
            if found != digest:
                raise ValueError("its checksum is wrong")
        with safe_open(path, "pt") as file:
            yield file, json.loads((file.metadata() or {})["lafq"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a lafq file ({error}){advice}") from None


def _seal(path: Path) -> tuple[str, str, int]:
    """The seal of a file ("" for none), what it must be, and where in the file it stands."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), HEADER_LIMIT))
        seal = re.search(rb'"seal":"([0-9a-f]{64})"', header)
        start, end = seal.span(1) if seal else (0, 0)
        content = hashlib.sha256(length + header[:start] + BLANK.encode() + header[end:])
        hashlib.file_digest(file, lambda: content)
    return header[start:end].decode(), content.hexdigest(), 8 + start
