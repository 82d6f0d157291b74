# SPDX-License-Identifier: GPL-2.0-or-later
"""The builders: what they demand beforehand, and that they notice when it went wrong.

Kernel and QEMU are played by source trees of a few lines; everything around them is real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from difflib import unified_diff
from functools import partial
from pathlib import Path

import pytest

from fixtures.waiting import until
from images import kernel_build, needs, qemu_build, steps
from images.errors import BadInputError, EnvironmentFault

FRAGMENT = Path(kernel_build.__file__).with_name("kernel.config")

#: allnoconfig "loses" CONFIG_IOMMUFD; bzImage tells what it was built with.
KERNEL_MAKEFILE = """\
allnoconfig:
\t@echo CONFIG_VFIO=y > .config
bzImage:
\t@mkdir -p arch/x86/boot
\t@echo "  CC      main.o"
\t@echo "by $(KBUILD_BUILD_USER) flags [$(KCFLAGS)]" > arch/x86/boot/bzImage
"""


@pytest.fixture
def kernel_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("make") is None:
        pytest.skip("no make")
    monkeypatch.setattr(needs, "KERNEL", ())
    return _pack(tmp_path, "linux.tar.xz", {"linux-source/Makefile": KERNEL_MAKEFILE})


def _pack(where: Path, name: str, files: dict[str, str]) -> Path:
    source = where / f"{name}.d"
    for path, text in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    with tarfile.open(where / name, "w:xz") as tar:
        for entry in source.iterdir():
            tar.add(entry, arcname=entry.name)
    return where / name


def test_missing_needs_are_named_with_one_command_that_installs_them() -> None:
    present = needs.Need("here", lambda: True, "here-dev")
    lacking = [
        needs.Need("flex", lambda: False, "flex"),
        needs.Need("gelf.h", lambda: False, "libelf-dev"),
        needs.Need("libelf.h", lambda: False, "libelf-dev"),
    ]
    assert needs.missing([present, *lacking]) == lacking
    with pytest.raises(EnvironmentFault) as caught:
        needs.require([present, *lacking], "the kernel")
    assert "flex, gelf.h, libelf.h" in str(caught.value)
    assert str(caught.value).endswith("apt-get install -y --no-install-recommends flex libelf-dev")
    needs.require([present], "the kernel")


def test_what_is_missing_is_installed_and_a_failure_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n'
        f"[ $1 = update ] && touch {tmp_path}/lists\n"
        f'[ -e {tmp_path}/lists ] || {{ echo "E: Unable to locate" >&2; exit 100; }}\n'
    )
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    flex = needs.Need("flex", lambda: False, "flex")
    needs.install([needs.Need("here", lambda: True, "here-dev")])
    assert not (tmp_path / "log").exists()
    needs.install([flex])
    asked = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert asked == ["install", "update", "install"]
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho E: no such package >&2; exit 100\n")
    with pytest.raises(EnvironmentFault, match=r"apt-get install .*flex: E: no such package"):
        needs.install([flex])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(EnvironmentFault, match=r"only root can do this: apt-get install"):
        needs.install([flex])


def test_checks_tell_what_is_there_from_what_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    # ensurepip is Python's and not to be found through PATH.
    assert [need.name for need in (*needs.KERNEL, *needs.QEMU) if need.check()] in (
        [],
        ["python3 ensurepip"],
    )
    (tmp_path / "flex").write_text("#!/bin/sh\n")
    (tmp_path / "flex").chmod(0o755)
    assert "flex" not in [need.name for need in needs.missing(needs.KERNEL)]


def test_unmet_demands_of_a_fragment_are_named() -> None:
    fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_N=16\n# CONFIG_C is not set\nCONFIG_D=y\n"
    config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=64\nCONFIG_C=y\nCONFIG_OTHER=y\n"
    assert kernel_build.unmet(fragment, config) == [
        "CONFIG_B=y (is n)",
        "CONFIG_N=16 (is 64)",
        "CONFIG_C=n (is y)",
        "CONFIG_D=y (is n)",
    ]
    assert kernel_build.unmet(fragment, fragment) == []


def test_our_fragment_demands_each_symbol_once() -> None:
    text = FRAGMENT.read_text()
    lines = [
        line
        for line in text.splitlines()
        if "CONFIG_" in line.split("=")[0]
        and (line.startswith("CONFIG_") or line.endswith(" is not set"))
    ]
    assert len(kernel_build.demands(text)) == len(lines) > 100


def test_a_kernel_is_not_built_without_a_demanded_symbol(kernel_tar: Path, tmp_path: Path) -> None:
    (tmp_path / "fragment").write_text("CONFIG_VFIO=y\nCONFIG_IOMMUFD=y\n")
    into = tmp_path / "cache" / "kernel"
    into.parent.mkdir()
    with pytest.raises(kernel_build.FragmentError, match="CONFIG_IOMMUFD") as caught:
        kernel_build.build(kernel_tar, tmp_path / "fragment", into, log=tmp_path / "log", jobs=1)
    assert caught.value.symbols == ["CONFIG_IOMMUFD=y (is n)"]
    assert list(into.parent.iterdir()) == []


def test_a_kernel_is_built_untouched_by_the_environment(
    kernel_tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCFLAGS", "-O0")
    monkeypatch.setenv("KBUILD_BUILD_USER", "me")
    (tmp_path / "fragment").write_text("CONFIG_VFIO=y\n")
    into = tmp_path / "cache" / "kernel"
    into.parent.mkdir()
    said: list[str] = []
    kernel_build.build(
        kernel_tar, tmp_path / "fragment", into, log=tmp_path / "log", jobs=1, progress=said.append
    )
    assert (into / "bzImage").read_text() == "by vfio-cpr-suite flags []\n"
    assert (into / "config").read_text() == "CONFIG_VFIO=y\n"
    assert [path.name for path in into.parent.iterdir()] == ["kernel"]
    assert "compiling" in said


def test_a_kernel_is_patched_or_not_built(kernel_tar: Path, tmp_path: Path) -> None:
    (tmp_path / "fragment").write_text("CONFIG_VFIO=y\n")
    patch = tmp_path / "our.patch"
    (into := tmp_path / "cache" / "kernel").parent.mkdir()
    build = partial(
        kernel_build.build,
        *(kernel_tar, tmp_path / "fragment", into),
        patches=[patch],
        log=tmp_path / "log",
        jobs=1,
    )
    patch.write_text("--- a/arch/none.c\n+++ b/arch/none.c\n@@ -1 +1 @@\n-old\n+new\n")
    with pytest.raises(EnvironmentFault, match=r"applying our\.patch to the kernel"):
        build()
    assert not into.exists()
    by, other = '@echo "by $(KBUILD_BUILD_USER)', '@echo "patched, by $(KBUILD_BUILD_USER)'
    diff = unified_diff(
        KERNEL_MAKEFILE.splitlines(True),
        KERNEL_MAKEFILE.replace(by, other).splitlines(True),
        "a/Makefile",
        "b/Makefile",
    )
    patch.write_text("".join(diff))
    build()
    assert (into / "bzImage").read_text().startswith("patched, by")


def test_a_failing_step_quotes_the_end_of_its_output(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"(?s)the step failed \(3\).*line 40$") as caught:
        steps.run(
            ["sh", "-c", "for n in $(seq 40); do echo line $n; done; exit 3"],
            what="the step",
            log=tmp_path / "log",
        )
    assert "line 1\n" not in str(caught.value)
    assert "line 1\n" in (tmp_path / "log").read_text()


def test_an_abandoned_step_leaves_no_process_behind(tmp_path: Path) -> None:
    pids: list[str] = []

    def stop(line: str) -> None:
        pids.append(line.strip())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps.run(
            ["sh", "-c", "sleep 60 & echo $!; wait"],
            what="the step",
            log=tmp_path / "log",
            on_line=stop,
        )
    state = Path(f"/proc/{pids[0]}/stat")
    # An orphan that nobody has reaped yet is gone, too.
    until(
        lambda: not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z",
        "the child to end",
        10,
        pause_s=0.01,
    )


def test_a_step_does_not_outlive_a_builder_that_is_killed(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from images import steps; "
        "steps.run(['sleep', '60'], what='the step', log=Path('log'))"
    )
    builder = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environ())

    def steps_of_it() -> list[Path]:
        children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
        return [Path(f"/proc/{pid}") for pid in children]

    (step,) = until(
        lambda: [path for path in steps_of_it() if b"sleep" in (path / "cmdline").read_bytes()[:5]],
        "the step",
        10,
        pause_s=0.02,
    )
    builder.kill()
    builder.wait()
    until(lambda: not step.exists(), "the step to end", 10, pause_s=0.02)


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(steps.__file__).parents[1])}


def test_a_source_package_gets_only_the_patches_that_its_tarball_needs(tmp_path: Path) -> None:
    if shutil.which("patch") is None:
        pytest.skip("no patch")
    change = "--- a/pythondeps.toml\n+++ b/pythondeps.toml\n@@ -1 +1 @@\n-pycotap\n+{}\n"
    orig = _pack(tmp_path, "q.orig.tar.xz", {"qemu-1/pythondeps.toml": "pycotap\n"})
    debian = _pack(
        tmp_path,
        "q.debian.tar.xz",
        {
            "debian/patches/series": "microvm.patch\ndisable-pycotap.patch\n",
            "debian/patches/microvm.patch": change.format("from microvm"),
            "debian/patches/disable-pycotap.patch": change.format("disabled"),
        },
    )
    tree = qemu_build.unpack_source_package(orig, debian, tmp_path / "src")
    assert (tree / "pythondeps.toml").read_text() == "disabled\n"
    with pytest.raises(BadInputError, match="not empty"):
        qemu_build.unpack_source_package(orig, debian, tree)
    with pytest.raises(BadInputError, match=r"nothing\.tar\.xz cannot be unpacked"):
        qemu_build.unpack_source_package(tmp_path / "nothing.tar.xz", debian, tmp_path / "other")


def test_qemu_is_configured_once_and_built_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ninja") is None:
        pytest.skip("no ninja")
    monkeypatch.setattr(needs, "QEMU", ())
    source, build_dir = tmp_path / "src", tmp_path / "build"
    with pytest.raises(BadInputError, match="not a QEMU source tree"):
        qemu_build.build(tmp_path, build_dir, jobs=1, log=tmp_path / "log")
    for directory in ("hw/vfio", "python/wheels"):
        (source / directory).mkdir(parents=True)
    (source / "python/wheels/meson-1.9.0-py3-none-any.whl").touch()
    (source / "cpr.c").write_text("1\n")
    (source / "configure").write_text(
        "#!/bin/sh\necho $* >> configured\n"
        f"printf 'rule c\\n  command = cp $in $out\\nbuild {qemu_build.BINARY}: c "
        f"{source}/cpr.c\\n' > build.ninja\n"
    )
    (source / "configure").chmod(0o755)
    binary = qemu_build.build(source, build_dir, jobs=1, log=tmp_path / "log")
    assert binary.read_text() == "1\n"
    (source / "cpr.c").write_text("2\n")
    assert qemu_build.build(source, build_dir, jobs=1, log=tmp_path / "log") == binary
    assert binary.read_text() == "2\n"
    configured = (build_dir / "configured").read_text().splitlines()
    assert len(configured) == 1
    assert set(qemu_build.CONFIGURE) < set(configured[0].split())


def test_a_failed_configure_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "QEMU", ())
    source = tmp_path / "src"
    for directory in ("hw/vfio", "python/wheels"):
        (source / directory).mkdir(parents=True)
    (source / "python/wheels/meson-1.9.0-py3-none-any.whl").touch()
    (source / "configure").write_text("#!/bin/sh\necho ERROR: no glib; exit 1\n")
    (source / "configure").chmod(0o755)
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match=r"configuring .*\n.*ERROR: no glib"):
            qemu_build.build(source, tmp_path / "build", jobs=1, log=tmp_path / "log")


def test_the_shell_agrees_on_what_is_needed() -> None:
    # Guards the one non-obvious entry: a kernel for x86_64 builds objtool in any case.
    assert kernel_build.REQUIRES["gelf.h"] == "libelf-dev"
    command = needs.install_command((*needs.KERNEL, *needs.QEMU))
    assert subprocess.run(["sh", "-nc", " ".join(command)]).returncode == 0
    assert len(set(command)) == len(command)
