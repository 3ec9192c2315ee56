"""The software renderer: which side is which, what hides what, and labelled sheets."""

import numpy as np
import pytest

from experiments.pictures import PALETTE, contact_sheet, head_colors, render_mesh
from pointillist_jax.files import UserError
from pointillist_jax.flame import open_head

RED, GREEN = np.eye(3)[:2]


def square(z, half=0.05, x=0.0):
    """Two triangles facing +z."""
    corner = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    return np.column_stack([corner[:, 0] + x, corner[:, 1], np.full(4, z)]), np.array([[0, 1, 2], [0, 2, 3]])


def render(v, faces, colors, **options):
    options = {"width": 64, "height": 64, "center": (0, 0, 0), "background": (0, 0, 0), "distance": 1.0} | options
    return render_mesh(v, faces, np.asarray(colors), **options)


def test_a_square_covers_its_projected_area():
    v, faces = square(0.0)
    image = render(v, faces, [RED, RED], width=200, height=200, fov=0.4, supersample=1)
    side = 0.1 / (2 * np.tan(0.2)) * 200
    assert image.shape == (200, 200, 3)
    assert image.dtype == np.float32
    assert (image[..., 0] > 0).sum() == pytest.approx(side**2, rel=0.03)
    # The diagonal that both triangles share leaves no hole.
    assert (image[76:124, 76:124, 0] > 0.3).all()


def test_nearer_faces_hide_farther_ones_in_either_order():
    (near, faces), (far, _) = square(0.1, 0.02), square(-0.1)
    for order in (1, -1):
        parts = [(near, RED), (far, GREEN)][::order]
        v = np.concatenate([p for p, _ in parts])
        colors = np.repeat([c for _, c in parts], 2, axis=0)
        image = render(v, np.concatenate([faces, faces + 4]), colors)
        assert image[32, 32, 0] > 0.3 > image[32, 32, 1] + 0.1
        assert image[32, 26, 1] > 0.3


def test_back_faces_are_not_drawn():
    v, faces = square(0.0)
    assert render(v, faces, [RED, RED]).max() > 0.3
    assert render(v, faces[:, ::-1], [RED, RED]).max() == 0
    assert render(v, faces, [RED, RED], yaw=np.pi).max() == 0


def test_sides_and_camera_walk():
    v, faces = square(0.0, 0.02, x=0.05)  # on the subject's left
    seen = render(v, faces, [RED, RED])
    assert seen[:, 32:].max() > 0.3, "which is the right half of a picture from the front"
    assert seen[:, :32].max() == 0
    # Walking to the subject's left (+x) brings the face's own left side to the middle and beyond.
    v, _ = square(0.1, 0.02, x=0.05)
    column = [render(v, faces, [RED, RED], yaw=yaw)[..., 0].sum(axis=0).argmax() for yaw in (0, 0.5)]
    assert column[1] < column[0]


def test_head_colors_follow_regions():
    model = open_head("coarse")
    colors = head_colors(model)
    assert colors.shape == (model.num_faces, 3)
    np.testing.assert_allclose(colors[model.region_faces("teeth")[0]], PALETTE["teeth"], atol=1e-6)
    dark = head_colors(model, skin=(0.35, 0.24, 0.18))
    assert dark[model.region_faces("face")].mean() < 0.5 * colors[model.region_faces("face")].mean()
    np.testing.assert_array_equal(dark[model.region_faces("eyes")], colors[model.region_faces("eyes")])
    # A FLAME file names one region, "head", and teeth.
    plain = model.replace(region_names=("head",), face_regions=np.zeros(model.num_faces, np.int32))
    np.testing.assert_allclose(head_colors(plain)[0], PALETTE["skin"], atol=1e-6)


def test_contact_sheet():
    tiles = [np.full((20, 30, 3), g, np.float32) for g in (0.0, 0.5, 1.0)]
    sheet = contact_sheet(tiles, ["a", "b", ""], columns=2)
    assert sheet.shape == (2 * 38, 60, 3)
    np.testing.assert_allclose(sheet[:20, :30], 0)
    np.testing.assert_allclose(sheet[:20, 30:], 0.5, atol=0.01)
    assert sheet[20:38, :30].min() < 0.5, "a label"
    with pytest.raises(UserError, match="one size"):
        contact_sheet([tiles[0], tiles[1][:10]], ["a", "b"], columns=2)
    with pytest.raises(UserError, match="label"):
        contact_sheet(tiles, ["a"], columns=2)


def test_bad_arguments():
    v, faces = square(0.0)
    with pytest.raises(UserError, match="width"):
        render(v, faces, [RED, RED], width=0)
    with pytest.raises(UserError, match="fov"):
        render(v, faces, [RED, RED], fov=4.0)
