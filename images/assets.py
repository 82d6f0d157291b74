# SPDX-License-Identifier: GPL-2.0-or-later
"""The recipes: everything that gets booted, and how it is made from packages and sources."""

from __future__ import annotations

import inspect
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from images import apt, cpio, kernel_build, needs, probe
from images.cache import Cache, Recipe, digest, sha256_of
from images.errors import BadInputError, EnvironmentFault
from images.progress import Progress
from images.sysroot import FIRMWARE, LIBRARIES, LOADER, QEMU_BINARY, Sysroot, shared_objects

__all__ = [
    "BuiltKernel",
    "CustomQemu",
    "DebianKernel",
    "FromPackages",
    "Kernel",
    "LabRoot",
    "LinuxGuest",
    "PackagedQemu",
    "Probe",
    "SysrootImage",
    "Tools",
    "Tree",
    "lab_kernel",
]

HERE = Path(__file__).parent
#: Where everything but a chosen QEMU comes from.
SUITE = "trixie-backports"


def _source_of(*things: object) -> str:
    """The recipe's own text is part of what determines the content."""
    return digest([inspect.getsource(thing) for thing in things])  # type: ignore[arg-type]


class FromPackages(Recipe):
    """A recipe whose input is a selection of Debian packages."""

    suite: str = SUITE
    packages: tuple[str, ...] = ()
    #: Which of the selected packages are unpacked: a regular expression.
    unpacked = ".*"
    #: A selection made once is kept until `update`.
    lasting = False
    #: What a booted tree never reads.
    litter: tuple[str, ...] = (
        "./usr/share/doc/*",
        "./usr/share/man/*",
        "./usr/share/locale/*",
        "./usr/share/lintian/*",
        "./usr/share/bug/*",
        "./usr/lib/python3/*",
    )

    def selection(
        self, cache: Cache, progress: Progress | None = None, *, refresh: bool = False
    ) -> apt.Selection:
        whole = apt.resolve(
            cache,
            self.suite,
            self.packages,
            refresh=refresh,
            lasting=self.lasting,
            progress=progress,
        )
        return replace(
            whole, debs=tuple(deb for deb in whole.debs if re.match(self.unpacked, deb.name))
        )

    def key(self, cache: Cache) -> str:
        return digest(self.selection(cache).key, _source_of(type(self), FromPackages, apt.unpack))

    def _unpack(self, into: Path, cache: Cache, progress: Progress) -> None:
        selection = self.selection(cache, progress)
        debs = apt.fetch(cache, selection, progress, self.title)
        with progress.step(f"{self.title}: unpacking"):
            apt.unpack(debs, into, drop=self.litter)


class Tree(Recipe):
    """A recipe that makes a sysroot, in ``tree`` below its asset."""


class PackagedQemu(FromPackages, Tree):
    """A packaged ``qemu-system-x86`` with every library and firmware file it needs."""

    space = 600 << 20
    critical = (f"tree/{QEMU_BINARY}",)

    def __init__(self, suite: str = SUITE, version: str | None = None) -> None:
        self.suite = suite
        self.name = f"qemu-{suite}"
        self.title = f"QEMU of {suite}" + (f" {version}" if version else "")
        self.packages = (f"qemu-system-x86={version}" if version else "qemu-system-x86",)

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        self._unpack(into / "tree", cache, progress)
        if not (into / "tree" / QEMU_BINARY).exists():
            raise BadInputError(f"{self.title}: the package brings no {QEMU_BINARY.name}")


class CustomQemu(Tree):
    """Somebody's own build with the libraries it needs, and packaged firmware to boot with.

    The libraries are those ``ldd`` names on this machine or, where the binary belongs to
    another root tree, everything below that tree's library directories.
    """

    space = 600 << 20
    name = "qemu-custom"

    def __init__(
        self, binary: Path, sysroot: Path | None = None, firmware: Sequence[Path] = ()
    ) -> None:
        self.binary = binary.absolute()
        self.firmware = [path.absolute() for path in firmware]
        self.sysroot = sysroot.absolute() if sysroot else None
        self.title = f"QEMU {binary}"
        self.critical = (f"tree/{QEMU_BINARY}",)
        if not self.binary.is_file():
            raise BadInputError(f"{binary}: no such file")
        for place in self.firmware:
            if not place.is_dir():
                raise BadInputError(f"-L {place}: no such directory")
        if self.sysroot and not (self.sysroot / LOADER).exists():
            raise BadInputError(
                f"--qemu-sysroot {sysroot}: no {LOADER} below it; "
                "a root tree with its own libraries is expected"
            )

    def _libraries(self) -> list[tuple[Path, str]]:
        if self.sysroot is None:
            found = list(shared_objects(self.binary))
            return [(path, str(LOADER.parent / path.name)) for path in found]
        return [
            (path, str(path.relative_to(self.sysroot)))
            for directory in LIBRARIES
            for path in sorted((self.sysroot / directory).glob("*.so*"))
            if path.is_file()
        ]

    def key(self, cache: Cache) -> str:
        files = [path for path, _ in self._libraries()]
        files += [path for place in self.firmware for path in sorted(place.rglob("*"))]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return digest(
            sha256_of(self.binary), stats, PackagedQemu().key(cache), _source_of(CustomQemu)
        )

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        tree = into / "tree"
        files = [(self.binary, str(QEMU_BINARY)), *self._libraries()]
        for source, name in files:
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        if not (tree / LOADER).exists():
            raise BadInputError(
                f"{self.title}: not linked against {LOADER.name}; "
                "the lab host runs x86_64 glibc binaries"
            )
        # QEMU takes the first file of a name along its search path: so do we.
        packaged = cache.ensure(PackagedQemu(), progress) / "tree"
        layers = [(place, tree / FIRMWARE[0]) for place in self.firmware]
        layers += [(packaged / name, tree / name) for name in FIRMWARE]
        for source, target in layers:
            for path in source.rglob("*"):
                place = target / path.relative_to(source)
                if path.is_file() and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, place)


class Tools(FromPackages):
    """mkfs.erofs and depmod for the builder itself, so that the machine need not have them."""

    name = "tools"
    title = "Image tools"
    space = 100 << 20
    packages = ("erofs-utils", "kmod", "busybox-static")

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        self._unpack(into, cache, progress)

    @classmethod
    def erofs(cls, source: Path, image: Path, cache: Cache, progress: Progress) -> None:
        """Pack a tree into a read-only image file, owned by root, with fixed times."""
        # Uncompressed: the page cache of this machine holds the image, and decompressing
        # under emulation costs more than reading.
        tools = Sysroot(cache.ensure(cls(), progress))
        _run(
            [
                *tools.program("usr/bin/mkfs.erofs"),
                "--all-root",
                "-T",
                "0",
                "-U",
                "00000000-0000-0000-0000-000000000000",
                "--quiet",
                str(image),
                str(source),
            ],
            f"packing {image.name}",
        )


class SysrootImage(Recipe):
    """A QEMU tree as a file system image that a lab host can mount."""

    space = 600 << 20
    critical = ("sysroot.erofs",)

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.name = f"{tree.name}-image"
        self.title = f"{tree.title}, image"

    def key(self, cache: Cache) -> str:
        return digest(self.tree.key(cache), Tools().key(cache), _source_of(SysrootImage))

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        tree = cache.ensure(self.tree, progress) / "tree"
        with progress.step(self.title):
            Tools.erofs(tree, into / "sysroot.erofs", cache, progress)


class Kernel(Recipe):
    """A lab-host kernel: ``vmlinuz`` and an ``initrd`` that mounts the root image.

    Below ``version`` stands the release, as ``uname -r`` prints it.
    """

    critical = ("vmlinuz", "initrd")


class DebianKernel(FromPackages, Kernel):
    """Debian's own kernel, prebuilt: nothing to compile, slower to boot.

    It has the type1 container but neither IOMMUFD nor VFIO_NOIOMMU.
    """

    name = "kernel-debian"
    title = "Debian's kernel"
    space = 700 << 20
    packages = ("linux-image-amd64",)
    # Their dependencies (initramfs tools, ...) are for installing a kernel on a machine.
    unpacked = r"linux-(base|binary|modules|image)-\d.*-amd64$"
    #: Loaded by the initrd, in this order.  Everything else is built in or not needed.
    modules = (
        "virtio_pci",
        "virtio_iommu",  # before the devices that it isolates get drivers
        "virtio_blk",
        "erofs",
        "virtio_net",
        "qemu_fw_cfg",
        "virtio_rng",
        "vfio-pci",
        "vfio_iommu_type1",
        "kvm-amd",
        "kvm-intel",
        "overlay",
    )

    #: Most of 4,000 modules, which depmod would have to read: 8 s with them, 2 s without.
    litter = FromPackages.litter + tuple(
        f"./usr/lib/modules/*/kernel/{path}/*"
        for path in (
            "sound",
            "drivers/gpu",
            "drivers/media",
            "drivers/net/wireless",
            "drivers/net/ethernet",
            "drivers/usb",
            "drivers/iio",
            "drivers/staging",
            "drivers/hwmon",
            "drivers/input",
            "drivers/scsi",
            "drivers/mtd",
            "drivers/infiniband",
            "drivers/platform",
            "net/netfilter",
        )
    )

    def key(self, cache: Cache) -> str:
        helpers = _source_of(_initrd_skeleton, cpio, _module_name, _decompressed)
        return digest(super().key(cache), Tools().key(cache), helpers)

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        unpacked = into / "unpacked"
        self._unpack(unpacked, cache, progress)
        modules = next((unpacked / "usr/lib/modules").iterdir())
        version = modules.name
        # Where Debian's packages put the image has changed with 7.x.
        image = next(
            path
            for path in (modules / "vmlinuz", unpacked / f"boot/vmlinuz-{version}")
            if path.exists()
        )
        tools = cache.ensure(Tools(), progress)
        with progress.step(f"{self.title}: initrd"):
            # kmod goes by the name it is started with.
            loader, *rest = Sysroot(tools).program("usr/bin/kmod", "-b", str(unpacked), version)
            _run([loader, "--argv0", "depmod", *rest], "depmod")
            order = self._load_order(modules)
            archive = _initrd_skeleton(tools, order)
            for path in order:
                archive.file(f"modules/{_module_name(path)}.ko", _decompressed(modules / path))
            (into / "initrd").write_bytes(archive.finish())
        shutil.copy(image, into / "vmlinuz")
        (into / "version").write_text(version)
        shutil.rmtree(unpacked)

    def _load_order(self, modules: Path) -> list[str]:
        """The files of ``modules`` with everything they depend on, dependencies first."""
        depends = {}
        for line in (modules / "modules.dep").read_text().splitlines():
            path, _, others = line.partition(":")
            depends[_module_name(path)] = (path, others.split())
        builtin = {
            _module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()
        }
        order: dict[str, None] = {}
        for name in (_module_name(module) for module in self.modules):
            if name in depends:
                path, needed = depends[name]
                # modules.dep lists the nearest dependency first.
                order.update(dict.fromkeys([*reversed(needed), path]))
            elif name not in builtin:
                raise EnvironmentFault(f"{self.title} has no module {name}")
        return list(order)


class BuiltKernel(FromPackages, Kernel):
    """Our own kernel from Debian's source package: everything built in, IOMMUFD included.

    Made by ``python -m images build kernel`` only; it takes minutes and a compiler's friends.
    """

    name = "kernel-built"
    title = "Lab-host kernel"
    space = 4 << 30
    packages = ("linux-source",)
    unpacked = r"linux-source-\d"
    # Minutes of compiling are not to be lost to a new version that nobody asked for.
    lasting = True
    fragment = HERE / "kernel.config"
    patches = (HERE / "kernel-svm.patch",)

    def key(self, cache: Cache) -> str:
        helpers = _source_of(kernel_build, _initrd_skeleton, cpio)
        files = (self.fragment, *self.patches)
        return digest(self.selection(cache).key, *(file.read_text() for file in files), helpers)

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        needs.require(needs.KERNEL, "the kernel")
        unpacked = into / "unpacked"
        self._unpack(unpacked, cache, progress)
        tarball = next((unpacked / "usr/src").glob("linux-source-*.tar.xz"))
        log = cache.root / "logs" / "kernel.log"
        log.parent.mkdir(exist_ok=True)
        with progress.step(f"{self.title}: building (log: {log})") as report:
            # Its source tree lies beside its output, and so in our scratch, which gets removed
            # whatever happens.
            kernel_build.build(
                tarball,
                self.fragment,
                into / "built",
                patches=self.patches,
                log=log,
                jobs=os.cpu_count() or 1,
                progress=lambda text: report(0, text),
            )
        tools = cache.ensure(Tools(), progress)
        (into / "built/bzImage").rename(into / "vmlinuz")
        (into / "built/config").rename(into / "config")
        (into / "built").rmdir()
        (into / "initrd").write_bytes(_initrd_skeleton(tools, ()).finish())
        version = tarball.name.removeprefix("linux-source-").removesuffix(".tar.xz")
        (into / "version").write_text(version)
        shutil.rmtree(unpacked)


def lab_kernel(cache: Cache, choice: str = "auto") -> Kernel:
    """The kernel to boot lab hosts with.

    :param choice: ``built``, ``debian``, or ``auto``: the built one if it is in the cache.
    """
    built = BuiltKernel()
    if choice == "built":
        return built
    if choice == "auto" and any(cache.root.glob(f"{built.name}-*")) and cache.find(built):
        return built
    return DebianKernel()


class LabRoot(FromPackages):
    """The lab host's root file system: busybox, sshd, gdbserver, flock, and an init of a page."""

    name = "labroot"
    title = "Lab host's root file system"
    space = 300 << 20
    critical = ("root.erofs",)
    packages = (
        "openssh-server",
        "openssh-sftp-server",
        "busybox-static",
        "util-linux",
        "gdbserver",
    )
    files = HERE / "labroot"

    def key(self, cache: Cache) -> str:
        ours = {path.name: path.read_text() for path in sorted(self.files.iterdir())}
        return digest(super().key(cache), ours, Tools().key(cache), _source_of(_install_busybox))

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        tree = into / "tree"
        self._unpack(tree, cache, progress)
        with progress.step(self.title):
            for name in ("proc", "sys", "dev", "run", "tmp", "root", "var", "sysroot"):
                (tree / name).mkdir(exist_ok=True)
            _install_busybox(tree)
            for source in self.files.iterdir():
                target = tree / ("usr/sbin/init" if source.name == "init" else f"etc/{source.name}")
                target.unlink(missing_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
            (tree / "usr/sbin/init").chmod(0o755)
            Tools.erofs(tree, into / "root.erofs", cache, progress)
        shutil.rmtree(tree)


class LinuxGuest(FromPackages):
    """The Linux guest: an ``initrd`` of busybox, the guest agent and ethtool, for the lab host's
    kernel.

    Uncompressed: under emulation, reading is cheaper than inflating.
    """

    name = "linux-guest"
    title = "Linux guest"
    space = 200 << 20
    critical = ("initrd",)
    packages = ("qemu-guest-agent", "busybox-static", "ethtool")
    programs = PurePosixPath("usr/sbin/qemu-ga"), PurePosixPath("usr/sbin/ethtool")
    init = HERE / "linux" / "init"

    def key(self, cache: Cache) -> str:
        return digest(super().key(cache), self.init.read_text(), _source_of(cpio))

    def build(self, into: Path, cache: Cache, progress: Progress) -> None:
        tree = into / "tree"
        self._unpack(tree, cache, progress)
        with progress.step(self.title):
            archive = cpio.Archive()
            for directory in ("bin", "dev", "proc", "sys", "run", "tmp", "lib64"):
                archive.directory(directory)
            for directory in ("usr", "usr/sbin", "usr/lib", str(LOADER.parent)):
                archive.directory(directory)
            archive.device("dev/console", 5, 1)
            archive.file("init", self.init.read_bytes(), 0o755)
            archive.file("bin/busybox", (tree / "usr/bin/busybox").read_bytes(), 0o755)
            libraries: dict[str, Path] = {}
            for program in self.programs:
                archive.file(str(program), (tree / program).read_bytes(), 0o755)
                libraries |= {path.name: path for path in self._libraries(tree, program)}
            for name, library in libraries.items():
                archive.file(str(LOADER.parent / name), library.read_bytes(), 0o755)
            archive.file("lib64/" + LOADER.name, (tree / LOADER).read_bytes(), 0o755)
            (into / "initrd").write_bytes(archive.finish())
        shutil.rmtree(tree)

    @staticmethod
    def _libraries(tree: Path, program: PurePosixPath) -> list[Path]:
        """The shared objects of the tree that a program of it needs."""
        loader, *words = Sysroot(tree).program(program)
        listing = _run([loader, "--list", *words], f"listing the libraries of {program.name}")
        return [Path(path) for path in re.findall(r" => (/.*) \(0x\w+\)$", listing, re.M)]


class Probe(Recipe):
    """The bare-metal probe guest, compiled from ``images/probe``."""

    name = "probe"
    title = "Probe guest"
    critical = ("probe.bin",)

    def key(self, _cache: Cache) -> str:
        return digest({path.name: path.read_text() for path in probe.SOURCES}, _source_of(probe))

    def build(self, into: Path, _cache: Cache, progress: Progress) -> None:
        if shutil.which("gcc") is None:
            raise EnvironmentFault(
                "gcc is needed to compile the probe guest and is not on this "
                "machine: apt-get install gcc"
            )
        with progress.step(self.title):
            try:
                probe.build(into / "probe.bin")
            except probe.ProbeBuildError as error:
                raise EnvironmentFault(str(error)) from error


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _install_busybox(tree: Path) -> None:
    """Links for every applet that has no real program in the tree."""
    listing = _run([str(tree / "usr/bin/busybox"), "--list"], "busybox --list")
    for applet in listing.split():
        link = tree / "usr/bin" / applet
        if not (link.exists() or link.is_symlink() or (tree / "usr/sbin" / applet).exists()):
            link.symlink_to("busybox")


def _initrd_skeleton(tools: Path, modules: Iterable[str]) -> cpio.Archive:
    """An initrd that loads modules in the order given, mounts the root image and leaves.

    It stays uncompressed: under emulation, reading is cheaper than inflating.
    """
    archive = cpio.Archive()
    for directory in ("bin", "dev", "proc", "sys", "root", "modules"):
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", (tools / "usr/bin/busybox").read_bytes(), 0o755)
    lines = [
        "#!/bin/busybox sh",
        "# Loads what the root image needs, mounts it, hands over.",
        "b=/bin/busybox",
        "$b mount -t devtmpfs none /dev",
        "$b mount -t sysfs none /sys",
        *(
            f"$b insmod /modules/{_module_name(path)}.ko"
            # The processor has one of the two.
            + (" 2>/dev/null" if _module_name(path) in ("kvm_intel", "kvm_amd") else "")
            for path in modules
        ),
        # The disk is there once its driver has probed, which insmod does not wait for.
        "n=0; while [ ! -b /dev/vda ] && [ $n -lt 500 ]; do $b usleep 10000; n=$((n+1)); done",
        "$b mount -t erofs -o ro /dev/vda /root || exec $b sh",
        "$b mount -o move /dev /root/dev; $b umount /sys",
        "exec $b switch_root /root /usr/sbin/init",
        "",
    ]
    archive.file("init", "\n".join(lines).encode(), 0o755)
    return archive


def _run(argv: list[str], what: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        output = (done.stderr or done.stdout).strip() or "no reason given"
        raise EnvironmentFault(f"{what} failed ({done.returncode}): {output.splitlines()[-1]}")
    return done.stdout
