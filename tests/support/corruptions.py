"""Files that something has happened to: bits, bytes and entries that are not what they were."""

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laplax_kfac import files

Bytes = bytearray


def flip(data: Bytes, rng: random.Random) -> Bytes:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flips(data: Bytes, rng: random.Random) -> Bytes:
    for _ in range(rng.randrange(2, 20)):
        flip(data, rng)
    return data


def swap(data: Bytes, rng: random.Random) -> Bytes:
    i, j = rng.randrange(len(data)), rng.randrange(len(data))
    data[i], data[j] = data[j], data[i]
    return data


def truncate(data: Bytes, rng: random.Random) -> Bytes:
    return data[: rng.randrange(len(data))]


def cut_out(data: Bytes, rng: random.Random) -> Bytes:
    i = rng.randrange(len(data))
    del data[i : i + rng.randrange(1, 64)]
    return data


def insert(data: Bytes, rng: random.Random) -> Bytes:
    i = rng.randrange(len(data))
    data[i:i] = rng.randbytes(rng.randrange(1, 64))
    return data


def zeros(data: Bytes, rng: random.Random) -> Bytes:
    i, size = rng.randrange(len(data)), rng.randrange(1, 512)
    data[i : i + size] = bytes(len(data[i : i + size]))
    return data


def directory(data: Bytes, rng: random.Random) -> Bytes:
    """A flipped bit at the end, where the archive says what is in it and where."""
    start = data.find(b"PK\x01\x02")
    data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    return data


def entries(data: Bytes, rng: random.Random) -> Bytes:
    """A whole archive in which entries have changed places, or are missing, or there twice."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = [(name, archive.read(name)) for name in archive.namelist()]
    i, j = rng.sample(range(len(found)), 2)
    kind = rng.randrange(4)
    if kind == 0:
        (a, x), (b, y) = found[i], found[j]
        found[i], found[j] = (a, y), (b, x)
    elif kind == 1:
        del found[i]
    elif kind == 2:
        found.append((found[i][0] + "2", found[i][1]))
    else:
        found[i] = found[i][0], bytes(flip(Bytes(found[i][1]), rng))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in found:
            archive.writestr(name, content)
    return Bytes(stream.getvalue())


CORRUPTIONS: list[Callable[[Bytes, random.Random], Bytes]] = [
    flip, flips, swap, truncate, cut_out, insert, zeros, directory, entries,
]  # fmt: skip


def corrupted(data: bytes, seed: int) -> tuple[str, bytes]:
    """What was done, and the bytes after it."""
    rng = random.Random(seed)
    change = CORRUPTIONS[seed % len(CORRUPTIONS)]
    return change.__name__, bytes(change(Bytes(data), rng))


def forged(path: Path, change: Callable[[Any, dict[str, Any]], None]) -> Path:
    """A file whose header and arrays were changed, with the checksums that they then have."""
    file = files.read(path)
    header, arrays = dict(file.header), dict(file.arrays)
    change(header, arrays)
    files.write(path, header, arrays)
    return path
