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
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from images.errors import EnvironmentFault
from images.progress import Progress

__all__ = ["Cache", "Recipe", "default_root", "digest", "sha256_of"]

MANIFEST = "MANIFEST.json"
SCRATCH = ".building"


def default_root() -> Path:
    """``$VFIO_CPR_CACHE``, or ``vfio-cpr-suite`` below ``$XDG_CACHE_HOME`` (or ``~/.cache``)."""
    if own := os.environ.get("VFIO_CPR_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "vfio-cpr-suite"


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

    :raises EnvironmentFault: the directory cannot be made or written.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root()
        self._checked: set[Path] = set()
        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise EnvironmentFault(
                f"the cache directory {self.root} cannot be used: {error.strerror or error}; "
                "name another with --cache or $VFIO_CPR_CACHE"
            ) from error

    @contextmanager
    def lock(self, name: str, *, waiting_for: str = "", progress: Progress | None = None
             ) -> Iterator[None]:
        """Hold the lock ``name``.  The kernel drops it with its holder, however that ends."""
        lock = FileLock(self.root / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            if progress:
                progress.say(f"waiting for another process: {waiting_for or name}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find(self, recipe: Recipe) -> Path | None:
        """The asset if it is there and undamaged; None otherwise.  Builds nothing."""
        place = self.root / f"{recipe.name}-{recipe.key(self)}"
        return place if self._is_sound(place, recipe.critical) else None

    def ensure(self, recipe: Recipe, progress: Progress | None = None) -> Path:
        """The asset's directory, built now if it is missing or damaged.

        :raises EnvironmentFault: it cannot be built here; the text says why.
        """
        progress = progress or Progress()
        place = self.root / f"{recipe.name}-{recipe.key(self)}"
        if self._is_sound(place, recipe.critical):
            return self._touch(place)
        with self.lock(place.name, waiting_for=recipe.title, progress=progress):
            if self._is_sound(place, recipe.critical):
                return self._touch(place)
            if place.exists():
                progress.say(f"{recipe.title}: the cached copy is damaged, making it again")
                shutil.rmtree(place)
            # The lock is ours, so scratch of this name was left by a process that was killed.
            scratch = self.root / f"{SCRATCH}-{place.name}"
            shutil.rmtree(scratch, ignore_errors=True)
            self._require_space(recipe)
            try:
                scratch.mkdir(parents=True)
                recipe.build(scratch, self, progress)
                self._write_manifest(scratch)
                scratch.rename(place)
            except OSError as error:
                raise EnvironmentFault(f"{recipe.title}: {error}") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return place

    def verify(self, place: Path) -> list[str]:
        """Every way in which an asset differs from its manifest; all contents are hashed."""
        try:
            manifest = json.loads((place / MANIFEST).read_text())
        except (OSError, ValueError):
            return [f"{place.name}: no readable manifest"]
        problems = []
        for name, entry in manifest.items():
            path = place / name
            if not path.is_file():
                problems.append(f"{place.name}/{name}: missing")
            elif path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
                problems.append(f"{place.name}/{name}: changed")
        return problems

    def assets(self) -> list[Path]:
        """Every finished asset, least recently used first."""
        found = [path.parent for path in self.root.glob(f"*/{MANIFEST}")
                 if not path.parent.name.startswith(SCRATCH)]
        return sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime)

    def collect_garbage(self, *, unused_days: float) -> list[str]:
        """Remove assets nobody asked for in so many days, and what killed builds left.

        A lock that is held marks a build in progress, which is left alone.
        """
        removed = []
        horizon = time.time() - unused_days * 86400
        stale = [p for p in self.assets() if (p / MANIFEST).stat().st_mtime < horizon]
        stale += [p for p in self.root.glob(f"{SCRATCH}-*") if p.is_dir()]
        for path in stale:
            lock = FileLock(self.root / "locks" / f"{path.name.removeprefix(SCRATCH + '-')}.lock")
            try:
                with lock.acquire(timeout=0):
                    shutil.rmtree(path)
                    removed.append(path.name)
            except Timeout:
                continue
        return removed

    def _touch(self, place: Path) -> Path:
        os.utime(place / MANIFEST)  # "last used", for collect_garbage
        return place

    def _is_sound(self, place: Path, critical: tuple[str, ...]) -> bool:
        if place in self._checked:
            return True
        try:
            manifest = json.loads((place / MANIFEST).read_text())
            for name, entry in manifest.items():
                if (place / name).stat().st_size != entry["size"]:
                    return False
            if any(sha256_of(place / name) != manifest[name]["sha256"] for name in critical):
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self._checked.add(place)
        return True

    def _require_space(self, recipe: Recipe) -> None:
        free = shutil.disk_usage(self.root).free
        if free < recipe.space:
            raise EnvironmentFault(
                f"{recipe.title}: {recipe.space >> 20} MiB of disk space are needed below "
                f"{self.root} and {free >> 20} MiB are free; make room there "
                "(python -m images gc) or name another place with --cache"
            )

    @staticmethod
    def _write_manifest(place: Path) -> None:
        manifest = {}
        for path in sorted(place.rglob("*")):
            if path.is_file() and not path.is_symlink():
                name = str(path.relative_to(place))
                manifest[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        with (place / MANIFEST).open("w") as stream:
            json.dump(manifest, stream, indent=0)
            stream.flush()
            os.fsync(stream.fileno())
