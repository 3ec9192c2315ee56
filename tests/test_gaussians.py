"""PLY files in both layouts, avatar bundles, and damaged or hostile files."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest

from pointillist_jax.files import ArraySpec, FileFormatError, UserError, read_npz, write_npz
from pointillist_jax.flame import animate, bind_points, flame_vertices
from pointillist_jax.gaussians import SH_C0, Avatar, Gaussians, load_avatar, load_ply, save_avatar, save_ply
from tests.conftest import random_params


def random_gaussians(rng, num=37, degree=0, binding=None) -> Gaussians:
    quats = rng.normal(size=(num, 4))
    k = (degree + 1) ** 2
    return Gaussians(
        means=jnp.asarray(rng.normal(0, 0.1, (num, 3)), jnp.float32),
        quats=jnp.asarray(quats / np.linalg.norm(quats, axis=1, keepdims=True), jnp.float32),
        scales=jnp.asarray(np.exp(rng.uniform(-9, -2, (num, 3))), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.001, 0.999, num), jnp.float32),
        colors=jnp.asarray(rng.uniform(size=(num, 3)), jnp.float32) if degree == 0 else None,
        sh=jnp.asarray(rng.normal(size=(num, k, 3)), jnp.float32) if degree else None,
        binding=binding,
    )


def assert_same(a: Gaussians, b: Gaussians, rtol=2e-6):
    for name in ("means", "quats", "scales", "opacities", "colors", "sh", "binding"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("bound", [False, True])
def test_round_trip(tmp_path, rng, degree, bound):
    binding = jnp.asarray(rng.integers(0, 10144, 37), jnp.int32) if bound else None
    gaussians = random_gaussians(rng, degree=degree, binding=binding)
    save_ply(tmp_path / "g.ply", gaussians)
    loaded = load_ply(tmp_path / "g.ply", num_faces=10144)
    assert_same(loaded, gaussians)
    # A second trip changes nothing: what was read is what is written.
    save_ply(tmp_path / "again.ply", loaded)
    assert_same(load_ply(tmp_path / "again.ply"), loaded, rtol=1e-6)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_plyfile_reads_what_we_write_column_by_column(tmp_path, rng, degree):
    """The layout of facts/avatars_gsplat.md A.6, name by name and value by value; lower degrees are padded to it."""
    gaussians = random_gaussians(rng, degree=degree, binding=jnp.arange(37))
    save_ply(tmp_path / "point_cloud.ply", gaussians)
    ply = plyfile.PlyData.read(tmp_path / "point_cloud.ply")
    assert (ply.text, ply.byte_order, len(ply.elements)) == (False, "<", 1)
    vertex = ply["vertex"]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(45)] + ["opacity", "scale_0", "scale_1", "scale_2"]
    names += ["rot_0", "rot_1", "rot_2", "rot_3", "binding_0"]
    assert [p.name for p in vertex.properties] == names
    assert all(p.val_dtype == "f4" for p in vertex.properties)
    assert vertex.data.itemsize == 252
    o = np.asarray(gaussians.opacities, np.float64)
    np.testing.assert_allclose(vertex["opacity"], np.log(o / (1 - o)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vertex["scale_2"], np.log(gaussians.scales[:, 2]), rtol=1e-5)
    np.testing.assert_array_equal(vertex["rot_0"], gaussians.quats[:, 0])
    np.testing.assert_array_equal(vertex["binding_0"], np.arange(37))
    sh = np.zeros((37, 16, 3), np.float32)
    if degree:
        sh[:, : (degree + 1) ** 2] = gaussians.sh
    else:
        sh[:, 0] = (np.asarray(gaussians.colors) - 0.5) / SH_C0
    np.testing.assert_allclose(vertex["f_dc_1"], sh[:, 0, 1], rtol=1e-6)
    # Channel-major: the 15 red coefficients first, then green, then blue.
    np.testing.assert_array_equal(vertex["f_rest_0"], sh[:, 1, 0])
    np.testing.assert_array_equal(vertex["f_rest_16"], sh[:, 2, 1])
    np.testing.assert_array_equal(vertex["f_rest_44"], sh[:, 15, 2])
    save_ply(tmp_path / "standard.ply", random_gaussians(rng))
    standard = plyfile.PlyData.read(tmp_path / "standard.ply")["vertex"]
    assert [p.name for p in standard.properties] == names[:9] + names[54:-1]


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_we_read_what_plyfile_writes(tmp_path, rng, byte_order):
    """Another writer: other byte order, doubles, extra columns, another order of columns, an element behind."""
    fields = ["opacity", "x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "scale_0", "scale_1", "scale_2"]
    fields += ["rot_0", "rot_1", "rot_2", "rot_3"]
    dtype = [("label", "u1")] + [(name, "f8" if name in "xyz" else "f4") for name in fields]
    rows = np.zeros(11, dtype)
    for name in fields:
        rows[name] = rng.normal(size=11)
    extra = plyfile.PlyElement.describe(np.zeros(3, [("a", "i4")]), "extra")
    before = plyfile.PlyElement.describe(np.zeros(2, [("b", "f8")]), "before")
    path = tmp_path / "other.ply"
    elements = [before, plyfile.PlyElement.describe(rows, "vertex"), extra]
    plyfile.PlyData(elements, byte_order=byte_order, comments=["by a test"]).write(path)
    loaded = load_ply(path)
    np.testing.assert_allclose(loaded.means[:, 1], rows["y"], rtol=1e-6)
    np.testing.assert_allclose(loaded.opacities, 1 / (1 + np.exp(-rows["opacity"])), rtol=1e-5)
    np.testing.assert_allclose(loaded.scales[:, 0], np.exp(rows["scale_0"]), rtol=1e-5)
    np.testing.assert_allclose(loaded.colors[:, 2], 0.5 + SH_C0 * rows["f_dc_2"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(loaded.quats, axis=1), 1, rtol=1e-5)
    assert loaded.binding is None


def test_saturated_and_empty_sets(tmp_path):
    edge = Gaussians(
        means=jnp.zeros((2, 3)),
        quats=jnp.tile(jnp.array([1.0, 0, 0, 0]), (2, 1)),
        scales=jnp.full((2, 3), 0.0),
        opacities=jnp.array([0.0, 1.0]),
        colors=jnp.zeros((2, 3)),
    )
    save_ply(tmp_path / "edge.ply", edge)
    np.testing.assert_allclose(load_ply(tmp_path / "edge.ply").opacities, [0, 1], atol=1e-6)
    save_ply(tmp_path / "none.ply", jax.tree.map(lambda x: x[:0], edge))
    assert load_ply(tmp_path / "none.ply").num_gaussians == 0


def rewrite(path, old: bytes, new: bytes):
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.fixture
def good(tmp_path, rng):
    path = tmp_path / "good.ply"
    save_ply(path, random_gaussians(rng, binding=jnp.arange(37)))
    return path


def test_truncated_and_oversized(good):
    data = good.read_bytes()
    for cut in (data[:-1], data[: len(data) // 2], data[:40]):
        good.write_bytes(cut)
        with pytest.raises(FileFormatError, match=r"good\.ply"):
            load_ply(good)
    good.write_bytes(data + b"more")
    with pytest.raises(FileFormatError, match="oversized"):
        load_ply(good)
    good.write_bytes(data)
    rewrite(good, b"element vertex 37", b"element vertex 99999999999")
    with pytest.raises(FileFormatError, match="truncated: the header promises 99999999999"):
        load_ply(good)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("x", np.nan, "x is NaN"),
        ("opacity", np.inf, "opacity is NaN or infinite for 1 "),
        ("scale_1", 100.0, "logarithms"),
        ("binding_0", 10144.0, "10144 faces"),
        ("binding_0", -1.0, "no face index"),
        ("binding_0", 0.5, "no face index"),
        ("f_dc_0", np.nan, "f_dc_0"),
        (("rot_0", "rot_1", "rot_2", "rot_3"), 0.0, "rot_0..3 are all zero for 1"),
    ],
)
def test_bad_values_are_named(good, column, value, message):
    ply = plyfile.PlyData.read(good, mmap=False)
    for name in [column] if isinstance(column, str) else column:
        ply["vertex"][name][5] = value
    ply.write(good)
    with pytest.raises(FileFormatError, match=message) as caught:
        load_ply(good, num_faces=10144)
    assert "good.ply" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ply\n", b"png\n", "not a PLY"),
        (b"end_header", b"endheader_", "not a PLY"),
        (b"binary_little_endian", b"ascii", "only binary"),
        (b"property float f_dc_0", b"property float colour", "f_dc_0 is missing"),
        (b"property float opacity", b"property list uchar int opacity", "not a number"),
        (b"property float y", b"property float x", "named twice"),
        (b"element vertex", b"element points", "no vertex element"),
        (b"element vertex 37", b"element vertex -1", "is no PLY"),
        (b"format binary_little_endian 1.0\n", b"", "no format line"),
        (b"property float y\n", b"property float y\nnonsense here\n", "is no PLY"),
    ],
)
def test_bad_headers_are_named(good, old, new, message):
    rewrite(good, old, new)
    with pytest.raises(FileFormatError, match=message):
        load_ply(good)


def test_headers_of_other_writers(good):
    before = load_ply(good)
    for comment in ("comment \u00c5sa \u9ad8\u65af", "obj_info made elsewhere"):
        rewrite(good, b"element vertex", comment.encode() + b"\nelement vertex")
    head, body = good.read_bytes().split(b"end_header\n", 1)
    good.write_bytes(head.replace(b"\n", b"\r\n") + b"end_header\r\n" + body)
    assert_same(load_ply(good), before)
    rewrite(good, b"element vertex 37", "element vertex \u00b2".encode())
    with pytest.raises(FileFormatError, match="is no PLY"):
        load_ply(good)
    good.write_bytes(b"ply\nformat binary_little_endian 1.0\nelement vertex 1000000000000\nend_header\n")
    with pytest.raises(FileFormatError, match="no properties"):
        load_ply(good)


def test_wrong_number_of_sh_coefficients(tmp_path, rng):
    path = tmp_path / "sh.ply"
    save_ply(path, random_gaussians(rng, degree=1))
    rewrite(path, b"f_rest_8", b"g_rest_8")
    with pytest.raises(FileFormatError, match=r"8 f_rest_\*"):
        load_ply(path)
    save_ply(path, random_gaussians(rng, degree=1))
    rewrite(path, b"f_rest_8", b"f_rest_9")
    with pytest.raises(FileFormatError, match="f_rest_8 is missing"):
        load_ply(path)


def test_save_refuses_what_cannot_be_written(tmp_path, rng):
    gaussians = random_gaussians(rng)
    for wrong, message in (
        (gaussians.replace(means=gaussians.means * jnp.nan), "NaN"),
        (gaussians.replace(scales=-gaussians.scales), "activated"),
        (gaussians.replace(opacities=gaussians.opacities + 5), "activated"),
        (gaussians.replace(colors=None), "exactly one"),
        (jax.tree.map(lambda x: x[None], gaussians), "pick one frame"),
        (gaussians.replace(binding=jnp.full(37, -2)), "binding"),
        (gaussians.replace(binding=jnp.arange(36)), "binding has shape"),
        (gaussians.replace(colors=jnp.ones((37, 4))), "colors has shape"),
        (gaussians.replace(quats=gaussians.quats[:, :3]), "quats has shape"),
        (gaussians.replace(quats=gaussians.quats * 0), "length zero"),
        (gaussians.replace(colors=None, sh=jnp.ones((37, 4))), "sh has shape"),
    ):
        with pytest.raises(UserError, match=message):
            save_ply(tmp_path / "no.ply", wrong)
    assert list(tmp_path.iterdir()) == []


# --- avatar bundles ---


@pytest.fixture
def avatar(flame_model, rng):
    canonical = random_params(rng, flame_model).canonical()
    faces = rng.integers(0, flame_model.num_faces, 37)
    points = np.asarray(flame_vertices(flame_model, canonical))[np.asarray(flame_model.faces)[faces, 0]]
    return Avatar(
        random_gaussians(rng).replace(means=jnp.asarray(points)), bind_points(flame_model, canonical, points, faces)
    )


def test_bundle_round_trip_animates_the_same(tmp_path, flame_model, avatar, rng):
    path = tmp_path / "avatar"
    save_avatar(path, avatar, provenance={"portrait": "a.png"})
    assert sorted(p.name for p in path.iterdir()) == ["avatar.json", "gaussians.ply", "rig.npz"]
    loaded = load_avatar(path)
    params = random_params(rng, flame_model)
    assert_same(animate(loaded, flame_model, params), animate(avatar, flame_model, params), rtol=1e-5)
    assert loaded.rig.num_faces == flame_model.num_faces
    assert loaded.rig.model_sha256 == flame_model.sha256
    card = json.loads((path / "avatar.json").read_text())
    assert card["provenance"] == {"portrait": "a.png"}
    assert card["num_points"] == 37
    # Writing over a bundle replaces it and leaves nothing behind.
    save_avatar(path, avatar, expr_dirs=flame_model.expr_dirs, faces=flame_model.faces)
    assert [p.name for p in tmp_path.iterdir()] == ["avatar"]
    with np.load(path / "rig.npz") as rig:
        corners = np.asarray(flame_model.faces)[rig["binding"]]
        want = np.einsum("pc,pcae->pae", rig["barycentrics"], np.asarray(flame_model.expr_dirs)[corners])
        np.testing.assert_allclose(rig["expr_dirs"], want, atol=1e-5)
    assert_same(load_avatar(path).gaussians, loaded.gaussians)


def test_baked_frame_is_a_standard_world_space_file(tmp_path, flame_model, avatar, rng):
    frame = animate(avatar, flame_model, random_params(rng, flame_model))
    save_ply(tmp_path / "frame.ply", frame)
    loaded = load_ply(tmp_path / "frame.ply")
    assert loaded.binding is None
    np.testing.assert_allclose(loaded.means, frame.means, atol=1e-7)


def test_damaged_bundles_are_named(tmp_path, avatar):
    path = tmp_path / "avatar"
    save_avatar(path, avatar)
    with np.load(path / "rig.npz") as rig:
        arrays = dict(rig)

    def refused(message, **change):
        write_npz(path / "rig.npz", {**arrays, **change})
        with pytest.raises(FileFormatError, match=message):
            load_avatar(path)

    refused("binding has shape", binding=arrays["binding"][:-1])
    refused("binding has values", binding=arrays["binding"] + 20000)
    refused("barycentrics holds", barycentrics=arrays["barycentrics"] * np.nan)
    refused("skin_weights has shape", skin_weights=arrays["skin_weights"][:, :3])
    refused("canonical_jaw_pose has shape", canonical_jaw_pose=np.zeros(4))
    write_npz(path / "rig.npz", {k: v for k, v in arrays.items() if k != "rest_offset"})
    with pytest.raises(FileFormatError, match="rest_offset is missing"):
        load_avatar(path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"format": 3}', "format"),
        ("{NaN}", "JSON"),
    ):
        (path / "avatar.json").write_text(text)
        with pytest.raises(FileFormatError, match=message):
            load_avatar(path)
    with pytest.raises(FileNotFoundError, match=r"avatar\.json"):
        load_avatar(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="provenance"):
        save_avatar(tmp_path / "new", avatar, provenance={"loss": float("nan")})
    with pytest.raises(UserError, match="its rig 37"):
        save_avatar(tmp_path / "new", Avatar(jax.tree.map(lambda x: x[:3], avatar.gaussians), avatar.rig))
    assert not (tmp_path / "new").exists()
    other = tmp_path / "photos"
    other.mkdir()
    with pytest.raises(UserError, match="not an avatar bundle"):
        save_avatar(other, avatar)


def test_a_failure_while_folders_are_exchanged_keeps_the_old_one(tmp_path, avatar, monkeypatch):
    path = tmp_path / "avatar"
    save_avatar(path, avatar)
    before = (path / "avatar.json").read_bytes()
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        # The fourth rename moves the new folder into place, after two files and the old folder.
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        save_avatar(path, avatar, provenance={"new": 1})
    assert (path / "avatar.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["avatar"]


# --- the shared reader ---


def test_read_npz_binds_letters_and_ignores_what_it_was_not_asked_for(tmp_path, rng):
    path = tmp_path / "a.npz"
    np.savez(path, a=rng.normal(size=(4, 3)), b=np.asfortranarray(rng.normal(size=(4, 2))), secret=np.array([object()]))
    out = read_npz(
        path, {"a": ArraySpec(("N", 3)), "b": ArraySpec(("N", None)), "c": ArraySpec((), optional=True)}, "x"
    )
    assert set(out) == {"a", "b"}
    with np.load(path) as reference:
        np.testing.assert_array_equal(out["b"], reference["b"])
    with pytest.raises(FileFormatError, match=r"b has shape \(4, 2\), expected \(4, 5\)"):
        read_npz(path, {"a": ArraySpec(("N", 3)), "b": ArraySpec(("N", 5))}, "x")
    path.write_bytes(b"PK not really")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_npz(path, {}, "x")
