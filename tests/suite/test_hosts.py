# SPDX-License-Identifier: GPL-2.0-or-later
"""A host is a host: the same verbs with the same meaning, here and over SSH."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import PurePosixPath

import pytest

from fixtures.hosts import CommandError, Host, HostLostError, LocalHost
from fixtures.hosts.nested import SYSROOT
from fixtures.waiting import DeadlineError, until
from images.sysroot import Sysroot

SLEEP = ["sleep", "600"]


def log_of(host: Host) -> PurePosixPath:
    return host.scratch / "log"


# run


def test_run_returns_output_error_and_status(host: Host) -> None:
    done = host.run("echo out; echo error >&2; exit 3", check=False)
    assert (done.out, done.err, done.status) == ("out\n", "error\n", 3)


def test_a_command_that_fails_says_which_where_and_why(host: Host) -> None:
    with pytest.raises(CommandError, match=r"`ls /no/such` ended with \d: .*/no/such") as caught:
        host.run("ls /no/such")
    assert host.name in str(caught.value)


def test_a_list_of_words_reaches_the_program_as_it_is(host: Host) -> None:
    words = ["a  b", "$HOME", "it's", '"', "", "*", "\\", "; exit 1"]
    assert host.run(["printf", "<%s>", *words]).out == "".join(f"<{word}>" for word in words)


def test_standard_input_is_empty(host: Host) -> None:
    assert host.run("cat; echo end").out == "end\n"


def test_long_output_arrives_whole(host: Host) -> None:
    out = host.run("seq 50000").out
    assert out.splitlines() == [str(n) for n in range(1, 50001)]


def test_output_that_is_no_text_is_no_error(host: Host) -> None:
    assert host.run(r"printf 'a\377z'").out == "a\N{REPLACEMENT CHARACTER}z"


def test_a_command_that_misses_its_deadline_loses_the_host(second: Host) -> None:
    with pytest.raises(HostLostError, match=r"`sleep 600`.*0\.3 s") as caught:
        second.run("sleep 600", deadline_s=0.3)
    assert second.name in str(caught.value)


# spawn


def test_a_spawned_program_is_there_until_it_is_killed(host: Host) -> None:
    process = host.spawn(SLEEP, log=log_of(host))
    assert host.run(f"tr '\\0' ' ' < /proc/{process.pid}/cmdline").out == "sleep 600 "
    assert process.poll() is None
    process.kill()
    assert process.poll() == -signal.SIGKILL
    assert host.run(f"test -d /proc/{process.pid}", check=False).status == 1
    process.kill()
    process.signal(signal.SIGTERM)


def test_a_program_ends_with_its_status(host: Host) -> None:
    assert host.spawn(["sh", "-c", "exit 7"], log=log_of(host)).wait(20) == 7


def test_a_signal_reaches_the_program(host: Host) -> None:
    script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    log = host.scratch / "signal.log"
    process = host.spawn(["sh", "-c", script], log=log)

    def is_ready() -> bool:
        with contextlib.suppress(FileNotFoundError):  # it may not have come so far
            return host.read(log) == b"ready\n"
        return False

    until(is_ready, "the trap", 20, pause_s=0.02)
    process.signal(signal.SIGTERM)
    assert process.wait(20) == 5


def test_waiting_for_a_program_has_a_deadline(host: Host) -> None:
    process = host.spawn(SLEEP, log=log_of(host))
    with pytest.raises(DeadlineError, match=rf"sleep \(pid {process.pid}\) to end"):
        process.wait(0.2)
    process.kill()


def test_a_program_appends_to_its_log(host: Host) -> None:
    log = host.scratch / "append.log"
    for word in ("first", "second"):
        host.spawn(["sh", "-c", f"echo {word}; echo error >&2"], log=log).wait(20)
    assert host.read(log) == b"first\nerror\nsecond\nerror\n"


# read, write, put, remove


@pytest.fixture(params=["scratch", "memory"])
def path(request: pytest.FixtureRequest, host: Host) -> PurePosixPath:
    return PurePosixPath(getattr(host, request.param)) / secrets.token_hex(4)


def test_byte_ranges_of_a_file(host: Host, path: PurePosixPath) -> None:
    host.put(path, bytes(range(100)))
    assert host.read(path) == bytes(range(100))
    assert host.read(path, 90) == bytes(range(90, 100))
    assert host.read(path, 10, 5) == bytes(range(10, 15))
    assert host.read(path, 95, 50) == bytes(range(95, 100))
    assert host.read(path, 200) == b""
    assert host.read(path, 200, 4) == b""
    assert host.read(path, 10, 0) == b""


def test_pieces_are_written_where_they_belong_and_in_their_order(
    host: Host, path: PurePosixPath
) -> None:
    host.put(path, bytes(10))
    host.write(path, (2, b"ab"), (6, b""), (5, b"c"), (3, b"B"))
    assert host.read(path) == b"\0\0aB\0c" + bytes(4)
    host.write(path, (9, b"xyz"))
    assert host.read(path) == b"\0\0aB\0c" + bytes(3) + b"xyz"


def test_what_others_write_is_read(host: Host, path: PurePosixPath) -> None:
    host.put(path, b"ours")
    assert host.read(path) == b"ours"
    host.run(f"printf theirs > {path}")
    assert host.read(path) == b"theirs"
    host.write(path, (0, b"T"))
    assert host.run(f"cat {path}").out == "Theirs"


def test_putting_a_file_replaces_it(host: Host, path: PurePosixPath) -> None:
    host.put(path, b"long content")
    host.put(path, b"short")
    assert host.read(path) == b"short"


def test_a_file_that_is_removed_is_gone(host: Host, path: PurePosixPath) -> None:
    host.put(path, b"old")
    assert host.read(path) == b"old"
    host.remove(path)
    with pytest.raises(FileNotFoundError):
        host.read(path)
    host.put(path, b"new")
    assert host.read(path) == b"new"


@pytest.mark.parametrize("act", ["read", "write", "remove"])
def test_a_file_that_is_not_there_is_no_loss_of_the_host(
    host: Host, path: PurePosixPath, act: str
) -> None:
    acts: dict[str, Callable[[], object]] = {
        "read": lambda: host.read(path),
        "write": lambda: host.write(path, (0, b"x")),
        "remove": lambda: host.remove(path),
    }
    with pytest.raises(FileNotFoundError):
        acts[act]()
    assert host.run("echo well").out == "well\n"


@pytest.mark.parametrize("file", ["/proc/version", "/proc/self/maps", "/proc/net/unix"])
def test_files_in_proc_whose_size_is_unknown(host: Host, file: str) -> None:
    content = host.read(PurePosixPath(file))
    assert len(content) > 40
    assert content.endswith(b"\n")
    assert host.read(PurePosixPath("/proc/version"), 6, 8) == b"version "


def test_megabytes_pass_unchanged(host: Host, path: PurePosixPath) -> None:
    content = bytes(range(256)) * 8192
    host.put(path, content)
    assert host.read(path) == content


# connect


def test_a_unix_socket_carries_bytes_both_ways(host: Host, packaged: Sysroot) -> None:
    qemu = packaged if isinstance(host, LocalHost) else SYSROOT
    path = host.scratch / "qmp"
    process = host.spawn(
        qemu.qemu("-machine", "none", "-display", "none", "-qmp", f"unix:{path},server=on"),
        log=host.scratch / "qemu.log",
    )

    def connection() -> socket.socket | None:
        try:
            return host.connect(path)
        except OSError:
            return None

    stream = until(connection, "QEMU to listen", 60, pause_s=0.05, but=lambda: process.poll())
    stream.settimeout(60)
    with stream, stream.makefile("rwb", buffering=0) as lines:
        assert lines.readline().startswith(b'{"QMP"')
        for command in (b"qmp_capabilities", b"query-qmp-schema"):
            lines.write(b'{"execute": "%s"}\n' % command)
            answer = lines.readline()
        # Many packets, so that more than the first is seen to arrive.
        assert answer.startswith(b'{"return": [')
        assert answer.endswith(b"]}\r\n")
        assert len(answer) > 1 << 17
        lines.write(b'{"execute": "quit"}')
        assert lines.read().endswith(b"}\r\n"), "the end of the file arrives too"
    assert process.wait(20) == 0


def test_nobody_listening_is_an_os_error_and_no_loss_of_the_host(host: Host) -> None:
    with pytest.raises(OSError, match=r"nobody|No such file"):
        host.connect(host.scratch / "nobody")
    assert host.run("echo well").out == "well\n"


# listen


def test_who_calls_a_socket_of_the_host_gets_us(host: Host) -> None:
    path = host.scratch / "here"
    with host.listen(path) as listener:
        listener.settimeout(20)
        for words in (b"once", b"again"):
            with host.connect(path) as caller, listener.accept()[0] as callee:
                for stream in (caller, callee):
                    stream.settimeout(20)
                caller.sendall(words)
                assert callee.recv(100) == words
                callee.sendall(words[::-1])
                assert caller.recv(100) == words[::-1]
                callee.close()
                assert caller.recv(100) == b"", "the end of the file arrives too"
    with pytest.raises(OSError, match=r"here|No such file"):
        host.connect(path)
    with host.listen(path):
        pass


# What a host promises.


def test_a_host_has_directories_of_its_own_on_disk_and_in_memory(host: Host) -> None:
    for directory in (host.scratch, host.memory):
        assert host.run(f"stat -c '%F %a' {directory}").out == "directory 700\n"
    assert host.run(f"stat -f -c %T {host.memory}").out == "tmpfs\n"


def test_facts_name_the_machine(host: Host) -> None:
    facts = host.facts()
    assert facts["host"] == host.name
    assert all(facts[key] for key in ("kernel", "cpu", "iommu"))


def leave_things_behind(host: Host) -> list[int]:
    """Programs, also in sessions of their own, and files; returns the programs' pids."""
    program = host.spawn(SLEEP, log=log_of(host))
    host.spawn(["sh", "-c", "setsid sleep 600 & sleep 600"], log=log_of(host))
    for directory in (host.scratch, host.memory):
        host.run(f"mkdir {directory}/deep; echo x > {directory}/deep/file")
    daemon = host.run("setsid sleep 600 > /dev/null 2>&1 < /dev/null & echo $!").out
    return [program.pid, int(daemon)]


@pytest.mark.parametrize("end", ["closed", "lost"])
def test_nothing_outlives_a_run(
    host: Host, second: Host, left_of: Callable[[Host, str], str], end: str
) -> None:
    pids = leave_things_behind(second)
    until(lambda: left_of(host, second.token).count("/environ") >= 4, "all of it", 20, pause_s=0.02)
    if end == "closed":
        second.close()
        assert left_of(host, second.token) == "", "when close returns, all is gone"
    else:
        lose(second)
        until(lambda: left_of(host, second.token) == "", "the guardian", 30, pause_s=0.05)
    for pid in pids:
        assert host.run(f"cat /proc/{pid}/cmdline", check=False).out == ""
    assert host.run(f"test -d {host.scratch}", check=False).status == 0, "another run's"


def lose(host: Host) -> None:
    """End our side without a word, as a crash of ours would."""
    if isinstance(host, LocalHost):
        assert host._guardian.stdin is not None
        host._guardian.stdin.close()
    else:
        host._connection.abort()  # type: ignore[attr-defined]


def test_a_run_does_not_end_another_runs_programs(host: Host, second: Host) -> None:
    process = host.spawn(SLEEP, log=log_of(host))
    second.close()
    assert process.poll() is None
    process.kill()


def test_closing_twice_is_closing_once(second: Host) -> None:
    second.close()
    second.close()
