""".splat and .spz: what is read back lies within the format's steps, and what is refused."""

from __future__ import annotations

import builtins
import math

import jax.numpy as jnp
import numpy as np
import pytest

from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.gaussians import SH_C0, Gaussians
from pointillist_jax.splat_files import load_splat, save_splat, save_spz

gsply = pytest.importorskip("gsply")


def some_gaussians(rng, num: int = 500) -> Gaussians:
    quats = rng.normal(size=(num, 4))
    values = {
        "means": rng.normal(0, 0.1, (num, 3)),
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "scales": np.exp(rng.uniform(-9.5, -4, (num, 3))),
        "opacities": rng.uniform(0.01, 0.99, num),
        "colors": rng.uniform(size=(num, 3)),
    }
    return Gaussians(**{name: jnp.asarray(x, jnp.float32) for name, x in values.items()})


def assert_near(found, expected, atol: float):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=0)


def same_turns(found, expected, atol: float):
    found, expected = np.asarray(found), np.asarray(expected)
    assert_near(found * np.sign((found * expected).sum(1, keepdims=True)), expected, atol)


def test_splat_there_and_back(rng, tmp_path):
    gaussians = some_gaussians(rng)
    save_splat(tmp_path / "a.splat", gaussians)
    assert (tmp_path / "a.splat").stat().st_size == 32 * 500
    read = load_splat(tmp_path / "a.splat")
    # The most visible first.
    weight = np.asarray(gaussians.opacities) * np.prod(np.asarray(gaussians.scales), axis=1)
    order = np.argsort(-weight, kind="stable")
    np.testing.assert_array_equal(read.means, gaussians.means[order])
    np.testing.assert_array_equal(read.scales, gaussians.scales[order])
    assert_near(read.opacities, gaussians.opacities[order], 1 / 510 + 1e-6)
    assert_near(read.colors, gaussians.colors[order], 1 / 510 + 1e-6)
    same_turns(read.quats, gaussians.quats[order], 1.5 / 128)
    # The layout itself, byte by byte, of one Gaussian.
    one = Gaussians(
        means=np.array([[1, 2, 3]]), quats=np.array([[0.5, -0.5, 0.5, -0.5]]), scales=np.array([[0.1, 0.2, 0.3]]),
        opacities=np.array([0.2]), colors=np.array([[0, 0.6, 1.4]]),
    )  # fmt: skip
    save_splat(tmp_path / "one.splat", one)
    content = (tmp_path / "one.splat").read_bytes()
    np.testing.assert_array_equal(np.frombuffer(content[:24], "<f4"), np.float32([1, 2, 3, 0.1, 0.2, 0.3]))
    assert list(content[24:]) == [0, 153, 255, 51, 192, 64, 192, 64]


def test_spz_is_as_fine_as_its_steps(rng, tmp_path):
    gaussians = some_gaussians(rng)
    save_spz(tmp_path / "a.spz", gaussians)
    read = gsply.read_spz(tmp_path / "a.spz")
    assert_near(read.means, gaussians.means, 2**-17 + 1e-8)
    assert_near(read.scales, np.log(gaussians.scales), 1 / 32 + 1e-5)
    assert_near(1 / (1 + np.exp(-read.opacities)), gaussians.opacities, 1 / 510 + 1e-6)
    assert_near(0.5 + SH_C0 * read.sh0, gaussians.colors, SH_C0 / (255 * 0.15) / 2 + 1e-6)
    # Smallest three: nine bits and a sign over 1/√2.
    same_turns(read.quats, gaussians.quats, 3 * math.sqrt(0.5) / 511)
    assert (tmp_path / "a.spz").stat().st_size < 24 * 500


def test_harmonics_become_the_colour_from_everywhere(rng, tmp_path):
    plain = some_gaussians(rng, 20)
    sh = np.zeros((20, 4, 3), np.float32)
    sh[:, 0], sh[:, 1:] = (np.asarray(plain.colors) - 0.5) / SH_C0, rng.normal(size=(20, 3, 3))
    for save, name in ((save_splat, "splat"), (save_spz, "spz")):
        save(tmp_path / f"plain.{name}", plain)
        save(tmp_path / f"sh.{name}", plain.replace(colors=None, sh=jnp.asarray(sh)))
        a, b = ((tmp_path / f"{kind}.{name}").read_bytes() for kind in ("plain", "sh"))
        assert a == b


@pytest.mark.parametrize("save", [save_splat, save_spz])
def test_what_is_no_set_in_world_space_is_refused(save, rng, tmp_path):
    good = some_gaussians(rng, 5)
    for message, bad in (
        ("local to triangles", good.replace(binding=jnp.arange(5))),
        ("means has shape", good.replace(means=good.means[None])),
        ("scales has shape", good.replace(scales=good.scales[:4])),
        ("colors holds NaN", good.replace(colors=good.colors * jnp.nan)),
        ("scales must be positive", good.replace(scales=-good.scales)),
        (r"opacities in \[0, 1\]", good.replace(opacities=good.opacities + 1)),
        ("not of length 0", good.replace(quats=0 * good.quats)),
    ):
        (tmp_path / "a.x").write_bytes(b"old")
        with pytest.raises(UserError, match=message):
            save(tmp_path / "a.x", bad)
        assert [p.name for p in tmp_path.iterdir()] == ["a.x"]
        assert (tmp_path / "a.x").read_bytes() == b"old"


def test_spz_refuses_what_it_cannot_hold_and_says_when_gsply_is_missing(rng, tmp_path, monkeypatch):
    far = some_gaussians(rng, 5)
    with pytest.raises(UserError, match="129 m away"):
        save_spz(tmp_path / "a.spz", far.replace(means=far.means.at[0, 0].set(-129)))
    assert not list(tmp_path.iterdir())
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gsply":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install gsply"):
        save_spz(tmp_path / "a.spz", far)
    save_splat(tmp_path / "a.splat", far)


def test_damaged_splats_are_refused(rng, tmp_path):
    path = tmp_path / "a.splat"
    save_splat(path, some_gaussians(rng, 3))
    good = path.read_bytes()
    for content, message in (
        (good[:-1], "has 95 bytes; a .splat has 32"),
        (np.float32(np.nan).tobytes() + good[4:], "holds NaN"),
        (good[:12] + np.float32(-1).tobytes() + good[16:], "scales below 0"),
        (good[:28] + bytes([128] * 4) + good[32:], "length 0"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            load_splat(path)
    with pytest.raises(FileNotFoundError, match=r"b\.splat does not exist"):
        load_splat(tmp_path / "b.splat")
