# SPDX-License-Identifier: GPL-2.0-or-later
"""The pipelines in ci/ are what GitLab and GitHub take, and the commands in them are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from images.__main__ import _parser
from images.cache import Cache

ROOT = Path(__file__).parents[2]
PIPELINES = {"gitlab-ci": "ci/gitlab-ci.yml", "github-workflows": "ci/github-actions.yml"}


def pipeline(schema: str) -> Any:
    return yaml.safe_load((ROOT / PIPELINES[schema]).read_text())


@pytest.mark.parametrize("schema", PIPELINES)
def test_a_pipeline_is_as_its_schema_says(schema: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", f"vendor.{schema}", ROOT / PIPELINES[schema]),
        ],
        check=True,
    )


def scripts() -> Iterator[tuple[str, str]]:
    """The shell's part of each job, by its name."""
    for name, job in pipeline("gitlab-ci").items():
        if isinstance(job, dict) and name != "variables":
            lines = [*job.get("before_script", []), *job.get("script", [])]
            yield f"gitlab {name}", "\n".join(lines)
    for name, job in pipeline("github-workflows")["jobs"].items():
        steps = [step["run"] for step in job["steps"] if "run" in step]
        yield f"github {name}", re.sub(r"[$]\{\{ .*? \}\}", "1", "\n".join(steps))


SCRIPTS = dict(scripts())


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_steps_are_what_a_shell_takes(script: str) -> None:
    subprocess.run(["sh", "-n", "-c", script], check=True)


def commands(name: str) -> list[str]:
    """How the pipelines call ci/``name``."""
    calls = (re.findall(rf"[$]?suite/ci/{name} [^)\n]*", script) for script in SCRIPTS.values())
    return [call.strip() for some in calls for call in some]


def test_both_verify_all_shares(cache: Cache, tmp_path: Path) -> None:
    """By their very command lines, but that nothing is done; each beside a checkout."""
    (tmp_path / "suite").symlink_to(ROOT)
    calls = commands("verify")
    assert len(calls) == len(PIPELINES)
    for call, last in zip(calls, (".vfio-cpr/last", "last"), strict=True):
        (tmp_path / last).mkdir(parents=True)
        done = subprocess.run(
            ["sh", "-c", f"{call} --list-groups"],
            cwd=tmp_path,
            env={
                **os.environ,
                **{"suite": "suite", "CI_NODE_INDEX": "1", "CI_NODE_TOTAL": "1"},
                **{"VFIO_CPR_OPTIONS": "--profile smoke", "VFIO_CPR_CACHE": str(cache.root)},
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "tests/qemu/test_direct.py[8-vectors] 9" in done.stdout.splitlines()
    matrix = pipeline("github-workflows")["jobs"]["verify"]["strategy"]["matrix"]["shard"]
    assert matrix == list(range(1, pipeline("gitlab-ci")["vfio-cpr-verify"]["parallel"] + 1))


def test_the_other_commands_are_there() -> None:
    verbs = {call.split()[1] for call in commands("images")}
    assert verbs == {"build", "gc", "key"}
    for verb in verbs:
        _parser().parse_args([verb])
