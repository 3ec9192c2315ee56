"""A bounded cache of what was read from disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class ByteCache:
    """Values by key, the least recently used of which are dropped at a bound. Safe to share between threads.

    The newest value is kept even if it alone is larger. A copy in another process (pickling) starts empty.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], tuple[Any, int]]) -> Any:
        """The value of `key`; where it is not held, `read` gives it and its number of bytes."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            # Inside the lock: threads that want the same value wait for one read instead of reading it each.
            value, size = self._values[key] = read()
            self._bytes += size
            while self._bytes > self.max_bytes and len(self._values) > 1:
                self._bytes -= self._values.popitem(last=False)[1][1]
            return value

    def __getstate__(self) -> dict:
        return {"max_bytes": self.max_bytes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["max_bytes"])
