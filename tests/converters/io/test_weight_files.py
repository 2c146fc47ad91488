"""Readers and writers: what the libraries write is read, and the other way about; bad files."""

import json
import os
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fact_convert.io.hashing import content_hash
from fact_convert.io.hub import local_folder
from fact_convert.io.json_io import read_json
from fact_convert.io.lazy_tensor import LazyTensor
from fact_convert.io.output_paths import MANIFEST, output_folder
from fact_convert.io.safetensors_io import read_safetensors, write_safetensors
from fact_convert.io.torch_io import read_torch_file, write_torch_file
from fact_convert.io.weight_files import read_file, read_weights
from fact_jax.utils.errors import UserError


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((3, 5)).astype(np.float32),
        "transposed": rng.standard_normal((4, 7)).astype(np.float32).T,
        "half": rng.standard_normal((3,)).astype(np.float16),
        "brain": rng.standard_normal((5,)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "counter": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False, True]),
    }


def test_the_library_reads_what_we_write(state, same_bits, tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, state, {"format": "pt", "naïve": "ü"})
    same_bits(state, load_file(file))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_we_read_what_the_library_writes(state, same_bits, tmp_path):
    file = tmp_path / "x.safetensors"
    # The library writes a transposed array's memory as it lies, under the shape it does not have.
    state["transposed"] = np.ascontiguousarray(state["transposed"])
    save_file(state, file, {"a": "b"})
    read, metadata = read_safetensors(file)
    same_bits(state, read)
    assert metadata == {"a": "b"}
    assert not read["matrix"].flags.writeable


def test_a_file_without_any_tensor(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {}, {})
    state, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert (state, metadata) == ({}, {"content": content_hash({})})


@pytest.mark.parametrize("cut", [4, 40, -1])
def test_truncated_safetensors(state, tmp_path, cut):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, state, {})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"x\.safetensors: not a whole safetensors file"):
        read_safetensors(file)


def test_a_key_that_would_steer_the_terminal(tmp_path):
    save_file({"a\x1b[2J": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"keys that are no names: 'a\\x1b\[2J'"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_header_that_claims_more_than_there_is(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_safetensors(file)
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_safetensors(file)


def test_a_failed_write_leaves_what_was_there(state, tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, state, {})
    before = file.read_bytes()

    def fail():
        raise OSError("disk failed")

    unread = state | {"unread": LazyTensor((3,), np.float32, fail)}
    with pytest.raises(OSError, match="disk failed"):
        write_safetensors(file, unread, {})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_pickles_round_trip(state, same_bits, tmp_path):
    file = tmp_path / "x.ckpt"
    write_torch_file(file, state)
    assert torch.load(file, weights_only=True)["brain"].dtype == torch.bfloat16
    same_bits(state, read_torch_file(file)[0])


def test_pickles_of_the_old_layout(state, same_bits, tmp_path):
    del state["brain"]
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    same_bits(state, read_torch_file(tmp_path / "x.pt")[0])


class Malicious:
    """Runs a command when unpickled by a loader that lets it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("layout", ["zip", "old", "plain"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, layout):
    file, target = tmp_path / "x.ckpt", tmp_path / "owned"
    held = {"weight": torch.ones(2), "payload": Malicious(target)}
    if layout == "plain":
        file.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(UserError, match="refused, since it holds more than tensors") as caught:
        read_torch_file(file)
    assert "\n" not in str(caught.value)
    assert not target.exists()
    torch.load(file, weights_only=False) if layout != "plain" else pickle.loads(file.read_bytes())
    assert target.exists()  # the file was dangerous indeed


def test_pickles_that_are_no_states(tmp_path):
    for name, held, reason in (
        ("list", [torch.ones(1)], "no dictionary of tensors but a list"),
        ("nested", {"state": {"a": torch.ones(1)}}, "not a flat dictionary of tensors: 'state'"),
        ("empty", {}, "no dictionary of tensors"),
        ("odd", {"a\nb": torch.ones(1)}, r"keys that are no names: 'a\\nb'"),
        ("sparse", {"a": torch.eye(3).to_sparse()}, "a is torch.float32, torch.sparse_coo"),
        ("complex", {"a": torch.ones(3, dtype=torch.complex64)}, "a is torch.complex64"),
        ("expanded", {"a": torch.ones(1).expand(10**12)}, "claims 4000000000000 bytes"),
        ("meta", {"a": torch.ones(3, device="meta")}, "on meta"),
        ("turned", {"a": torch.ones(3)._neg_view()}, "its sign turned"),
        ("deep", {"state_dict": {"a": {"b": torch.ones(3)}}}, "not a flat dictionary.*: 'a'"),
        ("number", {1: torch.ones(3)}, "not a flat dictionary of tensors: int"),
    ):
        torch.save(held, tmp_path / name)
        with pytest.raises(UserError, match=reason):
            read_torch_file(tmp_path / name)
    for content in (b"", b"nonsense", b"PK\x03\x04 broken zip"):
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.ckpt") as caught:
            read_torch_file(tmp_path / "x.ckpt")
        assert "\n" not in str(caught.value)


def test_a_truncated_pickle(state, tmp_path):
    file = tmp_path / "x.ckpt"
    write_torch_file(file, state)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"x\.ckpt"):
        read_torch_file(file)


def test_without_torch_the_error_says_what_to_install(monkeypatch, tmp_path):
    import sys

    (tmp_path / "x.ckpt").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'fact-jax\[torch\]'"):
        read_torch_file(tmp_path / "x.ckpt")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
@pytest.mark.parametrize(
    ("kind", "stem"),
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("clip_text", "model"),
    ],
)
def test_shards_and_variants_of_the_peers(
    peers, peer_state, same_bits, tmp_path, kind, stem, shard, variant
):
    peers[kind].save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "60KB")
    same_bits(peer_state(kind)[0], read_weights(tmp_path, stem, variant))


def test_a_variant_that_is_not_there(peers, tmp_path):
    peers["vae"].save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(UserError, match="there are weights of variant fp16"):
        read_weights(tmp_path, "diffusion_pytorch_model")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        read_weights(tmp_path / "absent", "model")


def index_of(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_that_do_not_fit_their_index(tmp_path, state):
    write_safetensors(tmp_path / "one.safetensors", {"a": state["half"]}, {})
    index_of(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(UserError, match=r"1 missing \(b\); 0 unexpected"):
        read_weights(tmp_path, "model")
    index_of(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(UserError, match=r"two\.safetensors: no such file"):
        read_weights(tmp_path, "model")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_points_elsewhere(tmp_path, name):
    index_of(tmp_path, {"a": name})
    with pytest.raises(UserError, match="not a file of this folder"):
        read_weights(tmp_path, "model")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "{'a': 1}", "[" * 100000])
def test_bad_json(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_json_of_unreasonable_size(tmp_path):
    with open(tmp_path / "x.json", "wb") as handle:
        handle.truncate(2**30)
    with pytest.raises(UserError, match="too many for a JSON file"):
        read_json(tmp_path / "x.json")


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a file"):
        read_safetensors(tmp_path)
    (tmp_path / "x.png").touch()
    with pytest.raises(UserError, match="not a weight file"):
        read_file(tmp_path / "x.png")


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), output_folder(target, force=False) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert os.listdir(tmp_path) == []
    with output_folder(target, force=False) as folder:
        (folder / "one").touch()
    assert sorted(os.listdir(target)) == [MANIFEST, "one"]
    with (
        pytest.raises(UserError, match="exists already"),
        output_folder(target, force=False),
    ):
        pass
    with output_folder(target, force=True) as folder:
        (folder / "two").touch()
    assert sorted(os.listdir(target)) == [MANIFEST, "two"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_hub_name_is_fetched_and_a_missing_folder_is_not(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        assert "safety_checker/*" in ignore_patterns
        if name == "no/where":
            raise ConnectionError("offline\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert local_folder("some/model", ("*.json",), "fp16") == tmp_path
    assert asked.pop() == ("some/model", ["*.json", "*/*.fp16*safetensors"])
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    local_folder("some/model", ("*.json",), "fp16")
    assert asked.pop() == ("some/model", ["vae/*model*.safetensors"])
    asked.clear()
    local_folder("some/model", ("*.json",), None, weights=False)
    assert asked == [("some/model", ["*.json"])]
    with pytest.raises(UserError, match=r"no/where: no such folder here.*\(offline\)$"):
        local_folder("no/where", (), None)
    (tmp_path / "models").mkdir()
    for name in ("models/bse", tmp_path / "absent", "./a/b"):
        with pytest.raises(UserError, match=r"no such folder$"):
            local_folder(name, (), None)
    assert len(asked) == 2
