# SPDX-License-Identifier: GPL-2.0-or-later
"""The builder's command line: ``python -m images --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from images import needs
from images.assets import (
    SUITE,
    BuiltKernel,
    DebianKernel,
    LabRoot,
    PackagedQemu,
    Probe,
    SysrootImage,
    Tools,
    lab_kernel,
)
from images.cache import Cache, Recipe, default_root
from images.errors import SuiteError
from images.progress import Progress

__all__ = ["main"]


def _recipes(options: argparse.Namespace) -> dict[str, Callable[[Cache], Recipe]]:
    qemu = PackagedQemu(options.qemu_suite, options.qemu_version)
    return {
        "probe": lambda cache: Probe(),
        "tools": lambda cache: Tools(),
        "qemu": lambda cache: qemu,
        "qemu-image": lambda cache: SysrootImage(qemu),
        "labroot": lambda cache: LabRoot(),
        "debian-kernel": lambda cache: DebianKernel(),
        "kernel": lambda cache: BuiltKernel(),
        "lab-kernel": lambda cache: lab_kernel(cache),
    }


#: What `build` makes when no asset is named: all that a verdict needs by default.
DEFAULT = ("probe", "qemu", "qemu-image", "labroot", "lab-kernel")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m images", description="Make, check and discard what the suite boots.")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help=f"where assets live (default: $VFIO_CPR_CACHE or {default_root()})")
    parser.add_argument("--qemu-suite", default=SUITE, metavar="SUITE",
                        help="the Debian suite `qemu` is taken from (default: %(default)s)")
    parser.add_argument("--qemu-version", metavar="VERSION",
                        help="its Debian version (default: the newest in that suite)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    build = verbs.add_parser("build", help="make assets, print where they are")
    build.add_argument("assets", nargs="*", metavar="ASSET",
                       help=f"any of: probe, tools, qemu, qemu-image, labroot, debian-kernel, "
                            f"kernel (our own, 5 to 10 min), lab-kernel (our own if it has "
                            f"been built, else Debian's); default: {' '.join(DEFAULT)}")
    verbs.add_parser("list", help="what is in the cache, with sizes")
    verbs.add_parser("verify", help="compare every cached asset with its manifest")
    verbs.add_parser("update", help="select the newest packages again")
    verbs.add_parser("needs", help="print the command that installs what builds from source need")
    gc = verbs.add_parser("gc", help="remove assets not used lately, and left-overs")
    gc.add_argument("--unused-days", type=float, default=14, metavar="DAYS")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (see `images.errors`)."""
    parser = _parser()
    options = parser.parse_args(argv)
    progress = Progress(quiet=options.quiet)
    try:
        return _run(options, parser, Cache(options.cache), progress)
    except SuiteError as error:
        print(f"images: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser, cache: Cache,
         progress: Progress) -> int:
    recipes = _recipes(options)
    if options.verb == "build":
        if unknown := [name for name in options.assets if name not in recipes]:
            parser.error(f"no such asset: {', '.join(unknown)}; there are {', '.join(recipes)}")
        for name in options.assets or DEFAULT:
            print(cache.ensure(recipes[name](cache), progress))
    elif options.verb == "list":
        for place in cache.assets():
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()
                       and not path.is_symlink())
            print(f"{size / 1e6:9.1f} MB  {place.name}")
    elif options.verb == "verify":
        problems = [problem for place in cache.assets() for problem in cache.verify(place)]
        print("\n".join(problems) or f"{len(cache.assets())} assets, all as they were made")
        return 3 if problems else 0
    elif options.verb == "update":
        for name in recipes:
            recipe = recipes[name](cache)
            if hasattr(recipe, "packages"):
                from images import apt
                apt.resolve(cache, recipe.suite, recipe.packages,  # type: ignore[attr-defined]
                            refresh=True, progress=progress)
    elif options.verb == "needs":
        print(" ".join(needs.install_command((*needs.KERNEL, *needs.QEMU))))
    elif options.verb == "gc":
        for name in cache.collect_garbage(unused_days=options.unused_days):
            print(f"removed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
