# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights come and go: licence accepted, downloaded, imported, removed. Nothing is fetched that nobody agreed to.

A download goes on where it stopped, never reads beyond the size that the manifest declares, and takes its place in one
rename when its SHA-256 is right. huggingface-hub knows addresses and tokens; loading and checking is done here, since
it checks the size alone.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import mmap
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import filelock

from backend import packet, tensors, weights
from backend.protocol import PopulaceError
from backend.weights import MANIFEST_FOLDER, Manifest, WeightFile

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0  # without a byte
ATTEMPTS = 5
PAUSE_S = 1.0  # before the second attempt, then twice as long each time
SPARE_BYTES = 200_000_000
MAX_IMPORT_BYTES = 32 << 30

Step = Callable[[str, float], None]
"""Told the file's name and the fraction of all files together; raises to stop."""


# -------------------------------------------------------------------------------------------------------- the licence


def licence_text(manifest: Manifest) -> str:
    """What the user accepts, whole."""
    return manifest.licence_text or f"{manifest.title}: {manifest.licence}\n{manifest.licence_url}\n"


def is_accepted(manifest: Manifest, data_dir: Path) -> bool:
    """Whether the user accepted this very text. Embedded weights came with Populace, imported ones from the user."""
    accepted = weights.user_record(data_dir).get("accepted", {}).get(manifest.name, {})
    return manifest.embedded or manifest.imported or accepted.get("sha256") == _sha256(licence_text(manifest))


def accept(manifest: Manifest, data_dir: Path) -> None:
    """Record that the user accepted the licence: which text, and when."""
    entry = {"licence": manifest.licence, "sha256": _sha256(licence_text(manifest)), "date": _now()}
    with _locked(data_dir / "weights" / "user.json"):
        record = weights.user_record(data_dir)
        _write_record(data_dir, record | {"accepted": record.get("accepted", {}) | {manifest.name: entry}})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- download


def fetch(manifest: Manifest, data_dir: Path, step: Step = lambda name, fraction: None) -> int:
    """Download what is missing. Returns the bytes loaded. Raises `weights_missing` when the licence is not accepted or
    the network fails, `weights_corrupt` when what comes is not what the manifest promises, `out_of_disk`."""
    if not manifest.files:
        raise PopulaceError("weights_missing", f"The weights {manifest.name!r} cannot be downloaded by Populace.",
                            manifest.obtain)  # fmt: skip
    if manifest.embedded or manifest.imported:
        raise PopulaceError("invalid_request", f"The weights {manifest.name!r} are not to be downloaded.",
                            "They are here already." if manifest.embedded else "Import the file again.")  # fmt: skip
    if not is_accepted(manifest, data_dir):
        raise PopulaceError("weights_missing", f"The licence of {manifest.name!r} is not accepted yet.",
                            f"Read and accept it: populace weights accept {manifest.name}.")  # fmt: skip
    before, loaded = 0, 0
    for file in manifest.files:
        path = manifest.location(file, data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)

        def tell(done: int, before: int = before, file: WeightFile = file) -> None:
            step(file.path, (before + done) / manifest.size)

        with _locked(path):  # two that want the same file: the second finds it there
            try:
                weights.verify(manifest, file, data_dir)
            except PopulaceError:
                _check_space(path.parent, file.size)
                loaded += _download(file, path, tell)
                weights.verify(manifest, file, data_dir, fresh=True)
        before += file.size
        tell(0, before)
    return loaded


def _download(file: WeightFile, path: Path, tell: Callable[[int], None]) -> int:
    """To `<path>.part`, resumed if there is one, then renamed. A file with the wrong hash is fetched once more."""
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):
        loaded = _load(file, part, tell)
        if part.stat().st_size == file.size and weights.sha256_of(part) == file.sha256:
            os.replace(part, path)
            return loaded
        part.unlink()
    raise PopulaceError("weights_corrupt", f"{file.path} of {file.repository} is not the file that this version knows.",
                        "Try again later, or update Populace.")  # fmt: skip


def _load(file: WeightFile, part: Path, tell: Callable[[int], None]) -> int:
    """Fill `part` up to the declared size, in several attempts while each of them brings something."""
    loaded, failures, trouble = 0, 0, ""
    while failures < ATTEMPTS:
        have = part.stat().st_size if part.is_file() else 0
        if have > file.size:
            part.unlink()
            have = 0
        if have == file.size:
            return loaded
        try:
            with _opened(file, have) as reply, open(part, "ab" if reply.status == 206 else "wb") as out:
                start = done = out.tell()
                while done < file.size and (data := reply.read(min(CHUNK_BYTES, file.size - done))):
                    out.write(data)
                    done += len(data)
                    tell(done)
            loaded += done - start
            trouble = "The connection broke off"
            failures = 0 if done > max(start, have) else failures + 1
        except urllib.error.HTTPError as error:
            if error.code == 416:  # our part is longer than theirs: begin again
                part.unlink(missing_ok=True)
            elif error.code in (401, 403, 404):
                raise _refused(file, error.code) from None
            failures, trouble = failures + 1, f"The server answers {error.code}"
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            failures, trouble = failures + 1, f"The connection failed ({getattr(error, 'reason', error)})"
        if 0 < failures < ATTEMPTS:
            time.sleep(PAUSE_S * 2 ** (failures - 1))
    raise PopulaceError("weights_missing", f"{trouble} while fetching {file.path}.",
                        "Try again: what is already here is kept.")  # fmt: skip


def _opened(file: WeightFile, have: int) -> Any:
    """The reply to a request for the rest of a file. Raises URLError and its kin, ValueError for a reply that lies."""
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise PopulaceError("weights_missing", "HF_HUB_OFFLINE forbids downloads.", "Unset it, or import the file.")
    assert file.repository is not None
    url = huggingface_hub.hf_hub_url(file.repository, file.path, revision=file.revision,
                                     endpoint=os.environ.get("HF_ENDPOINT"))  # fmt: skip
    headers = {"User-Agent": "populace", "Accept-Encoding": "identity"}
    if (token := huggingface_hub.get_token()) and urlsplit(url).scheme == "https":
        headers["Authorization"] = f"Bearer {token}"
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    reply = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    sent = reply.headers["Content-Range"] or ""
    if reply.status == 206 and not re.match(rf"bytes {have}-\d+/({file.size}|\*)$", sent):
        reply.close()
        raise ValueError("it sends another part than the one asked for")
    return reply


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Stores redirect to their content hosts; those must not see the token, and must not be less safe."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise urllib.error.URLError("it leads to an address that is not encrypted")
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None and old.netloc != new.netloc:
            made.remove_header("Authorization")
        return made


def _refused(file: WeightFile, code: int) -> PopulaceError:
    if code == 404:
        return PopulaceError("weights_missing", f"{file.repository} has no {file.path} at revision {file.revision}.",
                             "Update Populace, or import the file.")  # fmt: skip
    return PopulaceError("weights_missing", f"{file.repository} wants you to sign in and accept its terms.",
                         f"Do so on huggingface.co/{file.repository}, then run: hf auth login.")  # fmt: skip


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise PopulaceError("out_of_disk", f"{(size + SPARE_BYTES) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are "
                            f"free where {folder} is.", "Free some space.")  # fmt: skip


# --------------------------------------------------------------------------------------------- import, use and removal


def import_file(
    source: Path, name: str, licence: str, data_dir: Path, folder: Path = MANIFEST_FOLDER, provenance: str = ""
) -> Manifest:
    """Take in a safetensors file: as the missing file of weights that this version knows, else as weights of the
    user's own. Checked, copied beside its place, then renamed. Raises `weights_corrupt` or `invalid_request`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise PopulaceError("invalid_request", f"{name!r} cannot be a name of weights.",
                            "Use lower-case letters, digits and _, at most 40.")  # fmt: skip
    if not source.is_file() or not 0 < source.stat().st_size <= MAX_IMPORT_BYTES:
        raise PopulaceError("invalid_request", f"{source} is not a file of a sensible size.", "Choose another file.")
    known = {manifest.name: manifest for manifest in weights.manifests(folder) if manifest.files}
    digest = weights.sha256_of(source)
    if name in known:
        manifest = known[name]
        file = next((f for f in manifest.files if f.sha256 == digest), None)
        if manifest.embedded or file is None:
            raise PopulaceError("invalid_request", f"{source.name} is none of the files of {name!r}.",
                                "Check that it is whole, or give it a name of your own.")  # fmt: skip
        if file.path.endswith(".safetensors"):
            _check_tensors_readable(source)
        _copy(source, manifest.location(file, data_dir), digest)
        return manifest
    metadata = _check_tensors_readable(source)
    path = data_dir / "weights" / name / "weights.safetensors"
    _copy(source, path, digest)
    quoted = {key: json.dumps(value) for key, value in {
        "name": name, "title": metadata.get("title", source.stem)[:80], "licence": licence, "licence_url": "",
        "provenance": provenance or f"Imported from {source.name} on {_now()[:10]}.",
    }.items()}  # fmt: skip
    text = "".join(f"{key} = {value}\n" for key, value in quoted.items()) + "embedded = false\nimported = true\n\n"
    target = weights.imports_folder(data_dir) / f"{name}.toml"
    target.parent.mkdir(parents=True, exist_ok=True)
    packet.write_file(target, (text + weights.describe(path)).encode())
    return weights.find(name, data_dir, folder)


def import_checkpoint(
    family: str, source: Path, data_dir: Path, own: bool = False, folder: Path = MANIFEST_FOLDER
) -> Manifest:
    """Take in an official file of a family: read without running anything in it, checked name by name, written as
    safetensors, recorded with its SHA-256 and licence, and used for the family if nothing else is. Raises
    `weights_corrupt` or `invalid_request`, then nothing has changed."""
    from backend import checkpoints, families

    if not source.is_file() or not 0 < source.stat().st_size <= MAX_IMPORT_BYTES:
        raise PopulaceError("invalid_request", f"{source} is not a file of a sensible size.", "Choose another file.")
    made = checkpoints.convert(family, source, own)
    shipped = {manifest.name: manifest for manifest in weights.manifests(folder)}
    manifest = shipped.get(made.name, shipped[family])
    converted = data_dir / "weights" / f".{made.name}.converted"
    converted.parent.mkdir(parents=True, exist_ok=True)
    _check_space(converted.parent, sum(array.nbytes for array in made.arrays.values()))
    try:
        packet.write_file(converted, b"".join(tensors.dump_tensors(made.arrays, made.metadata)))
        origin = f"Converted from {source.name} (SHA-256 {weights.sha256_of(source)}) on {_now()[:10]}."
        origin += _as_published(source, checkpoints.published(family))
        found = import_file(converted, made.name, manifest.licence, data_dir, folder, origin)
    finally:
        converted.unlink(missing_ok=True)
    if found.name not in families.info(family).companions and family not in weights.replacements(data_dir):
        use(found.name, family, data_dir, folder)
    return found


def _as_published(source: Path, known: Mapping[str, tuple[int, str]]) -> str:
    """Whether a file is the one whose size and MD5 its authors told; nothing where they told none."""
    if source.name not in known:
        return ""
    with open(source, "rb") as file:
        found = source.stat().st_size, hashlib.file_digest(file, "md5").hexdigest()
    return f" It is {'' if found == known[source.name] else 'not '}the file that its authors published (by its MD5)."


def _check_tensors_readable(source: Path) -> dict[str, str]:
    with open(source, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return packet.load_tensors(view)[1]
    except ValueError as error:
        raise PopulaceError("weights_corrupt", f"{source.name} is not a safetensors file: {error}.",
                            "Only such files are accepted: they hold numbers, never code.") from None  # fmt: skip


def _copy(source: Path, path: Path, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(path.parent, source.stat().st_size)
    part = path.with_name(f"{path.name}.import")
    try:
        shutil.copyfile(source, part)
        if weights.sha256_of(part) != digest:
            raise PopulaceError("weights_corrupt", f"{source.name} changed while it was copied.", "Try again.")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def use(name: str, in_place_of: str, data_dir: Path, folder: Path = MANIFEST_FOLDER) -> None:
    """Have whoever asks for the weights `in_place_of` get `name`; the same name twice ends it."""
    for asked in (name, in_place_of):
        weights.find(asked, data_dir, folder)
    with _locked(data_dir / "weights" / "user.json"):
        record = weights.user_record(data_dir)
        chosen = {key: value for key, value in weights.replacements(data_dir).items() if key != in_place_of}
        _write_record(data_dir, record | {"use": chosen | ({in_place_of: name} if name != in_place_of else {})})


def remove(name: str, data_dir: Path, folder: Path = MANIFEST_FOLDER) -> int:
    """Delete the files of downloaded or imported weights. Returns the bytes freed."""
    manifest = weights.find(name, data_dir, folder)
    if manifest.embedded:
        raise PopulaceError("invalid_request", f"The weights {name!r} are part of Populace.", "They cannot be removed.")
    for old, new in weights.replacements(data_dir).items():
        if new == name:
            use(old, old, data_dir, folder)
    place, freed = data_dir / "weights" / name, 0
    for path in place.rglob("*"):
        freed += path.stat().st_size if path.is_file() else 0
    shutil.rmtree(place, ignore_errors=True)
    if manifest.imported:
        (weights.imports_folder(data_dir) / f"{name}.toml").unlink(missing_ok=True)
    return freed


# ---------------------------------------------------------------------------------------------------------- household


def _write_record(data_dir: Path, record: dict[str, Any]) -> None:
    packet.write_file(data_dir / "weights" / "user.json", json.dumps(record, indent=2).encode())


def _locked(path: Path) -> contextlib.AbstractContextManager[Any]:
    """For one process at a time; where the file system has no locks, the last rename wins with equal content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(path.with_name(f".{path.name}.lock")).acquire()
    except (NotImplementedError, OSError):
        return contextlib.nullcontext()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
