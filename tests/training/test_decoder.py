"""Stage two: capacity that grows, meshes, bitwise resume, kills; what subjects' batches hold."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.configs import preset
from pointillist_jax.convert import lpips_from_torch
from pointillist_jax.data.subject_views import FeatureClouds, SubjectViews, TemplateClouds, subject_batches
from pointillist_jax.files import UserError
from pointillist_jax.flame import flame_vertices
from pointillist_jax.models.gaussian_decoder import Decoded
from pointillist_jax.training import decoder
from pointillist_jax.training.checkpoints import Checkpoints, load_params
from pointillist_jax.training.metric_log import read_metrics
from pointillist_jax.training.state import TrainState
from tests.losses.test_lpips import by_torch, random_vgg
from tests.training.decoder_scene import CONFIG, open_people, write_people

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    root = tmp_path_factory.mktemp("people")
    write_people(root)
    return root


@pytest.fixture(scope="module")
def opened(people):
    return open_people(people)


def sources(opened, **options):
    _, features, captures = opened
    options = {"views": 2, "seed": 1} | options
    return SubjectViews(captures, FeatureClouds(features), **options)


def test_records_are_the_subjects(opened):
    _, features, captures = opened
    source = sources(opened)
    assert source.max_points == 256
    # Every pass shows every view, grouped anew.
    groups = source.groups_per_epoch
    seen = [set(), set()]
    for i in range(2 * groups):
        record = source[i]
        for t, c in zip(record["timestep"], record["camera"], strict=True):
            seen[i // groups].add((int(record["subject"]), int(t), int(c)))
    views = {
        (s, int(t), int(c))
        for s, capture in enumerate(captures)
        for t, c in zip(capture.split("train").timesteps, capture.split("train").camera_indices, strict=True)
    }
    assert seen == [views, views]
    assert [source[i]["camera"].tolist() for i in range(groups)] != [
        source[groups + i]["camera"].tolist() for i in range(groups)
    ]
    record = source[3]
    cloud, capture = features.load(source.subjects[record["subject"]]), captures[record["subject"]]
    n = record["num_points"]
    assert n == cloud.num_points
    for name in ("points", "binding", "hidden"):
        np.testing.assert_array_equal(record[name][:n], getattr(cloud, name))
    assert record["hidden"].shape == (256, 4, 6)
    np.testing.assert_array_equal(record["canonical"]["shape"], capture.params.shape)
    np.testing.assert_allclose(record["canonical"]["jaw_pose"], [0.3, 0, 0])
    np.testing.assert_array_equal(record["flame"]["expr"][1], capture.params.expr[record["timestep"][1]])


def test_evaluation_sees_every_view_once(opened):
    source = sources(opened, split="test", shuffle=False, views=4)
    batches = list(subject_batches(source, 4))
    weights = np.concatenate([b["weight"] for b in batches])
    assert weights.sum() == 10
    assert len(sources(opened, split="test", shuffle=False, views=4, limit=3)) == 2
    with pytest.raises(UserError, match=r"bob has 75 points, more than decoder\.max_points=72"):
        sources(opened, max_points=72)


def test_template_clouds_are_the_canonical_vertices(opened):
    head, _, captures = opened
    clouds = TemplateClouds(head, captures, 0.3)
    cloud = clouds.load("bob")
    expected = flame_vertices(head, captures[1].params.timestep(0).canonical(0.3))
    np.testing.assert_allclose(cloud.points, expected, atol=1e-7)
    corners = np.asarray(head.faces)[cloud.binding]
    assert (corners == np.arange(head.num_vertices)[:, None]).any(axis=1).all()
    assert clouds.num_points("bob") == head.num_vertices


def test_the_composed_loss_is_the_papers_in_float64(rng, monkeypatch):
    """1·L1 + 0.5·(1 − SSIM) + 0.1·LPIPS + 0.1·Reg of random pictures, by NumPy and torch; and its gradients."""
    torch = pytest.importorskip("torch")
    B, K, P, H, W = 2, 2, 7, 16, 19
    images, target = rng.uniform(size=(B, K, H, W, 3)), rng.integers(0, 256, (B, K, H, W, 3))
    offsets, lengths = rng.normal(0, 0.3, (B, P, 3)), np.array([7, 5])
    offsets[1, 5:] = 0  # As the decoder leaves padding.
    weight = np.array([[1.0, 1.0], [1.0, 0.0]])
    vgg = random_vgg(rng)
    config = dataclasses.replace(CONFIG.decoder, lambda_l1=1.0, lambda_ssim=0.5, lambda_lpips=0.1, lambda_reg=0.1)
    assert config == dataclasses.replace(config, **{n: getattr(preset("paper").decoder, n) for n in vars(config)
                                                    if n.startswith("lambda_")})  # fmt: skip

    # Parameters of the loss are here what it compares: pictures and offsets.
    def no_renderer(head, decoded, batch, width, height, **how):
        zeros = {name: jnp.zeros((B, K), jnp.int32) for name in ("overflow", "intersections")}
        return decoded.gaussians, zeros

    monkeypatch.setattr(decoder, "decode_batch", lambda params, *rest: Decoded(*params))
    monkeypatch.setattr(decoder, "render_views", no_renderer)
    batch = {"image": target.astype(np.uint8), "weight": weight, "num_points": lengths}

    def total(params, lpips_params):
        loss_fn = decoder.make_loss(config, {"head": None, "lpips": lpips_params}, W, H)
        loss, count, extra = loss_fn(params, batch, None)
        return loss / count, extra

    params = tuple(jnp.asarray(x, jnp.float32) for x in (images, offsets))
    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (found, extra), gradients = both(params, lpips_from_torch(vgg))

    x, o = torch.tensor(images, requires_grad=True), torch.tensor(offsets, requires_grad=True)
    flat, y = (v.reshape(B * K, H, W, 3).permute(0, 3, 1, 2) for v in (x, torch.tensor(target / 255)))
    distance = by_torch(torch, vgg, 2 * flat - 1, 2 * y - 1)
    each = (flat - y).abs().mean((1, 2, 3)) + 0.5 * (1 - torch_ssim(torch, flat, y)) + 0.1 * distance
    square = (o**2).sum((1, 2)) / torch.tensor(lengths)
    each = each.reshape(B, K) + 0.1 * square[:, None]
    expected = (each * torch.tensor(weight)).sum() / 3
    expected.backward()
    assert distance.min() > 0.01
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    for gradient, theirs in zip(gradients, (x.grad, o.grad), strict=True):
        np.testing.assert_allclose(gradient, theirs, atol=1e-4 * float(theirs.abs().max()))
    assert not np.any(gradients[0][1, 1])  # The view that does not count.
    decibels = -10 * np.log10(((images - target / 255) ** 2).mean((2, 3, 4)))
    np.testing.assert_allclose(extra["psnr"][0] / extra["psnr"][1], (decibels * weight).sum() / 3, rtol=1e-5)
    millimetres = 1e3 * np.sqrt(square.detach().numpy()).mean()
    np.testing.assert_allclose(extra["offset_mm"][0] / extra["offset_mm"][1], millimetres, rtol=1e-5)


def torch_ssim(torch, x, y):
    """The 3DGS definition, [N, 3, H, W] in float64 → [N]."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    kernel = torch.tensor(np.outer(window, window) / window.sum() ** 2).expand(3, 1, 11, 11)
    blur = functools.partial(torch.nn.functional.conv2d, weight=kernel, padding=5, groups=3)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ratio = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    return ratio.mean((1, 2, 3))


def run_program(*arguments, devices: int = 1, wait: bool = True):
    environment = os.environ | {
        # Compilation is most of the time; what is tested does not depend on its optimisations.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.training.decoder_program", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not wait:
        return process
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    return said


def test_resume_refuses_another_decoder(people, opened, tmp_path):
    """A checkpoint of another decoder of equal shapes; only its meta is read."""
    features = opened[1].spec
    settings = CONFIG.decoder.for_features(features.store.tokenizer, features.width)
    other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(settings, max_offset=0.25))
    state = TrainState(np.int32(5), {"w": np.zeros(2)}, (), None, jax.random.PRNGKey(0))
    meta = {"config": dataclasses.asdict(other), "features": features.to_json(), "capacity": 64}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, SimpleNamespace(get_state=dict), meta)
    process = run_program("train", people, tmp_path, 6, wait=False)
    said, _ = process.communicate(timeout=600)
    assert process.returncode != 0, said
    assert "UserError" in said
    assert "decoder.max_offset=0.25 (now 0.1): resume with --config.decoder.max_offset=0.25, or" in said
    assert "going on with" not in said


@pytest.mark.slow
def test_a_capacity_too_small_grows_and_changes_nothing(people):
    said = run_program("grow", people)
    found = json.loads(said.splitlines()[-1])
    assert "capacity grows" in said
    assert found["grown"][0] > 70
    assert found["steps"] == [1, 1]
    assert found["finite"] == [True, True]
    assert found["moved"] > 1e-3
    assert found["difference"] < 1e-5


@pytest.mark.slow
def test_four_devices_agree_with_one(people):
    """The same batch of four subjects on meshes of four devices, and on one."""
    found = json.loads(run_program("meshes", people, devices=4).splitlines()[-1])
    assert set(found) == {"data:4", "data:2,fsdp:2"}
    for mesh, each in found.items():
        assert each["loss"] < 1e-5, mesh
        assert each["gradients"] < 1e-5 * each["largest"], mesh
        assert each["largest"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:4", "data:2,fsdp:2"])
def test_two_processes_are_one(people, tmp_path, mesh):
    """Two processes of two devices each, against one of four: losses, held-out scores, parameters, one set of files."""
    run_program("train", people, tmp_path / "one", 15, mesh, devices=4)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    two = tmp_path / "two"
    both = [run_program("train", people, two, 15, mesh, port, i, devices=2, wait=False) for i in range(2)]
    # Read side by side: a full pipe would stop one process, and with it the other.
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda process: process.communicate(timeout=900)[0], both))
    for process, text in zip(both, said, strict=True):
        assert process.returncode == 0, text[-3000:]
        assert "done 15" in text
    found, expected = (read_metrics(path) for path in (two, tmp_path / "one"))
    for name in ("loss", "psnr", "eval_views_psnr", "eval_people_ssim"):
        a, b = ([(line["step"], line[name]) for line in lines if name in line] for lines in (found, expected))
        assert len(a) == (1 if name.startswith("eval") else 15)
        np.testing.assert_allclose(a, b, rtol=1e-3)
        if not name.startswith("eval"):
            np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5)
    cards = [json.loads((path / "card.json").read_text())["scores"] for path in (two, tmp_path / "one")]
    assert cards[0].keys() == cards[1].keys()
    for name, value in cards[1].items():
        np.testing.assert_allclose(cards[0][name], value, rtol=5e-3, err_msg=name)
    # As a whole: where a gradient is rounding noise, Adam makes steps of full size of it.
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(load_params(p)[0])]) for p in (two, tmp_path / "one"))
    assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(b)
    assert {p.name for p in (two / "strips").iterdir()} == {p.name for p in (tmp_path / "one/strips").iterdir()}


@pytest.mark.slow
def test_resumed_and_killed_runs_equal_the_uninterrupted_one(people, tmp_path):
    run_program("train", people, tmp_path / "whole", 30)
    run_program("train", people, tmp_path / "parts", 15)
    said = run_program("train", people, tmp_path / "parts", 30)
    assert "done 30" in said
    assert "going on from step 15" in said

    process = run_program("train", people, tmp_path / "killed", 30, wait=False)
    limit = time.monotonic() + 600
    checkpoints = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and time.monotonic() < limit:
        if any(p.name.isdigit() for p in checkpoints.glob("*")):
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.kill()
    process.communicate()
    assert "going on from step" in run_program("train", people, tmp_path / "killed", 30)

    def losses(name):
        return [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]

    whole, _ = load_params(tmp_path / "whole")
    for name in ("parts", "killed"):
        jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / name)[0], whole)
        assert losses(name) == losses("whole")
    assert len(losses("whole")) == 30
    assert losses("whole")[-1] < 0.8 * losses("whole")[0]
    card = json.loads((tmp_path / "whole" / "card.json").read_text())
    assert {"views_psnr", "expressions_ssim", "people_psnr"} <= set(card["scores"])
    assert {p.name.split("_", 1)[1] for p in (tmp_path / "whole" / "strips").iterdir()} >= {"views.png", "people.png"}
    assert dataclasses.asdict(CONFIG.decoder)["inputs"] == card["inputs"]
    assert np.isfinite(losses("whole")).all()
