# SPDX-License-Identifier: GPL-2.0-or-later
"""Packages: real apt and real signatures, on an archive that these tests serve themselves."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from fixtures.waiting import until
from images import apt
from images.cache import Cache, sha256_of
from images.errors import BadInputError, EnvironmentFault
from images.progress import Progress

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "dpkg-deb", "gpg"))), reason="no apt, or no gpg"
)

Fork = multiprocessing.get_context("fork").Process
QUIET = Progress(quiet=True)
#: Large enough for a download to be interrupted.
BALLAST = bytes(3 << 20)


class Archive:
    """A Debian archive behind a web server that notes what it is asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.keyring = root / "keyring.gpg"
        self.requests: list[tuple[str, str | None]] = []
        #: Downloads stop in the middle until this is set.
        self.flowing = threading.Event()
        self.flowing.set()
        handler = partial(_Handler, self)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def asked(self, pattern: str) -> list[str | None]:
        """The ranges of the requests so far whose path matches."""
        return [span for path, span in self.requests if re.search(pattern, path)]

    def publish(self, place: str, suite: str, debs: list[Path], **release: str) -> None:
        """Write the signed indices of a suite."""
        index = self.root / place / "dists" / suite / "main/binary-amd64/Packages"
        index.parent.mkdir(parents=True)
        stanzas = []
        for deb in debs:
            pool = self.root / place / "pool" / deb.name
            pool.parent.mkdir(parents=True, exist_ok=True)
            if not pool.exists():
                pool.hardlink_to(deb)
            control = _output("dpkg-deb", "--field", deb).strip()
            digest = hashlib.sha256(deb.read_bytes()).hexdigest()
            stanzas.append(
                f"{control}\nFilename: pool/{deb.name}\n"
                f"Size: {deb.stat().st_size}\nSHA256: {digest}\n"
            )
        index.write_text("\n".join(stanzas))
        digest = hashlib.sha256(index.read_bytes()).hexdigest()
        fields = {"Origin": "Debian", "Label": "Debian", "Suite": suite, "Codename": suite}
        fields |= {"Date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S UTC")}
        fields |= {"Architectures": "amd64", "Components": "main", **release}
        text = "".join(f"{name}: {value}\n" for name, value in fields.items())
        text += f"SHA256:\n {digest} {index.stat().st_size} main/binary-amd64/Packages\n"
        subprocess.run(
            ["gpg", "--batch", "--clearsign", "--output", index.parents[2] / "InRelease"],
            input=text.encode(),
            check=True,
            stderr=subprocess.DEVNULL,
        )


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, archive: Archive, *args: object) -> None:
        self.archive = archive
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        span = self.headers["Range"]
        self.archive.requests.append((self.path, span))
        path = self.archive.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        changed = self.date_time_string(int(path.stat().st_mtime))
        begin = 0
        if span and self.headers["If-Range"] == changed:
            begin = int(span.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - begin))
        self.send_header("Last-Modified", changed)
        self.end_headers()
        half = (begin + len(content)) // 2
        with suppress(ConnectionError):  # the client was killed
            self.wfile.write(content[begin:half])
            self.archive.flowing.wait()
            self.wfile.write(content[half:])

    def log_message(self, *_args: object) -> None:
        pass


def _output(*argv: str | Path) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _make_deb(
    into: Path, name: str, version: str, files: dict[str, bytes], depends: str = ""
) -> Path:
    tree = into / f"{name}-{version}"
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    if (tree / "usr/bin/su").exists():
        (tree / "usr/bin/su").chmod(0o4755)
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
        f"Maintainer: Nobody <nobody@example.org>\nDescription: {name}\n"
        + (f"Depends: {depends}\n" if depends else "")
    )
    deb = into / f"{name}_{version.rpartition(':')[2]}_amd64.deb"
    _output("dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, deb)
    return deb


@pytest.fixture(scope="module")
def _published() -> Iterator[Archive]:
    # Not below pytest's directory: gpg-agent's socket needs a short path.
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        root = Path(name)
        patch.setenv("GNUPGHOME", str(root / "gpg"))
        (root / "gpg").mkdir(mode=0o700)
        me = ["--batch", "--passphrase", "", "--quick-gen-key", "me", "ed25519", "sign", "never"]
        subprocess.run(["gpg", *me], check=True, stderr=subprocess.DEVNULL)
        archive = Archive(root / "www")
        archive.root.mkdir()
        archive.keyring.write_bytes(
            subprocess.run(["gpg", "--export"], check=True, stdout=subprocess.PIPE).stdout
        )
        make = partial(_make_deb, root)
        base = make("libbase", "1:1.0-1", {"lib/base.so": b"base"})
        old = [
            make("tool", "1.0", {"usr/bin/tool": b"1"}, "tool-data (= 1.0), libbase"),
            make("tool-data", "1.0", {"usr/share/tool/ballast": BALLAST}),
        ]
        files = {"usr/bin/tool": b"2", "usr/bin/su": b"su", "usr/share/doc/tool/NEWS": b"news"}
        new = [
            make("tool", "2.0", files, "tool-data (= 2.0), libbase"),
            make("tool-data", "2.0", {"usr/share/tool/data": b"2"}),
        ]
        archive.publish("debian", "stone", [base, *old])
        backports = {"NotAutomatic": "yes", "ButAutomaticUpgrades": "yes"}
        archive.publish("debian", "stone-backports", new, **backports)
        archive.publish("third/debian", "stone", [base], Origin="Third", Label="Third")
        archive.publish("unsigned/debian", "stone", [base])
        (archive.root / "unsigned/debian/dists/stone/InRelease").rename(
            archive.root / "unsigned/debian/dists/stone/Release"
        )
        (archive.root / "company-mirror").symlink_to("debian")
        serving = threading.Thread(target=archive.server.serve_forever)
        serving.start()
        yield archive
        archive.server.shutdown()
        serving.join()
        subprocess.run(["gpgconf", "--kill", "all"])


@pytest.fixture
def archive(_published: Archive) -> Archive:
    _published.requests.clear()
    _published.flowing.set()
    return _published


class Machine:
    """The apt configuration of a machine that never read its package lists."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("sources.list.d", "apt.conf.d", "preferences.d"):
            (root / "etc/apt" / name).mkdir(parents=True)
        (root / "var/lib/apt/lists/partial").mkdir(parents=True)
        (root / "var/lib/dpkg").mkdir()
        (root / "var/lib/dpkg/status").touch()
        (root / "apt.conf").write_text(
            f'Dir "{root}";\nDir::State::status "{root}/var/lib/dpkg/status";\n'
        )

    def write(self, name: str, text: str) -> None:
        (self.root / "etc/apt" / name).write_text(text)

    def files(self) -> dict[Path, tuple[int, int]]:
        stats = {path: path.stat() for path in self.root.rglob("*")}
        return {path: (entry.st_mtime_ns, entry.st_size) for path, entry in stats.items()}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path / "machine")
    monkeypatch.setenv("APT_CONFIG", str(machine.root / "apt.conf"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return machine


@pytest.fixture
def debian(archive: Archive, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that gets its packages from our archive."""
    machine.write("sources.list", f"deb {archive.url}/debian old main\n")
    monkeypatch.setattr(apt, "KEYRING", archive.keyring)
    return machine


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", QUIET)


def versions(selection: apt.Selection) -> dict[str, str]:
    return {deb.name: deb.version for deb in selection.debs}


def expire(cache: Cache) -> None:
    """Let a week pass."""
    for pin in cache.root.glob("selections/*"):
        pin.write_text(json.dumps({**json.loads(pin.read_text()), "until": 0}))
    for stamp in cache.root.glob("apt/*/updated"):
        stamp.unlink()


NEW = {"libbase": "1:1.0-1", "tool": "2.0", "tool-data": "2.0"}


@pytest.mark.usefixtures("debian")
def test_the_closure_is_selected_from_the_suite_and_what_it_builds_on(cache: Cache) -> None:
    assert versions(apt.resolve(cache, "stone-backports", ["tool"])) == NEW
    old = apt.resolve(cache, "stone", ["tool"])
    assert versions(old) == {"libbase": "1:1.0-1", "tool": "1.0", "tool-data": "1.0"}
    assert old.version_of("tool") == "1.0"
    data = apt.resolve(cache, "stone-backports", ["tool-data=1.0"])
    assert versions(data) == {"tool-data": "1.0"}
    assert data.key != old.key


@pytest.mark.usefixtures("debian")
def test_the_archive_is_asked_once(
    cache: Cache, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = apt.resolve(cache, "stone", ["tool"])
    apt.resolve(cache, "stone", ["libbase"])
    assert len(archive.asked("InRelease")) == 1
    with monkeypatch.context() as offline:
        offline.setattr(apt._State, "update", None)
        assert apt.resolve(Cache(cache.root, QUIET), "stone", ["tool"]) == first
        expire(cache)
        assert apt.resolve(cache, "stone", ["tool"], lasting=True) == first
    assert apt.resolve(cache, "stone", ["tool"]) == first
    assert len(archive.asked("InRelease")) == 2


@pytest.mark.usefixtures("debian")
def test_parallel_processes_ask_once_and_download_once(
    cache: Cache, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "LISTS_LIFETIME_S", 0)

    def work() -> None:
        apt.fetch(cache, apt.resolve(cache, "stone", ["tool"]), QUIET, "Tool")

    workers = [Fork(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert len(archive.asked("InRelease")) == 1
    assert len(archive.asked("/tool_1.0")) == 1


@pytest.mark.usefixtures("debian")
@pytest.mark.parametrize(
    ("suite", "package", "text"),
    [
        ("../etc", "tool", r"'\.\./etc' is not the name of a Debian suite"),
        ("marble", "tool", "marble Release' does not have a Release file"),
        ("stone", "hammer", "Unable to locate package hammer"),
        ("stone", "tool=3.0", "Version '3.0' for 'tool' was not found"),
        ("stone-backports", "tool=1.0", r"tool : Depends: tool-data \(= 1.0\) but 2.0 is to be"),
    ],
)
def test_what_the_archive_does_not_have_is_bad_input(
    cache: Cache, suite: str, package: str, text: str
) -> None:
    with pytest.raises(BadInputError, match=text) as caught:
        apt.resolve(cache, suite, [package])
    assert "\n" not in str(caught.value)


def test_an_archive_out_of_reach_matters_only_without_a_selection(
    cache: Cache, debian: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    selection = apt.resolve(cache, "stone", ["tool"])
    expire(cache)
    debian.write("sources.list", "deb http://127.0.0.1:9/debian old main\n")
    began = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"Failed to fetch .*127.0.0.1:9.*refused") as caught:
        apt.resolve(cache, "stone", ["libbase"])
    assert "\n" not in str(caught.value)
    loud = Cache(cache.root)
    assert apt.resolve(loud, "stone", ["tool"]) == selection
    assert time.monotonic() - began < 8
    assert "staying with the packages selected before\n" in capfd.readouterr().err
    # It is not asked each time; but who insists gets to know.
    began = time.monotonic()
    assert apt.resolve(loud, "stone", ["tool"]) == selection
    assert time.monotonic() - began < 0.5
    assert capfd.readouterr().err == ""
    with pytest.raises(EnvironmentFault):
        apt.resolve(cache, "stone", ["tool"], refresh=True)


@pytest.mark.usefixtures("debian")
@pytest.mark.parametrize("text", ["", '{"until": 9e9, "debs": [{"name": 1}]}'])
def test_a_damaged_selection_is_made_again(cache: Cache, text: str) -> None:
    apt.resolve(cache, "stone-backports", ["tool"])
    for pin in cache.root.glob("selections/*"):
        pin.write_text(text)
    assert versions(apt.resolve(cache, "stone-backports", ["tool"])) == NEW


def test_an_unsigned_archive_is_refused_whatever_the_machine_thinks(
    cache: Cache, archive: Archive, debian: Machine
) -> None:
    debian.write("sources.list", f"deb [trusted=yes] {archive.url}/unsigned/debian stone main\n")
    debian.write(
        "apt.conf.d/careless",
        'Acquire::AllowInsecureRepositories "true"; APT::Get::AllowUnauthenticated "true";\n',
    )
    with pytest.raises(EnvironmentFault, match="is not signed"):
        apt.resolve(cache, "stone", ["libbase"])


@pytest.mark.usefixtures("debian")
def test_an_archive_signed_by_somebody_else_is_refused(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "other.gpg").touch()
    monkeypatch.setattr(apt, "KEYRING", tmp_path / "other.gpg")
    with pytest.raises(EnvironmentFault, match=r"is not signed|signature"):
        apt.resolve(cache, "stone", ["libbase"])


def test_the_machine_is_left_alone(cache: Cache, debian: Machine, tmp_path: Path) -> None:
    hooked = tmp_path / "hooked"
    debian.write(
        "apt.conf.d/hooks",
        f'APT::Update::Pre-Invoke {{"touch {hooked}";}};\n'
        f'APT::Update::Post-Invoke-Success {{"touch {hooked}";}};\n'
        f'DPkg::Pre-Invoke {{"touch {hooked}";}};\nDPkg::Post-Invoke {{"touch {hooked}";}};\n',
    )
    debian.write("preferences", "Package: tool\nPin: version *\nPin-Priority: -1\n")
    before = debian.files()
    selection = apt.resolve(cache, "stone-backports", ["tool"])
    apt.fetch(cache, selection, QUIET, "Tool")
    assert versions(selection) == NEW
    assert debian.files() == before
    assert not hooked.exists()


def test_the_machines_proxy_is_used(cache: Cache, debian: Machine) -> None:
    debian.write("apt.conf.d/proxy", 'Acquire::http::Proxy "http://127.0.0.1:9";\n')
    with pytest.raises(EnvironmentFault, match=r"127\.0\.0\.1:9"):
        apt.resolve(cache, "stone", ["tool"])


@pytest.mark.usefixtures("debian")
def test_packages_are_fetched_once_and_again_when_damaged(cache: Cache, archive: Archive) -> None:
    selection = apt.resolve(cache, "stone-backports", ["tool"])
    paths = apt.fetch(cache, selection, QUIET, "Tool")
    names = ["libbase_1%3a1.0-1_amd64.deb", "tool_2.0_amd64.deb", "tool-data_2.0_amd64.deb"]
    assert sorted(path.name for path in paths) == sorted(names)
    archive.requests.clear()
    assert apt.fetch(cache, selection, QUIET, "Tool") == paths
    assert archive.requests == []
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(cache.root / "apt")
    assert apt.fetch(cache, selection, QUIET, "Tool") == paths
    assert paths[1].read_bytes() == content


@pytest.mark.usefixtures("debian")
def test_a_package_that_is_not_what_was_selected_is_refused(cache: Cache) -> None:
    selection = apt.resolve(cache, "stone", ["libbase"])
    (deb,) = selection.debs
    other = replace(selection, debs=(replace(deb, sha256="0" * 64),))
    with pytest.raises(
        EnvironmentFault, match=r"did not serve libbase 1:1.0-1 as selected.*update"
    ):
        apt.fetch(cache, other, QUIET, "Tool")
    gone = replace(selection, debs=(replace(deb, version="0.9"),))
    with pytest.raises(
        EnvironmentFault, match=r"Version '0.9' for 'libbase' was not found.*update"
    ):
        apt.fetch(cache, gone, QUIET, "Tool")


@pytest.mark.usefixtures("debian")
def test_a_file_of_the_pool_is_fetched_once_and_must_be_the_one_that_was_named(
    cache: Cache, archive: Archive
) -> None:
    name = "pool/tool_1.0_amd64.deb"
    good = hashlib.sha256((archive.root / "debian" / name).read_bytes()).hexdigest()
    (path,) = apt.fetch_from_pool(cache, {name: good}, QUIET)
    assert sha256_of(path) == good
    assert apt.fetch_from_pool(cache, {name: good}, QUIET) == [path]
    assert len(archive.asked("tool_1.0")) == 1
    path.write_bytes(b"damaged")
    apt.fetch_from_pool(cache, {name: good}, QUIET)
    assert sha256_of(path) == good
    path.unlink()
    for wrong, sha256 in ((name, "0" * 64), ("pool/gone.deb", good)):
        with pytest.raises(EnvironmentFault, match=f"the archive does not serve {wrong}"):
            apt.fetch_from_pool(cache, {wrong: sha256}, QUIET)
    assert list(path.parent.iterdir()) == []


@pytest.mark.usefixtures("debian")
def test_a_killed_download_resumes(cache: Cache, archive: Archive) -> None:
    selection = apt.resolve(cache, "stone", ["tool-data"])
    archive.flowing.clear()
    worker = Fork(target=lambda: apt.fetch(cache, selection, QUIET, "Tool"))
    worker.start()
    half = len(BALLAST) // 2
    part = cache.root / "debs/partial/tool-data_1.0_amd64.deb"
    until(lambda: part.exists() and part.stat().st_size >= half, "half of it", 10, pause_s=0.01)
    worker.kill()
    worker.join()
    # What it started must not be writing when the next one starts.
    until(lambda: not processes_that_mention(cache.root), "apt to end", 10, pause_s=0.01)
    archive.flowing.set()
    began = part.stat().st_size
    (path,) = apt.fetch(cache, selection, QUIET, "Tool")
    assert archive.asked("tool-data") == [None, f"bytes={began}-"]
    assert BALLAST in path.read_bytes()


def processes_that_mention(path: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text()
        except OSError:
            continue
        if str(path) in command:
            found.append(command)
    return found


@pytest.mark.usefixtures("debian")
def test_unpacking(cache: Cache, tmp_path: Path) -> None:
    debs = apt.fetch(cache, apt.resolve(cache, "stone-backports", ["tool"]), QUIET, "Tool")
    tree = tmp_path / "tree"
    before = os.umask(0o077)
    try:
        apt.unpack(debs, tree, drop=["./usr/share/doc/*"])
    finally:
        os.umask(before)
    assert (tree / "usr/bin/tool").read_text() == "2"
    assert (tree / "lib").readlink() == Path("usr/lib")
    assert (tree / "usr/lib/base.so").read_text() == "base"
    assert not (tree / "usr/share/doc/tool/NEWS").exists()
    assert stat.S_IMODE((tree / "usr/bin/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "usr/share/tool/data").stat().st_mode) == 0o644


def test_a_package_that_cannot_be_unpacked_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "bad_1_amd64.deb").write_text("no package")
    with pytest.raises(EnvironmentFault, match=r"^bad_1_amd64.deb cannot be unpacked: .+$"):
        apt.unpack([tmp_path / "bad_1_amd64.deb"], tmp_path / "tree")


@pytest.mark.usefixtures("debian")
def test_garbage_is_what_no_selection_in_use_needs(cache: Cache) -> None:
    for suite in ("stone", "stone-backports"):
        apt.fetch(cache, apt.resolve(cache, suite, ["tool"]), QUIET, "Tool")
    (unused,) = cache.root.glob("selections/stone-????????????????.json")
    os.utime(unused, (0, 0))
    (cache.root / "debs/partial/half.deb").touch()
    (cache.root / "selections/stone-0.new").write_text(unused.read_text())
    assert set(apt.collect_garbage(cache, unused_days=1)) == {
        f"selections/{unused.name}",
        "selections/stone-0.new",
        "debs/tool_1.0_amd64.deb",
        "debs/tool-data_1.0_amd64.deb",
        "debs/partial/half.deb",
        "apt/stone",
    }
    assert apt.collect_garbage(cache, unused_days=1) == []
    # A selection is used when it is looked at.
    (used,) = cache.root.glob("selections/*")
    os.utime(used, (0, 0))
    selection = apt.resolve(cache, "stone-backports", ["tool"])
    assert apt.collect_garbage(cache, unused_days=1) == []
    assert len(apt.fetch(cache, selection, QUIET, "Tool")) == 3


@pytest.mark.usefixtures("machine")
def test_without_apt_there_is_one_clear_line(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EnvironmentFault, match=r"^apt-get is needed to get packages .*\(--cache\)$"
    ):
        apt.resolve(cache, "stone", ["tool"])


@pytest.mark.usefixtures("debian")
def test_no_room_for_lists_is_told_before_they_are_read(
    cache: Cache, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apt, "LISTS_SPACE", 1 << 60)
    with pytest.raises(EnvironmentFault, match=r"^Package lists of stone: .* are needed below"):
        apt.resolve(cache, "stone", ["tool"])
    assert archive.requests == []


THIRD = "deb https://packages.example.com/runner/debian bookworm main\n"
OTHER = "\ndeb https://packages.example.org/other/debian bookworm main"
SECURITY = "deb http://security.debian.org/debian-security bookworm-security main\n"
SOURCES = {
    "one-line": ("deb http://deb.debian.org/debian/ bookworm main", "http://deb.debian.org/debian"),
    "with options": (
        f"{THIRD}deb [arch=amd64 trusted=yes] http://ftp.de.debian.org/debian bookworm main{OTHER}",
        "http://ftp.de.debian.org/debian",
    ),
    "a mirror of one's own": (
        f"{THIRD}{SECURITY}deb http://mirror.lan/debian bookworm main{OTHER}",
        "http://mirror.lan/debian",
    ),
    "a mirror below a path": (
        f"{SECURITY}deb https://mirror.lan/artifactory/debian-remote bookworm main",
        "https://mirror.lan/artifactory/debian-remote",
    ),
    "a snapshot": (
        f"{THIRD}deb http://snapshot.debian.org/archive/debian/20250520T000000Z bookworm main"
        f"{OTHER}",
        "http://snapshot.debian.org/archive/debian/20250520T000000Z",
    ),
    "deb822": (
        "Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: bookworm-security\n"
        "Components: main\n\nTypes: deb deb-src\nURIs: http://deb.debian.org/debian\n"
        "Suites: bookworm bookworm-updates\nComponents: main contrib\n",
        "http://deb.debian.org/debian",
    ),
    "a list of mirrors": (
        "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: bookworm\n"
        "Components: main\n\n"
        "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian-security.list\n"
        "Suites: bookworm-security\nComponents: main\n",
        "mirror+file:/etc/apt/mirrors/debian.list",
    ),
    "a directory": ("deb file:/srv/debian bookworm main", "copy:/srv/debian"),
}


@pytest.mark.parametrize(("text", "uri"), SOURCES.values(), ids=SOURCES)
def test_the_mirror_is_the_machines_own(
    machine: Machine, tmp_path: Path, text: str, uri: str
) -> None:
    syntax = "sources" if text.startswith("Types:") else "list"
    machine.write(f"sources.list.d/debian.{syntax}", f"{text}\n")
    assert apt._mirror(tmp_path) == uri


def test_an_archive_on_disk_serves_too(cache: Cache, debian: Machine, archive: Archive) -> None:
    debian.write("sources.list", f"deb file:{archive.root}/debian old main\n")
    (path,) = apt.fetch(cache, apt.resolve(cache, "stone", ["libbase"]), QUIET, "Base")
    assert path.parent == cache.root / "debs"
    assert archive.requests == []


@pytest.mark.parametrize(
    "text", ["", SECURITY, "deb http://archive.ubuntu.com/ubuntu noble main\n"]
)
def test_a_machine_without_debians_archive_is_told(
    machine: Machine, tmp_path: Path, text: str
) -> None:
    machine.write("sources.list", text)
    with pytest.raises(EnvironmentFault, match="names no Debian archive"):
        apt._mirror(tmp_path)


def test_the_mirror_is_told_by_its_lists_where_there_are_any(
    machine: Machine, archive: Archive, tmp_path: Path
) -> None:
    machine.write(
        "sources.list",
        f"deb [signed-by={archive.keyring}] {archive.url}/third/debian stone main\n"
        f"deb [signed-by={archive.keyring}] {archive.url}/company-mirror stone main\n",
    )
    _output("apt-get", "update", "-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=true")
    assert apt._mirror(tmp_path) == f"{archive.url}/company-mirror"


@pytest.mark.archive
def test_debians_own_archive(cache: Cache) -> None:
    selection = apt.resolve(cache, "trixie-backports", ["busybox-static"])
    (path,) = apt.fetch(cache, selection, QUIET, "Busybox")
    assert path.name.startswith("busybox-static_1%3a")
