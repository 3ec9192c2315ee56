"""What the tests of all scripts share: good inputs, and a process whose forks run scripts."""

from __future__ import annotations

import pytest

from tests.experiments.bad_inputs import write_good
from tests.experiments.forked import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("compiled")) as forks:
        yield forks


@pytest.fixture(scope="session")
def good_root(tmp_path_factory):
    """What {root} in `bad_inputs.SCRIPTS` stands for. Read-only by agreement."""
    root = tmp_path_factory.mktemp("good")
    write_good(root)
    return root
