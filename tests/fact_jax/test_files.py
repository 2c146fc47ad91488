"""Files appear whole or not at all, and never in the place of another."""

import errno
import os
import threading

import pytest

from fact_jax import files
from fact_jax.files import atomic_write, create, free_path


def filled(text: str):
    return lambda path: path.write_text(text)


def test_a_taken_name_gets_a_number(tmp_path):
    wanted = tmp_path / "new" / "a.png"
    made = [create(wanted, filled(str(i))) for i in range(3)]
    assert [path.name for path in made] == ["a.png", "a-2.png", "a-3.png"]
    assert [path.read_text() for path in made] == ["0", "1", "2"]
    assert len(list(wanted.parent.iterdir())) == 3


@pytest.mark.parametrize("kind", ["file", "folder", "hard link", "symbolic link", "dangling link"])
def test_whatever_has_the_name_stays(tmp_path, kind):
    own, taken = tmp_path / "own.png", tmp_path / "taken.png"
    own.write_text("mine")
    if kind == "folder":
        taken.mkdir()
    elif kind == "hard link":
        os.link(own, taken)
    elif kind == "file":
        taken.write_text("mine")
    else:
        taken.symlink_to(own if kind == "symbolic link" else tmp_path / "gone")
    before = os.lstat(taken)
    spelling = tmp_path / "x" / ".." / "taken.png"
    (tmp_path / "x").mkdir()
    assert create(spelling, filled("new")).name == "taken-2.png"
    assert os.lstat(taken) == before
    assert own.read_text() == "mine"
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("links", [True, False])
def test_two_at_once_get_two_names(tmp_path, monkeypatch, links):
    """Also where the file system knows no hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM)))
    both = threading.Barrier(2)

    def free(path):
        found = free_path(path)
        if found == path:
            both.wait(10)
        return found

    monkeypatch.setattr(files, "free_path", free)
    threads = [
        threading.Thread(target=create, args=(tmp_path / "a", filled(text))) for text in "xy"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize("write", [create, None])
def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, write):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        if write is not None:
            write(tmp_path / "a.png", full)
        else:
            with atomic_write(tmp_path / "a.png") as temporary:
                full(temporary)
    assert error.value.filename == str(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
