"""The relay between JAX and its coordinator, against a coordinator made of plain sockets."""

from __future__ import annotations

import select
import socket
import subprocess
import sys

import pytest

from pointillist_jax import relay


@pytest.fixture
def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


@pytest.fixture
def started(coordinator):
    """(the process, a connection through it, the coordinator's end of that)."""
    command = [sys.executable, "-I", "-S", relay.__file__, f"127.0.0.1:{coordinator.getsockname()[1]}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        host, _, port = process.stdout.readline().decode().strip().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=30) as near:
            far, _ = coordinator.accept()
            yield process, near, far
            far.close()
        process.kill()


def test_bytes_go_both_ways(started):
    _, near, far = started
    near.sendall(b"question")
    assert far.recv(100) == b"question"
    far.sendall(b"answer")
    assert near.recv(100) == b"answer"


def said(process: subprocess.Popen) -> bytes:
    """Its next line, or nothing within a time."""
    ready, _, _ = select.select([process.stdout], [], [], 30)
    return process.stdout.readline() if ready else b""


def asked_again(far: socket.socket, coordinator: socket.socket) -> socket.socket:
    """The coordinator's end of what the relay tries when the connection has ended."""
    far.close()
    return coordinator.accept()[0]


def stays_open(near: socket.socket) -> bool:
    near.settimeout(0.5)
    try:
        return near.recv(1) != b""
    except TimeoutError:
        return True


def test_a_coordinator_that_is_gone_is_told_and_the_near_end_stays(started, coordinator):
    process, near, far = started
    coordinator.close()
    far.close()
    assert said(process) == b"gone\n"
    assert stays_open(near)


def test_one_that_is_being_killed_still_takes_connections(started, coordinator):
    process, near, far = started
    asked_again(far, coordinator).close()
    assert said(process) == b"gone\n"
    assert stays_open(near)


def test_a_connection_that_a_living_one_ends_is_ended(started, coordinator):
    _, near, far = started
    with asked_again(far, coordinator) as alive:
        alive.sendall(b"settings")
        assert near.recv(1) == b""
