"""Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import InvalidFile


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block a temporary path beside `path`, and move the file there when the block succeeds.

    Raises:
        InvalidFile: The folder does not exist or cannot be written to, or `path` is itself a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InvalidFile(f"Cannot write {target}: the folder {target.parent} does not exist. Create it first.")
    if target.is_dir():
        raise InvalidFile(f"Cannot write {target}: it is a folder. Name a file.")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise InvalidFile(f"Cannot write {target}: {error.strerror}.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
