"""Loading heads: every published layout, teeth, and files that are damaged or hostile."""

from __future__ import annotations

import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from experiments.random_flame import random_flame, write_flame
from pointillist_jax.files import FileFormatError, UserError
from pointillist_jax.flame import UnsafeFileError, flame_vertices, load_flame, save_flame
from pointillist_jax.flame.teeth import LOWER_LIP, UPPER_LIP
from tests.flame.flame_files import chumpy_dumps, python2_dumps

# Small heads without teeth wherever the size does not matter: a FLAME-sized pickle takes half a second to write.
CONTENT = random_flame(num_vertices=211, num_faces=400)
FLOATS = ("v_template", "shapedirs", "posedirs", "weights")


def load(path):
    return load_flame(path, teeth=False)


def assert_holds(model, content=CONTENT):
    num_vertices = len(content["v_template"])
    np.testing.assert_array_equal(model.v_template[:num_vertices], content["v_template"].astype(np.float32))
    np.testing.assert_array_equal(model.shape_dirs[:num_vertices], content["shapedirs"][..., :300].astype(np.float32))
    np.testing.assert_array_equal(model.expr_dirs[:num_vertices], content["shapedirs"][..., 300:].astype(np.float32))
    np.testing.assert_array_equal(model.pose_dirs[:num_vertices], content["posedirs"].astype(np.float32))
    np.testing.assert_array_equal(model.skin_weights[:num_vertices], content["weights"].astype(np.float32))
    regressor = content["J_regressor"]
    regressor = regressor.toarray() if scipy.sparse.issparse(regressor) else regressor
    np.testing.assert_array_equal(model.joint_regressor[:, :num_vertices], regressor.astype(np.float32))
    np.testing.assert_array_equal(model.faces[: len(content["f"])], content["f"].astype(np.int32))
    assert model.parents == (-1, 0, 1, 1, 1)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path, protocol):
    assert_holds(load(write_flame(tmp_path / "flame2023.pkl", CONTENT, protocol=protocol)))


@pytest.mark.parametrize("convert", [scipy.sparse.csr_matrix, scipy.sparse.coo_matrix, scipy.sparse.csc_array, "dense"])
def test_every_kind_of_regressor(tmp_path, convert):
    regressor = CONTENT["J_regressor"].toarray() if convert == "dense" else convert(CONTENT["J_regressor"])
    assert_holds(load(write_flame(tmp_path / "f.pkl", {**CONTENT, "J_regressor": regressor}, protocol=4)))


def test_flame_2023_open_has_an_extra_key(tmp_path):
    extra = {"supr_expression_metadata": {"names": ["a", "b"], "count": np.int64(3), "nested": [np.float32(1), None]}}
    single = {k: v.astype(np.float32) if k in FLOATS else v for k, v in CONTENT.items()}
    assert_holds(load(write_flame(tmp_path / "flame2023_Open.pkl", {**single, **extra}, protocol=4)))


def test_python_2_pickle_with_latin1_strings(tmp_path):
    path = tmp_path / "generic_model.pkl"
    path.write_bytes(python2_dumps({**CONTENT, "f": CONTENT["f"].astype(np.int64)}))
    assert_holds(load(path))


def test_chumpy_pickle(tmp_path):
    path = tmp_path / "generic_model.pkl"
    path.write_bytes(chumpy_dumps(CONTENT, FLOATS))
    assert_holds(load(path))


def test_fortran_order_and_big_endian_arrays(tmp_path):
    odd = {
        **CONTENT,
        "shapedirs": np.asfortranarray(CONTENT["shapedirs"]),
        "v_template": CONTENT["v_template"].astype(">f8"),
        "kintree_table": CONTENT["kintree_table"].astype(np.uint32),
    }
    assert_holds(load(write_flame(tmp_path / "f.pkl", odd)))


def test_number_of_directions_and_path_types(flame_pickle):
    content = random_flame()
    assert_holds(load_flame(flame_pickle), content)
    model = load_flame(os.fspath(flame_pickle), n_shape=17, n_expr=5, teeth=False)
    assert model.shape_dirs.shape == (5023, 3, 17)
    assert model.expr_dirs.shape == (5023, 3, 5)
    np.testing.assert_array_equal(model.expr_dirs, content["shapedirs"][..., 300:305].astype(np.float32))
    assert model.neutral_params((2, 4)).shape.shape == (2, 4, 17)


def test_other_vertex_counts_load_without_teeth(tmp_path):
    path = write_flame(tmp_path / "small.pkl", CONTENT)
    assert load(path).num_vertices == 211
    with pytest.raises(UserError, match="teeth=False"):
        load_flame(path)


def test_float64_is_kept_when_enabled(flame_pickle):
    with jax.enable_x64(True):
        assert load_flame(flame_pickle).v_template.dtype == np.float64
    assert load_flame(flame_pickle).v_template.dtype == np.float32


def test_loading_inside_jit_leaks_nothing(flame_pickle):
    cache = []

    @jax.jit
    def first(x):
        cache.append(load_flame(flame_pickle, n_shape=2, n_expr=2))
        return x + cache[0].v_template.sum()

    first(jnp.zeros(()))
    assert np.isfinite(np.asarray(cache[0].v_template)).all()


# --- teeth: the numbers of facts/avatars_gsplat.md A.1 ---


def test_teeth_counts_and_face_order(flame_model):
    assert (flame_model.num_vertices, flame_model.num_faces) == (5143, 10144)
    faces = np.asarray(flame_model.faces)
    assert faces[9976].tolist() == [5023, 5054, 5053]
    assert faces[10060].tolist() == [5068, 5069, 5038]
    assert faces[10109].tolist() == [5124, 5139, 5138]
    assert faces[-1].tolist() == [5141, 5142, 5082]
    teeth = faces[9976:] - 5023
    assert (teeth >= 0).all()
    assert set(teeth.ravel()) == set(range(120))
    # The six strips start where the table says, and each has 14 quads = 28 triangles.
    for start, blocks in zip(
        range(0, 168, 28), ((0, 30), (60, 75), (75, 30), (45, 15), (90, 105), (105, 45)), strict=True
    ):
        assert {v // 15 * 15 for v in teeth[start : start + 28].ravel()} == set(blocks)
    # Both patterns of every strip, at the last quad of the first half and the first quad of the second.
    a, b = np.arange(15), 30 + np.arange(15)
    assert teeth[12:14].tolist() == [[a[6], b[7], b[6]], [a[6], a[7], b[7]]]
    assert teeth[14:16].tolist() == [[a[7], a[8], b[7]], [a[8], b[8], b[7]]]
    a, b = 60 + np.arange(15), 75 + np.arange(15)
    assert teeth[28 + 12 : 28 + 14].tolist() == [[a[6], b[6], b[7]], [a[6], b[7], a[7]]]
    assert teeth[28 + 14 : 28 + 16].tolist() == [[a[7], b[7], a[8]], [a[8], b[7], b[8]]]


def test_teeth_geometry_and_rig(flame_model):
    content = random_flame()
    upper, lower = (content["v_template"][list(ring)] for ring in (UPPER_LIP, LOWER_LIP))
    d = np.linalg.norm(upper - lower, axis=1).mean()
    middle = (upper + lower) / 2
    middle[:, 1] = middle[:, 1].mean()
    middle[:, 2] -= 1.5 * d
    y, z = np.array([0, d, 0]), np.array([0, 0, d])
    upper_edge, lower_edge = middle + 0.1 * y, middle - 0.1 * y - 0.4 * z
    upper_root, lower_root = upper_edge + 2 * y, lower_edge - 2 * y
    fronts = [upper_root, lower_root, upper_edge, lower_edge]
    want = np.concatenate([*fronts, upper_root - z, upper_edge - z, lower_root - z, lower_edge - z])
    np.testing.assert_allclose(flame_model.v_template[5023:], want, atol=1e-6)

    shape = content["shapedirs"][..., :300]
    mean = (shape[list(UPPER_LIP)] + shape[list(LOWER_LIP)]) / 2
    np.testing.assert_allclose(flame_model.shape_dirs[5023:], np.tile(mean, (8, 1, 1)), atol=1e-6)
    for zero in (flame_model.expr_dirs[5023:], flame_model.pose_dirs[5023:], flame_model.joint_regressor[:, 5023:]):
        assert not np.asarray(zero).any()
    joint = np.asarray(flame_model.skin_weights[5023:]).argmax(axis=1)
    np.testing.assert_array_equal(joint, np.repeat([1, 2, 1, 2, 1, 1, 2, 2], 15))
    np.testing.assert_array_equal(np.asarray(flame_model.skin_weights[5023:]).max(axis=1), 1)
    np.testing.assert_array_equal(flame_model.region_faces("teeth"), np.arange(9976, 10144))


def test_npz_round_trip_is_exact_and_deterministic(tmp_path, flame_model):
    save_flame(tmp_path / "a.npz", flame_model)
    save_flame(tmp_path / "b.npz", flame_model)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = load_flame(tmp_path / "a.npz")
    for name in ("v_template", "faces", "shape_dirs", "expr_dirs", "pose_dirs", "joint_regressor", "skin_weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(flame_model, name))
    assert (again.parents, again.expr_names, again.region_names) == (
        flame_model.parents,
        flame_model.expr_names,
        flame_model.region_names,
    )
    assert len(again.sha256) == 64
    params = flame_model.neutral_params()
    np.testing.assert_array_equal(flame_vertices(again, params), flame_vertices(flame_model, params))
    assert load_flame(tmp_path / "a.npz", n_shape=4).shape_dirs.shape[-1] == 4


# --- hostile and damaged files ---


class Bomb:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("where", ["instead", "inside"])
@pytest.mark.parametrize(
    ("call", "args"),
    [
        (os.system, ("touch {marker}",)),
        (eval, ("open('{marker}', 'w')",)),
        (open, ("{marker}", "w")),
        (getattr, ("text", "upper")),
        (np.save, ("{marker}", 1)),
        (np.load, ("{marker}",)),
        (scipy.sparse.save_npz, ("{marker}", 1)),
        (np.memmap, ("{marker}", "u1", "w+", 0, (4,))),
    ],
)
def test_a_pickle_that_runs_code_runs_nothing(tmp_path, call, args, where):
    marker = tmp_path / "executed.npy"
    bomb = Bomb(call, *(a.format(marker=marker) if isinstance(a, str) else a for a in args))
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(bomb if where == "instead" else {**CONTENT, "extra": bomb}))
    with pytest.raises(UnsafeFileError, match=r"evil\.pkl.*nothing was executed"):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"cos\nsystem\n(S'touch {marker}'\ntR.",  # Protocol 0.
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch {marker}\x85R.",  # STACK_GLOBAL.
        b"\x80\x04\x8c\x05numpy\x8c\x0etesting.run_module_suite\x93)R.",  # A dotted name.
        b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",  # The class itself must not be callable.
        b"(Pext\nQ.",  # A persistent id.
        b"i__builtin__\neval\n.",  # INST.
    ],
)
def test_hand_written_streams_run_nothing(tmp_path, stream):
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pkl"
    path.write_bytes(stream.replace(b"{marker}", os.fsencode(marker)))
    with pytest.raises(FileFormatError, match=r"evil\.pkl"):
        load(path)
    assert not marker.exists()


def test_stand_ins_cannot_be_altered_by_a_stream(tmp_path):
    # BUILD on a class would set attributes on it for every later load.
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x02cscipy.sparse.csc\ncsc_matrix\n}(U\x05denseK\x01ub.")
    with pytest.raises(FileFormatError):
        load(path)
    assert load(write_flame(tmp_path / "good.pkl", CONTENT)).num_vertices == 211


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_template": np.zeros((211, 2))}, r"v_template has shape \(211, 2\), expected \(V, 3\)"),
        ({"shapedirs": np.zeros((5023, 3, 10))}, "shapedirs has shape .* expected .*400"),
        ({"posedirs": np.zeros((210, 3, 36))}, "posedirs"),
        ({"weights": CONTENT["weights"] * np.nan}, "weights holds .* NaN"),
        ({"weights": CONTENT["weights"] * 0.5}, "weights of a vertex sum"),
        ({"weights": -CONTENT["weights"]}, "weights has values"),
        ({"f": CONTENT["f"].astype(np.int64) + 200}, "faces refer to vertex"),
        ({"f": -CONTENT["f"].astype(np.int64)}, "f has values"),
        ({"f": CONTENT["f"] + 0.5}, "f has dtype float64, expected int"),
        ({"kintree_table": np.array([[-1, 4, 1, 1, 1], [0, 1, 2, 3, 4]])}, "parents"),
        ({"kintree_table": np.zeros((2, 24), int)}, "kintree_table"),
        ({"J_regressor": scipy.sparse.csc_matrix((5, 200))}, "J_regressor"),
        ({"v_template": "a string"}, "v_template"),
        ({"v_template": [[1.0, 2.0], [3.0]]}, "v_template is not an array"),
    ],
)
def test_wrong_contents_are_named(tmp_path, change, message):
    path = write_flame(tmp_path / "wrong.pkl", {**CONTENT, **change})
    with pytest.raises(FileFormatError, match=message) as caught:
        load(path)
    assert "wrong.pkl" in str(caught.value)


def test_missing_key_is_named(tmp_path):
    content = {k: v for k, v in CONTENT.items() if k != "posedirs"}
    with pytest.raises(FileFormatError, match="posedirs is missing"):
        load(write_flame(tmp_path / "f.pkl", content))


def test_hostile_sparse_matrix(tmp_path):
    regressor = CONTENT["J_regressor"].copy()
    regressor.indices = regressor.indices.copy()
    regressor.indices[0] = 1 << 20
    with pytest.raises(FileFormatError, match="outside"):
        load(write_flame(tmp_path / "f.pkl", {**CONTENT, "J_regressor": regressor}))


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({1: 2})])
def test_not_a_model(tmp_path, data):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"x\.pkl"):
        load(path)


def test_truncated_pickle_and_missing_file(tmp_path, flame_pickle):
    path = tmp_path / "cut.pkl"
    path.write_bytes(flame_pickle.read_bytes()[:100_000])
    with pytest.raises(FileFormatError, match="damaged"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl does not exist"):
        load(tmp_path / "nowhere.pkl")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(tmp_path)


def test_damaged_npz(tmp_path, flame_model):
    good = tmp_path / "good.npz"
    save_flame(good, flame_model)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(good.read_bytes()[:-2000])
    with pytest.raises(FileFormatError, match=r"cut\.npz"):
        load_flame(cut)

    # A header that promises terabytes must be refused before anything is allocated.
    big = tmp_path / "big.npz"
    with zipfile.ZipFile(big, "w") as archive:
        header = (
            b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999, 3), }"
        )
        archive.writestr("v_template.npy", header.ljust(127) + b"\n")
    with pytest.raises(FileFormatError, match="more than this program ever reads"):
        load_flame(big)

    objects = tmp_path / "objects.npz"
    np.savez(objects, v_template=np.array([Bomb(os.system, "true")], object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="v_template has dtype object"):
        load_flame(objects)


# --- files that attacked earlier versions of the reader (found in review) ---


def record(stream_of_state: bytes, name: bytes = b"numpy\nndarray\n") -> bytes:
    """A stream {"v_template": <object with a state>}."""
    return b"\x80\x02}(X\x0a\x00\x00\x00v_templatec" + name + b")\x81" + stream_of_state + b"bu."


def load_stream(tmp_path, stream: bytes):
    path = tmp_path / "evil.pkl"
    path.write_bytes(stream)
    with pytest.raises(FileFormatError, match=r"evil\.pkl") as caught:
        load_flame(path)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


INTERFACE = pickle.dumps(
    {"__array_interface__": {"shape": (9, 3), "typestr": "<f8", "data": (1 << 38, False), "version": 3}}, 2
)[2:-1]


@pytest.mark.parametrize(
    "name", [b"numpy\nndarray\n", b"__builtin__\nobject\n", b"scipy.sparse\ncsc_matrix\n", b"chumpy.ch\nCh\n"]
)
def test_an_address_in_a_pickle_is_never_read(tmp_path, name):
    load_stream(tmp_path, record(INTERFACE, name))  # A dictionary as state.
    load_stream(tmp_path, record(b"N" + INTERFACE + b"\x86", name))  # The form that sets attributes.


@pytest.mark.parametrize("name", [b"numpy\nndarray\n", b"numpy.core.multiarray\n_reconstruct\n", b"chumpy.ch\nCh\n"])
def test_a_stream_cannot_alter_the_stand_ins(tmp_path, name):
    from pointillist_jax.flame import unpickle

    def snapshot():
        return {n: dict(vars(c)) for n, c in vars(unpickle).items() if isinstance(c, type)}

    before = snapshot()
    for state in (b"}X\x05\x00\x00\x00stateK\x01s", b"N}X\x05\x00\x00\x00stateK\x01s\x86"):
        load_stream(tmp_path, b"\x80\x02c" + name + state + b"b.")
    assert snapshot() == before


# Ten references to the list one level down, 28 levels deep.
LAUGHS = b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(28))
LONG = b"\x8b" + (200_000).to_bytes(4, "little") + b"\x7f" * 200_000
# An array of 2^28 bytes whose data are the integer 2^31 - 1.
FROM_INTEGER = b"(K\x01J\x00\x00\x00\x10\x85cnumpy\ndtype\nU\x02f8\x85R\x89J\xff\xff\xff\x7ft"
HUNGRY = {
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "deep tuple as key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "billion laughs": b"\x80\x02}X\x0a\x00\x00\x00v_template]q\x00" + LAUGHS + b"s.",
    "huge integers": b"\x80\x02}X\x01\x00\x00\x00a(" + LONG * 3 + b"ts.",
    "bytes from an integer": record(FROM_INTEGER, b"numpy.core.multiarray\n_reconstruct\n"),
    "a list": b"\x80\x02}X\x0a\x00\x00\x00v_template](K\x01K\x02es.",
    "huge key": b"\x80\x02}(I" + b"9" * 4000 + b"\nNu.",
}


@pytest.mark.parametrize("name", HUNGRY)
def test_small_files_cannot_exhaust_the_machine(tmp_path, name):
    load_stream(tmp_path, HUNGRY[name])


def test_keys_that_no_head_needs_are_not_even_looked_at(tmp_path):
    import collections

    extra = {
        "ordered": collections.OrderedDict(a=1),
        "set": frozenset({1}),
        "slice": slice(1, 2),
        "complex": 1j,
        "structured": np.zeros(2, [("a", "i4")]),
        "date": np.array(["2020-01-01"], "datetime64[D]"),
        "objects": np.array([None, "x"], object),
        3: "a number as key",
    }
    for protocol in (2, 4):
        assert_holds(load(write_flame(tmp_path / "f.pkl", {**CONTENT, **extra}, protocol=protocol)))


def test_random_damage_to_files_is_always_a_sentence(tmp_path, rng):
    """Flipped bytes in a pickle and in an npz: a model or FileFormatError, nothing else."""
    small = random_flame(num_vertices=20, num_faces=30)
    pkl = write_flame(tmp_path / "f.pkl", small)
    npz = tmp_path / "f.npz"
    save_flame(npz, load(pkl))
    for path in (pkl, npz):
        good = path.read_bytes()
        refused = 0
        for _ in range(150):
            damaged = bytearray(good)
            # Half of the flips near the ends, where the structure is.
            where = rng.integers(0, len(good), 4) if rng.random() < 0.5 else -rng.integers(1, 2000, 4)
            damaged[where[0]] = int(rng.integers(256))
            damaged[where[1]] = int(rng.integers(256))
            path.write_bytes(damaged)
            try:
                load(path)
            except FileFormatError:
                refused += 1
        assert refused > 10


def npz_with_header(path, header: bytes, payload: bytes = b""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = header + b"\n"
        archive.writestr("v_template.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 3), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (True, 3), }",
        b"{'descr': ',', 'fortran_order': False, 'shape': (1, 3), }",
        b"((((((3",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"1, 3), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
    ],
)
def test_hostile_npz_headers(tmp_path, header):
    path = tmp_path / "f.npz"
    npz_with_header(path, header, bytes(1 << 20))
    with pytest.raises(FileFormatError, match=r"f\.npz"):
        load_flame(path)
