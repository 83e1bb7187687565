"""Archives: what was written comes back, and nothing else is read."""

import io
import json
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from laplax_kfac import files

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b/0": np.ones((), np.float32),
    "empty": np.zeros((0, 3), np.int32),
    "half": np.arange(4).astype(ml_dtypes.bfloat16),
    "transposed": np.arange(6).reshape(2, 3).T,
    "truth": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path):
    files.write(tmp_path / "file", {"kind": "test"}, ARRAYS)
    return tmp_path / "file"


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_what_was_written_comes_back(path):
    found = files.read(path)
    assert found.header == {"kind": "test", "format": files.FORMAT}
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        got = found.arrays[name]
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)


def test_the_same_content_is_the_same_file(path):
    first = path.read_bytes()
    files.write(path, {"kind": "test"}, ARRAYS)
    assert path.read_bytes() == first


def test_numpy_can_open_it(path):
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["a"], ARRAYS["a"])
        assert json.loads(str(file["header"]))["entries"]["half"]["dtype"] == "bfloat16"


def lying(shape, content=b"\0" * 64):
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


CHANGES = {
    "an entry missing": (lambda e: e.pop("a.npy"), "lacks the arrays"),
    "an entry more": (lambda e: e.update({"c.npy": npy(np.ones(2))}), "are strangers"),
    "an entry that is no array": (lambda e: e.update({"a.txt": b"a"}), "no array"),
    "no checksum": (lambda e: e.pop("checksum.npy"), "checksum"),
    "another checksum": (lambda e: e.update({"checksum.npy": npy("0" * 64)}), "another one"),
    "another header": (lambda e: e.update({"header.npy": npy('{"format": 3}')}), "another one"),
    "other numbers": (lambda e: e.update({"a.npy": npy(ARRAYS["a"] + 1)}), "array 'a' is another"),
    "another shape": (lambda e: e.update({"a.npy": npy(np.arange(6.0))}), "has shape"),
    "another dtype": (lambda e: e.update({"a.npy": npy(ARRAYS["a"].astype("f4"))}), "has shape"),
    "another byte order": (lambda e: e.update({"a.npy": npy(ARRAYS["a"].astype(">f8"))}), "has sh"),
    "objects": (lambda e: e.update({"a.npy": npy(np.array([{}]))}), "has shape"),
    "a long shape": (lambda e: e.update({"a.npy": lying((10**12,))}), "has shape"),
    "no entry of numpy": (lambda e: e.update({"a.npy": b"text"}), "magic|EOF"),
    "a header that is no JSON": (lambda e: e.update({"header.npy": npy("{")}), "Expecting"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_was_changed_is_refused(case, path):
    change, text = CHANGES[case]
    content = entries(path)
    change(content)
    write(path, content)
    with pytest.raises(ValueError, match=rf"`path` \(.*file\) is damaged.*({text})"):
        files.read(path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", [(10**9,), (-1,), (2**62, 4)])
def test_shapes_are_compared_with_the_entry_before_anything_is_read(version, shape, path):
    write(path, {"header.npy": npy(json.dumps({"format": version})), "a.npy": lying(shape)})
    with pytest.raises(ValueError, match=r"is damaged.*(not as long as its shape|has shape)"):
        files.read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_file_of_large_arrays_takes_no_memory(method, path):
    large = {"a.npy": lying((2 * 10**7,), bytes(16 * 10**7))}
    write(path, entries(path) | large, compression=method)
    assert path.stat().st_size < 10**6
    tracemalloc.start()
    with pytest.raises(ValueError, match="compressed"):
        files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_entries_that_overlap_are_refused(path):
    """Many names for the same bytes: together they are longer than the file."""
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("header.npy", npy('{"format": 2}'))
        archive.writestr("a.npy", npy(np.zeros(1000)))
        info = archive.getinfo("a.npy")
        for k in range(50):
            other = zipfile.ZipInfo(f"a{k}.npy")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(other, name, getattr(info, name))
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
    path.write_bytes(one.getvalue())
    with pytest.raises(ValueError, match=r"is damaged.*its entries have"):
        files.read(path)


def test_another_format_is_named(path):
    write(path, {"header.npy": npy('{"format": 9}')})
    with pytest.raises(ValueError, match="has format 9; this version reads 3"):
        files.read(path)


def test_the_argument_is_named(path):
    path.write_text("text")
    with pytest.raises(ValueError, match=r"`checkpoint` .* was not written by laplax_kfac.save"):
        files.read(path, "checkpoint")
