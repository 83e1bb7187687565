"""Files: paths of none, objects that no file is for, and what is in them when they are read."""

import functools
import io
import json
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
from support.corruptions import forged

import laplax_kfac as lk
from bad_inputs.fitted import CLASSES, LABELS, PARAMS, X, Y, fitted, model
from bad_inputs.rows import Row

TEMPORARY = tempfile.TemporaryDirectory()
FOLDER = Path(TEMPORARY.name).resolve()


def at(name: str) -> Path:
    return FOLDER / name


# -- paths -------------------------------------------------------------------------------------


def circle() -> Path:
    for name, other in (("circle", "round"), ("round", "circle")):
        if not at(name).is_symlink():
            at(name).symlink_to(other)
    return at("circle")


def pipe() -> Path:
    if not at("pipe").exists():
        os.mkfifo(at("pipe"))
    return at("pipe")


def link_to_a_pipe() -> Path:
    if not at("link").is_symlink():
        at("link").symlink_to(pipe())
    return at("link")


def listening() -> Path:
    if not at("socket").exists():
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(at("socket")))
    return at("socket")


def text() -> Path:
    at("text").write_text("a text")
    return at("text")


NO_PATHS: dict[str, Any] = {"None": None, "3": 3, "True": True, "bytes": b"file", "a list": ["a"]}
NO_FILES: dict[str, tuple[Callable[[], Any], str]] = {
    "a folder": (lambda: FOLDER, "is a folder, no regular file"),
    "nothing": (lambda: "", "is a folder, no regular file"),
    "a pipe": (pipe, "is a pipe, no regular file"),
    "a link to a pipe": (link_to_a_pipe, "is a pipe, no regular file"),
    "a socket": (listening, "is a socket, no regular file"),
    "a device": (lambda: "/dev/null", "is a device, no regular file"),
    "links in a circle": (circle, "is no path of a file"),
    "a null byte": (lambda: "a\0b", "is no path of a file"),
    "a long name": (lambda: at("x" * 5000), "is no path of a file"),
    "a file as a folder": (lambda: text() / "inside", "leads through a file"),
}
DOORS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "save": ("path", lambda path: lk.save(path, fitted().curvature)),
    "load": ("path", lk.load),
    "kfac": ("checkpoint", lambda path: lk.kfac(**CLASSES, checkpoint=path)),
}


def at_made(call: Callable[[Any], object], make: Callable[[], Any]) -> object:
    return call(make())


def paths() -> list[Row]:
    found = []
    for door, (argument, call) in DOORS.items():
        for name, path in NO_PATHS.items():
            if path is None and door == "kfac":  # the default
                continue
            use = functools.partial(call, path)
            row = Row(
                f"{door} {argument}={name}", use, TypeError, "must be the path of a file", argument
            )
            found.append(row)
        for name, (make, fragment) in NO_FILES.items():
            use = functools.partial(at_made, call, make)
            row = Row(f"{door} {argument}={name}", use, ValueError, fragment, argument)
            found.append(row)
        if door != "load":
            use = functools.partial(call, at("missing") / "file")
            found.append(
                Row(
                    f"{door} {argument} in no folder",
                    use,
                    FileNotFoundError,
                    "there is no folder",
                    argument,
                )
            )
    use = functools.partial(lk.load, at("missing"))
    return [*found, Row("load no file", use, FileNotFoundError, "there is no such file", "path")]


# -- what is saved -----------------------------------------------------------------------------


def with_nan(x: Any) -> Any:
    return jax.tree.map(lambda a: a * jnp.nan if a.ndim and a.dtype.kind == "f" else a, x)


def saving(x: Callable[[], Any], **options: Any) -> Callable[[], object]:
    return lambda: lk.save(at("never written"), x(), **options)


NO_CURVATURES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "parameters": lambda: PARAMS,
    "a block": lambda: fitted().curvature.blocks[0],
    "an accumulator": lambda: fitted().accumulator,
    "a predictive": lambda: fitted().predictive,
    "a pair": lambda: (fitted().curvature, fitted().curvature),
    "the class": lambda: lk.Curvature,
}
BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: with_nan(fitted().curvature), "nonfinite='keep'"),
    "infinity": (lambda: fitted().curvature.map(lambda a: a + jnp.inf), "are not finite"),
    "a posterior of NaN": (lambda: with_nan(fitted().posterior), "are not finite"),
    "a state of NaN": (lambda: with_nan(fitted().state), "are not finite"),
    "negative": (lambda: fitted().curvature.map(lambda a: a - 1e3), "are negative"),
}


def objects() -> list[Row]:
    found = [
        Row(
            f"save the object {name}",
            saving(x),
            TypeError,
            "must be a Curvature or a Posterior",
            "x",
        )
        for name, x in NO_CURVATURES.items()
    ]
    found += [
        Row(f"save the object {name}", saving(x), ValueError, fragment, "x")
        for name, (x, fragment) in BROKEN.items()
    ]
    for value in ("drop", True, None):
        call = saving(lambda: fitted().curvature, nonfinite=value)
        found.append(
            Row(f"save nonfinite={value}", call, ValueError, "must be one of", "nonfinite")
        )
    traced = lambda: jax.jit(lambda c: lk.save(at("x"), c))(fitted().curvature)  # noqa: E731
    return [*found, Row("save under jit", traced, TypeError, "is traced", "x")]


# -- what is loaded ----------------------------------------------------------------------------


def saved(name: str, x: Any = None) -> Path:
    lk.save(at(name), fitted().curvature if x is None else x)
    return at(name)


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[], Path]:
    def make() -> Path:
        path = saved("changed")
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def flipped(data: bytes) -> bytes:
    middle = data.index(b"NUMPY", len(data) // 2) + 200  # inside the numbers of an entry
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def compressed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


def archive(**arrays: Any) -> Callable[[], Path]:
    def make() -> Path:
        np.savez(at("other.npz"), **arrays)
        return at("other.npz")

    return make


def changed(change: Callable[[Any, dict[str, Any]], Any]) -> Callable[[], Path]:
    return lambda: forged(saved("forged"), change)


def array(name: str, change: Callable[[Any], Any]) -> Callable[[], Path]:
    return changed(lambda _, arrays: arrays.update({name: change(arrays[name])}))


def layer(**changes: Any) -> Callable[[], Path]:
    return changed(lambda header, _: header["layers"][0].update(changes))


FOREIGN = "was not written by laplax_kfac.save"
VALUES = "block0/eigenvalues"
FILES: dict[str, tuple[Callable[[], Path], str]] = {
    "a text": (text, FOREIGN),
    "an empty file": (with_bytes(lambda _: b""), FOREIGN),
    "half of a file": (with_bytes(lambda data: data[: len(data) // 2]), FOREIGN),
    "an archive of weights": (archive(w=np.ones(3)), FOREIGN),
    "another format": (archive(header=json.dumps({"format": 9})), "has format 9"),
    "a list for a header": (archive(header="[]"), "has format None"),
    "no JSON": (archive(header="{"), "is damaged"),
    "an old header alone": (archive(header=json.dumps({"format": 2})), "is damaged"),
    "a flipped bit": (with_bytes(flipped), "is damaged"),
    "a compressed file": (with_bytes(compressed), "compressed"),
    "no eigenvalues": (changed(lambda _, arrays: arrays.pop(VALUES)), "is missing"),
    "an array more": (changed(lambda _, arrays: arrays.update(more=np.ones(3))), "knows nothing"),
    "eigenvalues of another shape": (array(VALUES, np.ravel), "has shape"),
    "eigenvalues that are integers": (array(VALUES, lambda x: x.astype(int)), "dtype int"),
    "negative eigenvalues": (array(VALUES, np.negative), "are negative"),
    "eigenvalues of NaN": (array(VALUES, lambda x: x * np.nan), "are not finite"),
    "a basis of another shape": (array("block0/basis0/0", lambda x: x[:-1]), "has shape"),
    "a strange kind": (changed(lambda header, _: header.update(kind="Evil")), "'Evil'"),
    "a layer of another size": (layer(out_features=9), "parameters"),
    "a layer of a strange block": (layer(block="odd"), "has the block 'odd'"),
    "a layer of strange sides": (layer(sides=["dense", "odd"]), "no kind of factor"),
    "a layer twice": (
        changed(lambda h, _: h["layers"][1].update(segments=h["layers"][0]["segments"])),
        "layer",
    ),
    "blocks of fewer layers": (changed(lambda header, _: header["sides"].pop()), "blocks for"),
}


class Model(equinox.Module):
    first: Any
    last: Any


def in_a_module() -> Path:
    return saved("module", lk.kfac(
        lambda input, params: model(input, {"first": params.first, "last": params.last}),
        Model(**PARAMS), (X, LABELS), loss_fn="cross_entropy",
    ))  # fmt: skip


OTHER_PARAMS: dict[str, tuple[Any, type[Exception], str]] = {
    "a leaf less": ({"first": PARAMS["first"]}, ValueError, "the file has"),
    "a leaf more": (PARAMS | {"more": np.ones(2)}, ValueError, "the file has"),
    "another name": ({"first": PARAMS["first"], "end": PARAMS["last"]}, ValueError, "the file has"),
    "another shape": (jax.tree.map(lambda a: a[None], PARAMS), ValueError, "the file has"),
    "empty": ({}, ValueError, "has no leaves"),
    "numbers": ([1, 2, 3, 4], TypeError, "must hold arrays"),
}


def loading_of(make: Callable[[], Path]) -> Callable[[], object]:
    return lambda: lk.load(make())


def loading_for(params: Any) -> Callable[[], object]:
    return lambda: lk.load(saved("good"), params)


def loading() -> list[Row]:
    found = [
        Row(f"load {name}", loading_of(make), ValueError, fragment, "path")
        for name, (make, fragment) in FILES.items()
    ]
    found += [
        Row(f"load params {name}", loading_for(p), error, text, "params")
        for name, (p, error, text) in OTHER_PARAMS.items()
    ]
    return [
        *found,
        Row("load of a module alone", lambda: lk.load(in_a_module()), ValueError,
            "Call load(path, params)", "params"),
        Row("load of a checkpoint", lambda: lk.load(half()), ValueError,
            "is the checkpoint of a fit", "path"),
    ]  # fmt: skip


# -- checkpoints -------------------------------------------------------------------------------

PARTS = [(X[k : k + 2], LABELS[k : k + 2]) for k in range(0, 8, 2)]


def half() -> Path:
    """The checkpoint of a fit that went to its end."""
    if not at("half").exists():
        lk.kfac(model, PARAMS, PARTS, loss_fn="cross_entropy", checkpoint=at("half"),
                checkpoint_every=3)  # fmt: skip
    return at("half")


def resumed(**changes: Any) -> Callable[[], object]:
    good = CLASSES | {"data": PARTS, "checkpoint_every": 3}
    return lambda: lk.kfac(**(good | {"checkpoint": half()} | changes))


def damaged_half() -> Path:
    at("damaged").write_bytes(flipped(half().read_bytes()))
    return at("damaged")


FITS: dict[str, tuple[dict[str, Any], str]] = {
    "the model": ({"model_fn": lambda input, params: 2 * model(input, params)}, "the model"),
    "the parameters": ({"params": jax.tree.map(lambda a: a + 1, PARAMS)}, "the parameters"),
    "the loss": ({"loss_fn": "mse", "data": [(x, Y[:2]) for x, _ in PARTS]}, "the loss"),
    "the Fisher type": ({"fisher_type": "empirical"}, "the options"),
    "the passes": ({"eigenvalue_correction": True}, "the options"),
    "the selection": ({"params_filter": "first/*"}, "the options"),
    "the key": ({"key": jax.random.key(7)}, "the random key"),
    "the batch size": ({"batch_size": 1}, "the options"),
    "the first batch": ({"data": PARTS[1:]}, "the first batch"),
}
DATA: dict[str, tuple[Any, str]] = {
    "fewer batches": (PARTS[:2], "but `checkpoint`"),
    "another order": ([PARTS[0], PARTS[2], PARTS[1], PARTS[3]], "in the place of number 3"),
}


def keeping_in(make: Callable[[], Path]) -> Callable[[], object]:
    return lambda: lk.kfac(**CLASSES, checkpoint=make())


def checkpoints() -> list[Row]:
    found = [
        Row(f"checkpoint of another fit: {name}", resumed(**changes), ValueError, fragment,
            "checkpoint")
        for name, (changes, fragment) in FITS.items()
    ] + [
        Row(f"checkpoint and {name}", resumed(data=data), ValueError, fragment, "data")
        for name, (data, fragment) in DATA.items()
    ]  # fmt: skip
    for value in (0, -1, 2.5, "3", True):
        found.append(
            Row(f"checkpoint_every={value!r}", resumed(checkpoint_every=value), ValueError,
                "must be a positive integer", "checkpoint_every")
        )  # fmt: skip
    others: dict[str, tuple[Callable[[], Path], str]] = {
        "a text": (text, FOREIGN),
        "a curvature": (lambda: saved("good"), "holds a Curvature"),
        "damaged": (damaged_half, "is damaged"),
    }
    found += [
        Row(f"checkpoint {name}", keeping_in(make),
            ValueError, fragment, "checkpoint")
        for name, (make, fragment) in others.items()
    ]  # fmt: skip

    def of(x: Any) -> Any:
        return lk.kfac(**CLASSES | {"data": (x, LABELS)}, checkpoint=at("traced")).trace()

    return [
        *found,
        Row("checkpoint_every alone", lambda: lk.kfac(**CLASSES, checkpoint_every=3), ValueError,
            "needs `checkpoint`", "checkpoint_every"),
        Row("checkpoint under jit", lambda: jax.jit(of)(X), ValueError, "outside of jit",
            "checkpoint"),
    ]  # fmt: skip


ROWS: list[Row] = [*paths(), *objects(), *loading(), *checkpoints()]
