"""The torch oracle runs on one thread."""

import pytest


@pytest.fixture(autouse=True)
def _one_torch_thread(one_torch_thread):
    pass
