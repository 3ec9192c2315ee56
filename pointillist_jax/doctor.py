"""What this machine has and lacks, and whether files of the user's own can be used.

    python -m pointillist_jax.doctor
    python -m pointillist_jax.doctor --flame=flame2023.pkl --captures=… --fits=… --dinov2=… --michelangelo=… --vgg=…
        --tracker=… --weights=…

Without flags: one line each for versions, devices, kernels and optional parts, with the command that fixes what is
missing. With flags: one line for each file or folder, which is really loaded (`doctor_files`). Exit code 1 if something
the package needs does not work or a file cannot be used, 0 if only optional parts are missing, 2 for a flag that does
not exist. Imports nothing optional at the top.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator

from pointillist_jax.doctor_files import BROKEN, FLAGS, OK, OPTIONAL, Finding, examine_files

# Import name → distribution name of everything in pyproject.toml's core dependencies.
CORE = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "grain": "grain",
    "array_record": "array-record",
    "numpy": "numpy",
    "einops": "einops",
    "chex": "chex",
    "absl": "absl-py",
    "ml_collections": "ml-collections",
    "jaxtyping": "jaxtyping",
    "imageio": "imageio",
    "imageio_ffmpeg": "imageio-ffmpeg",
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "tqdm": "tqdm",
    "tensorboardX": "tensorboardX",
}
INSTALL = "pip install -e ."
INSTALL_GPU = "pip install -e '.[gpu]'"
INSTALL_TORCH = "pip install -e '.[torch]'"
INSTALL_VIEWER = "pip install -e '.[viewer]'"
INSTALL_EXPORT = "pip install -e '.[export]'"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def examine() -> Iterator[Finding]:
    """Yields the findings one by one; a check that fails unforeseen becomes a BROKEN line, not a traceback."""
    for check in (_python, _core, _devices, _compiles, _open_head, _video, _torch, _bridge, _gsplat, _viser, _gsply,
                  _browser):  # fmt: skip
        try:
            yield from check()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            yield Finding(BROKEN, check.__name__.strip("_").replace("_", " "), reason[0][:200], INSTALL)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    paths = vars(_parser().parse_args(arguments))
    if any(paths.values()):
        findings = _report(examine_files(paths))
        broken = [f.name for f in findings if f.status == BROKEN]
        print(f"\ncannot be used: {', '.join(broken)}" if broken else "\neverything that was named can be used")
        return 1 if broken else 0
    findings = _report(examine())
    broken = [f.name for f in findings if f.status == BROKEN]
    missing = [f.name for f in findings if f.status == OPTIONAL]
    print(f"\n{'needs mending: ' + ', '.join(broken) if broken else 'everything that is needed works'}", end="")
    print(f"; optional and missing: {', '.join(missing)}" if missing else "")
    return 1 if broken else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pointillist_jax.doctor", allow_abbrev=False,
                     description="Checks this installation, or files of your own.")  # fmt: skip
    for name, (what, _) in FLAGS.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=what)
    return parser


def _report(findings: Iterable[Finding]) -> list[Finding]:
    """Prints the findings as they come."""
    found = []
    for finding in findings:
        found.append(finding)
        print(f"{finding.status:<9} {finding.name:<18} {finding.found}", flush=True)
        if finding.fix:
            print(f"{'':<9} {'':<18} fix: {finding.fix}")
    return found


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    fix = "" if good else "use Python 3.11 or newer"
    yield Finding(OK if good else BROKEN, "python", f"{version} on {platform.system()} {platform.machine()}", fix)


def _core() -> Iterator[Finding]:
    found, missing = [], []
    for module, distribution in CORE.items():
        try:
            importlib.import_module(module)
            found.append(f"{distribution} {importlib.metadata.version(distribution)}")
        except Exception as error:
            missing.append(f"{distribution} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
    yield Finding(OK, "packages", ", ".join(found))
    if missing:
        yield Finding(BROKEN, "packages", f"missing or broken: {', '.join(missing)}", INSTALL)


def _devices() -> Iterator[Finding]:
    import jax

    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform == "gpu" else None
        size = f", {memory / 2**30:.0f} GiB for JAX" if memory else ""
        yield Finding(OK, "device", f"{device.platform}:{device.id} {device.device_kind}{size}")
    has_gpu = any(device.platform == "gpu" for device in jax.devices())
    if not has_gpu and shutil.which("nvidia-smi"):
        yield Finding(OPTIONAL, "gpu", "this machine has an NVIDIA driver, but JAX sees only the CPU", INSTALL_GPU)


def _compiles() -> Iterator[Finding]:
    import jax
    import jax.numpy as jnp

    value = float(jax.jit(lambda x: (x @ x.T).sum())(jnp.ones((8, 8))))
    if value != 512:
        yield Finding(BROKEN, "jit", f"a matrix product gave {value}, expected 512", f"{INSTALL} --force-reinstall")
    else:
        yield Finding(OK, "jit", "compiles and runs")
    if jax.default_backend() == "gpu":
        yield _cudnn_attention()


def _cudnn_attention() -> Finding:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)
    try:
        out = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        jax.block_until_ready(out)
    except Exception as error:
        reason = str(error).splitlines()[0][:120]
        return Finding(OPTIONAL, "cudnn attention", f"fails ({reason}); slower paths are used", INSTALL_GPU)
    return Finding(OK, "cudnn attention", "works")


def _open_head() -> Iterator[Finding]:
    import jax.numpy as jnp

    from pointillist_jax.flame import flame_vertices, open_head

    for detail in ("full", "coarse"):
        model = open_head(detail)
        finite = bool(jnp.isfinite(flame_vertices(model, model.neutral_params())).all())
        text = f"{detail}: {model.num_vertices} vertices, {model.num_faces} faces, {len(model.expr_names)} expressions"
        yield Finding(OK if finite else BROKEN, "open head", text, "" if finite else f"{INSTALL} --force-reinstall")


def _video() -> Iterator[Finding]:
    import imageio_ffmpeg

    yield Finding(OK, "video", f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        yield Finding(OPTIONAL, "torch", "not installed: no gsplat, no PyTorch checkpoints", INSTALL_TORCH)
        return
    cuda = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU only"
    yield Finding(OK, "torch", f"{torch.__version__}, {cuda}")


def _bridge() -> Iterator[Finding]:
    """The way tensors go between JAX and torch: DLPack without a copy, inside jit."""
    try:
        from jax.experimental.buffer_callback import buffer_callback  # noqa: F401
    except ImportError:
        yield Finding(OPTIONAL, "buffer_callback", "this JAX has none: gsplat runs outside jit", "pip install -U jax")
        return
    try:
        import torch
    except ImportError:
        yield Finding(OPTIONAL, "dlpack", "needs torch", INSTALL_TORCH)
        return
    import jax.numpy as jnp

    array = jnp.arange(64, dtype=jnp.float32)
    tensor = torch.from_dlpack(array)
    shared = tensor.data_ptr() == array.unsafe_buffer_pointer()
    found = "JAX arrays are torch tensors without a copy" if shared else "works, but copies"
    yield Finding(OK if shared else OPTIONAL, "dlpack", found, "" if shared else "pip install -U jax torch")


def _gsplat() -> Iterator[Finding]:
    import jax

    try:
        version = importlib.metadata.version("gsplat")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version and jax.default_backend() == "gpu":
        from renderer_bridge import gsplat_dlpack

        # Loads its CUDA kernels: better here than within a program.
        reason = gsplat_dlpack.unavailable()
        found = (
            f"{version}: {reason}: rendering uses the slower JAX rasteriser" if reason else f"{version}, kernels load"
        )
        yield Finding(OPTIONAL if reason else OK, "gsplat", found, INSTALL_GPU if reason else "")
    elif version:
        yield Finding(OK, "gsplat", f"{version} (its kernels need a CUDA GPU)")
    elif jax.default_backend() == "gpu":
        yield Finding(OPTIONAL, "gsplat", "not installed: rendering uses the slower JAX rasteriser", INSTALL_GPU)
    else:
        yield Finding(OPTIONAL, "gsplat", "not installed; it needs a CUDA GPU", f"{INSTALL_GPU}   (on a CUDA machine)")


def _viser() -> Iterator[Finding]:
    yield _package("viser", "viewer", "no viewer in the browser, no HTML player", INSTALL_VIEWER)


def _gsply() -> Iterator[Finding]:
    yield _package("gsply", ".spz files", "no export to .spz", INSTALL_EXPORT)


def _package(name: str, part: str, without: str, fix: str) -> Finding:
    """An optional package that is only looked up: some take seconds to import."""
    try:
        return Finding(OK, part, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(OPTIONAL, part, f"{name} is not installed: {without}", fix)


def _browser() -> Iterator[Finding]:
    """A browser without a window: only the tests of the web pages need one."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        fix = "apt-get install chromium   (or your system's package of it)"
        yield Finding(
            OPTIONAL, "browser", "no chromium: tests of the web pages are skipped, nothing else needs it", fix
        )
        return
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    yield Finding(OK, "browser", f"{said.splitlines()[0] if said else 'found'} ({found})")


if __name__ == "__main__":
    sys.exit(main())
