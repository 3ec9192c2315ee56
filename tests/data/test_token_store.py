"""The token store: what goes in comes out, other settings are refused by name, damage is a sentence."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading

import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from pointillist_jax.configs import IdentityConfig
from pointillist_jax.data import token_store
from pointillist_jax.data.fits import load_fit, save_fit
from pointillist_jax.data.identities import sample_identity
from pointillist_jax.data.records import pack_record, unpack_record
from pointillist_jax.data.subjects import check_subject, find_portrait, flame_fields, subject_record
from pointillist_jax.data.token_store import StoreWriter, open_store
from pointillist_jax.files import FileFormatError, UserError, file_sha256
from pointillist_jax.flame import face_frames, flame_vertices
from pointillist_jax.flame.param_files import save_flame_params
from tests.data.capture_files import write_capture
from tests.data.fit_files import HEAD_SPEC, MODEL, random_person, write_fit
from tests.data.stores import SPEC, TOKENIZER, random_record, write_store


def assert_half_a_cell(tokenizer, tokens, means, binding) -> None:
    """The points are the truth's, one to one: on the same faces, at most half a cell away on each axis."""
    points, faces = tokenizer.decode(tokens)
    np.testing.assert_array_equal(np.sort(faces), np.sort(binding))
    # Centres went through float32; a point on a cell's border may fall on either side.
    half = tokenizer.cell / 2 + 1e-6
    for face in np.unique(binding):
        far = (np.abs(points[faces == face][:, None] - means[binding == face][None]) > half).any(axis=-1)
        assert not far[linear_sum_assignment(far)].any()


def test_truth_to_tokens_and_back_within_half_a_cell(tmp_path, rng):
    """PLY → fit reader → canonical points → tokens → store → points: half a cell per axis, bindings exact."""
    names = {f"person_{i:04d}": int(n) for i, n in enumerate(rng.integers(500, 3000, 3))}
    truth = {name: write_fit(tmp_path / name, rng, n) for name, n in names.items()}
    writer = StoreWriter(tmp_path / "store", HEAD_SPEC)
    writer.write_shard([subject_record(name, tmp_path / name, MODEL, HEAD_SPEC) for name in names])
    writer.finish()
    store = open_store(tmp_path / "store", HEAD_SPEC.tokenizer, flame_sha256=MODEL.sha256)
    store.verify()
    for i, name in enumerate(store.subjects):
        means, binding = truth[name]
        assert_half_a_cell(store.tokenizer, store.tokens(i), means, binding)
        fit, identity = load_fit(tmp_path / name, MODEL), store.identity(i)
        np.testing.assert_array_equal(identity["shape"], fit.params.shape)
        np.testing.assert_array_equal(identity["static_offset"], fit.params.static_offset)
        # Without a portrait, the parameters are the canonical pose's.
        flame = store.condition(i)["flame"]
        assert "portrait" not in store.condition(i)
        np.testing.assert_allclose(flame["jaw_pose"], [0.3, 0, 0], atol=1e-7)
        np.testing.assert_array_equal(flame["shape"], fit.params.shape)
    assert store.num_points.tolist() == list(names.values())
    # The same centres as the rig's own placement.
    np.testing.assert_allclose(fit.canonical(MODEL, 0.3)[1].means, means, atol=1e-6)


@pytest.mark.parametrize("hair", ["bald", "long"])
def test_a_synthetic_person_to_tokens_and_back(tmp_path, hair):
    """The person's own truth, in float64 where it stands; nobody sticks out of the default cube."""
    person = sample_identity(MODEL, 7, IdentityConfig(density=0.1), hair_style=hair, beard="full", glasses="thin")
    save_fit(tmp_path / hair / "truth", person.gaussians, person.params, MODEL)
    record = subject_record(hair, tmp_path / hair, MODEL, HEAD_SPEC)
    binding, local = np.asarray(person.gaussians.binding), np.asarray(person.gaussians.means, np.float64)
    vertices = flame_vertices(MODEL, person.params.canonical(HEAD_SPEC.canonical_jaw))
    rotation, scale, center = (np.asarray(x, np.float64)[binding] for x in face_frames(vertices, MODEL.faces))
    means = scale[:, None] * np.einsum("pab,pb->pa", rotation, local) + center
    t = HEAD_SPEC.tokenizer
    assert record.num_clipped == ((means < t.lower) | (means > t.upper)).any(axis=1).sum() == 0
    np.testing.assert_allclose(t.cell, 0.6 / 1024)
    assert_half_a_cell(t, record.tokens, means, binding)
    assert len(record.tokens) == 4 * len(means) + 8
    # A cell moved is found out.
    shifted = record.tokens.copy()
    shifted[4] += 1 if shifted[4] < t.bins - 1 else -1
    with pytest.raises(AssertionError):
        assert_half_a_cell(t, shifted, means, binding)


def test_points_outside_the_cube_are_counted_or_clipped(tmp_path, rng):
    means, _ = write_fit(tmp_path / "far", rng, 400, spread=30.0)
    t = HEAD_SPEC.tokenizer
    outside = int(((means < t.lower) | (means > t.upper)).any(axis=1).sum())
    assert outside
    with pytest.raises(UserError, match=rf"far: {outside} of 400 points lie outside the box .*--bounds"):
        subject_record("far", tmp_path / "far", MODEL, HEAD_SPEC)
    clipping = dataclasses.replace(HEAD_SPEC, out_of_bounds="clip")
    with pytest.warns(UserWarning, match="clipped"):
        record = subject_record("far", tmp_path / "far", MODEL, clipping)
    assert record.num_clipped == outside
    StoreWriter(tmp_path / "store", clipping).write_shard([record])
    assert open_store(tmp_path / "store", allow_incomplete=True).num_clipped.tolist() == [outside]


def test_a_share_of_the_points_is_kept_by_name(tmp_path, rng):
    write_fit(tmp_path / "fit", rng, 400)
    t, half = HEAD_SPEC.tokenizer, dataclasses.replace(HEAD_SPEC, keep=0.5)
    whole = subject_record("a", tmp_path / "fit", MODEL, HEAD_SPEC).tokens[4:-4].reshape(-1, 4)
    kept = subject_record("a", tmp_path / "fit", MODEL, half).tokens
    assert len(kept) == 4 * 200 + 8
    assert t.first_error(kept) is None
    assert set(map(tuple, kept[4:-4].reshape(-1, 4))) <= set(map(tuple, whole))
    np.testing.assert_array_equal(kept, subject_record("a", tmp_path / "fit", MODEL, half).tokens)
    assert not np.array_equal(kept, subject_record("b", tmp_path / "fit", MODEL, half).tokens)
    assert len(subject_record("a", tmp_path / "fit", MODEL, dataclasses.replace(HEAD_SPEC, keep=1e-9)).tokens) == 12
    with pytest.raises(UserError, match=r"data\.keep=0"):
        dataclasses.replace(HEAD_SPEC, keep=0.0)


def test_portraits_from_files_from_captures_or_none(tmp_path, rng):
    assert find_portrait([tmp_path], MODEL, 16) is None
    write_capture(tmp_path / "capture", MODEL, rng)
    portrait = find_portrait([tmp_path / "nothing", tmp_path / "capture"], MODEL, 24)
    assert portrait.image.shape == (24, 24, 3)
    assert portrait.source.name.endswith("_01.png")  # The val camera of the test captures.
    calm = [np.load(tmp_path / "capture" / "flame_param" / f"{t:05d}.npz") for t in range(3)]
    strength = [np.linalg.norm(c["expr"]) + np.linalg.norm(c["jaw_pose"]) for c in calm]
    np.testing.assert_array_equal(portrait.flame["expr"], calm[int(np.argmin(strength))]["expr"][0])

    own = tmp_path / "person"
    own.mkdir()
    picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    iio.imwrite(own / "portrait.png", picture)
    with pytest.raises(FileFormatError, match=r"portrait\.png lies alone: portrait_flame_param\.npz is missing"):
        find_portrait([own], MODEL, 24)
    params = random_person(rng)
    one = params.replace(**{k: v[:1] for k, v in vars(params).items() if k not in ("shape", "static_offset")})
    save_flame_params(own / "portrait_flame_param.npz", one, MODEL)
    portrait = find_portrait([own, tmp_path / "capture"], MODEL, 24)
    np.testing.assert_array_equal(portrait.image, picture)
    for name, value in flame_fields(one, 0).items():
        np.testing.assert_array_equal(portrait.flame[name], value)
    save_flame_params(own / "portrait_flame_param.npz", params, MODEL)
    with pytest.raises(FileFormatError, match="holds 3 timesteps"):
        find_portrait([own], MODEL, 24)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("point_cloud.ply", lambda data: data[:-5], "is truncated"),
        ("point_cloud.ply", lambda data: data.replace(b"binding_0", b"binding_1"), "has no binding_0"),
        ("point_cloud.ply", lambda data: data.replace(b"opacity", b"opacitx"), "property opacity is missing"),
        ("point_cloud.ply", lambda data: data[: data.find(b"end_header\n") + 11].replace(b"x 60", b"x 0"),
         "holds no Gaussians"),
        ("point_cloud.ply", None, "holds no fit"),
        ("flame_param.npz", None, "does not exist"),
        ("flame_param.npz", lambda data: data[:99], "cannot be read as .npz"),
        ("portrait.png", None, "lies alone"),
        ("portrait.png", lambda data: data[:99], "is a truncated PNG"),
        ("portrait_flame_param.npz", lambda data: data[:99], "cannot be read as .npz"),
    ],
)  # fmt: skip
def test_a_subject_is_checked_by_headers(tmp_path, rng, file, damage, message):
    write_fit(tmp_path, rng, 60)
    params = random_person(rng)
    one = params.replace(**{k: v[:1] for k, v in vars(params).items() if k not in ("shape", "static_offset")})
    save_flame_params(tmp_path / "portrait_flame_param.npz", one, MODEL)
    iio.imwrite(tmp_path / "portrait.png", rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    check_subject(tmp_path, MODEL, [tmp_path])
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises((UserError, FileNotFoundError), match=message):
        check_subject(tmp_path, MODEL, [tmp_path])


def test_what_goes_in_comes_out(tmp_path, rng):
    store, records = write_store(tmp_path, rng, [4, 0, 31, 8, 5], shard=2)
    assert store.subjects == tuple(r.name for r in records)
    assert store.complete
    small = open_store(tmp_path, cache_bytes=1)  # Every access reads the record again.
    copy = pickle.loads(pickle.dumps(store))
    for opened in (store, small, copy):
        for i in rng.permutation(len(records)):
            record = records[i]
            np.testing.assert_array_equal(opened.tokens(i), record.tokens)
            assert opened.tokens(i).dtype == np.int32
            np.testing.assert_array_equal(opened.condition(i)["portrait"], record.portrait)
            for name, value in record.flame.items():
                np.testing.assert_array_equal(opened.condition(i)["flame"][name], value)
            assert ("static_offset" in opened.identity(i)) == (record.static_offset is not None)
        np.testing.assert_array_equal(opened.tokens(-1), records[-1].tokens)
        with pytest.raises(IndexError):
            opened.tokens(len(records))
    with pytest.raises(ValueError, match="read-only"):
        store.tokens(0)[:] = 0
    assert store.features_path("vitl14_reg-518", 2) == tmp_path / "features" / "vitl14_reg-518" / "person_0002.npz"
    with pytest.raises(UserError, match="features kind"):
        store.features_path("../x", 0)
    with pytest.raises(UserError, match="no subject 'nobody'"):
        store.index("nobody")


def test_threads_share_a_store(tmp_path, rng):
    _, records = write_store(tmp_path, rng, [50, 20, 31, 8, 5], shard=2)
    store, failed = open_store(tmp_path, cache_bytes=2000), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(records), 80):
            if not np.array_equal(store.tokens(int(i)), records[i].tokens):
                failed.append(i)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_adding_subjects_leaves_old_shards_as_they_are(tmp_path, rng):
    _, records = write_store(tmp_path, rng, [4, 7, 31], shard=2)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("tokens-*")}
    (tmp_path / ".tokens-00002.tmp-abc.array_record").write_bytes(b"left by a kill")
    writer = StoreWriter(tmp_path, SPEC)
    assert list(writer.subjects) == [r.name for r in records]
    more = random_record(rng, "new", 12)
    writer.write_shard([more])
    with pytest.raises(UserError, match="unfinished"):
        open_store(tmp_path)
    writer.finish()
    store = open_store(tmp_path)
    assert {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.glob("tokens-*") if p.name in before
    } == before
    assert not list(tmp_path.glob(".*"))
    np.testing.assert_array_equal(store.tokens(3), more.tokens)
    np.testing.assert_array_equal(store.tokens(0), records[0].tokens)
    with pytest.raises(UserError, match="already holds 'new'"):
        writer.write_shard([more])
    with pytest.raises(UserError, match="cannot be a subject's name"):
        writer.write_shard([dataclasses.replace(more, name="../x")])
    with pytest.raises(UserError, match="no subject"):
        StoreWriter(tmp_path / "other", SPEC).finish()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"bins": 32}, "bins 64, not 32"),
        ({"num_faces": 51}, "num_faces 50, not 51"),
        ({"lower": -0.4}, r"lower \[-0.3, -0.3, -0.34\], not \[-0.4, -0.4, -0.4\]"),
        ({"upper": 0.5}, r"upper \[0.3, 0.3, 0.26\], not \[0.5"),
    ],
)
def test_another_tokenizer_is_refused_by_name(tmp_path, rng, change, name):
    write_store(tmp_path, rng, [4])
    other = dataclasses.replace(TOKENIZER, **change)
    with pytest.raises(UserError, match=f"was made with {name}"):
        open_store(tmp_path, other)
    with pytest.raises(UserError, match=f"was made with {name}"):
        StoreWriter(tmp_path, dataclasses.replace(SPEC, tokenizer=other))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"flame_sha256": "cd" * 32}, r"another head model, sha256 abab.* \(random\), not cdcd"),
        ({"canonical_jaw": 0.0}, "canonical_jaw 0.3, not 0.0"),
        ({"portrait_size": 9}, "portrait_size 5, not 9"),
        ({"out_of_bounds": "clip"}, "out_of_bounds error, not clip"),
        ({"keep": 0.5}, "keep 1.0, not 0.5"),
    ],
)
def test_another_head_or_canonical_pose_is_refused_by_name(tmp_path, rng, change, name):
    write_store(tmp_path, rng, [4])
    with pytest.raises(UserError, match=name):
        StoreWriter(tmp_path, dataclasses.replace(SPEC, **change))
    if "flame_sha256" in change:
        with pytest.raises(UserError, match=name):
            open_store(tmp_path, **change)
    # What a head is called does not matter.
    StoreWriter(tmp_path, dataclasses.replace(SPEC, flame_source="renamed"))


def test_a_fit_of_another_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not the store's"):
        subject_record("x", tmp_path, MODEL, SPEC)


def test_damage_is_named(tmp_path, rng):
    store, _ = write_store(tmp_path, rng, [40, 7])
    shard, meta = tmp_path / "tokens-00000.array_record", tmp_path / "meta.json"
    good, text, first = shard.read_bytes(), meta.read_text(), store.tokens(0).tobytes()
    for damaged, message in (
        (text.replace('"version": 1', '"version": 9'), "version 9"),
        (text.replace("pointillist-tokens", "other"), "format"),
        (text.replace('"num_points": 40', '"num_points": -1'), "damaged"),
        (text.replace('"num_points": 40', '"num_points": 41'), "is not what meta.json says"),
        (text.replace('"record": 1', '"record": 7'), "damaged"),
        (text.replace("tokens-00000", "../tokens"), "damaged"),
        (text.replace('"name": "person_0001"', '"name": "person_0000"'), "damaged"),
        (text.replace('"complete": true', '"complete": 1'), "damaged"),
        (text.replace('"portrait_size": 5', '"portrait_size": 6'), "is not what meta.json says"),
        (text.replace('"bins": 64', '"bins": 16'), "is not what meta.json says"),
        (text.replace('"bins": 64', '"bins": "many"'), "bins"),
        (text.replace("-0.34", "-0.33"), "is not what meta.json says"),  # The cube stands in every record too.
        (text.replace('"portrait_size": 5', '"portrait_size": 1e999'), "damaged"),
        (text.replace('"portrait_size": 5', '"portrait_size": "five"'), "damaged"),
        ("[]", "object"),
    ):
        assert damaged != text
        meta.write_text(damaged)
        with pytest.raises(UserError, match=message):
            open_store(tmp_path).tokens(0)
    meta.write_text(text)
    shard.write_bytes(good[:-1])
    with pytest.raises(FileFormatError, match=r"expected .* bytes"):
        open_store(tmp_path)
    shard.unlink()
    with pytest.raises(FileFormatError, match="is missing"):
        open_store(tmp_path)
    where = good.find(first[:64])
    assert where > 0
    shard.write_bytes(good[: where + 8] + b"\xff\xff" + good[where + 10 :])  # A flipped token breaks Riegeli's hash.
    with pytest.raises(FileFormatError, match=r"tokens-00000\.array_record: record 0"):
        open_store(tmp_path).tokens(0)
    with pytest.raises(FileNotFoundError, match=r"no meta\.json"):
        open_store(tmp_path / "nowhere")


def test_records_of_before_carry_no_bounds(tmp_path, rng, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(token_store, "_bounds", lambda spec: {})
        _, records = write_store(tmp_path, rng, [40, 7])
    store = open_store(tmp_path)
    np.testing.assert_array_equal(store.tokens(1), records[1].tokens)
    # Added ones do.
    writer = StoreWriter(tmp_path, SPEC)
    path = writer.write_shard([random_record(rng, "new", 12)])
    writer.finish()
    assert b'"lower": [-0.3, -0.3, -0.34]' in path.read_bytes()
    assert b'"lower"' not in (tmp_path / "tokens-00000.array_record").read_bytes()
    open_store(tmp_path).verify()


def test_tokens_that_break_the_grammar_are_found(tmp_path, rng):
    record = random_record(rng, "shuffled", 30)
    tokens = record.tokens.copy()
    tokens[4:-4] = tokens[4:-4].reshape(-1, 4)[::-1].ravel()
    writer = StoreWriter(tmp_path, SPEC)
    writer.write_shard([dataclasses.replace(record, tokens=tokens)])
    writer.finish()
    with pytest.raises(FileFormatError, match="tokens of shuffled: token"):
        open_store(tmp_path).verify()


ARRAYS = st.dictionaries(
    st.text("abc/_", min_size=1, max_size=8),
    hnp.arrays(st.sampled_from([np.int32, np.float32, np.float16, np.uint8]), hnp.array_shapes(min_dims=0, min_side=0)),
    max_size=5,
)


@given(ARRAYS, st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_records_round_trip(arrays, info):
    data = pack_record(info, arrays)
    assert data == pack_record(info, arrays)
    have_info, have = unpack_record(data, "a record")
    assert have_info == info
    assert have.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(have[name], value)
        assert have[name].dtype == value.dtype


@given(ARRAYS, st.data())
def test_damaged_records_are_refused_or_read_never_more(arrays, data):
    """Any flip or cut gives a FileFormatError, or arrays that lie inside the bytes there are."""
    packed = bytearray(pack_record({"a": 1}, arrays))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = bytes(packed[: data.draw(st.integers(0, len(packed)))])
    try:
        _, have = unpack_record(packed, "a record")
    except FileFormatError:
        return
    assert sum(a.nbytes for a in have.values()) <= len(packed) * max(len(have), 1)


def test_records_of_other_types_are_a_defect():
    with pytest.raises(TypeError, match="float64"):
        pack_record({}, {"x": np.zeros(3)})


def test_the_same_store_has_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_store(tmp_path / name, np.random.default_rng(5), [20, 3, 9], shard=2)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["meta.json", "tokens-00000.array_record", "tokens-00001.array_record"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["shards"][1]["sha256"] == file_sha256(tmp_path / "a" / "tokens-00001.array_record")
