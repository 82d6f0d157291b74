# SPDX-License-Identifier: GPL-2.0-or-later
"""A content-addressed cache of everything that gets booted.

An asset is a directory ``<name>-<key>``, where the key is a hash of all that determines its
content.  It is built in a scratch directory beside its place and renamed into it, so that an
asset is whole or absent; a lock per asset lets any number of processes ask for it at once
and one of them build it.  A manifest of sizes and SHA-256 sums detects later damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from images.errors import EnvironmentFault
from images.progress import Progress

__all__ = ["Cache", "Recipe", "default_root", "digest", "sha256_of"]

MANIFEST = "MANIFEST.json"
SCRATCH = ".building-"


def default_root() -> Path:
    """``$VFIO_CPR_CACHE``, or ``vfio-cpr-suite`` below ``$XDG_CACHE_HOME`` (or ``~/.cache``)."""
    if own := os.environ.get("VFIO_CPR_CACHE"):
        return Path(own)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without a name, and no $HOME
        raise EnvironmentFault(
            "this user has no home directory; name a cache directory with --cache or "
            "$VFIO_CPR_CACHE"
        ) from error
    return Path(base) / "vfio-cpr-suite"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """A short stable hash of plain values (strings, numbers, lists and dicts of them)."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Recipe(ABC):
    """How one asset is made.  Equal keys must mean equal content."""

    name: str
    #: What a person sees while it is being made.
    title: str
    #: Bytes that must be free before a build starts.
    space: int = 64 << 20
    #: Files of the asset whose content is hashed each time it is asked for: the ones that
    #: get booted.  The others are checked for presence and size.
    critical: tuple[str, ...] = ()

    @abstractmethod
    def key(self, cache: Cache) -> str:
        """A hash of everything that determines the asset's content."""

    @abstractmethod
    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        """Make the asset in the empty directory ``into``."""


class Cache:
    """The assets below one directory.

    :param progress: who hears of the work, unless a call names somebody else.
    :raises EnvironmentFault: the directory cannot be made or written.
    """

    def __init__(self, root: Path | None = None, progress: Progress | None = None) -> None:
        self.root = (root or default_root()).absolute()
        self.progress = progress or Progress()
        self._locks = self.root / "locks"
        self._sound: set[Path] = set()
        try:
            # A loader's search path, apt's configuration or a QEMU option would end there.
            if re.search(r'[":;,\n]', str(self.root)):
                raise OSError("its name has a quote, colon, semicolon, comma or line break")
            self._locks.mkdir(parents=True, exist_ok=True)
            if not all(os.access(path, os.W_OK | os.X_OK) for path in (self.root, self._locks)):
                raise OSError("not writable")
        except OSError as error:
            raise EnvironmentFault(
                f"the cache directory {str(self.root)!r} cannot be used: "
                f"{error.strerror or error}; name another with --cache or $VFIO_CPR_CACHE"
            ) from error

    @contextmanager
    def lock(
        self, name: str, *, waiting_for: str = "", progress: Progress | None = None
    ) -> Iterator[None]:
        """Hold the lock ``name``.  The kernel drops it with its holder, however that ends."""
        lock = FileLock(self._locks / f"{name}.lock")
        try:
            try:
                lock.acquire(timeout=0.2)
            except Timeout:
                (progress or self.progress).say(
                    f"waiting for another process: {waiting_for or name}"
                )
                lock.acquire()
        except OSError as error:
            raise EnvironmentFault(f"the cache cannot be locked: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def find(self, recipe: Recipe) -> Path | None:
        """The asset if it is there and undamaged; None otherwise.  Builds nothing."""
        place = self._place(recipe)
        return place if self._is_sound(place, recipe) else None

    def ensure(self, recipe: Recipe, progress: Progress | None = None) -> Path:
        """The asset's directory, built now if it is missing or damaged.

        :raises EnvironmentFault: it cannot be built here; the text says why.
        """
        progress = progress or self.progress
        place = self._place(recipe)
        if self._is_sound(place, recipe):
            return place
        with self.lock(place.name, waiting_for=recipe.title, progress=progress):
            if not self._is_sound(place, recipe):
                try:
                    self._make(recipe, place, progress)
                except OSError as error:
                    raise EnvironmentFault(f"{recipe.title}: {error}") from error
        return place

    def discard(self, recipe: Recipe) -> None:
        """Remove the asset, if it is there: its maker knows that it will not be needed again."""
        place = self._place(recipe)
        with self.lock(place.name, waiting_for=recipe.title):
            self._sound.discard(place)
            if place.exists():
                self._discard(place, place.name)

    def require_space(self, needed: int, title: str) -> None:
        """Make sure that so many bytes are free, before ``title`` is begun.

        :raises EnvironmentFault: they are not.
        """
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise EnvironmentFault(
                f"{title}: {needed >> 20} MiB of disk space are needed below {self.root} and "
                f"{free >> 20} MiB are free; make room there (python -m images gc) or name "
                "another place with --cache"
            )

    def verify(self, place: Path) -> list[str]:
        """Every way in which an asset differs from its manifest; all contents are hashed."""
        return [f"{place.name}: {how}" for how in _differences(place, hashed=None)]

    def assets(self) -> list[Path]:
        """Every asset, damaged ones included, least recently used first."""
        found = [
            path for path in self.root.iterdir() if re.search(r"^[^.].*-[0-9a-f]{16}$", path.name)
        ]
        return sorted(found, key=_last_used)

    def collect_garbage(self, *, unused_days: float) -> list[str]:
        """Remove assets nobody asked for in so many days, and what killed builds left.

        A lock that is held marks a build in progress, which is left alone.
        """
        removed = []
        horizon = time.time() - unused_days * 86400
        stale = [place for place in self.assets() if _last_used(place) < horizon]
        for path in (*stale, *self.root.glob(f"{SCRATCH}*")):
            name = path.name
            if name.startswith(SCRATCH):
                name = name.removeprefix(SCRATCH).rpartition(".")[0]
            try:
                with FileLock(self._locks / f"{name}.lock", timeout=0):
                    self._discard(path, name)
                    removed.append(path.name)
            except Timeout:
                continue
        return removed

    def _place(self, recipe: Recipe) -> Path:
        return self.root / f"{recipe.name}-{recipe.key(self)}"

    def _scratch(self, name: str) -> Path:
        # With our process id: what a killed build started may still be writing into its own.
        return self.root / f"{SCRATCH}{name}.{os.getpid()}"

    def _make(self, recipe: Recipe, place: Path, progress: Progress) -> None:
        # The lock is ours, so scratch of this name was left by a process that was killed.
        for left_over in self.root.glob(f"{SCRATCH}{place.name}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if os.path.lexists(place):
            how = next(_differences(place, recipe.critical), "repaired meanwhile")
            progress.say(f"{recipe.title}: the cached copy is damaged ({how}), making it again")
            self._discard(place, place.name)
        self.require_space(recipe.space, recipe.title)
        scratch = self._scratch(place.name)
        try:
            scratch.mkdir()
            recipe.build(scratch, self, progress)
            _write_manifest(scratch)
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _discard(self, path: Path, name: str) -> None:
        """Remove an asset or scratch; the caller holds the lock ``name``."""
        # Renamed first: should we be killed, half of it is no asset.
        path = path.rename(self._scratch(name))
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def _is_sound(self, place: Path, recipe: Recipe) -> bool:
        try:
            if place not in self._sound and any(_differences(place, recipe.critical)):
                return False
            os.utime(place / MANIFEST)  # "last used", for collect_garbage
        except OSError:
            return False
        self._sound.add(place)
        return True


def _last_used(place: Path) -> float:
    manifest = place / MANIFEST
    return (manifest if manifest.exists() else place).lstat().st_mtime


def _facts(path: Path, *, hashed: bool) -> dict[str, object]:
    """What a manifest says of a file; its hash takes time and may be left out."""
    if path.is_symlink():
        return {"link": str(path.readlink())}
    facts: dict[str, object] = {"size": path.stat().st_size}
    if hashed:
        facts["sha256"] = sha256_of(path)
    return facts


def _write_manifest(place: Path) -> None:
    manifest = {
        str(path.relative_to(place)): _facts(path, hashed=True)
        for path in sorted(place.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
    with (place / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())


def _differences(place: Path, hashed: Collection[str] | None) -> Iterator[str]:
    """How an asset differs from its manifest.

    :param hashed: the files whose content is looked at; all of them if None.
    """
    try:
        manifest = json.loads((place / MANIFEST).read_text())
        # Spelled out, for what damage leaves may be JSON all the same.
        entries = {str(name): dict(entry) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        entries = {}
    if not entries:
        yield "no readable manifest"
    for name, entry in entries.items():
        try:
            facts = _facts(place / name, hashed=hashed is None or name in hashed)
        except OSError:
            yield f"{name} is missing"
        else:
            if any(entry.get(fact) != value for fact, value in facts.items()):
                yield f"{name} has changed"
