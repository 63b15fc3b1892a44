"""Going on with a study: its settings must be those it was begun with, but for what may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchspace.disk import write_file
from searchspace.errors import SpecError, show
from searchspace.files import read_file
from searchspace.plugins import decode_records, needing
from studies.config import StudyConfig
from studies.records.folder import JOURNAL, SETTINGS, SUMS
from studies.records.reading import has_launches

_MAY_CHANGE = (
    *("search.num_trials", "search.max_failures", "search.promote", "search.enqueue", "search.time_budget_s"),
    *("scale", "resources", "name", "tracking", "plugins"),
)
"""Settings that may differ when a study goes on."""


def check_settings(settings: StudyConfig, folder: Path) -> None:
    """Raise `SpecError` if the folder's journal was begun with other settings."""
    file = folder / SETTINGS
    if not file.is_file() or not has_launches(folder):
        return  # where nothing was launched, these settings may have been what was wrong
    before = read_file(file)
    with needing(decode_records(before.get("plugins", []), "plugins"), file=str(file)):
        pass
    if differing := _first_difference(before, settings.plain):
        old, new = (show(_at(data, differing)) for data in (before, settings.plain))
        raise SpecError(
            differing, f"is {new}, but {old} in this folder's study", "use another --dir, or set it back", str(file)
        )


def keep_settings(settings: StudyConfig, folder: Path) -> None:
    """Write the study's settings into its folder, whole. A journal in which nothing was launched begins anew."""
    if (folder / JOURNAL).is_file() and not has_launches(folder):
        for name in (JOURNAL, SUMS):
            (folder / name).unlink(missing_ok=True)
    write_file(folder / SETTINGS, settings.to_yaml())


def _at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else data
    return data


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Dotted path of the first value that differs, but for those that may change between runs."""
    if path in _MAY_CHANGE:
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if found := _first_difference(old.get(name), new.get(name), f"{path}.{name}" if path else name):
                return found
        return ""
    return "" if old == new else path
