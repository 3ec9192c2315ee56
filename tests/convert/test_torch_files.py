"""load_torch_file: what it reads, and that nothing a file says is executed or believed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from pointillist_jax.convert import load_torch_file
from pointillist_jax.files import FileFormatError, UnsafeFileError

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def tensors(rng):
    return {"a.weight": torch.from_numpy(rng.normal(size=(3, 4)).astype(np.float32)), "b": torch.arange(5)}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "teacher"])
def test_torch_files_are_read(tmp_path, tensors, suffix, wrapper):
    path = tmp_path / f"weights{suffix}"
    content = tensors if wrapper is None else {wrapper: tensors, "epoch": 3, "optimizer": {"state": [1.0]}}
    torch.save(content, path)
    arrays = load_torch_file(path)
    assert set(arrays) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(arrays[name], value.numpy())


def test_half_precision_transposed_and_old_files_are_read(tmp_path, tensors):
    torch.save({"half": tensors["a.weight"].bfloat16(), "turned": tensors["a.weight"].T}, tmp_path / "w.pt")
    arrays = load_torch_file(tmp_path / "w.pt")
    assert arrays["half"].dtype == np.float32
    np.testing.assert_allclose(arrays["half"], tensors["a.weight"].numpy(), rtol=2**-8)
    np.testing.assert_array_equal(arrays["turned"], tensors["a.weight"].numpy().T)
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(load_torch_file(tmp_path / "old.pth")["b"], np.arange(5))


def test_safetensors_are_read(tmp_path, tensors):
    from safetensors.torch import save_file

    save_file({"a": tensors["a.weight"], "half": tensors["a.weight"].bfloat16()}, tmp_path / "w.safetensors")
    arrays = load_torch_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["a"], tensors["a.weight"].numpy())
    assert arrays["half"].dtype == np.float32
    np.testing.assert_allclose(arrays["half"], arrays["a"], rtol=2**-8)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {}, "hyper_parameters": evil}])
def test_files_that_want_to_run_code_are_refused(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Evil()), "evil.ckpt")
    with pytest.raises(UnsafeFileError, match=r"evil\.ckpt holds more than tensors \(\w+\.system\).*nothing was execu"):
        load_torch_file("evil.ckpt")
    for protocol in (0, 2, 5):
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(wrap(Evil()), protocol=protocol))
        with pytest.raises(FileFormatError, match=r"evil\.pth"):
            load_torch_file("evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_tensor_that_claims_more_than_it_stores_is_refused(tmp_path):
    torch.save({"huge": torch.zeros(1).expand(1 << 20, 1 << 20), "half": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match=r"huge is not a plain array .*more elements than it stores"):
        load_torch_file(tmp_path / "w.pt")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path, tensors):
    torch.save(tensors, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match="compressed archive"):
        load_torch_file(tmp_path / "bomb.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, rng, tensors, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors_numpy.save_file({name: x.numpy() for name, x in tensors.items()}, path)
    good = path.read_bytes()
    for data in (b"", b"hello", good[: len(good) // 2], good[:-1], rng.bytes(200)):
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match=path.name):
            load_torch_file(path)
    for _ in range(20):
        # A flipped byte gives other numbers or a refusal, and nothing else.
        damaged = bytearray(good)
        damaged[rng.integers(len(good))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(FileFormatError):
            load_torch_file(path)


def test_a_safetensors_header_that_claims_more_than_the_file_is_refused(tmp_path):
    for shape, end in (([1 << 30, 1 << 20], 1 << 52), ([1 << 20], 4)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        with pytest.raises(FileFormatError, match=r"w\.safetensors is damaged"):
            load_torch_file(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(FileFormatError, match=r"w\.safetensors is damaged"):
        load_torch_file(tmp_path / "w.safetensors")


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_torch_file(tmp_path / "none.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"ends in \.npz; checkpoints end in \.safetensors, \.pth"):
        load_torch_file(tmp_path / "w.npz")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FileFormatError, match="holds a list, expected a dictionary"):
        load_torch_file(tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(FileFormatError, match="holds no tensors"):
        load_torch_file(tmp_path / "empty.pt")
    buffer = io.BytesIO()
    torch.save({"sparse": torch.eye(3).to_sparse()}, buffer)
    (tmp_path / "sparse.pt").write_bytes(buffer.getvalue())
    with pytest.raises(FileFormatError, match="sparse"):
        load_torch_file(tmp_path / "sparse.pt")
