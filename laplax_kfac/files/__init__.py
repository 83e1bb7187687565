"""Files: arrays and a header in, an archive with checksums out; and back.

`archive` is the format, `writing` how a file takes the place of another one, whole or not at all.
What the arrays stand for, others know.
"""

from laplax_kfac.files.archive import FORMAT, Archive, Json, damaged, read, write
from laplax_kfac.files.writing import file_path, regular, replace_file

__all__ = [
    "FORMAT", "Archive", "Json", "damaged", "file_path", "read", "regular", "replace_file",
    "write",
]  # fmt: skip
