"""A file takes the place of another one: whole or not at all, with its mode, through links."""

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from laplax_kfac.files import file_path, replace_file

posix = pytest.mark.skipif(os.name != "posix", reason="files of POSIX")


def put(text: bytes):
    return lambda file: file.write(text)


@pytest.fixture(params=["without a name", "with a name"])
def new_files(request, monkeypatch):
    """Both ways to have a new file: systems differ in which of them there is."""
    if request.param == "with a name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("new_files")
def test_a_file_is_written_and_replaced(tmp_path):
    target = tmp_path / "file"
    for text in (b"first", b"second"):
        replace_file(target, put(text))
        assert target.read_bytes() == text
    assert names(tmp_path) == ["file"]


@posix
@pytest.mark.usefixtures("new_files")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_a_file_keeps_its_mode(mode, tmp_path):
    target = tmp_path / "file"
    target.touch()
    target.chmod(mode)
    replace_file(target, put(b"x"))
    assert stat.S_IMODE(target.stat().st_mode) == mode


@posix
@pytest.mark.usefixtures("new_files")
def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    replace_file(tmp_path / "file", put(b"x"))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@posix
@pytest.mark.usefixtures("new_files")
@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_written(there, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    target, link, longer = folder / "target", tmp_path / "link", tmp_path / "longer"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    longer.symlink_to("link")  # relative, and to a link
    replace_file(file_path("path", longer), put(b"new"))
    assert link.is_symlink()
    assert longer.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(folder) == ["target"]


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


SPECIAL = {"a folder": Path.mkdir, "a pipe": pipe, "a socket": listening}


@posix
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("through_link", [False, True])
def test_what_is_no_regular_file_is_refused(kind, through_link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths of sockets are short
    SPECIAL[kind](Path("special"))
    before = (tmp_path / "special").stat()
    path = tmp_path / "special"
    if through_link:
        path = tmp_path / "link"
        path.symlink_to("special")
    with pytest.raises(ValueError, match=rf"`path` \(.*special\) is {kind}, no regular file"):
        replace_file(file_path("path", path), put(b"x"))
    assert (tmp_path / "special").stat().st_mode == before.st_mode
    assert "special" in names(tmp_path)


@posix
def test_devices_are_refused():
    with pytest.raises(ValueError, match=r"`path` \(/dev/null\) is a device, no regular file"):
        replace_file(file_path("path", "/dev/null"), put(b"x"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def circle(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a"


def through_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "inside"


@posix
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (circle, ValueError, "is no path of a file"),
        (lambda _: "a\0b", ValueError, "is no path of a file"),
        (lambda folder: folder / ("x" * 5000), ValueError, "is no path of a file"),
        (through_a_file, ValueError, "leads through a file"),
        (lambda _: 3, TypeError, "must be the path of a file"),
        (lambda _: None, TypeError, "must be the path of a file"),
        (lambda _: b"bytes", TypeError, "must be the path of a file"),
    ],
    ids=["circle", "null", "long", "through a file", "3", "None", "bytes"],
)
def test_paths_of_no_file_are_refused(make, error, text, tmp_path):
    with pytest.raises(error, match=text):
        file_path("path", make(tmp_path))


@pytest.mark.usefixtures("new_files")
def test_errors_name_the_file_and_leave_nothing(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def full(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        replace_file(target, full)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing"):
        replace_file(tmp_path / "missing" / "file", put(b"x"))


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everything")
def test_files_that_must_not_be_written_are_not(tmp_path):
    target = tmp_path / "file"
    target.touch(0o400)
    with pytest.raises(PermissionError, match="must not be written"):
        replace_file(target, put(b"x"))


KILLED = """
import os, signal, sys
if sys.argv[2] == "named" and hasattr(os, "O_TMPFILE"):
    del os.O_TMPFILE
from pathlib import Path
from laplax_kfac.files import writing
if sys.argv[3] == "renaming":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
def write(file):
    file.write(b"half of it"), file.flush()
    if sys.argv[3] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
writing.replace_file(Path(sys.argv[1]), write)
"""


@posix
@pytest.mark.parametrize("how", ["nameless", "named"])
@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_what_a_kill_leaves_the_next_save_removes(how, when, tmp_path):
    if how == "nameless" and not has_nameless(tmp_path):
        pytest.skip("the file system has no files without names")
    target = tmp_path / "file[1]"  # a name with a meaning in patterns
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, target, how, when], check=False)
    assert done.returncode == -9
    assert target.read_text() == "old"
    left = [name for name in names(tmp_path) if name != target.name]
    assert len(left) == (how == "named" or when == "renaming")
    (tmp_path / "file[1].part").touch()  # not ours
    (tmp_path / "file[1].0123.part").touch()
    replace_file(target, put(b"new"))
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == sorted(["file[1]", "file[1].part", "file[1].0123.part"])


def has_nameless(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except (OSError, AttributeError):
        return False
    return True


@posix
def test_a_file_that_somebody_is_writing_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    target = tmp_path / "file"

    def write(file):
        replace_file(target, put(b"by the other"))
        assert len(names(tmp_path)) == 2  # ours is still there
        file.write(b"by us")

    replace_file(target, write)
    assert target.read_bytes() == b"by us"
    assert names(tmp_path) == ["file"]


def test_what_is_written_is_brought_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_mode))
    replace_file(tmp_path / "file", put(b"x"))
    assert stat.S_ISREG(synced[0])
    if os.name == "posix":
        assert stat.S_ISDIR(synced[1])
