# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder's command line: ``python -m images --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from images import apt, needs
from images.assets import (
    SUITE,
    BuiltKernel,
    DebianKernel,
    FromPackages,
    LabRoot,
    LinuxGuest,
    PackagedQemu,
    Probe,
    SysrootImage,
    Tools,
    lab_kernel,
)
from images.cache import Cache, Recipe, digest
from images.errors import BadInputError, EnvironmentFault, SuiteError
from images.progress import Progress

__all__ = ["main"]

#: What `build` makes when no asset is named: all that a verdict needs by default.
DEFAULT = ("probe", "qemu", "qemu-image", "labroot", "lab-kernel")


def _recipes(options: argparse.Namespace, cache: Cache) -> dict[str, Recipe]:
    qemu = PackagedQemu(options.qemu_suite, options.qemu_version)
    return {
        "probe": Probe(),
        "tools": Tools(),
        "qemu": qemu,
        "qemu-image": SysrootImage(qemu),
        "labroot": LabRoot(),
        "linux-guest": LinuxGuest(),
        "debian-kernel": DebianKernel(),
        "kernel": BuiltKernel(),
        "lab-kernel": lab_kernel(cache),
    }


def _days(text: str) -> float:
    if not (days := float(text)) >= 0:
        raise ValueError(text)
    return days


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m images", description="Make, check and discard what the suite boots."
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where assets live (default: $VFIO_CPR_CACHE, or vfio-cpr-suite in $XDG_CACHE_HOME "
        "or ~/.cache)",
    )
    parser.add_argument(
        "--qemu-suite",
        default=SUITE,
        metavar="SUITE",
        help="the Debian suite `qemu` is taken from (default: %(default)s)",
    )
    parser.add_argument(
        "--qemu-version",
        metavar="VERSION",
        help="its Debian version (default: the newest in that suite)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="make assets, print where they are")
    build.add_argument(
        "assets",
        nargs="*",
        metavar="ASSET",
        help="any of: probe, tools, qemu, qemu-image, labroot, debian-kernel, kernel (our own, "
        "5 to 12 min), lab-kernel (our own if it has been built, else Debian's); "
        f"default: {' '.join(DEFAULT)}",
    )
    verbs.add_parser(
        "key", help="print a hash of what `build` makes: that of a cache which holds all of it"
    )
    verbs.add_parser("list", help="what is in the cache, with sizes")
    verbs.add_parser("verify", help="compare every cached asset with its manifest")
    verbs.add_parser("update", help="select the newest packages again")
    wants = verbs.add_parser(
        "needs", help="print the command that installs what builds from source need"
    )
    wants.add_argument("--install", action="store_true", help="install what is missing, as root")
    gc = verbs.add_parser("gc", help="remove what was not used lately, and left-overs")
    gc.add_argument(
        "--unused-days",
        type=_days,
        default=14,
        metavar="DAYS",
        help="how long not (default: %(default)s); 0 also takes what is in use right now",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (see `images.errors`)."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, Cache(options.cache, Progress(quiet=options.quiet)))
    except SuiteError as error:
        print(f"images: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"images: {error}", file=sys.stderr)
        return EnvironmentFault.exit_code
    except KeyboardInterrupt:
        print("images: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, cache: Cache) -> int:
    if options.verb == "build":
        recipes = _recipes(options, cache)
        if unknown := [name for name in options.assets if name not in recipes]:
            raise BadInputError(
                f"no such asset: {', '.join(unknown)}; there are {', '.join(recipes)}"
            )
        for name in options.assets or DEFAULT:
            print(cache.ensure(recipes[name]), flush=True)
    elif options.verb == "key":
        recipes = _recipes(options, cache)
        print(digest({name: recipes[name].key(cache) for name in DEFAULT}))
    elif options.verb == "list":
        for place in cache.assets():
            size = sum(path.lstat().st_size for path in place.rglob("*"))
            print(f"{size / 1e6:9.1f} MB  {place.name}")
    elif options.verb == "verify":
        problems = [problem for place in cache.assets() for problem in cache.verify(place)]
        print("\n".join(problems) or f"{len(cache.assets())} assets, all as they were made")
        return EnvironmentFault.exit_code if problems else 0
    elif options.verb == "update":
        for recipe in _recipes(options, cache).values():
            if isinstance(recipe, FromPackages):
                recipe.selection(cache, refresh=True)
    elif options.verb == "needs":
        everything = (*needs.KERNEL, *needs.QEMU)
        if options.install:
            needs.install(everything)
        else:
            print(" ".join(needs.install_command(everything)))
    elif options.verb == "gc":
        removed = cache.collect_garbage(unused_days=options.unused_days)
        removed += apt.collect_garbage(cache, unused_days=options.unused_days)
        for name in removed:
            print(f"removed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
