"""The one place where files are opened: what is read is regular and bounded, what is written is whole and ours.

Whatever a folder holds that the product did not write stays as it is: nothing is written through a link, a folder is
replaced only if all it holds is known to be the product's, and nothing is removed by walking down a tree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

from searchspace.errors import SpecError

Contents: TypeAlias = Callable[[Path], "set[str] | None"]
"""Names of the files in a folder that the product wrote there; None if the folder is not its own."""

JSON_BYTES = 32 * 2**20  # manifests and settings take kilobytes; what is larger is something else
_TEMPORARY = ".{name}-{number}.tmp"


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read it.

    Raises:
        SpecError: if it is missing, can't be read, or is a pipe, a device or a folder (which might never end).
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(handle).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError("", f"can't be read: {reason}", "check the path", file=str(path)) from error
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise SpecError("", "is no regular file", "give a file, not a folder, pipe or device", file=str(path))
    with os.fdopen(handle, "rb") as file:
        yield file


def check_regular(path: Path) -> None:
    """Raise `SpecError` unless ``path`` can be opened as a regular file."""
    with open_regular(path):
        return


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most ``most`` bytes. Raises `SpecError`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise SpecError("", f"has {size:,} bytes", f"keep it under {most:,}", file=str(path))
        try:
            return file.read(size)
        except OSError as error:
            raise SpecError("", f"can't be read: {error.strerror}", "check the disk", file=str(path)) from error


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """A JSON file of at most ``most`` bytes, as plain data. Raises `SpecError`."""
    return parse_json(read_bytes(path, most), str(path))


def parse_json(data: bytes | str, file: str = "") -> Any:
    """JSON as plain data. Raises `SpecError` for what is none, or is nested too deeply."""
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise SpecError("", "is nested too deeply", "flatten it", file=file) from error
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise SpecError("", f"is not valid JSON: {error}", "restore it, or make it again", file=file) from error


def write_file(path: Path, data: bytes | str) -> None:
    """Replace a file so that it is whole after a crash, old or new; a link is replaced, never followed."""
    temporary = path.with_name(_TEMPORARY.format(name=path.name[:60], number=secrets.token_hex(8)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `write_file` gives to what it has not finished."""
    head, _, number = name.removesuffix(".tmp").rpartition("-")
    return name.startswith(".") and name.endswith(".tmp") and bool(head) and _is_hex(number, 16)


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not set(text) - set("0123456789abcdef")


def sync_folder(folder: Path) -> None:
    """Make what was renamed, made or removed in a folder last."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def probe_folder(folder: Path, option: str) -> None:
    """Raise `SpecError` unless files can be made in ``folder`` or the nearest folder above it that exists."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "is not a folder")
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        what = f"can't write into {place}: {(error.strerror or str(error)).lower()}"
        raise SpecError(option, what, "choose another place") from error


def check_replaceable(folder: Path, contents: Contents, what: str) -> None:
    """Raise `SpecError` unless ``folder`` is absent, empty, or holds nothing but what the product wrote."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        kind = "link" if folder.is_symlink() else "file"
        raise SpecError("", f"is a {kind}, not a folder of {what}", "choose another folder", file=str(folder))
    held = {entry.name for entry in os.scandir(folder)}
    if not held:
        return
    known = contents(folder)
    if known is None:
        raise SpecError("", f"exists and is not {what}", "choose another folder", file=str(folder))
    if strange := sorted(held - known):
        names = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise SpecError("", f"holds what is not part of {what}: {names}", "move it, or choose another", str(folder))


@contextmanager
def new_folder(folder: Path, contents: Contents, what: str) -> Iterator[Path]:
    """A folder to be filled, which becomes ``folder`` when the body is done, and vanishes if the body fails.

    Args:
        folder: where it goes.
        contents: what of an existing folder is the product's.
        what: what such a folder is called: ``a bundle``.

    Raises:
        SpecError: if there is something that is not the product's.
    """
    folder = Path(os.path.abspath(folder))
    check_replaceable(folder, contents, what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name[:60]}-{secrets.token_hex(8)}")
    work.mkdir()
    try:
        yield work
        check_replaceable(folder, contents, what)  # it may have been used meanwhile
        aside = None
        if os.path.lexists(folder):
            aside = work.with_name(f"{work.name}-old")
            os.rename(folder, aside)
        os.rename(work, folder)
        if aside is not None:
            _remove_flat(aside)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_flat(work)
        raise


def _remove_flat(folder: Path) -> None:
    """Remove a folder of files; what lies deeper makes it stay."""
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    folder.rmdir()


def private_folder(name: str) -> Path:
    """A folder of this user's alone among the temporary ones, the same every time.

    Whoever else made it first does not get what is written there: then it is another one, new each time.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))


def sha256_of(path: Path) -> str:
    """The digest of a file. Raises `SpecError` if it is no regular one."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
