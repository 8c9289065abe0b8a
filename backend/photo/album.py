# SPDX-License-Identifier: GPL-3.0-or-later
"""Images by the SHA-256 of their bytes, which is how requests name them. Standard library only.

The server has an `ImageStore`: what clients sent, in a folder that only this user can enter, until the server ends or
for an hour after it was needed last. Whoever has no server has an `Album`.

    album = Album()
    request = parse_request({"photos": [{"image": album.add(path)}]})
    asset, stats = pipeline.generate(request, model, images=album)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from backend.photo.header import HINT, measure
from backend.protocol import MAX_IMAGE_BYTES, PopulaceError, StoredImage

MAX_STORE_BYTES: Final = 1 << 30
MAX_STORE_IMAGES: Final = 1000
MAX_UNUSED_S: Final = 3600.0


class Images(Protocol):
    """Where the images of a request come from."""

    def read(self, image: str) -> bytes:
        """The bytes with this SHA-256. Raises `image_missing`."""
        ...


class Album:
    """Images of this process: files, read when they are needed, or bytes."""

    def __init__(self, paths: Mapping[str, str | Path] | None = None) -> None:
        self._found: dict[str, bytes | Path] = {image: Path(path) for image, path in (paths or {}).items()}

    def add(self, image: bytes | str | os.PathLike[str]) -> str:
        """Its id. Raises `image_unreadable` and `too_large`, naming the file."""
        if isinstance(image, bytes):
            data, kept = image, image
        else:
            path = Path(image)
            data, kept = _file(path), path.absolute()
        try:
            measure(data)
        except PopulaceError as error:
            where = f"{kept}: " if isinstance(kept, Path) else ""
            raise PopulaceError(error.code, where + error.message, error.hint) from None
        found = hashlib.sha256(data).hexdigest()
        self._found.setdefault(found, kept)
        return found

    def paths(self) -> dict[str, str]:
        """Of the files among them, by id."""
        return {image: str(kept) for image, kept in self._found.items() if isinstance(kept, Path)}

    def read(self, image: str) -> bytes:
        """See `Images`."""
        kept = self._found.get(image)
        if kept is None:
            raise _missing()
        data = kept if isinstance(kept, bytes) else _file(kept)
        if hashlib.sha256(data).hexdigest() != image:
            raise PopulaceError("image_missing", f"{kept} has changed since it was read first.", "Begin again with it.")
        return data


class Folder:
    """The images of a store as its worker reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, image: str) -> bytes:
        """See `Images`."""
        try:
            data = (self._folder / image).read_bytes()
        except OSError:
            raise _missing() from None
        if hashlib.sha256(data).hexdigest() != image:
            raise PopulaceError("image_missing", "A photo was damaged on the disk.", "Send it again.")
        return data


class ImageStore:
    """The server's. Methods that block say so; the others may be called on the event loop. Not for several threads,
    but for what `Incoming` does."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._now = now
        self._used: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def open(self, needed: Collection[str]) -> None:
        """Blocks. Remove what an earlier server left, but for what is `needed` still."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name in needed and re.fullmatch(r"[0-9a-f]{64}", path.name) and path.is_file():
                self._used[path.name], self._bytes[path.name] = self._now(), path.stat().st_size
            else:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Blocks. Nothing is left."""
        self._used.clear()
        self._bytes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def need(self, images: Collection[str]) -> None:
        """Say that they are needed now. Raises `image_missing` unless all are there."""
        if any(image not in self._used for image in images):
            raise _missing()
        self.touch(images)

    def touch(self, images: Collection[str]) -> None:
        """They were needed until now."""
        self._used |= dict.fromkeys((image for image in images if image in self._used), self._now())

    def incoming(self) -> Incoming:
        """Blocks."""
        return Incoming(self.folder)

    def stale(self, needed: Collection[str]) -> list[Path]:
        """Forget what was unused for too long, or is too much, oldest first, but nothing that is `needed`; its files
        are to be removed by the caller."""
        size, gone, oldest = sum(self._bytes.values()), [], self._now() - MAX_UNUSED_S
        for image, used in sorted(self._used.items(), key=lambda pair: pair[1])[:-1]:
            too_much = size > MAX_STORE_BYTES or len(self._used) > MAX_STORE_IMAGES
            if image in needed or (used >= oldest and not too_much):
                continue
            size -= self._bytes.pop(image)
            del self._used[image]
            gone.append(self.folder / image)
        return gone

    def accept(self, image: str, size: int) -> None:
        """An image is there, or is about to be."""
        self._used[image], self._bytes[image] = self._now(), size


class Incoming:
    """A file on its way into the store. Every method blocks, and may run in a thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f".{uuid.uuid4().hex}.partial"
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o600)
        self._file: BinaryIO = os.fdopen(descriptor, "w+b")
        self._digest: Any = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        self._digest.update(piece)
        self.size += len(piece)
        self._file.write(piece)

    def measure(self) -> StoredImage:
        """Raises `image_unreadable` and `too_large`."""
        self._file.seek(0)
        found = measure(self._file.read())
        return StoredImage(id=self._digest.hexdigest(), width=found.width, height=found.height)

    def keep(self) -> None:
        self._file.close()
        self._path.replace(self._path.with_name(self._digest.hexdigest()))

    def discard(self) -> None:
        """What was not kept."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise PopulaceError("too_large", f"{path} is larger than {MAX_IMAGE_BYTES >> 20} MiB.", HINT)
        return path.read_bytes()
    except OSError as error:
        raise PopulaceError("image_unreadable", f"{path}: {error.strerror}.", HINT) from None


def _missing() -> PopulaceError:
    return PopulaceError("image_missing", "A photo of this request is not here, or not any more.",
                         "Send it first: POST /v1/images.")  # fmt: skip
