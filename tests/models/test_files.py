import hashlib
import os
import signal
import threading

import pytest

from models.files import FORGOTTEN, LEFT, remove_left, replacing, sha256, uninterrupted


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    names = [
        ".file-0123abcd.txt",
        ".file-4567abcd.txt",
        ".file-0123abcd.csv",
        ".files-0123abcd.txt",
        ".file-mine.txt",
    ]
    for name in names:
        (tmp_path / name).touch()
        old = (tmp_path / name).stat().st_mtime - FORGOTTEN - 1
        os.utime(
            tmp_path / name, (old, old) if name != names[1] else None
        )  # that one may still be written
    with replacing(tmp_path / "file.txt") as temporary:
        temporary.touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names[1:], "file.txt"])


def test_all_that_killed_processes_left_is_removed_where_nobody_else_writes(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in (
        ".file-0123abcd.txt",
        "folder/.other-4567abcd.pt",
        ".mine.txt",
        "file-0123abcd.txt",
    ):
        (tmp_path / name).touch()
    remove_left(tmp_path.rglob(LEFT))
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {
        ".mine.txt",
        "file-0123abcd.txt",
    }


def test_an_interrupt_waits_for_the_end_of_the_block():
    done, handler = [], signal.getsignal(signal.SIGINT)

    def interrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_thread_has_no_interrupts():
    done = []

    def write():
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == [1]
