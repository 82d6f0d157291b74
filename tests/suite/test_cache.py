# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache: built once, whole or absent, repaired when damaged, free of left-overs."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.waiting import until
from images.cache import Cache, Recipe, default_root, digest
from images.errors import EnvironmentFault
from images.progress import Progress

Fork = multiprocessing.get_context("fork").Process
Break = Callable[[Path], object]


class Bread(Recipe):
    """Three files and a link; `during` is called in the middle of the build."""

    name = "bread"
    title = "Bread"
    space = 1
    critical = ("loaf",)

    def __init__(self, during: Break = str) -> None:
        self.during = during

    def key(self, _cache: Cache) -> str:
        return digest("rye")

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        with (cache.root / "baked").open("a") as log:
            log.write("once\n")
        with progress.step(self.title):
            (into / "loaf").write_text("loaf")
            self.during(into)
            (into / "crust").mkdir()
            (into / "crust/crumb").write_text("crumb")
            (into / "slice").symlink_to("loaf")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def builds(cache: Cache) -> int:
    return len((cache.root / "baked").read_text().splitlines())


def scratch(cache: Cache) -> list[Path]:
    return list(cache.root.glob(".building*"))


def test_is_built_once(cache: Cache) -> None:
    assert cache.find(Bread()) is None
    place = cache.ensure(Bread())
    assert place == cache.ensure(Bread()) == Cache(cache.root).find(Bread())
    assert (place / "slice").read_text() == "loaf"
    assert cache.verify(place) == []
    assert builds(cache) == 1
    assert scratch(cache) == []


def test_is_built_once_by_many_processes(cache: Cache) -> None:
    bread = Bread(during=lambda _: time.sleep(0.5))
    bakers = [Fork(target=lambda: Cache(cache.root).ensure(bread)) for _ in range(4)]
    for baker in bakers:
        baker.start()
    for baker in bakers:
        baker.join()
    assert [baker.exitcode for baker in bakers] == [0] * 4
    assert builds(cache) == 1


def test_who_waits_says_so(cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    baker = Fork(target=lambda: cache.ensure(Bread(during=lambda _: time.sleep(0.5))))
    baker.start()
    until(lambda: scratch(cache), "the build to begin", 10, pause_s=0.01)
    cache.ensure(Bread())
    baker.join()
    assert "waiting for another process: Bread\n" in capfd.readouterr().err


def corrupt(place: Path) -> None:
    (place / "loaf").write_text("leaf")


def replace_by_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("loaf")


def rewrite(text: str) -> Break:
    return lambda place: (place / "MANIFEST.json").write_text(text)


DAMAGE: dict[str, Break] = {
    "critical file corrupted": corrupt,
    "file truncated": lambda place: os.truncate(place / "crust/crumb", 2),
    "file missing": lambda place: (place / "crust/crumb").unlink(),
    "link missing": lambda place: (place / "slice").unlink(),
    "link changed": lambda place: (
        (place / "slice").unlink(),
        (place / "slice").symlink_to("crust"),
    ),
    "directory in place of a file": lambda place: (
        (place / "loaf").unlink(),
        (place / "loaf").mkdir(),
    ),
    "file in place of the asset": replace_by_file,
    "no manifest": lambda place: (place / "MANIFEST.json").unlink(),
    "truncated manifest": lambda place: os.truncate(place / "MANIFEST.json", 60),
    "empty manifest": rewrite("{}"),
    "manifest of something else": rewrite('["loaf"]'),
    "manifest with odd entries": rewrite('{"loaf": 7}'),
    "binary manifest": lambda place: (place / "MANIFEST.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_repaired_and_told(
    cache: Cache, capfd: pytest.CaptureFixture[str], damage: Break
) -> None:
    place = cache.ensure(Bread())
    damage(place)
    capfd.readouterr()
    other = Cache(cache.root)
    assert other.find(Bread()) is None
    assert other.verify(place) != []
    assert other.ensure(Bread()) == place
    told = capfd.readouterr().err.splitlines()[0]
    assert told.startswith("Bread: the cached copy is damaged (")
    assert other.verify(place) == []
    assert builds(cache) == 2


def test_verify_finds_what_is_not_looked_at_each_time(cache: Cache) -> None:
    place = cache.ensure(Bread())
    (place / "crust/crumb").write_text("crime")
    assert cache.verify(place) == [f"{place.name}: crust/crumb has changed"]


def test_an_asset_that_vanished_is_made_again(cache: Cache) -> None:
    cache.ensure(Bread())
    shutil.rmtree(cache.ensure(Bread()))
    assert cache.ensure(Bread()).is_dir()


def test_a_killed_build_leaves_no_asset_and_no_lock(cache: Cache) -> None:
    baker = Fork(target=lambda: cache.ensure(Bread(during=lambda _: time.sleep(60))))
    baker.start()
    until(lambda: [*cache.root.glob(".building*/loaf")], "half a build", 10, pause_s=0.01)
    baker.kill()
    baker.join()
    assert cache.find(Bread()) is None
    assert len(scratch(cache)) == 1
    began = time.monotonic()
    assert cache.verify(cache.ensure(Bread())) == []
    assert time.monotonic() - began < 1
    assert scratch(cache) == []


def test_an_interrupted_build_cleans_up(cache: Cache) -> None:
    def bake() -> None:
        with pytest.raises(KeyboardInterrupt):
            cache.ensure(Bread(during=lambda _: time.sleep(60)))

    baker = Fork(target=bake)
    baker.start()
    until(lambda: [*cache.root.glob(".building*/loaf")], "half a build", 10, pause_s=0.01)
    os.kill(baker.pid or 0, signal.SIGINT)
    baker.join()
    assert baker.exitcode == 0
    assert scratch(cache) == []
    assert cache.find(Bread()) is None


def test_killed_while_replacing_a_damaged_asset(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cache.ensure(Bread())
    corrupt(place)

    def die(*_args: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def bake() -> None:
        monkeypatch.setattr(shutil, "rmtree", die)
        Cache(cache.root).ensure(Bread())

    baker = Fork(target=bake)
    baker.start()
    baker.join()
    assert baker.exitcode == -signal.SIGKILL
    assert not place.exists()
    assert Cache(cache.root).collect_garbage(unused_days=9) == [
        f".building-{place.name}.{baker.pid}"
    ]


def test_a_full_disk_is_one_clear_line(cache: Cache) -> None:
    def fill(into: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(into / "crust"))

    with pytest.raises(EnvironmentFault, match=r"^Bread: .*No space left on device.*/crust'$"):
        cache.ensure(Bread(during=fill))
    assert scratch(cache) == []
    assert cache.assets() == []


def test_too_little_space_is_told_before_anything_is_done(cache: Cache) -> None:
    bread = Bread()
    bread.space = 1 << 60
    with pytest.raises(EnvironmentFault, match=r"^Bread: 1099511627776 MiB .* are needed below .*"):
        cache.ensure(bread)
    assert not (cache.root / "baked").exists()


@pytest.mark.parametrize("root", ["file", "file/below", "/proc/cache", "/sys/cache", "a:b", "a,b"])
def test_an_unusable_directory_is_one_clear_line(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        EnvironmentFault, match=r"^the cache directory '.*' cannot be used: .*--cache"
    ):
        Cache(tmp_path / root)


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFIO_CPR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_root() == Path("/home/somebody/.cache/vfio-cpr-suite")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/xdg")
    assert default_root() == Path("/var/tmp/xdg/vfio-cpr-suite")
    monkeypatch.setenv("VFIO_CPR_CACHE", "/srv/cpr")
    assert default_root() == Path("/srv/cpr")


def test_a_relative_place_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Cache(Path("here")).root == tmp_path / "here"


def test_garbage_is_what_was_not_used_lately(cache: Cache) -> None:
    place = cache.ensure(Bread())
    old = time.time() - 15 * 86400
    os.utime(place / "MANIFEST.json", (old, old))
    (cache.root / ".building-cake-0123456789abcdef.1").mkdir()
    (cache.root / "toast-0123456789abcdef").mkdir()
    os.utime(cache.root / "toast-0123456789abcdef", (old, old))
    assert cache.collect_garbage(unused_days=16) == [".building-cake-0123456789abcdef.1"]
    Cache(cache.root).ensure(Bread())
    assert cache.collect_garbage(unused_days=14) == ["toast-0123456789abcdef"]
    assert cache.assets() == [place]
    assert cache.collect_garbage(unused_days=0) == [place.name]
    assert cache.assets() == []


def test_garbage_is_not_what_is_being_built(cache: Cache) -> None:
    baker = Fork(target=lambda: cache.ensure(Bread(during=lambda _: time.sleep(0.5))))
    baker.start()
    until(lambda: scratch(cache), "the build to begin", 10, pause_s=0.01)
    assert cache.collect_garbage(unused_days=0) == []
    baker.join()
    assert cache.find(Bread())


def test_manifest_names_every_file(cache: Cache) -> None:
    manifest = json.loads((cache.ensure(Bread()) / "MANIFEST.json").read_text())
    assert manifest["slice"] == {"link": "loaf"}
    assert set(manifest) == {"loaf", "crust/crumb", "slice"}
