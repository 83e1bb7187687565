"""A file that takes the place of another one: whole or not at all, and on the disk.

On Linux the new file has no name while it is written (``O_TMPFILE``), so that a process that is
killed leaves nothing behind. It then gets a name for as long as a link and a rename take, because
only a rename replaces a file. Elsewhere, and on file systems without such files, it has that name
all the time. Whoever writes holds a lock on it: the next save removes those that nobody locks.
"""

import contextlib
import glob
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that is open
    fcntl = None  # type: ignore[assignment]

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def file_path(name: str, path: object) -> Path:
    """The file that a path stands for: where links lead.

    Args:
        name: The argument, for errors.
        path: What was passed.

    Raises:
        TypeError: If it is no path.
        ValueError: If it cannot be one, or links go in a circle.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        msg = f"`{name}` must be the path of a file, a string or a pathlib.Path; found {path!r}."
        raise TypeError(msg)
    try:
        found = Path(os.path.realpath(os.fspath(path)))
        found.stat()
    except FileNotFoundError:
        pass
    except NotADirectoryError as error:
        msg = f"`{name}` ({path}) leads through a file, as if it were a folder."
        raise ValueError(msg) from error
    except (OSError, ValueError) as error:  # a null byte, links in a circle, a name too long
        if isinstance(error, PermissionError):
            raise
        msg = f"`{name}` ({str(path)!r}) is no path of a file: {error}."
        raise ValueError(msg) from error
    return found


def regular(name: str, path: Path) -> os.stat_result | None:
    """What is known of a file; None if there is none.

    Raises:
        ValueError: If there is something that is no regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "of another kind")
        msg = f"`{name}` ({path}) is {kind}, no regular file: give the path of a file."
        raise ValueError(msg)
    return found


def replace_file(target: Path, write: Callable[[BinaryIO], None], name: str = "path") -> None:
    """Write a file; an existing one keeps its mode and owner, and all it held until the end.

    Other names of the existing file (hard links) keep what it held.

    Args:
        target: The file, as `file_path` gives it.
        write: Writes to the new file.
        name: The argument that it comes from, for errors.

    Raises:
        ValueError: If the target is no regular file.
        FileNotFoundError: If its folder does not exist.
        PermissionError: If it must not be written.
        OSError: If it cannot be written; it names the target.
    """
    old = regular(name, target)
    if not target.parent.is_dir():
        msg = f"`{name}` ({target}): there is no folder {target.parent}; make it first."
        raise FileNotFoundError(msg)
    if old is not None and not os.access(target, os.W_OK):
        msg = f"`{name}` ({target}) is a file that must not be written: its mode forbids it."
        raise PermissionError(msg)
    remove_left_over(target)
    part = target.parent / f"{target.name}.{secrets.token_hex(8)}.part"
    try:
        with new_file(part, 0o666 if old is None else 0o600) as file:
            write(file)
            file.flush()
            keep_mode(file.fileno(), old)
            os.fsync(file.fileno())
            if not part.exists():
                handle = file.fileno()  # Python follows the link only if it is given a folder
                os.link(f"/proc/self/fd/{handle}", part, src_dir_fd=handle)
            if fcntl is not None:
                os.replace(part, target)
        if fcntl is None:  # Windows renames closed files only
            os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.filename is None or str(error.filename) == str(part):
            error.filename, error.filename2 = str(target), None
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def new_file(part: Path, mode: int) -> BinaryIO:
    """An empty file that is locked: without a name where there can be one, else with this one."""
    handle = None
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        with contextlib.suppress(OSError):  # the file system has none
            handle = os.open(part.parent, os.O_TMPFILE | os.O_RDWR, mode)
    if handle is None:
        binary = getattr(os, "O_BINARY", 0)
        handle = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | binary, mode)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.fdopen(handle, "w+b")


def remove_left_over(target: Path) -> None:
    """Remove what saves to this file that were killed have left: new files that nobody locks."""
    pattern = glob.escape(f"{target.name}.") + "[0-9a-f]" * 16 + ".part"
    for part in target.parent.glob(pattern):
        with contextlib.suppress(OSError), part.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody writes
            part.unlink()


def keep_mode(handle: int, old: os.stat_result | None) -> None:
    """Give a new file the owner and the mode of the one that it replaces."""
    if old is None or not hasattr(os, "fchmod"):
        return
    with contextlib.suppress(OSError):  # only some may give files away
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))


def sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
