"""Archives of arrays: a header that says what is in them, and checksums of it all; no pickle.

A file is a zip archive of ``.npy`` entries (``numpy.load`` opens it), stored without compression.
The entry ``header`` is JSON: what the arrays stand for, and of each its shape, its dtype and the
SHA-256 of its bytes; the entry ``checksum`` is the SHA-256 of the header. So everything that is
read is known from the header before, nothing is larger than the file, and a changed bit is found.

Safetensors would do for the arrays, but it has no checksums, and a header of strings alone; NumPy
and a zip archive are what everybody has.
"""

import contextlib
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from laplax_kfac.files.writing import file_path, regular, replace_file

Json = Any
"""What JSON can hold: dictionaries, lists, numbers, strings."""

FORMAT = 3
HEADER, CHECKSUM = "header", "checksum"
SUFFIX = ".npy"
_READERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    Attributes:
        path: The file, as it was named.
        header: What the arrays stand for.
        arrays: The arrays by their names; nobody has yet asked whether they fit the header.
    """

    path: str
    header: Json
    arrays: dict[str, np.ndarray]

    def take(self, name: str, shape: tuple[int, ...], kinds: str = "f") -> np.ndarray:
        """An array that must be there, of a shape and of one of these kinds of dtype.

        Raises:
            ValueError: If it is missing, or another one.
        """
        if name not in self.arrays:
            msg = f"the array {name!r} is missing"
            raise ValueError(msg)
        array = self.arrays.pop(name)
        kind = "f" if jnp.issubdtype(array.dtype, jnp.floating) else array.dtype.kind
        if array.shape != shape or kind not in kinds:
            msg = (
                f"the array {name!r} has shape {array.shape} and dtype {array.dtype}; the header "
                f"asks for {shape} and a dtype of kind {kinds!r}"
            )
            raise ValueError(msg)
        return array

    def require_empty(self) -> None:
        """Refuse arrays that nobody took.

        Raises:
            ValueError: If there are some.
        """
        if self.arrays:
            msg = f"the header knows nothing of the arrays {sorted(self.arrays)[:5]}"
            raise ValueError(msg)


@contextlib.contextmanager
def damaged(path: object, name: str = "path") -> Iterator[None]:
    """Turn whatever goes wrong while a file is understood into one error that names the file.

    Raises:
        ValueError: If something goes wrong.
    """
    try:
        yield
    except Exception as error:
        what = str(error) or type(error).__name__
        msg = (
            f"`{name}` ({path}) is damaged, or was changed after `laplax_kfac.save`: {what[:500]}."
        )
        raise ValueError(msg) from error


def write(path: object, header: Json, arrays: Mapping[str, np.ndarray], name: str = "path") -> None:
    """Write arrays and what they stand for; the file appears whole or not at all.

    Args:
        path: The file; links are followed.
        header: What the arrays stand for, in JSON.
        arrays: The arrays.
        name: The argument that the path comes from, for errors.

    Raises:
        TypeError: If ``path`` is no path.
        ValueError: If it is the path of something that is no regular file.
        OSError: If the file cannot be written.
    """
    target = file_path(name, path)
    plain = {key: as_plain(np.asarray(array, order="C")) for key, array in arrays.items()}
    entries = {
        key: {"shape": a.shape, "dtype": str(np.asarray(arrays[key]).dtype), "sha256": digest(a)}
        for key, a in plain.items()
    }
    text = json.dumps({**header, "format": FORMAT, "entries": entries})
    checksum = hashlib.sha256(text.encode()).hexdigest()

    def content(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            own = {HEADER: np.asarray(text), CHECKSUM: np.asarray(checksum)}
            for key, array in {**own, **plain}.items():
                with archive.open(zipfile.ZipInfo(key + SUFFIX), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)

    replace_file(target, content, name)


def read(path: object, name: str = "path") -> Archive:
    """Read an archive, of this format or an older one, and compare the checksums.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If there is no file.
        ValueError: If it is no such archive, is of another format, or is damaged.
    """
    target = file_path(name, path)
    found = regular(name, target)
    foreign = f"`{name}` ({path}) was not written by laplax_kfac.save, or is not all of the file."
    with target.open("rb") as stream:
        if found is None or not zipfile.is_zipfile(stream):
            raise ValueError(foreign)
        size = os.fstat(stream.fileno()).st_size
        with damaged(path, name), zipfile.ZipFile(stream) as archive:
            entries = entries_of(archive, size)
            text = str(read_array(archive, entries.pop(HEADER))) if HEADER in entries else "null"
            header = json.loads(text)
        if header is None:
            raise ValueError(foreign)
        version = header.get("format") if isinstance(header, dict) else None
        if version not in (1, 2, FORMAT):
            msg = f"`{name}` ({path}) has format {version}; this version reads {FORMAT}."
            raise ValueError(msg)
        with damaged(path, name), zipfile.ZipFile(stream) as archive:
            if version == FORMAT:
                require_checksum(text, str(read_array(archive, entries.pop(CHECKSUM))))
                arrays = read_checked(archive, entries, header.pop("entries"))
            else:
                arrays = {key: read_array(archive, info) for key, info in entries.items()}
    return Archive(str(path), header, arrays)


def require_checksum(text: str, checksum: str) -> None:
    """Refuse a header that was changed.

    Raises:
        ValueError: If its checksum is another one.
    """
    if hashlib.sha256(text.encode()).hexdigest() != checksum:
        msg = "the checksum of the header is another one"
        raise ValueError(msg)


def entries_of(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, if all are stored as they are and fit into the file together.

    Raises:
        ValueError: If not: then their sizes could be anything.
    """
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        key = info.filename.removesuffix(SUFFIX)
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if key in entries or key == info.filename or not stored or info.flag_bits & 1:
            msg = f"its entry {info.filename!r} is there twice, compressed, or no array"
            raise ValueError(msg)
        entries[key] = info
    total = sum(info.file_size for info in entries.values())
    if total > size:
        msg = f"its entries have {total} bytes, the file {size}"
        raise ValueError(msg)
    return entries


def read_checked(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], expected: Json
) -> dict[str, np.ndarray]:
    """Arrays that are as the header says: all, no others, of these shapes, dtypes and bytes.

    Raises:
        ValueError: If they are not.
    """
    if entries.keys() != expected.keys():
        missing, strange = expected.keys() - entries.keys(), entries.keys() - expected.keys()
        msg = f"it lacks the arrays {sorted(missing)[:5]}, and {sorted(strange)[:5]} are strangers"
        raise ValueError(msg)
    found = {}
    for key, entry in expected.items():
        dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
        plain = dtype if dtype.kind in "biufc" else np.dtype(f"u{dtype.itemsize}")
        array = read_array(archive, entries[key], (shape, plain))
        if digest(array) != entry["sha256"]:
            msg = f"the checksum of the array {key!r} is another one"
            raise ValueError(msg)
        found[key] = array.view(dtype)
    return found


def read_array(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    expected: tuple[tuple[int, ...], np.dtype[Any]] | None = None,
) -> np.ndarray:
    """One array; nothing is allocated before its size is known to be that of the entry.

    Raises:
        ValueError: If it is of another shape or dtype than expected, or not all there.
    """
    with archive.open(info) as entry:
        shape, fortran, dtype = _READERS[np.lib.format.read_magic(entry)](entry)
        if dtype.kind not in "biufcU" or (expected is not None and (shape, dtype) != expected):
            msg = f"the entry {info.filename!r} has shape {shape} and dtype {dtype}"
            raise ValueError(msg + (f", not {expected[0]} and {expected[1]}" if expected else ""))
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or entry.tell() + size != info.file_size:
            msg = f"the entry {info.filename!r} is not as long as its shape {shape}"
            raise ValueError(msg)
        content = entry.read(size) + entry.read(1)  # to the end, where zip's own checksum is
    array = np.frombuffer(content, dtype) if size else np.zeros(math.prod(shape), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def as_plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that NumPy can write: bfloat16 and its like as integers."""
    return array if array.dtype.kind in "biufc" else array.view(f"u{array.dtype.itemsize}")


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data if flat.size else b"").hexdigest()
