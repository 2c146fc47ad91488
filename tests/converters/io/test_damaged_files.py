"""Files that lie about themselves: every lie ends in one line, before anything comes of it."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from fact_convert.io.safetensors_io import read_safetensors, write_safetensors
from fact_convert.io.torch_io import read_torch_file, write_torch_file
from fact_convert.io.weight_files import read_file, read_weights
from fact_jax.utils.errors import UserError

NOTHING = {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}


@pytest.fixture
def file(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int16)}
    write_safetensors(tmp_path / "x.safetensors", state, {"format": "pt"})
    return tmp_path / "x.safetensors"


def change(file, edit):
    """Rewrite a safetensors header; ``edit`` gets it as data, or gives the text of another."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = (edit(header) or json.dumps(header)).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def a_is(**entry):
    return lambda header: header["a"].update(entry)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (a_is(shape=[2, 4]), r"a of shape \[2, 4\] needs 32 bytes and has those from 0 to 24"),
        (a_is(dtype="F64"), "needs 48 bytes"),
        (a_is(dtype="F31"), "a is 'F31', which is not supported"),
        (a_is(dtype=["F32"]), r"\['F32'\], which is not supported"),
        (a_is(dtype={"a": "F32"}), "which is not supported"),
        (a_is(shape=[2.0, 3]), "a is not described"),
        (a_is(shape=[True, 6]), "a is not described"),
        (a_is(shape=[-2, -3]), "a is not described"),
        (a_is(shape=6), "a is not described"),
        (a_is(shape=[1] * 40 + [6]), "a is not described"),
        (a_is(shape=[2**63, 0], data_offsets=[0, 0]), "a is not described"),
        (lambda header: header.update(c=NOTHING), "c is of shape"),
        (a_is(data_offsets=[0, 24, 32]), "a is not described"),
        (a_is(data_offsets=[24, 0]), "has those from 24 to 0"),
        (a_is(data_offsets=[8, 32]), "begins at"),
        (a_is(data_offsets=[2**40, 2**40 + 24]), "begins at"),
        (a_is(more=1), "a is not described"),
        (lambda header: header.update(c=header["b"]), "begins at"),
        (lambda header: header.pop("b") and None, "its tensors are"),
        (lambda header: header.update(c=None), "c is not described"),
        (lambda header: header.update({"__metadata__": {"a": 1}}), "not a table of texts"),
        (lambda header: header.update({"__metadata__": ["a"]}), "not a table of texts"),
        (lambda header: header.update({"__metadata__": {"a": "\ud800"}}), "not a table of texts"),
        (lambda header: header.update({"\ud800": header.pop("a")}), "keys that are no names"),
        (lambda header: '{"a": 1, "a": 2}', "a name stands in it twice"),
        (lambda header: "[" * 100_000, "not valid JSON"),
        (lambda header: "[1]", "holds a list"),
        (lambda header: '{"a":' + "9" * 5000 + "}", "not valid JSON"),
        (lambda header: "\ud800", "not valid JSON"),
    ],
)
def test_safetensors_headers(file, edit, reason):
    change(file, edit)
    with pytest.raises(UserError, match=reason) as caught:
        read_safetensors(file)
    assert "\n" not in str(caught.value)


def test_a_header_of_unreasonable_size(file):
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", 2**30))
        handle.truncate(2**31)
    with pytest.raises(UserError, match="a header of 1073741824 bytes is too much"):
        read_safetensors(file)


def test_names_that_no_file_has(tmp_path):
    for name in ("a\0b.safetensors", "a" * 5000 + ".safetensors"):
        with pytest.raises(UserError, match=r"\.safetensors'?: "):
            read_file(tmp_path / name)


def repack(file, edit=lambda name, data: data, **options):
    """Write the archive of a PyTorch file again, its members changed by ``edit``."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, edit(name, data))


@pytest.fixture
def pickled(tmp_path):
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(10**6)}, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_an_archive_that_would_unpack_to_more_than_it_is(pickled):
    repack(pickled, compression=zipfile.ZIP_DEFLATED)
    assert pickled.stat().st_size < 10_000
    with pytest.raises(UserError, match="refused, it would unpack to more than its"):
        read_torch_file(pickled)


def test_an_archive_that_is_packed(tmp_path):
    torch.save(
        {"a": torch.frombuffer(bytearray(os.urandom(4000)), dtype=torch.float32)},
        tmp_path / "x.ckpt",
    )
    repack(tmp_path / "x.ckpt", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match=r"refused, it (is packed|would unpack)"):
        read_torch_file(tmp_path / "x.ckpt")


def test_members_that_share_their_bytes(pickled):
    """As in zip bombs that need no recursion: the directory names one place many times."""
    with zipfile.ZipFile(pickled, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 10
        archive._didModify = True
    with pytest.raises(UserError, match="refused, it would unpack to more than its"):
        read_torch_file(pickled)


def test_numbers_of_another_byte_order(pickled):
    repack(pickled, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(UserError, match="its byte order is b'big'"):
        read_torch_file(pickled)


def test_a_record_that_is_marked_as_a_folder(pickled):
    """Found by fuzzing: the loader hands out memory that nothing was written to."""
    with zipfile.ZipFile(pickled, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        largest.external_attr |= 0x10
        archive._didModify = True
    with pytest.raises(UserError, match="data/1' is marked as a folder"):
        read_torch_file(pickled)


@pytest.mark.parametrize("count", [5, 7, 2**30])
def test_a_pickle_that_lies_about_the_length_of_a_record(tmp_path, count):
    """The loader itself would read the bytes of what lies beside."""
    torch.save({"a": torch.arange(6.0), "b": torch.arange(100, 140)}, tmp_path / "x.ckpt")
    packed = b"K" + bytes([count]) if count < 256 else b"J" + struct.pack("<i", count)

    def lie(name, data):
        return data.replace(b"K\x06t", packed + b"t") if name.endswith(".pkl") else data

    repack(tmp_path / "x.ckpt", lie)
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        read_torch_file(tmp_path / "x.ckpt")


def test_a_legacy_pickle_that_claims_more_than_it_holds(tmp_path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    assert data.count(b"K\x06\x85") == 1
    (tmp_path / "x.pt").write_bytes(data.replace(b"K\x06\x85", b"J\x00\x00\x00\x40\x85"))
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        read_torch_file(tmp_path / "x.pt")


def test_tensors_keep_their_layout_and_place(tmp_path, same_bits):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    held = {"part": whole[1:, :, 2:], "turned": whole.transpose(0, 2), "whole": whole}
    held |= {"brain": whole.bfloat16()[:, 1], "none": torch.zeros(0, 3), "one": torch.tensor(3)}
    torch.save(held, tmp_path / "x.ckpt")
    read = read_torch_file(tmp_path / "x.ckpt")[0]
    write_safetensors(tmp_path / "x.safetensors", read, {})
    write_torch_file(tmp_path / "again.ckpt", read)
    opened = torch.load(tmp_path / "again.ckpt", weights_only=True)
    from safetensors.torch import load_file

    for other in (load_file(tmp_path / "x.safetensors"), opened):
        assert other.keys() == held.keys()
        for key, tensor in held.items():
            assert torch.equal(other[key], tensor), key
            assert other[key].dtype == tensor.dtype, key


def test_a_state_inside_a_trainers_file(tmp_path, same_bits):
    inner = {"a": torch.arange(6.0)}
    held = {"state_dict": inner, "global_step": 7, "optimizer": [{"mu": torch.ones(3)}]}
    torch.save(held, tmp_path / "x.ckpt")
    state, about = read_file(tmp_path / "x.ckpt")
    same_bits({"a": inner["a"].numpy()}, state)
    assert about == {"step": "7"}


def shards(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_shards_may_not_be_links_to_elsewhere(file):
    folder = file.parent / "model"
    folder.mkdir()
    shards(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    (folder / "one.safetensors").symlink_to(file)
    with pytest.raises(UserError, match=r"names 'one\.safetensors', which is not a file of this"):
        read_weights(folder, "model")
    (folder / "one.safetensors").unlink()
    os.rename(file, folder / "two.safetensors")
    (folder / "one.safetensors").symlink_to("two.safetensors")
    assert read_weights(folder, "model").keys() == {"a", "b"}


def test_the_hubs_cache_is_made_of_links(file, tmp_path):
    blobs, folder = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc" / "unet"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    os.rename(file, blobs / "0123.safetensors")
    (folder / "one.safetensors").symlink_to("../../../blobs/0123.safetensors")
    shards(folder, {"a": "one.safetensors", "b": "one.safetensors"})
    assert read_weights(folder, "model").keys() == {"a", "b"}


def test_a_tensor_in_two_shards(file):
    os.link(file, file.with_name("y.safetensors"))
    shards(file.parent, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(UserError, match="tensors stand in two shards: a, b"):
        read_weights(file.parent, "model")


@pytest.mark.parametrize("name", ["..", "", "a\0b", "a\x1b[2J.safetensors"])
def test_shards_with_names_that_are_none(tmp_path, name):
    shards(tmp_path, {"a": name})
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path, "model")
    assert str(caught.value).isprintable()
