"""A study's folder: the names in it, the mark that makes it ours, and the lock of whoever drives it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from searchspace.disk import is_temporary, open_regular, read_bytes, write_file
from searchspace.errors import SpecError, show
from searchspace.files import read_file
from studies.config import StudyConfig, study_from_data

SETTINGS, JOURNAL, SUMS, REPORT = "study.yaml", "journal.log", "journal.sums", "report.html"
DATA, TRIALS, BEST, EXPORTS, TRACKING = "data", "trials", "best", "export", "tracking"
PREDICTED, SHOWN, PROBED = "predicted.json", "shown.json", "probe.json"
_LOCK, _MARK = "lock", "id"
_LINKED = ("train.bin", "val.bin")
"""Token files stay where they are; the prepared data links to them, and only reads."""


class StudyLockedError(SpecError):
    """Another process drives this study."""


def study_id(folder: Path) -> str:
    """The random mark of a study, which everything bears that may be removed with it. Raises `SpecError`."""
    mark = read_bytes(folder / _MARK, 64).decode("ascii", errors="replace")
    if len(mark) != 16 or set(mark) - set("0123456789abcdef"):
        raise SpecError("", f"holds {show(mark)}, not a study's mark", "restore it from a copy", str(folder / _MARK))
    return mark


def is_study(folder: Path) -> bool:
    """Whether search made this folder."""
    return os.path.lexists(folder / _MARK)


def mark_study(folder: Path) -> str:
    """The mark of a study's folder, made if it has none."""
    if not is_study(folder):
        write_file(folder / _MARK, secrets.token_hex(8))
    return study_id(folder)


def check_place(folder: Path) -> None:
    """Raise `SpecError` unless a study can begin in ``folder``, or has begun there; nothing is touched."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise SpecError("", "is not a folder", "use another --dir", file=str(folder))
    if is_study(folder):
        study_id(folder)
        check_links(folder)
    elif folder.is_dir() and any(name != _LOCK and not is_temporary(name) for name in os.listdir(folder)):
        raise SpecError("", "exists and holds no study", "use another --dir", file=str(folder))


def check_links(folder: Path) -> None:
    """Raise `SpecError` if something in a study's folder leads out of it: what is written there would be others'."""
    root = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(folder):  # which does not follow links
        for name in (*folders, *files):
            path = Path(place, name)
            if not path.is_symlink() or (name in _LINKED and Path(place) == folder / DATA):
                continue
            if not Path(os.path.realpath(path)).is_relative_to(root):
                what = f"is a link to {show(os.readlink(path))}, outside the study's folder"
                raise SpecError("", what, "remove it, if the folder is yours", file=str(path))


@contextmanager
def study_folder(folder: Path) -> Iterator[str]:
    """Hold a study's folder, made and marked if need be; one in which nothing has begun vanishes if the body fails.

    Yields:
        the study's mark.

    Raises:
        SpecError: if it holds something else.
        StudyLockedError: if another process holds it.
    """
    check_place(folder)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with exclusive(folder):
            check_place(folder)
            mark_study(folder)
            for name in os.listdir(folder):
                if is_temporary(name) and stat.S_ISREG(os.lstat(folder / name).st_mode):
                    (folder / name).unlink()  # of a process that was killed
            yield study_id(folder)
    except BaseException:
        if fresh and not (folder / JOURNAL).exists():
            with contextlib.suppress(OSError, SpecError):
                remove_study(folder)
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the system lets go when the process ends, however it ends.

    Raises:
        StudyLockedError: naming the owner's process id.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(folder / _LOCK, flags, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise SpecError("", "is a link", "remove it, if the folder is yours", file=str(folder / _LOCK)) from error
    with os.fdopen(handle, "r+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = show(file.read(200).strip() or "unknown", 80).strip("'")
            raise StudyLockedError(
                "", f"is in use by process {owner}", "wait for it, or stop it", file=str(folder)
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}")
        file.flush()
        yield


def is_driven(folder: Path) -> bool:
    """Whether some process holds the study folder now; nothing is written to find out."""
    try:
        with open_regular(folder / _LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, SpecError):  # no lock, or a file system without any
        return False
    return False


def remove_study(folder: Path) -> None:
    """Remove what a study wrote into its folder, once its trials' attempts are gone. What others put there stays."""
    study_id(folder)
    check_links(folder)
    data = [f"{DATA}/{name}" for name in os.listdir(folder / DATA)] if (folder / DATA).is_dir() else []
    for name in (SETTINGS, JOURNAL, SUMS, REPORT, SHOWN, *data):
        (folder / name).unlink(missing_ok=True)
    for name in (DATA, TRIALS):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    if set(os.listdir(folder)) <= {_LOCK, _MARK}:
        for name in (_LOCK, _MARK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def read_settings(folder: Path) -> StudyConfig:
    """The settings a study was begun with. Raises `SpecError`."""
    file = folder / SETTINGS
    try:
        return study_from_data(read_file(file), exact=False)
    except SpecError as error:
        error.file = error.file or str(file)
        raise
