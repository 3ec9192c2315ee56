"""Good inputs of every script, the ways to spoil them, and the table of what each script is given.

A script that is added to `experiments/` gets an entry in `SCRIPTS` here: the test fails until it has one.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pointillist_jax.data.point_features import FeatureSet
from pointillist_jax.flame import bind_points, open_head
from pointillist_jax.flame.model import save_flame
from pointillist_jax.gaussians import Avatar, Gaussians, save_avatar
from tests.data.fit_files import write_fit
from tests.experiments.decoder_runs import small, write_decoder, write_everything
from tests.fitting.scenes import write_person

NOISE = np.random.default_rng(7).bytes(700)
# Kind of an input → how the whole of it can be wrong.
WRONG = {
    "folder": ("missing", "a file", "empty folder"),
    "file": ("missing", "a folder", "empty file", "noise", "cut"),
    # Of weights and heads there is no good file at hand.
    "weights": ("missing", "a folder", "empty file", "noise", "text"),
}


@dataclasses.dataclass(frozen=True)
class Script:
    """What a script is given.

    Attributes:
      good: flags it runs with; {root} is the folder of `write_good`.
      inputs: flag of an input → its kind in `WRONG`, and more flags that make the script look at it.
      damage: (flag of a folder, glob in it, ways of `spoil`).
      values: flags out of range, or that do not go together → what the sentence must hold.
      without: flag of an input → flags of `good` that it excludes.
      output: flag that names where it writes, and the name below a folder of the test's own.
      spaces: bytes on a disk that is too small for what it writes.
    """

    good: tuple[str, ...] = ()
    inputs: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    damage: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    without: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    output: tuple[str, str] | None = None
    spaces: tuple[int, ...] = (0,)


FIT = {"iterations": 4, "densify_from": 1, "densify_interval": 2, "save_interval": 2, "max_points": 50}
STAGE_ONE = {"model.layers": 1, "model.width": 16, "model.head_dim": 8, "model.heads": 2, "model.mlp_width": 16,
             "model.window": 32, "model.encoder.image_size": 14, "model.encoder.num_points": 16, "data.held_out": 1,
             "train.steps": 2, "train.batch_size": 2, "train.warmup_steps": 1}  # fmt: skip
ENCODER = ("--config.model.encoder.image_size=14", "--config.model.encoder.num_points=16")
COMPARE = {"model.width": 32, "model.layers": 1, "model.head_dim": 16, "model.mlp_width": 48, "model.bins": 32,
           "model.num_faces": 40, "model.window": 16, "decoder.width": 24, "decoder.layers": 1,
           "decoder.head_dim": 8, "decoder.mlp_width": 24}  # fmt: skip
BENCH = {"model.layers": 1, "model.width": 32, "model.head_dim": 16, "model.mlp_width": 48}


def config(settings: dict[str, object], prefix: str = "") -> tuple[str, ...]:
    return tuple(f"--config.{prefix}{name}={value}" for name, value in settings.items())


# What one loader reads is spoiled in every way for one script, and once for the others.
CHECKPOINT = (
    ("checkpoints/*", ("gone",)),
    ("checkpoints/*/params", ("gone",)),
    ("checkpoints/*/meta", ("gone",)),
    ("checkpoints/*/meta/metadata", ("cut", "noise", "types")),
    ("checkpoints/*/params/manifest.ocdbt", ("cut", "noise")),
)
SOME_CHECKPOINT = (("checkpoints/*/meta/metadata", ("types",)),)
STORE = (("meta.json", ("gone", "cut", "types", "a folder")), ("tokens-*", ("gone", "cut", "noise")))
SOME_STORE = (("tokens-*", ("noise",)),)
CAPTURE = (
    ("p0/transforms_train.json", ("cut", "types", "noise")),
    ("p0/transforms_val.json", ("gone", "types")),
    ("p0/canonical_flame_param.npz", ("gone", "cut", "nan", "shapes")),
    ("p0/flame_param/00000.npz", ("gone", "cut", "nan", "shapes")),
    ("p0/images/*.png", ("gone", "cut", "noise", "empty file")),
)
SOME_CAPTURE = (("p0/transforms_train.json", ("noise",)), ("p0/images/*.png", ("cut",)))


def damage(flag: str, entries: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return tuple((flag, glob, ways) for glob, ways in entries)


FLAME = {"flame": ("weights",)}
SCRIPTS: dict[str, Script] = {
    "make_identities": Script(
        good=("--num_identities=1", "--timesteps=2", "--size=16", "--portrait_size=16", "--detail=coarse",
              "--config.identities.density=0.02"),
        inputs={"flame": ("weights",)},
        values={"--size=0": "size", "--num_identities=0": "num_identities", "--timesteps=1": "timesteps",
                "--shard=1": "shard", "--processes=0": "processes", "--config=huge": "config", "--size=big": "size",
                "--config.identities.density=-1": "density", "--seed=-1": "seed", "--resume --overwrite": "resume"},
        output=("workdir", "people"),
    ),
    "fit": Script(
        good=("--capture={root}/balls", "--subjects=ball_0", "--flame={root}/ball.npz", *config(FIT, "fit.")),
        inputs={"capture": ("folder",), "flame": ("weights",)},
        damage=damage("capture", [(g.replace("p0", "ball_0"), ways) for g, ways in CAPTURE]),
        values={"--subjects=nobody": "nobody", "--config.fit.max_points=1": "max_points", "--shard=1": "shard",
                "--downscale=0": "downscale", "--downscale=99": "downscale",
                "--config.fit.iterations=0": "iterations", "--config.fit.sh_degree=9": "sh_degree",
                "--config.fit.lr_means=nan": "lr_means"},
        output=("workdir", "fits"),
        spaces=(0, 10_000),
    ),
    "tokenize": Script(
        good=("--fits={root}/fits", "--captures={root}/captures", "--detail=coarse", "--config.data.portrait_size=14"),
        inputs={"fits": ("folder",), "captures": ("folder",)},
        damage=(
            *damage("fits", [("p0/point_cloud.ply", ("cut", "noise", "empty file")),
                             ("p0/flame_param.npz", ("gone", "cut", "nan", "shapes"))]),
            *damage("captures", [("p0/transforms_val.json", ("cut", "types"))]),
        ),
        values={"--subjects=nobody": "nobody", "--subjects=": "chooses nobody", "--bounds=1,2": "bounds",
                "--bounds=0,0,0,0,0,0": "lower",
                "--bounds=0,0,0,0.01,0.01,0.01": "outside the box", "--append": "append",
                "--config.data.bins=1": "bins",
                "--config.data.portrait_size=0": "portrait_size", "--bounds=nan,0,0,1,1,1": "nan",
                "--config.data.subjects_per_shard=0": "subjects_per_shard", "--detail=huge": "detail"},
        output=("workdir", "tokens"),
        spaces=(0, 40_000),
    ),
    "encode_conditions": Script(
        good=("--store={root}/store", "--random_weights", *ENCODER),
        inputs={"store": ("folder",),
                "image_weights": ("weights", "--norandom_weights", "--point_weights={root}/me.npz")},
        damage=damage("store", SOME_STORE),
        values={"--batch_size=0": "batch_size", "--config.model.encoder.image_size=15": "image_size",
                "--dtype=int8": "dtype", "--norandom_weights": "weights"},
    ),
    "train_ar": Script(
        good=("--store={root}/store", *config(STAGE_ONE)),
        inputs={"store": ("folder",), "flame": ("weights",), "image_weights": ("weights",)},
        damage=damage("store", SOME_STORE),
        values={"--mesh=data:0": "mesh", "--mesh=nothing": "mesh", "--mesh=data:7": "mesh", "--profile=3": "profile",
                "--profile=5:9": "profile", "--config.model.window=30": "window", "--config.train.steps=0": "steps",
                "--config.train.batch_size=0": "batch_size", "--config.model.heads=0": "heads",
                "--config.train.learning_rate=-1": "learning_rate",
                "--config.data.bins=512": "bins says 512", "--config.data.subjects_per_shard=2": "nothing",
                "--config.data.lower=-1,-1,-1": "data.lower", "--config.data.upper=1,1,1": "data.upper",
                "--config.data.keep=0.5": "made with 1.0", "--config.model.num_faces=9": "num_faces",
                "--config.model.encoder.frozen": "encode_conditions", "--config.model.dtype=int8": "dtype",
                "--config.model.dtype=float64": "JAX_ENABLE_X64", "--config.train.b2=1": "train.b2=1.0 must be",
                "--config.model.attention=flash": "attention", "--config.model.encoder.image=vitx14": "vits14_reg",
                "--config.model.encoder.image=vits14_reg": "--image_weights", "--random_weights": "does nothing",
                "--config.model.encoder.frozen --image_weights=x.pth": "image_weights does nothing",
                "--resume --overwrite": "resume",
                "--coordinator=nowhere --num_processes=2": "process_id"},
        output=("workdir", "ar"),
        spaces=(0, 60_000),
    ),
    "extract_features": Script(
        good=("--ar={root}/ar", "--store={root}/store"),
        inputs={"ar": ("folder",), "store": ("folder",), "flame": ("weights",)},
        damage=(*damage("ar", CHECKPOINT), *damage("store", STORE)),
        values={"--subjects=nobody": "nobody", "--step=99": "99", "--shard=1": "shard", "--batch=0": "batch",
                "--temperature=1": "temperature", "--top_p=2": "top_p",
                "--image_weights={root}/me.npz": "image_weights"},
        output=("workdir", "features"),
        spaces=(0, 8_000),
    ),
    "generate": Script(
        good=("--ar={root}/ar", "--portrait={root}/me.png", "--tracker={root}/me.npz", "--max_points=2"),
        inputs={"ar": ("folder",), "portrait": ("file",), "tracker": ("file",), "prefix": ("file", "--max_points=9"),
                "flame": ("weights",)},
        damage=damage("ar", SOME_CHECKPOINT),
        values={"--timestep=5": "timestep", "--prefix=7": "prefix", "--temperature=-1": "temperature",
                "--subjects=p0": "subjects", "--step=99": "99", "--batch=0": "batch",
                "--store={root}/store": "either"},
        output=("workdir", "clouds"),
    ),
    "train_decoder": Script(
        good=("--features={root}/features", "--captures={root}/captures", *small(**{"train.steps": 1})),
        inputs={"features": ("folder",), "captures": ("folder",), "vgg": ("weights",), "flame": ("weights",)},
        damage=(
            *damage("features", [("meta.json", ("gone", "cut", "types")),
                                 ("p0.npz", ("cut", "nan", "shapes", "noise"))]),
            *damage("captures", SOME_CAPTURE),
        ),
        values={"--compare=nothing": "nothing", "--mesh=data:3": "mesh", "--ar={root}/ar": "ar",
                "--config.decoder.inputs=none_of_it": "inputs", "--config.decoder.views=0": "views",
                "--config.decoder.cross_attention": "--ar", "--downscale=0": "downscale",
                "--downscale=99": "downscale"},
        output=("workdir", "decoder"),
        spaces=(0, 60_000),
    ),
    "reconstruct": Script(
        good=("--decoder={root}/decoder", "--features={root}/features", "--store={root}/store", "--subjects=p0"),
        inputs={"decoder": ("folder",), "features": ("folder",), "store": ("folder",), "flame": ("weights",)},
        damage=(
            *damage("decoder", SOME_CHECKPOINT),
            *damage("features", [("meta.json", ("types",)), ("p0.npz", ("cut",))]),
        ),
        values={"--subjects=nobody": "nobody", "--portrait={root}/me.png": "either", "--ar={root}/ar": "ar",
                "--tracker={root}/me.npz": "tracker", "--temperature=1": "temperature"},
        output=("workdir", "avatars"),
    ),
    "animate": Script(
        good=("--avatar={root}/avatars/p0", "--motion=talk", "--frames=2", "--size=16"),
        inputs={"avatar": ("folder",), "capture": ("folder",), "flame": ("weights",)},
        damage=damage("avatar", [("gaussians.ply", ("gone", "cut", "noise", "empty file")),
                                 ("rig.npz", ("gone", "cut", "nan", "shapes")),
                                 ("avatar.json", ("gone", "cut", "types"))]),
        values={"--motion=dance": "motion", "--camera=above": "camera", "--size=1": "size", "--fps=0": "fps",
                "--frames=0": "frames", "--motion={root}/nowhere.npz": "nowhere.npz", "--split=test": "split",
                "--camera={root}/nowhere.json": "size"},
        without={"capture": ("motion", "frames", "size")},
        output=("output", "me.mp4"),
    ),
    "export": Script(
        good=("--checkpoint={root}/ar",),
        inputs={"checkpoint": ("folder",), "import": ("weights",)},
        damage=damage("checkpoint", SOME_CHECKPOINT),
        without={"import": ("checkpoint",)},
        values={"--format=word": "format", "--step=99": "99", "--format=ply --avatar={root}/avatars/p0": "checkpoint",
                "--frame=3": "frame"},
        output=("output", "ar.safetensors"),
    ),
    "evaluate": Script(
        good=("--ar={root}/ar", "--decoder={root}/decoder", "--store={root}/store", "--captures={root}/captures",
              "--baselines=none", "--max_points=2", "--views=1"),
        inputs={"ar": ("folder",), "decoder": ("folder",), "store": ("folder",), "captures": ("folder",),
                "vgg": ("weights",)},
        damage=(*damage("ar", SOME_CHECKPOINT), *damage("decoder", SOME_CHECKPOINT), *damage("store", SOME_STORE)),
        values={"--protocols=nothing": "nothing", "--baselines=nothing": "nothing", "--subjects=nobody": "nobody",
                "--views=-1": "views", "--downscale=0": "downscale", "--baselines=all": "--fits",
                "--resume --overwrite": "resume"},
        output=("workdir", "evaluation"),
        spaces=(),
    ),
    "view": Script(
        good=("--avatar={root}/avatars/p0", "--port=0"),
        inputs={"avatar": ("folder",), "flame": ("weights",)},
        damage=damage("avatar", [("gaussians.ply", ("cut",)), ("rig.npz", ("nan",))]),
        values={"--motion=dance": "motion", "--port=70000": "port", "--host=nowhere.invalid": "host",
                "--frames=1": "frames", "--fps=0": "fps"},
    ),
    "pretrain": Script(
        good=("--smoke",),
        values={"--num_identities=0": "num_identities", "--processes=0": "processes", "--seed=-1": "seed",
                "--resume --overwrite": "resume"},
        output=("workdir", "pretrained"),
        spaces=(),
    ),
    "preset_table": Script(values={"--presets=huge": "huge", "--devices=abacus": "abacus", "--utilisation=2": "utili"}),
    "scaling_study": Script(
        good=config(BENCH),
        inputs={"store": ("folder", "--mode=size")},
        values={"--mode=size --sizes=30x1": "sizes", "--mode=size --sizes=x": "sizes", "--mode=size": "--store",
                "--mode=nothing": "mode", "--stages=three": "stages", "--mode=predict --hardware=abacus": "abacus",
                "--mode=predict --simulate=8": "simulate", "--mode=predict --meshes=nothing": "mesh",
                "--mode=predict --device_counts=0": "device_counts", "--device_counts=64": "simulate",
                "--resume --overwrite": "resume"},
        output=("workdir", "scaling"),
        spaces=(),
    ),
    "compare_torch": Script(
        good=("--what=blocks", "--length=8", "--points=4", *config(COMPARE)),
        values={"--what=nothing": "nothing", "--length=9": "length", "--seeds=x": "seeds", "--steps=0": "steps",
                "--dtype=int8": "dtype", "--config.model.width=0": "width"},
        output=("workdir", "compared"),
    ),
    "quickstart": Script(
        good=("--portrait={root}/me.png",),
        inputs={"portrait": ("file",), "flame": ("file",)},
        values={"--train --people=1": "people", "--size=1": "size", "--frames=0": "frames", "--people=4": "people",
                "--train": "portrait", "--crop=1,2": "crop", "--crop=0,0,999": "crop", "--flame=flame2023.pkl": ".pkl"},
        output=("workdir", "quickstart"),
        spaces=(),
    ),
    "build_open_head": Script(inputs={"wheel": ("weights",)}),
    "bench_animate": Script(values={"--gaussians=0": "gaussians", "--sizes=x": "sizes", "--detail=huge": "detail"}),
    "bench_data": Script(
        values={"--windows=x": "windows", "--windows=30": "windows", "--points=0": "points",
                "--against=huge": "against"},
    ),
    "bench_decode": Script(
        good=config(BENCH),
        values={"--batches=0": "batches", "--positions=x": "positions", "--cache_dtype=int7": "cache_dtype",
                "--config.model.step=leap": "step"},
    ),
    "bench_flame": Script(values={"--poses=0": "poses", "--points=-1": "points", "--repeats=x": "repeats"}),
    "bench_render": Script(values={"--repeats=0": "repeats", "--against=paint": "against"}),
    "bench_stage_two": Script(
        inputs={"vgg": ("weights",)},
        values={"--points=0": "points", "--sizes=": "sizes", "--subjects=0": "subjects"},
    ),
    "bench_train": Script(
        good=config(BENCH),
        values={"--windows=30": "windows", "--batch=0": "batch", "--mesh=nothing": "mesh",
                "--against=paper": "against"},
    ),
}  # fmt: skip


def write_good(root: Path) -> None:
    """Everything that `{root}` in `SCRIPTS` stands for."""
    write_everything(root)
    rng = np.random.default_rng(3)
    for i in range(2):
        write_fit(root / f"fits/p{i}", rng, 60, spread=0.1)
        model = write_person(root / f"balls/ball_{i}", i)
    save_flame(root / "ball.npz", model)
    write_decoder(root / "decoder", FeatureSet(root / "features"))
    write_avatar(root / "avatars/p0", rng)


def write_avatar(folder: Path, rng: np.random.Generator, num: int = 20) -> None:
    head = open_head("coarse")
    canonical = head.neutral_params().canonical()
    points, binding = rng.uniform(-0.1, 0.1, (num, 3)), rng.integers(0, head.num_faces, num)
    gaussians = Gaussians(
        means=points,
        quats=rng.normal(size=(num, 4)),
        scales=np.full((num, 3), 0.01),
        opacities=np.full(num, 0.5),
        colors=rng.uniform(size=(num, 3)),
    )
    gaussians = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gaussians)
    save_avatar(folder, Avatar(gaussians, bind_points(head, canonical, gaussians.means, binding)))


def filled(arguments: Sequence[str], root: Path) -> list[str]:
    return [argument.replace("{root}", str(root)) for argument in arguments]


def wrong_path(way: str, good: Path | None, folder: Path) -> Path:
    """A path below `folder` that is wrong in this way."""
    path = folder / ("wrong" + (good.suffix if good else ".pth"))
    if way == "missing":
        return path
    if way in ("a folder", "empty folder"):
        path.mkdir()
        if way == "a folder":
            (path / "something").write_text("1")
        return path
    contents: dict[str, Callable[[], bytes]] = {
        "a file": lambda: b"not a folder\n",
        "empty file": lambda: b"",
        "noise": lambda: NOISE,
        "text": lambda: b"I am some text.\n" * 40,
        "cut": lambda: good.read_bytes()[: good.stat().st_size // 2],
    }
    path.write_bytes(contents[way]())
    return path


def spoiled(good: Path, glob: str, way: str, folder: Path) -> tuple[Path, Path]:
    """A copy of an input folder with one file spoiled: (the copy, the file)."""
    copy = folder / "spoiled"
    shutil.copytree(good, copy)
    path = sorted(copy.glob(glob))[0]
    spoil(path, way)
    return copy, path


def spoil(path: Path, way: str) -> None:
    """Spoils a file in place."""
    if way in ("gone", "a folder"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if way == "a folder":
            path.mkdir()
        return
    data = path.read_bytes()
    match way:
        case "cut":
            data = data[: len(data) // 2]
        case "noise":
            data = NOISE
        case "empty file":
            data = b""
        case "types":  # JSON with the keys it should have, and values of no kind that anyone expects.
            data = json.dumps(dict.fromkeys(json.loads(data), "x")).encode()
        case "nan" | "shapes":
            with np.load(io.BytesIO(data)) as file:
                arrays = dict(file)
            for key, value in arrays.items():
                if way == "shapes":
                    arrays[key] = value.reshape(-1)[:1].repeat(7)
                elif value.dtype.kind == "f" and value.size:
                    arrays[key] = np.full_like(value, np.nan)
            stream = io.BytesIO()
            np.savez(stream, **arrays)
            data = stream.getvalue()
        case _:
            raise AssertionError(way)
    path.write_bytes(data)


def cases() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(script, "flags" | "input" | "damage", what it needs) of all bad inputs."""
    for name, script in SCRIPTS.items():
        for flags, said in ({"--nope=1": "nope", "extra": "'extra'"} | script.values).items():
            yield name, "flags", (flags, said)
        for flag, (kind, *_) in script.inputs.items():
            for way in WRONG[kind]:
                yield name, "input", (flag, way)
        for flag, glob, ways in script.damage:
            for way in ways:
                yield name, "damage", (flag, glob, way)
