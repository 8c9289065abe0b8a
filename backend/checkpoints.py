# SPDX-License-Identifier: GPL-3.0-or-later
"""Tensors out of checkpoints that `torch.save` wrote, without running anything that is in them.

Such a file is a pickle: a program for a small machine, whose GLOBAL and REDUCE instructions import and call whatever
they name. No pickle machine runs here, neither Python's nor torch's. The instructions are only *disassembled*
(`pickletools.genops`), and this module follows the few of them that make numbers, texts and plain containers. A name in
a file is a text that is compared with `_KNOWN`; nothing is ever imported, looked up or called by it. Any other name, or
any other instruction, ends the reading with a sentence that says which. So what a file can do is bounded by this page.

Both formats are read: the zip archive (since torch 1.6) and the older row of pickles. Storages stay in the file until
a tensor's `array` is asked for, and every extent is checked against the storage before.
"""

from __future__ import annotations

import importlib
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from backend.protocol import PopulaceError

MAX_PROGRAM_BYTES = 64 << 20  # of instructions; the numbers lie elsewhere
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_BFLOAT16 = np.dtype("<u2")  # its bits; widened when read
_DTYPES = {
    "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"), "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": _BFLOAT16, "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
_ORDERED, _TENSOR, _PARAMETER, _SIZE = "a dictionary", "a tensor", "a parameter", "a shape"
_KNOWN = {
    "collections.OrderedDict": _ORDERED,
    "torch._utils._rebuild_tensor_v2": _TENSOR,
    "torch._utils._rebuild_tensor": _TENSOR,
    "torch._utils._rebuild_parameter": _PARAMETER,
    "torch.Size": _SIZE,
    **{f"torch.{name}": name for name in _DTYPES},
}


class _Unreadable(ValueError):
    """What is wrong with the file, as the rest of a sentence."""


@dataclass(frozen=True)
class _Name:
    """A name of `_KNOWN` on the stack: what it stands for here."""

    text: str
    kind: str


@dataclass(frozen=True)
class Storage:
    """A row of numbers in the file."""

    dtype: str
    key: str
    count: int
    read: Callable[[], bytes | memoryview] = field(compare=False, repr=False)

    def numbers(self) -> np.ndarray[Any, Any]:
        data = self.read()
        if len(data) != self.count * _DTYPES[self.dtype].itemsize:
            raise _Unreadable(f"storage {self.key} has {len(data)} bytes instead of {self.count} numbers")
        return np.frombuffer(data, _DTYPES[self.dtype])


@dataclass(frozen=True)
class StoredTensor:
    """Which numbers of a storage a tensor has."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers

    def array(self) -> np.ndarray[Any, Any]:
        """A contiguous copy; bfloat16 comes as float32."""
        numbers = self.storage.numbers()
        steps = [step * numbers.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps, writeable=False)
        if self.storage.dtype == "BFloat16Storage":
            return (view.astype(np.uint32) << 16).view(np.float32)
        return np.array(view, order="C")


def read(path: Path) -> Any:
    """What the file holds: dicts, lists, tuples, texts, numbers, and `StoredTensor` where a tensor is.

    Raises `weights_corrupt` if it is cut short, is no checkpoint, or asks for anything but tensors and containers.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path)
            file.seek(0)
            if file.read(2) == b"PK":
                raise _Unreadable("its end is missing; the download was not complete")
            file.seek(0)
            return _read_legacy(file, path)
    except _Unreadable as error:
        raise refused(path.name, str(error)) from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RecursionError, NotImplementedError) as error:
        raise refused(path.name, f"the archive is damaged ({error})") from None
    except OSError as error:
        raise PopulaceError("invalid_request", f"{path}: {error.strerror}.", "Choose another file.") from None


def refused(name: str, why: str) -> PopulaceError:
    return PopulaceError("weights_corrupt", f"{name} was not read: {why}.",
                         "Nothing in it was run. Fetch the file again from its authors.")  # fmt: skip


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise _Unreadable("it is a zip archive, but not one of torch.save (it has no data.pkl)")
        root = programs[0].removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise _Unreadable("its entries are compressed, as torch.save never writes them")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise _Unreadable("it was written on a big-endian machine")
        if entries[programs[0]].file_size > MAX_PROGRAM_BYTES:
            raise _Unreadable(f"its description has {entries[programs[0]].file_size} bytes")
        program = archive.read(programs[0])

    def storage(dtype: str, key: str, count: int) -> Storage:
        name = f"{root}data/{key}"
        if name not in entries:
            raise _Unreadable(f"storage {key} is missing")
        if entries[name].file_size != count * _DTYPES[dtype].itemsize:
            raise _Unreadable(f"storage {key} has {entries[name].file_size} bytes instead of {count} numbers")

        def load() -> bytes:
            try:
                with zipfile.ZipFile(path) as archive:
                    return archive.read(name)
            except (zipfile.BadZipFile, EOFError, OSError) as error:
                raise refused(path.name, f"storage {key} is damaged ({error})") from None

        return Storage(dtype, key, count, load)

    return _follow(io.BytesIO(program), storage)


def _read_legacy(file: IO[bytes], path: Path) -> Any:
    """Five pickles (magic number, version, machine, content, keys of the storages), then the storages in that order."""

    def none(dtype: str, key: str, count: int) -> Storage:
        raise _Unreadable("a storage is where there can be none")

    if _follow(file, none) != LEGACY_MAGIC:
        raise _Unreadable("it is not a checkpoint of torch.save")
    if _follow(file, none) != LEGACY_PROTOCOL:
        raise _Unreadable("it is of an unknown version of torch.save")
    machine = _follow(file, none)
    if not isinstance(machine, dict) or not machine.get("little_endian", False):
        raise _Unreadable("it was written on a big-endian machine")
    places: dict[str, tuple[int, int]] = {}
    wanted: dict[str, tuple[str, int]] = {}

    def storage(dtype: str, key: str, count: int) -> Storage:
        if wanted.setdefault(key, (dtype, count)) != (dtype, count):
            raise _Unreadable(f"storage {key} is described in two ways")

        def load() -> bytes:
            start, size = places[key]
            with open(path, "rb") as again:
                again.seek(start)
                return again.read(size)

        return Storage(dtype, key, count, load)

    content = _follow(file, storage)
    keys = _follow(file, none)
    if not isinstance(keys, list) or {str(key) for key in keys} != wanted.keys():
        raise _Unreadable("its list of storages is not that of its tensors")
    end = path.stat().st_size
    for key in map(str, keys):
        dtype, count = wanted[key]
        head = file.read(8)
        start, size = file.tell(), count * _DTYPES[dtype].itemsize
        if len(head) < 8 or start + size > end:
            raise _Unreadable("its end is missing; the download was not complete")
        if int.from_bytes(head, "little") != count:
            raise _Unreadable(f"storage {key} has another length than its tensors say")
        places[key] = start, size
        file.seek(size, 1)
    return content


class _Mark:
    """Where a group begins on the stack."""


_MARK = _Mark()


def _follow(file: IO[bytes], storage: Callable[[str, str, int], Storage]) -> Any:
    """The value that one program makes; `file` is behind it then. Instructions that make anything but texts, numbers,
    containers and tensors are refused by name."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    start = file.tell()
    try:
        for opcode, argument, at in _instructions(file):
            if at - start > MAX_PROGRAM_BYTES:
                raise _Unreadable("its description does not end")
            if opcode == "STOP":
                return stack.pop()
            _step(opcode, argument, stack, memo, storage)
    except IndexError:
        raise _Unreadable("its instructions take more than there is") from None
    raise _Unreadable("its end is missing; the download was not complete")


def _instructions(file: IO[bytes]) -> Iterator[tuple[str, Any, int]]:
    """Names of instructions, their arguments, and where they stand."""
    try:
        for opcode, argument, at in pickletools.genops(file):
            yield opcode.name, argument, at or 0
    except (ValueError, OverflowError, MemoryError) as error:  # its parsers say so of truncated and foreign bytes
        raise _Unreadable(f"it is cut short or not a checkpoint ({str(error)[:80]})") from None


_PUSH = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _step(
    opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any], storage: Callable[[str, str, int], Storage]
) -> None:
    match opcode:
        case "PROTO" | "FRAME":
            pass
        case "MARK":
            stack.append(_MARK)
        case _ if opcode in _PUSH:
            stack.append(argument)
        case _ if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            size = int(opcode[-1])
            if size > len(stack):
                raise IndexError
            stack[-size:] = [tuple(stack[-size:])]
        case "TUPLE":
            stack.append(tuple(_group(stack)))
        case "LIST":
            stack.append(_group(stack))
        case "DICT":
            stack.append(_put({}, _group(stack)))
        case "APPEND":
            value = stack.pop()
            _top(stack, list).append(value)
        case "APPENDS":
            values = _group(stack)
            _top(stack, list).extend(values)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            _put(_top(stack, dict), [key, value])
        case "SETITEMS":
            values = _group(stack)
            _put(_top(stack, dict), values)
        case "PUT" | "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
            if argument not in memo:
                raise _Unreadable("it refers to something that it does not have")
            stack.append(memo[argument])
        case "GLOBAL":
            stack.append(_named(str(argument).replace(" ", ".", 1)))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_named(f"{module}.{name}"))
        case "REDUCE":
            arguments, made_by = stack.pop(), stack.pop()
            stack.append(_made(made_by, arguments))
        case "BUILD":  # attributes of a dictionary (torch notes versions of modules there) are left out
            stack.pop()
            _top(stack, dict)
        case "BINPERSID":
            stack.append(_stored(stack.pop(), storage))
        case _:
            raise _Unreadable(f"it holds the instruction {opcode}, which makes more than tensors and plain containers")


def _group(stack: list[Any]) -> list[Any]:
    """Everything above the last mark, which goes too."""
    for i in range(len(stack) - 1, -1, -1):
        if stack[i] is _MARK:
            values = stack[i + 1 :]
            del stack[i:]
            return values
    raise IndexError


def _top(stack: list[Any], kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise _Unreadable(f"it fills a {type(stack[-1]).__name__} as if it were a {kind.__name__}")
    return stack[-1]


def _put(target: dict[Any, Any], pairs: list[Any]) -> dict[Any, Any]:
    if len(pairs) % 2 or not all(isinstance(key, (str, int)) for key in pairs[::2]):
        raise _Unreadable("a dictionary has keys that are neither text nor numbers")
    target.update(zip(pairs[::2], pairs[1::2]))
    return target


def _named(text: str) -> _Name:
    if text not in _KNOWN:
        shown = text if len(text) <= 80 and text.isascii() and text.isprintable() else "something without a plain name"
        raise _Unreadable(f"it asks for {shown}, and only tensors and plain containers are read")
    return _Name(text, _KNOWN[text])


def _made(by: Any, arguments: Any) -> Any:
    """What a known name makes of its arguments."""
    if not isinstance(by, _Name) or not isinstance(arguments, tuple):
        raise _Unreadable("it calls something that is not a name")
    if by.kind == _ORDERED and (arguments in ((), ([],))):
        return {}
    if by.kind == _SIZE and len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return tuple(arguments[0])
    if by.kind == _PARAMETER and arguments and isinstance(arguments[0], StoredTensor):
        return arguments[0]
    if by.kind == _TENSOR and len(arguments) >= 4 and isinstance(arguments[0], Storage):
        return _tensor(*arguments[:4])
    raise _Unreadable(f"it calls {by.text} with arguments that torch.save does not write")


def _tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    numbers = [offset, *shape, *strides] if isinstance(shape, tuple) and isinstance(strides, tuple) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) or len(shape) != len(strides) or len(shape) > 8:
        raise _Unreadable("a tensor's shape is not one")
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
    if offset > storage.count or (math.prod(shape) and last >= storage.count):
        raise _Unreadable(f"a tensor of shape {list(shape)} reaches beyond its {storage.count} numbers")
    if math.prod(shape) > storage.count:  # overlapping views could make a small file a huge array
        raise _Unreadable(f"a tensor of shape {list(shape)} shows its {storage.count} numbers several times")
    return StoredTensor(storage, offset, shape, strides)


def _stored(reference: Any, storage: Callable[[str, str, int], Storage]) -> Storage:
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise _Unreadable("it refers to something outside of the file")
    _, kind, key, _, count, *view = reference
    fits = isinstance(kind, _Name) and kind.kind in _DTYPES and isinstance(key, (str, int))
    if not fits or type(count) is not int or not 0 <= count < 1 << 48:
        raise _Unreadable("it has a storage of an unknown kind")
    if any(part is not None for part in view):
        raise _Unreadable("it has a storage that is a part of another one")
    return storage(kind.kind, str(key), count)


# ------------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Converted:
    """A family's weights, taken out of an official file: see `families/<name>/checkpoint.py`."""

    name: str  # of the weights, as in weights_manifest/
    arrays: dict[str, np.ndarray[Any, Any]]
    metadata: dict[str, str]


def state_dict(content: Any, file: str, *keys: str) -> dict[str, StoredTensor]:
    """The tensors by name under `keys` of what `read` gave (empty: at the top). Raises `weights_corrupt`."""
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            found = ", ".join(sorted(map(str, content))[:8]) if isinstance(content, Mapping) else "no dictionary"
            raise refused(file, f"it has no {key!r}; there is: {found}")
        content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise refused(file, "it holds no tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise refused(file, f"{str(name)[:80]!r} is not a tensor")
    return dict(content)


def check_names(
    file: str, found: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> None:
    """Raise `weights_corrupt` unless the names and shapes are those of `shapes`, but for names that are `ignored`."""
    missing = sorted(name for name in shapes if name not in found and not ignored(name))
    if missing:
        raise refused(file, f"{len(missing)} tensors are missing: {_few(missing)}")
    unexpected = sorted(name for name in found if name not in shapes and not ignored(name))
    if unexpected:
        raise refused(file, f"{len(unexpected)} tensors do not belong there: {_few(unexpected)}")
    wrong = [f"{name} is {list(found[name].shape)} instead of {list(shape)}"
             for name, shape in shapes.items() if name in found and found[name].shape != shape]  # fmt: skip
    if wrong:
        raise refused(file, f"{len(wrong)} tensors have another shape: {_few(wrong)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def numbers(file: str, tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray[Any, Any]]:
    """float32 arrays, contiguous and finite."""
    arrays = {}
    for name, tensor in tensors.items():
        try:
            array = tensor.array()
        except _Unreadable as error:
            raise refused(file, str(error)) from None
        if array.dtype.kind != "f":
            raise refused(file, f"{name} holds {array.dtype.name} instead of fractions")
        arrays[name] = array.astype(np.float32)
        if not np.isfinite(arrays[name]).all():
            raise refused(file, f"{name} holds numbers that are not finite")
    return arrays


def convert(family: str, path: Path, own: bool = False) -> Converted:
    """The family's weights from an official file, or of a training of one's `own` that may have other sizes. Raises
    `weights_corrupt`, `invalid_request`."""
    return importlib.import_module(f"backend.families.{family}.checkpoint").convert(read(path), path.name, own)


def published(family: str) -> Mapping[str, tuple[int, str]]:
    """Bytes and MD5 of the family's official files by name, as far as their authors told them."""
    return getattr(importlib.import_module(f"backend.families.{family}.checkpoint"), "PUBLISHED", {})
