"""Hashes and checksums: what a file carries is compared with what it holds."""

import hashlib
import json
import struct
import zipfile

import numpy as np
import pytest
import torch

from fact_convert import load_adapter
from fact_convert.cli.main import main
from fact_convert.cli.opening import open_weights
from fact_convert.io.hashing import content_hash
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import write_torch_file
from fact_convert.io.weight_files import read_file
from fact_jax.utils.errors import UserError


def flip(path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture
def encoder(golden, tmp_path):
    state = {k: v.astype(np.float32) for k, v in golden("transface", "state.")[0].items()}
    write_safetensors(tmp_path / "encoder.safetensors", state, {})
    return tmp_path / "encoder.safetensors"


def inspected(path, capsys, *options) -> dict:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_bit_of_our_own_file_is_noticed(encoder, released_checkpoint, tmp_path, capsys):
    adapter = tmp_path / "adapter.safetensors"
    assert main(["to-torch", str(released_checkpoint), str(adapter), "--dim-head", "8"]) == 0
    for path in (encoder, adapter):
        (start,) = struct.unpack("<Q", path.read_bytes()[:8])
        for place in (8 + start, path.stat().st_size - 1):
            flip(path, place)
            with pytest.raises(UserError, match="not those that were written"):
                read_file(path)
            capsys.readouterr()
            words = (["inspect"], ["to-jax", tmp_path / "x"], ["to-torch", tmp_path / "x.pt"])
            for command, *out in words:
                assert main([command, str(path), *map(str, out)]) == 2
                assert "damaged" in capsys.readouterr().err
            assert not list(tmp_path.glob("x*"))
            flip(path, place)
        read_file(path)
    flip(adapter, adapter.stat().st_size - 1)
    with pytest.raises(UserError, match="damaged"):
        load_adapter(adapter)


def test_a_folder_of_ours_with_one_bit_changed(pipeline_folder, tmp_path):
    out = tmp_path / "base"
    options = [[], ["--save-variant", "fp16", "--shard", "100kB"]]
    for number, words in enumerate(options):
        out = tmp_path / str(number)
        assert main(["to-torch", str(pipeline_folder), str(out), *words]) == 0
        file = max((out / "vae").glob("*.safetensors"))
        flip(file, file.stat().st_size - 1)
        with pytest.raises(UserError, match=f"{file.name}: damaged"):
            open_weights(out, variant="fp16" if words else None)


def test_a_file_without_a_hash_is_read(encoder, tmp_path):
    """A ``content`` that is no hash is another program's."""
    state, _ = read_file(encoder)
    other = {"metadata": {"content": "portraits"}}
    from safetensors.numpy import save_file

    save_file({k: np.array(a) for k, a in state.items()}, tmp_path / "x.safetensors", **other)
    assert read_file(tmp_path / "x.safetensors")[1] == other["metadata"]


def test_inspect_says_the_hashes(encoder, pipeline_folder, tmp_path, capsys):
    state, metadata = read_file(encoder)
    about = inspected(encoder, capsys, "--sha256")
    assert about["content"] == metadata["content"] == content_hash(state)
    assert about["files"] == {encoder.name: hashlib.sha256(encoder.read_bytes()).hexdigest()}
    assert about["parts"]["transface"]["sha256"] == about["hash"]
    assert "sha256" not in json.dumps(inspected(encoder, capsys))
    about = inspected(pipeline_folder, capsys, "--sha256")
    name = "unet/diffusion_pytorch_model.safetensors"
    whole = hashlib.sha256((pipeline_folder / name).read_bytes()).hexdigest()
    assert (len(about["files"]), about["files"][name]) == (3, whole)
    assert main(["to-torch", str(pipeline_folder), str(tmp_path / "x.ckpt")]) == 0
    other = inspected(tmp_path / "x.ckpt", capsys, "--sha256")
    for part in ("unet", "vae", "clip_text"):
        assert about["parts"][part]["sha256"] == other["parts"][part]["sha256"]


@pytest.mark.parametrize("ours", [True, False])
def test_the_checksums_of_a_pickle(encoder, ours, tmp_path):
    state, path = read_file(encoder)[0], tmp_path / "x.ckpt"
    if ours:
        write_torch_file(path, state)
    else:
        torch.save({key: torch.from_numpy(a.copy()) for key, a in state.items()}, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as member:
            place = member._fileobj.tell()
    flip(path, place + 5)
    with pytest.raises(UserError, match="is not what was written"):
        read_file(path)
    flip(path, place + 5)
    read_file(path)


def test_a_pickle_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_file(tmp_path / "x.pt")[0]["a"].tolist() == [0, 1, 2]


def test_what_was_put_aside_names_no_weight(encoder, tmp_path, capsys):
    assert main(["to-jax", str(encoder), str(tmp_path / "jax")]) == 0
    meta = tmp_path / "jax" / "meta" / "metadata"
    about = json.loads(meta.read_text())
    for key in ("norm.weight", "blocks.0.attn.qkv.weight"):
        kept = {"transface": about["kept"]["transface"] | {key: ["float32", [7.0] * 32]}}
        meta.write_text(json.dumps(about | {"kept": kept}))
        with pytest.raises(UserError, match=f"has the name of a weight: {key}"):
            open_weights(tmp_path / "jax")
