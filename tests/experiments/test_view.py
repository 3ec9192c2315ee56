"""`experiments.view` before anyone looks: its refusals, its sliders, and what they do to the pose."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.motions import MOTIONS, named_expressions
from experiments.viewer import Slider, add_sliders, expression_sliders, pose_sliders
from pointillist_jax.flame import open_head
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.gaussians import save_avatar
from tests.experiments.plain_avatars import red_faced_avatar
from tests.experiments.script_program import refusals
from tests.experiments.small_ar import ROOT, environment

HEAD = open_head("coarse")


def test_sliders_are_named_expressions_or_the_first_of_flames(flame_model):
    named = expression_sliders(HEAD)
    assert len(named) == len(HEAD.expr_names) == 34
    assert ("mouth open", 0.0, 1.0) in [(s.label, s.low, s.high) for s in named]
    assert all(HEAD.expr_names[s.components[0]].replace("-", " ") == s.label for s in named)
    assert not named_expressions(flame_model)
    numbered = expression_sliders(flame_model)
    assert [s.components for s in numbered] == [(i,) for i in range(10)]


def test_sliders_add_to_the_motion():
    moving = MOTIONS["turn_and_talk"](HEAD, 8).timestep(3)
    by_label = {slider.label: slider for slider in (*pose_sliders(), *expression_sliders(HEAD))}
    amounts = {"jaw open": 0.2, "neck turn": -0.3, "eyes left": 0.4, "mouth open": 1.0}
    posed = add_sliders(moving, [(by_label[label], amount) for label, amount in amounts.items()])
    np.testing.assert_allclose(posed.jaw_pose, moving.jaw_pose + jnp.array([0.2, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(posed.neck_pose, moving.neck_pose + jnp.array([0, -0.3, 0]), atol=1e-6)
    np.testing.assert_allclose(posed.eyes_pose, moving.eyes_pose + jnp.array([0, 0.4, 0] * 2), atol=1e-6)
    changed = np.flatnonzero(np.asarray(posed.expr != moving.expr))
    assert changed.tolist() == [HEAD.expr_names.index("mouth-open")]
    np.testing.assert_array_equal(posed.rotation, moving.rotation)
    assert isinstance(by_label["jaw open"], Slider)


@pytest.mark.parametrize(
    ("stop", "code", "said"), [(signal.SIGINT, 130, "stopped by Ctrl-C.\n"), (signal.SIGTERM, 0, "")]
)
def test_serving_ends_by_signals(tmp_path, stop, code, said):
    save_avatar(tmp_path / "someone", red_faced_avatar(HEAD, every=40))
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.view", f"--avatar={tmp_path}/someone", "--port=0"],
        cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert any(line.startswith("open http://127.0.0.1:") for line in process.stdout)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, said)


def test_refusals_are_sentences(tmp_path):
    save_avatar(tmp_path / "someone", red_faced_avatar(HEAD, every=40))
    # An avatar of a head that is not here.
    shutil.copytree(tmp_path / "someone", tmp_path / "foreign")
    card = json.loads((tmp_path / "foreign/avatar.json").read_text())
    card["flame"]["sha256"] = "0" * 64
    (tmp_path / "foreign/avatar.json").write_text(json.dumps(card))
    save_flame_params(tmp_path / "m.npz", MOTIONS["turn"](HEAD, 2), HEAD)
    avatar = f"--avatar={tmp_path}/someone"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refusals(
            tmp_path,
            "view",
            {
                "--avatar is missing": (),
                "avatar.json does not exist": (f"--avatar={tmp_path}",),
                "name its file with --flame": (f"--avatar={tmp_path}/foreign",),
                "must be one of turn, talk": (avatar, "--motion=dance"),
                "flame_param.npz or another tracker's output (.frame or folder) that exists": (
                    avatar,
                    "--motion=nowhere.npz",
                ),
                "--frames does nothing with a flame_param.npz": (avatar, f"--motion={tmp_path}/m.npz", "--frames=9"),
                "nowhere.pkl does not exist": (avatar, "--flame=nowhere.pkl"),
                f"port {port} of 127.0.0.1 is in use": (avatar, f"--port={port}"),
                "is no address of this machine": (avatar, "--host=203.0.113.7"),
                "--host=no.such.host.invalid is no address": (avatar, "--host=no.such.host.invalid"),
                "--port=70000": (avatar, "--port=70000"),
            },
        )
