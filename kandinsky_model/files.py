"""Output files are whole or absent: written under a draft name, then renamed.

with replacing(path) as draft: write(draft)
    path holds what it held before, until `draft` is complete and on the disk
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write under, in the folder of `path`, with its extension; it becomes `path`.

    Folders are made as needed. When the body fails, the draft is removed and `path` is left alone.
    Who still reads the old file (it may be memory-mapped) keeps reading the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise an error now if `replacing` could not write `path` later."""
    path = Path(path)
    try:
        is_folder = path.is_dir()
        path.parent.mkdir(parents=True, exist_ok=True)
        _draft(path).touch()
        _draft(path).unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    if is_folder:
        raise ValueError(f"{path} is a folder; name a file in it")


def remove_drafts(path: str | Path) -> None:
    """Remove what processes that were killed left of `path`."""
    path = Path(path)
    for draft in path.parent.iterdir():
        if re.fullmatch(rf"\.\d+-{re.escape(path.name)}", draft.name):
            draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{path.name}")
