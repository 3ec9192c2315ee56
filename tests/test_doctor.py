"""`doctor` with files of the user's own: each is loaded and named in one line, and what is wrong comes with a fix."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from experiments.random_flame import random_flame, write_flame
from pointillist_jax import doctor
from pointillist_jax.configs import ModelConfig, config_from_json
from pointillist_jax.convert.reference import ar_to_torch, save_reference
from pointillist_jax.flame.param_files import save_flame_params
from pointillist_jax.training.checkpoints import load_params
from tests.convert.torch_weights import hub_state, huggingface_dinov2, randomize
from tests.data.capture_files import write_capture
from tests.data.fit_files import MODEL, random_person, write_fit
from tests.experiments.small_ar import write_ar, write_people
from tests.losses.test_lpips import random_vgg

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")


@pytest.fixture
def said(capsys):
    """Runs doctor; returns exit code, and (status, name, text) and fixes of the lines it printed."""

    def run(*arguments: str):
        code = doctor.main([str(a) for a in arguments])
        lines = capsys.readouterr().out.splitlines()
        found = [m.groups() for line in lines if (m := re.match(r"(ok|optional|BROKEN) +(\w+) +(.+)", line))]
        fixes = [line.split("fix: ", 1)[1] for line in lines if "fix: " in line]
        return code, found, fixes, lines[-1]

    return run


def good(said, flag, path, *more):
    """The one line about a file that can be used."""
    code, found, fixes, last = said(f"--{flag}={path}", *more)
    assert code == 0, found
    assert not fixes
    assert last == "everything that was named can be used"
    line = next(one for one in found if one[1] == flag)
    assert line[0] == "ok"
    assert line[2].startswith(f"{path}: ")
    return line[2]


def bad(said, flag, path, *more):
    """The one line about a file that cannot be used; it has a fix."""
    code, found, fixes, last = said(f"--{flag}={path}", *more)
    assert code == 1
    assert last.startswith("cannot be used: ")
    (line,) = [one for one in found if one[1] == flag]
    assert line[0] == "BROKEN"
    assert str(path) in line[2]
    assert fixes
    assert all("docs/bring_your_own.md" in fix for fix in fixes)
    return line[2]


def test_flame(said, flame_pickle, tmp_path):
    line = good(said, "flame", flame_pickle)
    assert "5143 vertices, 10144 faces, 300 shape and 100 expression directions" in line
    assert "jaw does not move" not in line
    content = random_flame()
    weights = content["weights"]
    weights[:, 0] += weights[:, 2]
    weights[:, 2] = 0
    content["posedirs"] = 0 * content["posedirs"]
    assert "jaw does not move" in good(said, "flame", write_flame(tmp_path / "no_jaw.pkl", content))
    content["v_template"] = 1000 * content["v_template"]
    assert "100.0]" in bad(said, "flame", write_flame(tmp_path / "mm.pkl", content))
    content["v_template"] = content["v_template"] / 1e5
    assert "not a head's size" in bad(said, "flame", write_flame(tmp_path / "small.pkl", content))
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "nothing was executed" in bad(said, "flame", tmp_path / "evil.pkl")
    assert "does not exist" in bad(said, "flame", tmp_path / "gone.pkl")


def test_captures_and_fits(said, rng, tmp_path, flame_pickle):
    for name in ("a", "b"):
        write_capture(tmp_path / "captures" / name, MODEL, rng)
    assert "2 captures of open_head(coarse): 8 timesteps, 2 training cameras, 24 pictures of 20 × 16" in good(
        said, "captures", tmp_path / "captures"
    )
    next((tmp_path / "captures/a/images").iterdir()).write_bytes(b"no picture")
    assert "a is not a usable capture, 1 problem" in bad(said, "captures", tmp_path / "captures")
    assert "expected transforms_train.json" in bad(said, "captures", tmp_path / "nowhere")
    write_fit(tmp_path / "fits/one", rng, 7)
    write_fit(tmp_path / "fits/two", rng, 12)
    assert "2 fits of 7 to 12 Gaussians, bound to open_head(coarse)" in good(said, "fits", tmp_path / "fits")
    # Another head than the one they were made with.
    assert "one" in bad(said, "fits", tmp_path / "fits", f"--flame={flame_pickle}")
    (tmp_path / "fits/one/point_cloud.ply").write_bytes(b"ply\n")
    assert "if it is FLAME's, give --flame too" in bad(said, "fits", tmp_path / "fits")


def test_dinov2(said, rng, tmp_path):
    published = huggingface_dinov2(rng, width=384, layers=12, heads=6)
    published.save_pretrained(tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    assert "DINOv2 vits14_reg; train with --config.model.encoder.image=vits14_reg" in good(said, "dinov2", path)
    small = huggingface_dinov2(rng, width=64, layers=2)
    small.save_pretrained(tmp_path / "small")
    from safetensors.torch import load_file

    state = hub_state({k: v.numpy() for k, v in load_file(tmp_path / "small/model.safetensors").items()})
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "small.pth")
    assert "no published size: width 64, 2 layers, 4 registers" in good(said, "dinov2", tmp_path / "small.pth")
    state["norm.weight"][3] = np.nan
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "nan.pth")
    code, found, fixes, _ = said(f"--dinov2={tmp_path / 'nan.pth'}")
    assert code == 1
    assert "norm.weight" in found[0][2]
    assert "download dinov2_vitl14_reg4_pretrain.pth again" in fixes[0]


def test_michelangelo_and_vgg(said, rng, tmp_path):
    from tests.models import torch_point_encoder as twin

    encoder = twin.PointEncoder(width=128, layers=2, heads=2, queries=9)
    randomize(encoder, rng)
    torch.save({"state_dict": twin.checkpoint(encoder)}, tmp_path / "shapevae.ckpt")
    assert "a point encoder of 9 queries, width 128, 2 layers" in good(said, "michelangelo", tmp_path / "shapevae.ckpt")
    vgg = {k: torch.from_numpy(v) for k, v in random_vgg(rng).items()}
    torch.save(vgg, tmp_path / "vgg16.pth")
    assert re.search(r"VGG16 for LPIPS: .* are 0\.\d+ apart", good(said, "vgg", tmp_path / "vgg16.pth"))
    # Each in the other's place.
    code, found, fixes, last = said(f"--vgg={tmp_path / 'shapevae.ckpt'}", f"--michelangelo={tmp_path / 'vgg16.pth'}")
    assert code == 1
    assert [one[:2] for one in found] == [("BROKEN", "michelangelo"), ("BROKEN", "vgg")]
    assert len(fixes) == 2
    assert last == "cannot be used: michelangelo, vgg"


def test_tracker(said, rng, tmp_path):
    params = random_person(rng)
    save_flame_params(tmp_path / "flame_param.npz", params, MODEL)
    line = good(said, "tracker", tmp_path / "flame_param.npz")
    assert "FLAME parameters (VHAP, LAM, GaussianAvatars), 1 file, 3 timesteps for open_head(coarse)" in line
    (tmp_path / "notes.txt").write_text("hello")
    assert "no tracker output" in bad(said, "tracker", tmp_path / "notes.txt")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "flame_param.npz").read_bytes()[:200])
    assert "cannot be read as .npz" in bad(said, "tracker", tmp_path / "cut.npz")


def test_tracker_of_another_edition(said, rng, tmp_path):
    from tests.convert.tracker_files import loaded, somebody, write_editions, write_pixel3dmm

    editions = write_editions(tmp_path)
    old = loaded(editions.old)
    folder = write_pixel3dmm(tmp_path / "tracked", old, somebody(rng, old))
    line = good(said, "tracker", folder, f"--flame={editions.new}")
    assert "Pixel3DMM .frame, 1 file, 1 timestep for new.pkl" in line
    alone = write_pixel3dmm(tmp_path / "alone", old, somebody(rng, old), meshes=False)
    assert "--tracker_flame" in bad(said, "tracker", alone, f"--flame={editions.new}")
    good(said, "tracker", alone, f"--flame={editions.new}", f"--tracker_flame={editions.old}")


def test_weights(said, tmp_path):
    write_ar(tmp_path / "ar", write_people(tmp_path / "store", 3))
    line = good(said, "weights", tmp_path / "ar")
    assert re.search(r"a trained ar of step 7, 0\.\d\d M parameters; use it by --ar=", line)
    params, meta = load_params(tmp_path / "ar")
    config = config_from_json(ModelConfig, meta["config"]["model"], "here")
    path = tmp_path / "ar.safetensors"
    save_reference(path, ar_to_torch(params, config), {"kind": "ar", "step": 7, "config": meta["config"], "meta": {}})
    assert "use it by python -m experiments.export" in good(said, "weights", path)
    nan = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    save_reference(path, ar_to_torch(nan, config), {"kind": "ar", "step": 7, "config": meta["config"], "meta": {}})
    assert "NaN or infinite weights" in bad(said, "weights", path)
    assert "has no checkpoint" in bad(said, "weights", tmp_path / "store")


def test_flags_that_do_not_exist_are_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--flam=x"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --flam=x (see --help)\n"


@pytest.mark.parametrize(
    ("check", "missing", "name", "fix"),
    [
        (doctor._viser, "viser", "viewer", "pip install -e '.[viewer]'"),
        (doctor._gsply, "gsply", ".spz files", "pip install -e '.[export]'"),
        (doctor._browser, None, "browser", "apt-get install chromium"),
    ],
)
def test_optional_parts_name_the_command_that_installs_them(monkeypatch, check, missing, name, fix):
    def version(package):
        if package == missing:
            raise doctor.importlib.metadata.PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = check()
    assert (finding.status, finding.name) == (doctor.OPTIONAL, name)
    assert fix in finding.fix
    # And found where they are there.
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda package: "1.2.3")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/echo" if name == "chromium" else None)
    (finding,) = check()
    assert (finding.status, finding.name, finding.fix) == (doctor.OK, name, "")
