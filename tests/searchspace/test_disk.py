"""The file layer: what is read is regular and bounded, what is written is whole, and only what is ours goes."""

import os
import re
import tempfile

import pytest

from searchspace import SpecError
from searchspace.disk import (
    check_replaceable,
    is_temporary,
    new_folder,
    open_regular,
    parse_json,
    private_folder,
    probe_folder,
    read_bytes,
    read_json,
    write_file,
)


def test_a_write_replaces_a_link_and_leaves_what_it_points_to(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    (tmp_path / ".out.tmp").symlink_to(tmp_path / "precious")  # a name that could be guessed
    write_file(tmp_path / "out", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").read_text() == "new"
    assert not [name for name in os.listdir(tmp_path) if is_temporary(name)]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_file(tmp_path / "out", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "out", "new")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


def test_written_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "out", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(SpecError, match=r"no regular file|can't be read"), open_regular(path):
            pass
    for name in ("none", "a\0b", "x" * 300):
        with pytest.raises(SpecError, match="can't be read"):
            read_bytes(tmp_path / name, 10)


def test_size_is_looked_at_before_the_content(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(60 * 2**30)
    with pytest.raises(SpecError, match=r"has 64,424,509,440 bytes"):
        read_bytes(tmp_path / "sparse", 2**20)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "1" * 5000, '"\\ud8', "\xff", "nul"])
def test_json_of_any_kind_is_data_or_a_message(text, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(SpecError, match=re.escape(str(tmp_path / "x.json"))):
        read_json(tmp_path / "x.json")
    with pytest.raises(SpecError):
        parse_json(text.encode("latin-1"))


def fill(folder, contents=lambda folder: {"a"}):
    with new_folder(folder, contents, "a thing") as work:
        (work / "a").write_text("new")


def test_a_folder_is_replaced_only_if_all_of_it_is_known(tmp_path):
    fill(tmp_path / "thing")
    (tmp_path / "thing" / "a").write_text("old")
    fill(tmp_path / "thing")
    assert (tmp_path / "thing" / "a").read_text() == "new"
    (tmp_path / "thing" / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"holds what is not part of a thing: notes\.txt"):
        fill(tmp_path / "thing")
    assert (tmp_path / "thing" / "notes.txt").read_text() == "mine"
    with pytest.raises(SpecError, match="exists and is not a thing"):
        fill(tmp_path / "thing", lambda folder: None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "thing")
    for name in ("file", "link"):
        with pytest.raises(SpecError, match="not a folder of a thing"):
            fill(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "thing"]


def test_an_empty_folder_is_filled_and_a_failure_leaves_what_was(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert (tmp_path / "empty" / "a").read_text() == "new"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "empty", lambda f: {"a"}, "a thing") as work:  # noqa: PT012
        (work / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "empty" / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["empty"]


def test_what_came_into_being_meanwhile_stays(tmp_path):
    with pytest.raises(SpecError, match="exists and is not a thing"):  # noqa: PT012, SIM117
        with new_folder(tmp_path / "thing", lambda f: None, "a thing") as work:
            (work / "a").write_text("new")
            (tmp_path / "thing").mkdir()
            (tmp_path / "thing" / "b").write_text("somebody's")
    assert os.listdir(tmp_path / "thing") == ["b"]


def test_a_private_folder_that_others_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = private_folder("x")
    assert mine.stat().st_mode & 0o777 == 0o700
    assert private_folder("x") == mine
    mine.chmod(0o777)
    assert private_folder("x") != mine
    mine.rmdir()
    (tmp_path / "elsewhere").mkdir()
    mine.symlink_to(tmp_path / "elsewhere")
    assert private_folder("x") != mine
    assert not os.listdir(tmp_path / "elsewhere")


def test_targets_are_tried_before_the_work(tmp_path):
    probe_folder(tmp_path / "new" / "deeper", "-o")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="-o: can't write into"):
        probe_folder(tmp_path / "file" / "x", "-o")
    check_replaceable(tmp_path / "absent", lambda f: None, "a thing")
