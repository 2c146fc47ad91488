"""Files appear whole or not at all, and never in the place of another."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from fact_jax.utils import files
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import (
    atomic_write,
    create,
    folder_lock,
    free_path,
    recover,
    replace_folder,
)


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


def overwrite(path, write) -> None:
    with atomic_write(path) as temporary:
        write(temporary)


@pytest.mark.parametrize("write", [create, overwrite])
def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, write):
    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "a.png", full)
    assert error.value.filename == str(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def killed(body: str, folder) -> None:
    """Run lines of Python in a process that is killed in them: nothing is cleaned up."""
    lines = [
        "import os; from pathlib import Path; from fact_jax.utils import files",
        f"out = Path({str(folder / 'out')!r})",
        body,
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False)
    assert done.returncode == 9


def listing(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fill(path, text: str, **options) -> None:
    with replace_folder(path, **options) as folder:
        (folder / "a").write_text(text)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "new" / "out"
    for text in "12":
        fill(target, text)
        assert listing(tmp_path) == {"new/out/a": text}

    def full():
        with replace_folder(target) as folder:
            (folder / "a").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        full()
    assert error.value.filename == str(target)
    with pytest.raises(UserError, match="out: kept, something else was written there"):
        fill(target, "3", replace=False)
    assert listing(tmp_path) == {"new/out/a": "2"}
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_folder_is_there_at_every_moment(tmp_path, monkeypatch):
    """With renameat2 there is no moment without one of the two."""
    target = tmp_path / "out"
    fill(target, "1")
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail("two steps"))
    fill(target, "2")
    assert listing(tmp_path) == {"out/a": "2"}


def test_a_kill_between_the_two_renames_is_undone(tmp_path):
    target = tmp_path / "out"
    fill(target, "1")
    body = """
rename, files._exchange = os.rename, lambda one, other: False
os.rename = lambda *names: (rename(*names), os._exit(9))
with files.replace_folder(out) as folder:
    (folder / "a").write_text("2")
"""
    killed(body, tmp_path)
    assert not target.exists()
    assert not recover(target)
    assert listing(tmp_path) == {"out/a": "1"}


def test_what_a_killed_process_left_is_swept(tmp_path):
    target, other = tmp_path / "out", tmp_path / "other"
    body = "with files.replace_folder(out), files.atomic_write(out):\n    os._exit(9)"
    killed(body, tmp_path)
    (tmp_path / ".out.notes.tmp").write_text("mine")
    assert len(list(tmp_path.iterdir())) == 3
    with replace_folder(target), atomic_write(other):
        assert recover(target)  # a living one is left alone
        assert len(list(tmp_path.iterdir())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.notes.tmp", "other", "out"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(UserError, match="a: kept"), atomic_write(tmp_path / "a", replace=False):
        (tmp_path / "a").write_text("mine")
    assert listing(tmp_path) == {"a": "mine"}
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert listing(tmp_path) == {"a": "new"}
    assert os.stat(tmp_path / "a").st_mode & 0o111 == 0


def test_a_lock_keeps_threads_out_and_is_kept_by_nobody_who_was_kept_out(tmp_path):
    with folder_lock(tmp_path):
        for _ in range(2):
            again = folder_lock(tmp_path / "a" / "..", keep=False)
            with pytest.raises(UserError, match="another thread of this process"), again:
                pass
        assert _locked_elsewhere(tmp_path)
    assert not _locked_elsewhere(tmp_path)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """As by another that ends between opening and locking."""
    path, lockf = tmp_path / ".lock", fcntl.lockf

    def late(file, flags):
        monkeypatch.undo()
        path.unlink()
        lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", late)
    with folder_lock(tmp_path, keep=False):
        assert _locked_elsewhere(tmp_path)
    assert not path.exists()


def test_the_lock_of_another_is_not_removed(tmp_path):
    path = tmp_path / ".lock"
    with folder_lock(tmp_path, keep=False):
        path.unlink()
        path.touch()
    assert path.exists()


def _locked_elsewhere(folder):
    """Whether another process is kept out."""
    code = (
        "import sys; from pathlib import Path; from fact_jax.utils.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): pass"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0 or "another process is writing" in done.stderr
    return done.returncode != 0


def test_a_name_beyond_a_link_is_the_systems(tmp_path):
    """``link/../out`` lies beside what the link names, not beside the link."""
    (tmp_path / "deep" / "dir").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "dir")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with replace_folder(tmp_path / "link" / ".." / "out") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "deep" / "out" / "new").read_text() == "new"
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_url_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://b/model is a URL"), replace_folder("gs://b/model"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_a_program_runs_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for here in (tmp_path / "a", tmp_path / "a" / "b"):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match="runs is not replaced"), replace_folder(tmp_path / "a"):
            pass
    assert (tmp_path / "a" / "b").is_dir()
