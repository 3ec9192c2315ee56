"""Pictures of head meshes in plain NumPy: a z-buffered renderer, region colours and labelled contact sheets.

Meant for looking at heads (quickstart, videos of a few dozen frames, `head_sheet`), not for training: that is
`renderer_bridge`. Letters: V vertices, F faces, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pointillist_jax.files import UserError

BACKGROUND = (0.93, 0.94, 0.95)
# sRGB; regions a model has beyond these are painted as skin.
PALETTE = {
    "skin": (0.86, 0.67, 0.57),
    "face": (0.87, 0.67, 0.57),
    "nose": (0.87, 0.65, 0.56),
    "brows": (0.55, 0.40, 0.32),
    "scalp": (0.80, 0.63, 0.54),
    "lips": (0.75, 0.42, 0.40),
    "lids": (0.82, 0.59, 0.51),
    "ears": (0.87, 0.64, 0.55),
    "neck": (0.85, 0.66, 0.56),
    "shoulders": (0.84, 0.65, 0.55),
    "eyes": (0.95, 0.95, 0.94),
    "iris": (0.30, 0.45, 0.52),
    "pupil": (0.03, 0.03, 0.04),
    "sockets": (0.62, 0.36, 0.32),
    "mouth_inside": (0.55, 0.24, 0.23),
    "teeth": (0.94, 0.91, 0.84),
    "tongue": (0.76, 0.43, 0.43),
}


def render_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    face_colors: np.ndarray,
    *,
    width: int,
    height: int,
    yaw: float = 0.0,
    pitch: float = 0.0,
    distance: float = 1.2,
    fov: float = 0.32,
    center: Sequence[float] = (0.0, -0.03, -0.04),
    background: Sequence[float] = BACKGROUND,
    supersample: int = 2,
    flat: bool = False,
) -> np.ndarray:
    """One shaded view of a triangle mesh, perspective, z-buffered, back faces culled.

    Args:
      vertices: [V, 3] metres; x to the subject's left, y up, z to the viewer.
      faces: [F, 3], counter-clockwise seen from outside.
      face_colors: [F, 3] in [0, 1].
      width, height: pixels.
      yaw: radians the camera walks around the head towards the subject's left (+x).
      pitch: radians it rises.
      distance: metres from `center`, the point it looks at.
      fov: full vertical angle of view in radians.
      background: colour where there is no surface.
      supersample: samples per pixel and axis.
      flat: shade with face normals instead of smooth vertex normals.

    Returns:
      float32 [H, W, 3] in [0, 1].
    """
    if min(width, height, supersample) < 1:
        raise UserError(f"width={width}, height={height} and supersample={supersample} must be at least 1.")
    if not (0 < fov < math.pi and distance > 0):
        raise UserError(f"fov={fov} must lie between 0 and pi, and distance={distance} above 0.")
    vertices = np.asarray(vertices, np.float64)
    faces = np.asarray(faces)
    w, h = width * supersample, height * supersample

    axes = _camera_axes(yaw, pitch)
    local = (vertices - np.asarray(center, np.float64)) @ axes.T
    depth = distance - local[:, 2]
    inverse_depth = 1 / np.maximum(depth, 1e-6)
    focal = 0.5 * h / math.tan(fov / 2)
    x = 0.5 * w + focal * local[:, 0] * inverse_depth
    y = 0.5 * h - focal * local[:, 1] * inverse_depth

    tx, ty = x[faces], y[faces]
    # y points down on the screen, so outward faces turn clockwise there. Those behind the camera are dropped whole.
    area = (ty[:, 1] - ty[:, 0]) * (tx[:, 2] - tx[:, 0]) - (tx[:, 1] - tx[:, 0]) * (ty[:, 2] - ty[:, 0])
    front = np.flatnonzero((area > 1e-9) & (depth[faces].min(axis=1) > 1e-3))
    image = np.empty((h * w, 3), np.float32)
    image[:] = background
    tx, ty, tri = tx[front], ty[front], faces[front]
    pixel, owner, bary = _fragments(tx, ty, area[front], inverse_depth[tri], w, h)

    normals = _corner_normals(vertices, faces, 1.1 if flat else _CREASE)[front] @ axes.T.astype(np.float32)
    normal = sum(bary[:, k, None] * normals[owner, k] for k in range(3))
    colors = np.asarray(face_colors, np.float32)[front][owner]
    image[pixel] = _shade(normal, colors)
    image = image.reshape(height, supersample, width, supersample, 3)
    total = sum(image[:, i, :, j] for i in range(supersample) for j in range(supersample))
    return total / np.float32(supersample**2)


def head_colors(model, skin: Sequence[float] | None = None) -> np.ndarray:
    """Natural colours of a head's faces by region.

    Args:
      model: a `FlameModel`; regions it does not name (FLAME's own "head") become skin.
      skin: an sRGB skin tone that replaces the default one; lids, ears, nose and lips keep their relation to it.

    Returns:
      float32 [F, 3].
    """
    tone = np.ones(3) if skin is None else np.asarray(skin, np.float64) / PALETTE["skin"]
    own = {"eyes", "iris", "pupil", "teeth", "tongue", "mouth_inside"}
    table = [
        np.asarray(PALETTE.get(name, PALETTE["skin"])) * (1.0 if name in own else tone) for name in model.region_names
    ]
    return np.clip(np.asarray(table, np.float32)[np.asarray(model.face_regions)], 0, 1)


def contact_sheet(images: Sequence[np.ndarray], labels: Sequence[str], columns: int) -> np.ndarray:
    """Images in a grid, each with its label below.

    Args:
      images: float [H, W, 3] in [0, 1], all of one size.
      labels: one per image; "" for none.
      columns: images per row.

    Returns:
      float32 [rows * (H + 18), columns * W, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images or len(images) != len(labels) or columns < 1:
        raise UserError(
            f"contact_sheet needs one label per image and columns >= 1: {len(images)} images, {len(labels)} labels, "
            f"columns={columns}."
        )
    if len({image.shape for image in images}) != 1:
        raise UserError("contact_sheet needs images of one size; render them with the same width and height.")
    height, width, _ = images[0].shape
    strip, rows = 18, -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + strip)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = i % columns * width, i // columns * (height + strip)
        sheet.paste(Image.fromarray(np.uint8(np.round(np.clip(image, 0, 1) * 255))), (left, top))
        draw.text((left + width / 2, top + height + strip / 2), label, (20, 20, 20), font, anchor="mm")
    return np.asarray(sheet, np.float32) / 255


def head_sheet(model, coarse=None, *, size: int = 192, columns: int = 8, seed: int = 0) -> np.ndarray:
    """Everything a head can do on one labelled sheet.

    Views of the neutral head, eight random identities, every expression direction (at most 40) at 1, an open jaw,
    turned eyes and a turned neck; and a row of the coarse head if one is given.

    Args:
      model: a `FlameModel`.
      coarse: the same head with fewer faces, or None.
      size: pixels of one picture's side.
      columns: pictures per row.
      seed: of the random identities.

    Returns:
      float32 [H, W, 3].
    """
    images, labels = _sheet_cells(model, size, seed, expressions=True)
    blank = [np.ones((size, size, 3), np.float32)] * (-len(images) % columns)
    images, labels = images + blank, labels + [""] * len(blank)
    if coarse is not None:
        more, names = _sheet_cells(coarse, size, seed, expressions=False)
        images, labels = images + more, labels + [f"coarse: {name}" for name in names]
    return contact_sheet(images, labels, columns)


def _sheet_cells(model, size: int, seed: int, expressions: bool) -> tuple[list[np.ndarray], list[str]]:
    import jax

    from pointillist_jax.flame import flame_vertices

    pose = jax.jit(flame_vertices)
    colors, faces = head_colors(model), np.asarray(model.faces)
    neutral = model.neutral_params()
    images, labels = [], []

    def add(label: str, params=neutral, yaw: float = 0.25, pitch: float = 0.0, **camera) -> None:
        view = {"center": (0.0, -0.035, -0.04), "fov": 0.33, "distance": 1.2} | camera
        vertices = np.asarray(pose(model, params))
        images.append(render_mesh(vertices, faces, colors, width=size, height=size, yaw=yaw, pitch=pitch, **view))
        labels.append(label)

    close = {"center": (0.0, -0.01, 0.02), "fov": 0.17}
    for label, yaw, pitch in (("front", 0, 0), ("three-quarter", 0.7, 0.1), ("side", 1.57, 0), ("back", 3.14, 0)):
        add(label, yaw=yaw, pitch=pitch)
    add("jaw 0.3", neutral.replace(jaw_pose=neutral.jaw_pose.at[0].set(0.3)), **close)
    # +x turns a gaze down, +y to the subject's left.
    for label, turn in (("eyes left", (0, 0.4, 0)), ("eyes right", (0, -0.4, 0)), ("eyes up", (-0.3, 0, 0))):
        add(
            label, neutral.replace(eyes_pose=neutral.eyes_pose + np.tile(np.asarray(turn, np.float32), 2)), 0.0, **close
        )
    for angle in (0.6, -0.6):
        add(f"neck yaw {angle:+}", neutral.replace(neck_pose=neutral.neck_pose.at[1].set(angle)), 0.0)
    n_shape = model.shape_dirs.shape[-1]
    rng = np.random.default_rng(seed)
    for i in range(8 if expressions else 4):
        add(f"identity {i}", neutral.replace(shape=np.float32(rng.normal(size=n_shape))))
    # FLAME has a hundred directions without names: the first, strongest ones tell enough.
    for i, name in enumerate(model.expr_names[:40]):
        if expressions or name in ("mouth-open", "mouth-corner-puller", "eye-left-closure", "mouth-pursing"):
            add(name, neutral.replace(expr=neutral.expr.at[i].set(1.0)), **close)
    return images, labels


def _camera_axes(yaw: float, pitch: float) -> np.ndarray:
    """[3, 3] rows: the camera's right, up and backward axes in the head's frame."""
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    return np.array([[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]])


def _fragments(
    tx: np.ndarray, ty: np.ndarray, area: np.ndarray, inverse_depth: np.ndarray, w: int, h: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rasterises T triangles by row spans and keeps the nearest fragment of every pixel.

    Args:
      tx, ty: [T, 3] screen coordinates of the corners.
      area: [T] twice the positive screen area.
      inverse_depth: [T, 3] at the corners; linear on the screen.
      w, h: pixels.

    Returns:
      pixel [P] flat index, owner [P] triangle, bary [P, 3] float32 screen-linear weights of the corners (perspective
      does not bend them visibly inside triangles this small).
    """
    # weight_k(x, y) = (a_k x + b_k y + c_k) / area: positive inside, 1 at corner k, 0 on the opposite edge.
    nx, ny, px, py = (np.roll(t, shift, axis=1) for shift in (-1, 1) for t in (tx, ty))
    a, b, c = py - ny, nx - px, ny * px - nx * py
    first = np.clip(np.ceil(ty.min(axis=1) - 0.5), 0, h).astype(np.int32)
    rows = np.clip(np.ceil(ty.max(axis=1) - 0.5), 0, h).astype(np.int32) - first
    row_tri, row_y = _ranges(first, np.maximum(rows, 0))

    # Each row of a triangle is the span where all three weights are positive. An edge shared by two triangles gives
    # both the same end (their coefficients are exact negatives), so no pixel is lost or doubled between them.
    middle = row_y + 0.5
    left, right = np.full(len(row_tri), -np.inf), np.full(len(row_tri), np.inf)
    for k in range(3):
        slope = a[:, k][row_tri]
        with np.errstate(divide="ignore", invalid="ignore"):
            end = -(b[:, k][row_tri] * middle + c[:, k][row_tri]) / slope
        np.maximum(left, end, out=left, where=slope > 0)
        np.minimum(right, end, out=right, where=slope < 0)
    start = np.clip(np.ceil(left - 0.5), 0, w).astype(np.int32)
    count = np.clip(np.ceil(right - 0.5), 0, w).astype(np.int32) - start
    span, col = _ranges(start, np.maximum(count, 0))

    # The weights are linear, so is the inverse depth: one multiply-add per fragment.
    per_corner = inverse_depth / area[:, None]
    dx, dy, d0 = ((coefficient * per_corner).sum(axis=1) for coefficient in (a, b, c))
    level = dy[row_tri] * middle + d0[row_tri] + 0.5 * dx[row_tri]
    nearness = (dx[row_tri][span] * col + level[span]).astype(np.float32)
    pixel = (row_y * w)[span] + col
    # The bits of positive floats sort like integers: with the fragment's index below, one maximum finds the nearest.
    key = nearness.view(np.int32).astype(np.int64) << 32 | np.arange(len(pixel))
    best = np.zeros(h * w, np.int64)
    np.maximum.at(best, pixel, key)
    pixel = np.flatnonzero(best)
    kept = best[pixel] & 0xFFFFFFFF
    span, col = span[kept], col[kept] + 0.5
    owner, row = row_tri[span], middle[span]
    bary = np.empty((len(pixel), 3), np.float32)
    for k in range(3):
        bary[:, k] = (a[owner, k] * col + b[owner, k] * row + c[owner, k]) / area[owner]
    return pixel, owner, bary


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each i the integers first[i] … first[i] + count[i] - 1: (i repeated, the integers)."""
    owner = np.repeat(np.arange(len(first), dtype=np.int32), count)
    # Within a run the integers grow like the positions in the whole list.
    shift = first - (np.cumsum(count, dtype=np.int32) - count)
    return owner, shift[owner] + np.arange(len(owner), dtype=np.int32)


def _face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """[F, 3], as long as twice the area."""
    p, q, r = (vertices[faces[:, k]].T for k in range(3))
    (ux, uy, uz), (vx, vy, vz) = q - p, r - p
    return np.stack([uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx], axis=1)


# Cosine between a face's normal and its corner's smooth normal below which the edge is sharp (teeth).
_CREASE = 0.45


def _corner_normals(vertices: np.ndarray, faces: np.ndarray, crease: float) -> np.ndarray:
    """[F, 3, 3] float32 unit normals of corners: smooth, but the face's own where the two differ by a crease."""
    face = _face_normals(vertices, faces)
    corner = faces.T.ravel()
    smooth = np.stack([np.bincount(corner, np.tile(n, 3), len(vertices)) for n in face.T], axis=1)
    face, smooth = _unit(face).astype(np.float32)[:, None], _unit(smooth).astype(np.float32)[faces]
    return np.where((smooth * face).sum(axis=-1, keepdims=True) < crease, face, smooth)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)


# Directions in the camera's frame (right, up, backward): a soft key from the upper left, a weak fill from the right.
_KEY = np.array([-0.45, 0.55, 0.70], np.float32) / np.float32(np.linalg.norm([-0.45, 0.55, 0.70]))
_FILL = np.array([0.75, 0.05, 0.55], np.float32) / np.float32(np.linalg.norm([0.75, 0.05, 0.55]))
_HALF = (_KEY + np.array([0, 0, 1], np.float32)) / np.linalg.norm(_KEY + np.array([0, 0, 1], np.float32))


def _shade(normal: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """[P, 3] normals (any length, camera frame) and [P, 3] colours → [P, 3] shaded colours."""
    normal = normal / np.maximum(np.sqrt(np.einsum("pk,pk->p", normal, normal)), 1e-12)[:, None]
    key = np.maximum(normal @ _KEY, 0)
    fill = np.maximum(normal @ _FILL, 0)
    light = 0.36 + 0.10 * normal[:, 1] + 0.56 * key + 0.20 * fill
    shine = 0.10 * np.maximum(normal @ _HALF, 0) ** 24
    return np.clip(colors * light[:, None] + shine[:, None], 0, 1)
