"""A process of `peers`: hands TCP connections on to a coordinator, and keeps the near ends open when that has gone.

    python relay.py <host:port>

Prints the address where it listens, on this machine, and a second line when the coordinator has gone. Ends with its
stdin. Imports nothing but the standard library, so that it starts in a moment.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    threading.Thread(target=serve, args=(listener, (host.strip("[]"), int(port))), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def serve(listener: socket.socket, target: tuple[str, int]) -> None:
    while True:
        near, _ = listener.accept()
        far = connect(target)
        if far is None:
            near.close()  # Not there yet: JAX tries again.
            continue
        threading.Thread(target=pump, args=(near, far), daemon=True).start()
        threading.Thread(target=pump, args=(far, near, target), daemon=True).start()


def connect(target: tuple[str, int]) -> socket.socket | None:
    try:
        far = socket.create_connection(target, timeout=10)
    except OSError:
        return None
    far.settimeout(None)
    return far


def lives(target: tuple[str, int]) -> bool:
    """Whether the coordinator speaks: gRPC does so as soon as a connection is there.

    One that is being killed takes connections for a moment, because its sockets are closed one after the other.
    """
    far = connect(target)
    if far is None:
        return False
    with far, contextlib.suppress(OSError):
        far.settimeout(10)
        return bool(far.recv(1))
    return False


def pump(source: socket.socket, sink: socket.socket, target: tuple[str, int] | None = None) -> None:
    """Copies until the source ends. `target`: of the coordinator, if that is the source."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if target is not None and not lives(target):
        print("gone", flush=True)
        return
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
