# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian packages from the machine's own mirror, without touching the machine.

apt runs with a state of its own (sources, lists, an empty list of installed packages), as
whatever user we are.  With nothing "installed", apt selects the whole closure of a package,
libc included, which is what makes a tree that runs anywhere.  Signatures are checked by apt
against Debian's keyring; a package's SHA-256 is checked again before it is unpacked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path

from images.cache import Cache, digest, sha256_of
from images.errors import BadInputError, EnvironmentFault
from images.progress import Progress

__all__ = ["Deb", "Selection", "fetch", "resolve", "unpack"]

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: A selection is made anew after this long, so that "the newest" stays true; an archive
#: that cannot be reached then is no error while the old selection is at hand.
SELECTION_LIFETIME_S = 7 * 86400
#: Suites whose packages build upon another suite's.
BUILDS_ON = {"-backports": "", "-updates": "", "-proposed-updates": ""}


@dataclass(frozen=True)
class Deb:
    """One package of a selection."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Selection:
    """The closure of some packages in a suite, as the archive had it when it was resolved."""

    suite: str
    wanted: tuple[str, ...]
    debs: tuple[Deb, ...]

    def version_of(self, package: str) -> str:
        """The version of a package of the selection, as Debian writes it."""
        return next(deb.version for deb in self.debs if deb.name == package)

    @property
    def key(self) -> str:
        """Names the content: equal keys, equal packages."""
        return digest(sorted(deb.sha256 for deb in self.debs))

    @property
    def size(self) -> int:
        """Bytes to download if nothing is there yet."""
        return sum(deb.size for deb in self.debs)


def resolve(cache: Cache, suite: str, packages: Sequence[str], *, refresh: bool = False,
            progress: Progress | None = None) -> Selection:
    """The closure of ``packages`` (``name`` or ``name=version``) in ``suite``.

    :raises BadInputError: the archive has no such suite, package or version.
    :raises EnvironmentFault: no apt, or no archive to be reached.
    """
    progress = progress or Progress()
    pin = cache.root / "selections" / f"{suite}-{digest(list(packages))}.json"
    known = _load(pin)
    if known and not refresh and time.time() - pin.stat().st_mtime < SELECTION_LIFETIME_S:
        return known
    state = _State(cache, suite)
    with cache.lock(f"apt-{suite}", waiting_for="apt", progress=progress):
        again = _load(pin)
        if again and not refresh and time.time() - pin.stat().st_mtime < SELECTION_LIFETIME_S:
            return again
        try:
            state.update(progress)
            selection = state.select(packages)
        except EnvironmentFault as error:
            if known is None:
                raise
            progress.say(f"the archive cannot be asked ({error}); using the selection of "
                         f"{time.strftime('%Y-%m-%d', time.localtime(pin.stat().st_mtime))}")
            return known
        pin.parent.mkdir(parents=True, exist_ok=True)
        scratch = pin.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(selection)))
        scratch.rename(pin)
    return selection


def fetch(cache: Cache, selection: Selection, progress: Progress, title: str) -> list[Path]:
    """The selection's files, downloaded where they are missing; broken downloads resume."""
    archive = cache.root / "debs"
    (archive / "partial").mkdir(parents=True, exist_ok=True)
    paths = [archive / _archive_name(deb) for deb in selection.debs]

    def lacking() -> list[Deb]:
        return [deb for deb, path in zip(selection.debs, paths, strict=True)
                if not path.is_file() or path.stat().st_size != deb.size
                or sha256_of(path) != deb.sha256]

    if missing := lacking():
        state = _State(cache, selection.suite)
        with cache.lock(f"apt-{selection.suite}", waiting_for="apt", progress=progress):
            for deb in missing:
                (archive / _archive_name(deb)).unlink(missing_ok=True)
            if not state.has_lists():
                state.update(progress)
            megabytes = sum(deb.size for deb in missing) / 1e6
            with progress.step(f"{title}: downloading {len(missing)} packages, "
                               f"{megabytes:.0f} MB") as report:
                state.download(missing, report)
        if still := lacking():
            raise EnvironmentFault(
                f"{title}: the archive did not serve {still[0].name} {still[0].version} "
                "as selected; run `python -m images update` to select anew")
    return paths


def unpack(debs: Sequence[Path], into: Path, *, drop: Sequence[str] = ()) -> None:
    """Unpack packages over each other into ``into`` and remove the paths named in ``drop``."""
    into.mkdir(parents=True, exist_ok=True)
    # With /usr merged, packages may still ship /lib or /bin.  The links must come first.
    for name in ("bin", "sbin", "lib", "lib64"):
        (into / "usr" / name).mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to(f"usr/{name}")

    def one(deb: Path) -> None:
        # Not dpkg-deb -x: it would replace the links above by a package's directories.
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as tar:
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "--no-same-owner",
                            "-C", into, *(f"--exclude={path}" for path in drop)],
                           stdin=tar.stdout, check=True)
        if tar.returncode:
            raise EnvironmentFault(f"dpkg-deb cannot read {deb}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, debs))


def _archive_name(deb: Deb) -> str:
    # apt's own name for it: the epoch's colon is quoted.
    arch = deb.filename.rsplit("_", 1)[1]
    return f"{deb.name}_{deb.version.replace(':', '%3a')}_{arch}"


def _load(pin: Path) -> Selection | None:
    try:
        raw = json.loads(pin.read_text())
        return Selection(raw["suite"], tuple(raw["wanted"]),
                         tuple(Deb(**deb) for deb in raw["debs"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _State:
    """One private apt state: the suite, and what it builds on."""

    def __init__(self, cache: Cache, suite: str) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", suite):
            raise BadInputError(f"{suite!r} is not the name of a Debian suite")
        for tool in ("apt-get", "apt-cache", "dpkg-deb", "tar"):
            if shutil.which(tool) is None:
                raise EnvironmentFault(
                    f"{tool} is needed to get packages and is not on this machine; "
                    "the suite sets itself up on Debian and its derivatives, or takes a built "
                    "QEMU and images from a cache prepared elsewhere (--cache)")
        self.suite = suite
        self.root = cache.root / "apt" / suite
        self.archive = cache.root / "debs"

    def _suites(self) -> list[str]:
        for ending in BUILDS_ON:
            if self.suite.endswith(ending):
                return [self.suite.removesuffix(ending), self.suite]
        return [self.suite]

    def _configure(self) -> dict[str, str]:
        (self.root / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self.root / "parts").mkdir(exist_ok=True)
        (self.archive / "partial").mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        signed = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
        (self.root / "debian.sources").write_text(
            f"Types: deb\nURIs: {_mirror()}\nSuites: {' '.join(self._suites())}\n"
            f"Components: main\n{signed}")
        (self.root / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in {
            "Dir::Etc::sourcelist": self.root / "debian.sources",
            "Dir::Etc::sourceparts": self.root / "parts",
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.archive,
            "Dir::Log": self.root,
            "APT::Sandbox::User": "",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Default-Release": self.suite,
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
        }.items()))
        return {**os.environ, "APT_CONFIG": str(self.root / "apt.conf"), "LC_ALL": "C"}

    def _run(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self._configure(), capture_output=True, text=True,
                              stdin=subprocess.DEVNULL)
        if done.returncode or "\nW: Failed to fetch" in f"\n{done.stderr}":
            why = [line[3:] for line in done.stderr.splitlines() if line.startswith("E: ")]
            why = why or done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            text = f"{' '.join(argv[:2])} for {self.suite}: {'; '.join(why)}"
            if re.search(r"Unable to locate package|Version .* was not found|"
                         r"has no installation candidate|does not have a Release file|"
                         r"404 +Not Found", done.stderr):
                raise BadInputError(f"the archive has no such thing: {text}")
            if "No space left" in done.stderr or "enough free space" in done.stderr:
                raise EnvironmentFault(f"no disk space left below {self.root}: {text}")
            raise EnvironmentFault(text)
        return done.stdout

    def has_lists(self) -> bool:
        return any((self.root / "lists").glob("*_Packages*"))

    def update(self, progress: Progress) -> None:
        with progress.step(f"Reading the package lists of {self.suite}"):
            self._run("apt-get", "update")

    def select(self, packages: Sequence[str]) -> Selection:
        plan = self._run("apt-get", "-s", "-y", "install", *packages)
        chosen = re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE)
        records = self._run("apt-cache", "show", *(f"{n}={v}" for n, v in chosen))
        debs = {}
        for stanza in records.strip().split("\n\n"):
            record = HeaderParser().parsestr(stanza)
            debs[record["Package"], record["Version"]] = Deb(
                record["Package"], record["Version"], record["Filename"],
                int(record["Size"]), record["SHA256"])
        return Selection(self.suite, tuple(packages), tuple(
            debs[name.split(":")[0], version] for name, version in sorted(chosen)))

    def download(self, debs: Sequence[Deb], report: object) -> None:
        assert callable(report)
        reading, writing = os.pipe()
        with subprocess.Popen(
                ["apt-get", "-y", "-o", f"APT::Status-Fd={writing}", "--no-install-recommends",
                 "--download-only", "--reinstall", "install",
                 *(f"{deb.name}={deb.version}" for deb in debs)],
                env=self._configure(), pass_fds=[writing], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as apt:
            os.close(writing)
            with os.fdopen(reading) as status:
                for line in status:
                    kind, _, rest = line.partition(":")
                    fields = rest.split(":")
                    if kind == "dlstatus" and len(fields) >= 3:
                        report(float(fields[1]) / 100, fields[2].strip())
            assert apt.stderr is not None
            errors = apt.stderr.read()
        if apt.returncode:
            why = [line for line in errors.splitlines() if line.startswith("E: ")] or [errors]
            raise EnvironmentFault(f"apt-get could not download: {why[0].strip()}")


def _mirror() -> str:
    """The URI of Debian's main archive in the machine's apt configuration."""
    out = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
         "Created-By: Packages"], capture_output=True, text=True).stdout
    main = [line.split()[0] for line in out.splitlines()
            if line.split()[2:] == ["main"] and "security" not in line]
    # A machine may have third-party archives that also call their component "main".
    debian = [uri for uri in main if uri.rstrip("/").endswith("/debian")] or main
    if not debian:
        raise EnvironmentFault("the machine's apt configuration names no Debian archive "
                               "(`apt-get indextargets` lists no component main)")
    return debian[0]
