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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path

from images.cache import Cache, digest, sha256_of
from images.errors import BadInputError, EnvironmentFault, SuiteError
from images.progress import Progress, Report

__all__ = [
    "Deb",
    "Selection",
    "collect_garbage",
    "fetch",
    "fetch_from_pool",
    "fetch_source",
    "resolve",
    "unpack",
]

HELPER = Path("/usr/lib/apt/apt-helper")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: A selection is made anew after this long, so that "the newest" stays true; an archive
#: that cannot be reached then is no error while the old selection is at hand.
SELECTION_LIFETIME_S = 7 * 86400
#: When to ask again an archive that could not be reached.
RETRY_S = 3600
#: Package lists this young are not read again: one command resolves several selections.
LISTS_LIFETIME_S = 60
#: Bytes that a suite's lists and apt's caches of them take.
LISTS_SPACE = 200 << 20
#: What to do about a selection whose packages cannot be had any more.
MOVED_ON = "if the archive has moved on, `python -m images update` selects anew"


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
        return {deb.name: deb.version for deb in self.debs}[package]

    @property
    def key(self) -> str:
        """Names the content: equal keys, equal packages."""
        return digest(sorted(deb.sha256 for deb in self.debs))

    @property
    def size(self) -> int:
        """Bytes to download if nothing is there yet."""
        return sum(deb.size for deb in self.debs)


def resolve(
    cache: Cache,
    suite: str,
    packages: Sequence[str],
    *,
    refresh: bool = False,
    lasting: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """The closure of ``packages`` (``name`` or ``name=version``) in ``suite``.

    :param refresh: ask the archive, and fail if it does not answer.
    :param lasting: do not ask the archive if there is a selection, however old.
    :raises BadInputError: the archive has no such suite, package or version.
    :raises EnvironmentFault: no apt, or no archive to be reached.
    """
    progress = progress or cache.progress
    state = _State(cache, suite)
    pin = cache.root / "selections" / f"{suite}-{digest(list(packages))}.json"

    def known() -> Selection | None:
        selection, until = _load(pin)
        if selection and not refresh and (lasting or time.time() < until):
            os.utime(pin)  # "last used", for collect_garbage
            return selection
        return None

    if selection := known():
        return selection
    with cache.lock("apt", waiting_for="downloads", progress=progress):
        if selection := known():
            return selection
        until = time.time() + SELECTION_LIFETIME_S
        try:
            cache.require_space(LISTS_SPACE, f"Package lists of {suite}")
            state.update(progress)
            with progress.step(f"Selecting {' '.join(packages)} from {suite}"):
                selection = state.select(packages)
        except SuiteError as error:
            selection, _ = _load(pin)
            if selection is None or refresh:
                raise
            progress.say(f"{error}; staying with the packages selected before")
            until = time.time() + RETRY_S
        pin.parent.mkdir(exist_ok=True)
        scratch = pin.with_suffix(".new")
        scratch.write_text(json.dumps({"until": until, **asdict(selection)}))
        scratch.rename(pin)
    return selection


def fetch(cache: Cache, selection: Selection, progress: Progress, title: str) -> list[Path]:
    """The selection's files, downloaded where they are missing; broken downloads resume."""
    archive = cache.root / "debs"
    paths = [archive / _archive_name(deb) for deb in selection.debs]

    def lacking() -> list[Deb]:
        return [
            deb
            for deb, path in zip(selection.debs, paths, strict=True)
            if not path.is_file()
            or path.stat().st_size != deb.size
            or sha256_of(path) != deb.sha256
        ]

    if not lacking():
        return paths
    state = _State(cache, selection.suite)
    with cache.lock("apt", waiting_for="downloads", progress=progress):
        if missing := lacking():
            for deb in missing:
                (archive / _archive_name(deb)).unlink(missing_ok=True)
            if not state.has_lists():
                state.update(progress)
            megabytes = sum(deb.size for deb in missing) / 1e6
            what = f"{title}: downloading {len(missing)} packages, {megabytes:.0f} MB"
            try:
                with progress.step(what) as report:
                    state.download(missing, report)
            except SuiteError as error:
                raise EnvironmentFault(f"{title}: {error}; {MOVED_ON}") from error
    if still := lacking():
        deb = still[0]
        raise EnvironmentFault(
            f"{title}: the archive did not serve {deb.name} {deb.version} as selected; {MOVED_ON}"
        )
    return paths


def fetch_source(cache: Cache, suite: str, package: str, progress: Progress) -> list[Path]:
    """The files of a source package, the newest in ``suite``; apt checks signature and hashes.

    :raises BadInputError: the archive has no such suite or source package.
    :raises EnvironmentFault: no apt, or no archive to be reached.
    """
    state = _State(cache, suite, kind="deb-src")
    place = cache.root / "sources"
    place.mkdir(exist_ok=True)
    with cache.lock("apt", waiting_for="apt", progress=progress):
        state.update(progress)
        with progress.step(f"Source of {package}: downloading") as report:
            listing = state.source(package, place, report)
    return [place / name for name in listing]


def fetch_from_pool(cache: Cache, files: Mapping[str, str], progress: Progress) -> list[Path]:
    """Files of the archive's pool that are in no index (any more); their hashes vouch for them.

    :param files: a path below the archive's root, to its SHA-256.
    :raises EnvironmentFault: no apt, no archive to be reached, or it has not got them.
    """
    _require_tools()
    if not HELPER.exists():
        raise EnvironmentFault(f"{HELPER} is needed to get files of the archive (apt has it)")
    place = cache.root / "sources"
    place.mkdir(exist_ok=True)
    paths = []
    with cache.lock("apt", waiting_for="downloads", progress=progress):
        for name, sha256 in files.items():
            path = place / Path(name).name
            paths.append(path)
            if path.is_file() and sha256_of(path) == sha256:
                continue
            scratch = path.with_name(path.name + ".new")
            with progress.step(f"{path.name}: downloading"):
                done = subprocess.run(
                    [
                        *("setpriv", "--pdeathsig=KILL", HELPER, "-oAPT::Sandbox::User="),
                        *("download-file", f"{_mirror(cache.root / 'apt')}/{name}", scratch),
                        f"SHA256:{sha256}",
                    ],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "LC_ALL": "C"},
                )
            if done.returncode:
                for rest in place.glob(f"{scratch.name}*"):  # apt calls it .FAILED
                    rest.unlink()
                raise EnvironmentFault(f"the archive does not serve {name}: {_reason(done.stderr)}")
            scratch.replace(path)
    return paths


def unpack(debs: Sequence[Path], into: Path, *, drop: Sequence[str] = ()) -> None:
    """Unpack packages over each other into ``into``, without the paths that match ``drop``.

    Modes do not depend on who unpacks; nothing is left set-user-id, for a cache is no place
    for a second ``su``.
    """
    # With /usr merged, packages may still ship /lib or /bin.  The links must come first.
    for name in ("bin", "sbin", "lib", "lib64"):
        (into / "usr" / name).mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to(f"usr/{name}")
    # Not dpkg-deb -x: it would replace the links above by a package's directories.
    tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "--no-same-permissions"]
    tar += [*(f"--exclude={path}" for path in drop), "-C", str(into)]

    def one(deb: Path) -> None:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as out:
            done = subprocess.run(
                tar, stdin=out.stdout, stderr=subprocess.PIPE, text=True, umask=0o022
            )
        if done.returncode or out.returncode:
            raise EnvironmentFault(f"{deb.name} cannot be unpacked: {_reason(done.stderr)}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, debs))


def collect_garbage(cache: Cache, *, unused_days: float) -> list[str]:
    """Remove selections nobody used in so many days, and all that only they needed."""
    horizon = time.time() - unused_days * 86400
    kept, doomed = [], []
    with cache.lock("apt"):
        for pin in cache.root.glob("selections/*"):
            selection, _ = _load(pin)
            # Nobody is writing a selection while the lock is ours.
            if selection is None or pin.suffix == ".new" or pin.stat().st_mtime < horizon:
                doomed.append(pin)
            else:
                kept.append(selection)
        needed = {_archive_name(deb) for selection in kept for deb in selection.debs}
        suites = {selection.suite for selection in kept}
        doomed += [path for path in cache.root.glob("debs/*.deb") if path.name not in needed]
        doomed += cache.root.glob("debs/partial/*")
        doomed += [path for path in cache.root.glob("apt/*") if path.name not in suites]
        for path in doomed:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return [str(path.relative_to(cache.root)) for path in doomed]


def _archive_name(deb: Deb) -> str:
    # apt's own name for it: the epoch's colon is quoted.
    arch = deb.filename.rsplit("_", 1)[1]
    return f"{deb.name}_{deb.version.replace(':', '%3a')}_{arch}"


def _load(pin: Path) -> tuple[Selection | None, float]:
    """A selection and the time until which it is good."""
    try:
        raw = json.loads(pin.read_text())
        debs = tuple(Deb(**deb) for deb in raw["debs"])
        return Selection(raw["suite"], tuple(raw["wanted"]), debs), float(raw["until"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _reason(text: str) -> str:
    """The line that says why: the first one, unless another speaks of a full disk."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "No space" in line), [*lines, "no reason given"][0])


def _require_tools() -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb", "tar", "setpriv"):
        if shutil.which(tool) is None:
            raise EnvironmentFault(
                f"{tool} is needed to get packages and is not on this machine; the suite sets "
                "itself up on Debian and its derivatives, or takes a built QEMU and images "
                "from a cache prepared elsewhere (--cache)"
            )


class _State:
    """One private apt state: the suite, and what it builds on."""

    def __init__(self, cache: Cache, suite: str, kind: str = "deb") -> None:
        if not re.fullmatch(r"[a-z][a-z0-9.-]*", suite):
            raise BadInputError(f"{suite!r} is not the name of a Debian suite")
        self.suite = suite
        self.kind = kind
        self.root = cache.root / "apt" / (suite if kind == "deb" else f"{suite}-sources")
        self.archive = cache.root / "debs"

    def update(self, progress: Progress) -> None:
        stamp = self.root / "updated"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_LIFETIME_S:
            return
        _require_tools()
        self.root.mkdir(parents=True, exist_ok=True)
        signed = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
        (self.root / "debian.sources").write_text(
            f"Types: {self.kind}\nURIs: {_mirror(self.root)}\n"
            f"Suites: {' '.join(self._suites())}\nComponents: main\n"
            f"Targets: {'Packages' if self.kind == 'deb' else 'Sources'}\n{signed}"
        )
        with progress.step(f"Reading the package lists of {self.suite}") as report:
            # An archive that does not answer shall be a matter of seconds.
            self._run("apt-get", "update", "-o", "Acquire::Retries=1", report=report)
        stamp.touch()

    def has_lists(self) -> bool:
        return any(self.root.glob("lists/*_Packages*"))

    def select(self, packages: Sequence[str]) -> Selection:
        plan = self._run("apt-get", "install", "-s", "-y", *packages)
        chosen = re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE)
        records = self._run("apt-cache", "show", *(f"{n}={v}" for n, v in chosen))
        debs = {}
        for stanza in records.strip().split("\n\n"):
            record = HeaderParser().parsestr(stanza)
            name, version = record["Package"], record["Version"]
            debs[name, version] = Deb(
                name, version, record["Filename"], int(record["Size"]), record["SHA256"]
            )
        return Selection(
            self.suite, tuple(packages), tuple(debs[package] for package in sorted(chosen))
        )

    def download(self, debs: Sequence[Deb], report: Report) -> None:
        argv = ["apt-get", "install", "-y", "--download-only"]
        self._run(*argv, *(f"{deb.name}={deb.version}" for deb in debs), report=report)

    def source(self, package: str, into: Path, report: Report) -> list[str]:
        """Download a source package's files into ``into``; returns their names."""
        files = self._run("apt-get", "source", "--print-uris", package, cwd=into)
        self._run("apt-get", "source", "--download-only", package, report=report, cwd=into)
        return re.findall(r"^'[^']+' (\S+) \d+ SHA", files, re.MULTILINE)

    def _run(self, *argv: str, report: Report | None = None, cwd: Path | None = None) -> str:
        """The output of an apt command, which runs with the private state."""
        _require_tools()
        # Should we be killed, it must not go on writing where the next of us will write.
        command = ["setpriv", "--pdeathsig=KILL", argv[0], f"--config-file={self._configure()}"]
        lines = []
        with subprocess.Popen(
            [*command, "-o", "APT::Status-Fd=1", *argv[1:]],
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as apt:
            assert apt.stdout is not None
            for line in apt.stdout:
                if match := re.match(r"dlstatus:\d+:([\d.]+):(.*)", line):
                    if report:
                        report(float(match[1]) / 100, match[2])
                elif not line.startswith(("W: ", "N: ")):
                    lines.append(line)
        output = "".join(lines)
        if apt.returncode:
            raise self._failure(argv[:2], output)
        return output

    def _failure(self, argv: Sequence[str], output: str) -> SuiteError:
        """What people are told when an apt command fails."""
        errors = [line[3:].strip() for line in output.splitlines() if line.startswith("E: ")]
        unmet = re.search(r"unmet dependencies:\n +(.*)", output)
        why = unmet[1] if unmet else errors[0] if errors else _reason(output)
        text = f"{' '.join(argv)} for {self.suite}: {why}"
        if unmet or re.search(
            r"E: Unable to locate package|E: Version .* was not found|"
            r"has no installation candidate|does not have a Release file",
            output,
        ):
            return BadInputError(f"the archive has no such thing: {text}")
        return EnvironmentFault(text)

    def _configure(self) -> Path:
        (self.root / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (self.root / "parts").mkdir(exist_ok=True)
        (self.archive / "partial").mkdir(parents=True, exist_ok=True)
        if not (self.root / "status").exists():
            (self.root / "status").touch()  # once: apt's caches are as good as it is old
        settings = {
            "Dir::Etc::sourcelist": self.root / "debian.sources",
            "Dir::Etc::sourceparts": self.root / "parts",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": self.root / "parts",
            "Dir::State": self.root,
            "Dir::State::lists": self.root / "lists",
            "Dir::State::status": self.root / "status",
            "Dir::Cache": self.root,
            "Dir::Cache::archives": self.archive,
            "Dir::Cache::pkgcache": self.root / "pkgcache.bin",
            "Dir::Cache::srcpkgcache": self.root / "srcpkgcache.bin",
            "Dir::Log": self.root,
            "APT::Sandbox::User": "",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "APT::Default-Release": self.suite,
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Update::Error-Mode": "any",
            "Acquire::GzipIndexes": "false",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::http::Timeout": "10",
            "Acquire::https::Timeout": "10",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
        }
        # Read after the machine's own configuration, which thereby keeps its proxies and
        # credentials but not its hooks, which would act on the machine.
        conf = self.root / "apt.conf"
        lines = [f'{key} "{value}";\n' for key, value in settings.items()]
        conf.write_text("".join(["#clear APT::Update;\n", "#clear DPkg;\n", *lines]))
        return conf

    def _suites(self) -> list[str]:
        base = re.sub(r"-(backports|updates|proposed-updates)$", "", self.suite)
        base = {"experimental": "sid"}.get(base, base)
        return list(dict.fromkeys([base, self.suite]))


def _mirror(scratch: Path) -> str:
    """The URI of Debian's main archive in the machine's apt configuration."""

    def ask(*argv: str) -> str:
        return subprocess.run(["apt-get", *argv], capture_output=True, text=True).stdout

    # Third parties call their component "main", too.  The lists say whose they are, ...
    lists = ask(
        "indextargets",
        "--format=$(REPO_URI) $(COMPONENT) $(ORIGIN), $(LABEL)",
        "Created-By: Packages",
    )
    debian = re.findall(r"^(?!cdrom:)(\S+) main Debian, Debian$", lists, re.M)
    if not debian:
        # ... but a fresh container has none yet.  Then it is what looks most like Debian.
        uris = ask("update", "--print-uris", f"-o=Dir::State::lists={scratch / 'nothing'}")
        main = re.findall(r"^'(?!cdrom:)(\S+?)/dists/[^/]+/main/binary-\w+/Packages", uris, re.M)
        debian = [
            uri
            for looks in (r"//[^/]*\bdebian\.org/", r"//[^/]+/debian$", r"/debian")
            for uri in main
            if re.search(looks, uri) and "security" not in uri
        ]
    if not debian:
        raise EnvironmentFault("the machine's apt configuration names no Debian archive")
    # apt uses file: packages where they are; copy: is the same archive, but downloaded.
    return re.sub(r"^file:", "copy:", debian[0].rstrip("/"))
