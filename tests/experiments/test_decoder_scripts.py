"""train_decoder, reconstruct and animate as a user starts them: what they refuse, what they write."""

from __future__ import annotations

import pytest

from tests.experiments.test_scripts import start
from tests.training.decoder_scene import write_people


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train_decoder", (), "--features and --captures are missing"),
        ("train_decoder", ("--features={people}/features", "--captures={people}"), "made with the head 'ball'"),
        ("train_decoder", ("--config.decoder.points=flame_vertices",), "no AR features"),
        ("reconstruct", ("--portrait=README.md",), "--decoder is missing"),
    ],
)
def test_user_errors_are_sentences(tmp_path, script, arguments, message):
    if any("{people}" in a for a in arguments):
        write_people(tmp_path, captures=False)
    filled = (a.format(people=tmp_path) for a in arguments)
    done = start("-m", f"experiments.{script}", *filled)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
