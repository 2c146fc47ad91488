"""Small weight files of every format, damaged in every way, and what the converter does with them.

``python -m tests.converters.mutants FOLDER FIRST COUNT`` tries mutants by number and says each
number first, so that whoever started it knows which one it died of.
"""

import faulthandler
import io
import json
import os
import random
import shutil
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import ml_dtypes
import numpy as np

SECONDS = 10
"""No file may keep the converter longer, on a machine that has nothing else to do."""

_BLOCK = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
_NORM = {"weight": (8,), "bias": (8,)}


def _under(name: str, **shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


_LAYER = "local_fac_prj.layers.0"
_SHAPES = {
    **_under(f"{_BLOCK}.linear", weight=(8, 6), bias=(8,)),
    **_under(f"{_BLOCK}.norm1", **_NORM),
    **_under(f"{_BLOCK}.norm2", **_NORM),
    **{f"{_BLOCK}.attn.to_{name}.weight": (8, 8) for name in "qkv"},
    **_under(f"{_BLOCK}.attn.to_out.0", weight=(8, 8), bias=(8,)),
    **_under(f"{_BLOCK}.ff.net.0.proj", weight=(64, 8), bias=(64,)),
    **_under(f"{_BLOCK}.ff.net.2", weight=(8, 32), bias=(8,)),
    f"{_BLOCK}.alpha_attn": (),
    f"{_BLOCK}.alpha_dense": (),
    "local_fac_prj.latents": (1, 3, 8),
    **_under("local_fac_prj.proj_in", weight=(8, 5), bias=(8,)),
    **_under("local_fac_prj.proj_out", weight=(6, 8), bias=(6,)),
    **_under("local_fac_prj.norm_out", weight=(6,), bias=(6,)),
    **_under(f"{_LAYER}.0.norm1", **_NORM),
    **_under(f"{_LAYER}.0.norm2", **_NORM),
    f"{_LAYER}.0.to_q.weight": (16, 8),
    f"{_LAYER}.0.to_kv.weight": (32, 8),
    f"{_LAYER}.0.to_out.weight": (8, 16),
    **_under(f"{_LAYER}.1.0", **_NORM),
    f"{_LAYER}.1.1.weight": (32, 8),
    f"{_LAYER}.1.3.weight": (8, 32),
}
_ENCODER = {
    "pos_embed": (1, 4, 8),
    "mask_token": (1, 1, 8),
    **_under("patch_embed.proj", weight=(8, 3, 2, 2), bias=(8,)),
    **_under("blocks.0.norm1", **_NORM),
    **_under("blocks.0.norm2", **_NORM),
    "blocks.0.attn.qkv.weight": (24, 8),
    **_under("blocks.0.attn.proj", weight=(8, 8), bias=(8,)),
    **_under("blocks.0.mlp.fc1", weight=(32, 8), bias=(32,)),
    **_under("blocks.0.mlp.fc2", weight=(8, 32), bias=(8,)),
    **_under("norm", **_NORM),
    "senet.0.weight": (4, 32),
    "senet.2.weight": (4, 4),
    "feature.0.weight": (8, 32),
    "feature.2.weight": (7, 8),
    **{
        f"feature.{i}.{name}": () if name == "num_batches_tracked" else (size,)
        for i, size in ((1, 8), (3, 7))
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    },
}
_FLOATS = (np.dtype("f4"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16))


def _state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = {}
    for number, (key, shape) in enumerate(shapes.items()):
        array = np.asarray(rng.standard_normal(shape) * 3)
        dtype = np.dtype("i8") if key.endswith("tracked") else _FLOATS[number % 3 if seed else 0]
        state[key] = array.astype(dtype)
    return state


def write_seeds(folder: Path) -> None:
    """One whole file or folder of every format; ``mutant`` makes the broken ones of them."""
    import torch
    from safetensors.numpy import save_file

    from fact_convert.cli.opening import open_weights
    from fact_convert.cli.saving import save_jax
    from fact_convert.io.safetensors_io import write_safetensors
    from fact_convert.io.torch_io import write_torch_file

    adapter, encoder = _state(_SHAPES, 0), _state(_ENCODER, 1)
    # Without a hash of the content, which would notice everything.
    save_file(adapter, folder / "adapter.safetensors", {"format": "pt", "a": "b"})
    write_safetensors(folder / "encoder.safetensors", encoder, {})
    write_torch_file(folder / "adapter.ckpt", adapter)
    write_torch_file(folder / "encoder.pt", encoder)
    tensors = {key: torch.from_numpy(array) for key, array in adapter.items()}
    torch.save({"state_dict": tensors, "global_step": 3}, folder / "trainer.ckpt")
    torch.save(tensors, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    shards = folder / "shards"
    halves = {f"model-{i}.safetensors": dict(list(encoder.items())[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        write_safetensors(shards / name, half, {})
    where = {key: name for name, half in halves.items() for key in half}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_jax(open_weights(folder / "encoder.safetensors"), folder / "plain")
    _save_packed(folder / "packed", open_weights(folder / "adapter.safetensors"))


def _save_packed(folder: Path, weights) -> None:
    """As the trainer does, through Orbax."""
    import jax
    import orbax.checkpoint as ocp

    from fact_convert.models.training_checkpoint import to_jax

    params = jax.tree.map(lambda a: np.array(a, order="C"), to_jax(weights.states)[0])
    sizes = {"dim": 8, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 3}
    about = {"adapter": {"resampler": {**sizes, "embedding_dim": 5, "output_dim": 6}}}
    items = {
        "state": ocp.args.StandardSave({"params": params, "ema": None}),
        "meta": ocp.args.JsonSave(about),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.Composite(**items))


SEEDS = {
    "adapter.safetensors": 30,
    "encoder.safetensors": 20,
    "adapter.ckpt": 10,
    "encoder.pt": 10,
    "trainer.ckpt": 10,
    "legacy.pt": 8,
    "shards": 5,
    "plain": 5,
    "packed": 2,
}
"""How many of a hundred mutants are made of each."""


def mutant(seeds: Path, number: int, folder: Path) -> Path:
    """Write mutant ``number``: the same bytes for the same seeds."""
    rng = random.Random(number)
    name = rng.choices(list(SEEDS), list(SEEDS.values()))[0]
    target = folder / name
    if (seeds / name).is_file():
        data = (seeds / name).read_bytes()
        target.write_bytes(_damage(data, name, rng))
        return target
    shutil.copytree(seeds / name, target)
    files = sorted(file for file in target.rglob("*") if file.is_file())
    file = rng.choice(files)
    if rng.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(_damage(file.read_bytes(), file.name, rng))
    return target


def _damage(data: bytes, name: str, rng: random.Random) -> bytes:
    ways: list[Callable[[bytes, random.Random], bytes]] = [_flip, _flip_early, _cut, _overwrite]
    ways += [_insert, _shuffle]
    if name.endswith(".safetensors"):
        ways = [*ways, *([_lie] * 12)]
    elif data[:2] == b"PK":
        ways = [*ways, *([_repack] * 6), *([_number] * 2)]
    elif name.endswith((".json", "metadata", "_METADATA", ".zarray")):
        ways = [*ways, *([_lie_in_json] * 6)]
    return rng.choice(ways)(data, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _flip_early(data: bytes, rng: random.Random) -> bytes:
    early = rng.choice((8, 64, 1024))
    return _flip(data[:early], rng) + data[early:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    begin, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 100))
    byte = rng.choice((b"\0", b"\xff", bytes([rng.randrange(256)])))
    return (data[:begin] + length * byte + data[begin + length :])[: len(data)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    begin, length = rng.randrange(len(data) + 1), rng.choice((1, 3, 50))
    piece = rng.choice((rng.randbytes(length), data[begin : begin + length]))
    return data[:begin] + piece + data[begin:]


def _shuffle(data: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


_ODD = (0, 1, -1, 7, 255, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, True, None)
_ODD += ("", "F32", "BF16", "F8_E4M3", "C64", "\0", "../x", "a" * 300, [], {}, [[1]], {"a": {}})


def _lie(data: bytes, rng: random.Random) -> bytes:
    """A safetensors header that says something else than it did, and is still a header."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(_other(header, rng)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _lie_in_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(_other(json.loads(data), rng)).encode()


def _other(tree: dict, rng: random.Random) -> dict:
    """The same data with a value, a name or two values changed."""
    holders, rest = [], [tree]
    while rest:
        node = rest.pop()
        if node:
            holders.append(node)
        children = node.values() if isinstance(node, dict) else node
        rest += [child for child in children if isinstance(child, dict | list)]
    for _ in range(rng.choice((1, 1, 2))):
        if not holders:
            break
        holder, other = rng.choice(holders), rng.choice(holders)
        place, there = _place(holder, rng), _place(other, rng)
        way = rng.randrange(4)
        if way == 0 or place is None or there is None:
            if place is not None:
                holder[place] = rng.choice(_ODD)
        elif way == 1:
            shared = json.dumps([holder[place], other[there]])
            other[there], holder[place] = json.loads(shared)
        elif way == 2 and isinstance(holder, dict):
            holder[place + rng.choice((".", "x", "\n", "\0", "é"))] = holder.pop(place)
        elif isinstance(holder[place], int):
            holder[place] += rng.choice((1, -1, 4, -4, 2**32))
        else:
            del holder[place]
    return tree


def _place(holder, rng: random.Random):
    places = list(holder) if isinstance(holder, dict) else range(len(holder))
    return rng.choice(places) if places else None


def _repack(data: bytes, rng: random.Random) -> bytes:
    """An archive that is whole, of members that are not what they were."""
    out = io.BytesIO()
    packing = rng.choice((zipfile.ZIP_STORED,) * 5 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", packing) as new:
        members = {name: old.read(name) for name in old.namelist()}
        way, chosen = rng.randrange(5), rng.choice(list(members))
        program = next(name for name in members if name.endswith("data.pkl"))
        if way == 0:
            members[chosen] = _damage(members[chosen], "", rng)
        elif way == 1:
            del members[chosen]
        elif way == 2:
            members[rng.choice((chosen + "x", "../" + chosen, "/" + chosen))] = members.pop(chosen)
        elif way == 3:
            members[program] = _other_program(members[program], rng)
        else:
            members[program] = _flip(members[program], rng)
        for name, content in members.items():
            new.writestr(name, content)
    return out.getvalue()


_NAMES = (b"builtins\nexec", b"builtins\neval", b"os\nsystem", b"posix\nmkdir", b"os\nmkdir")
_NAMES += (b"torch\nload", b"torch\nones", b"torch\nLongStorage", b"torch._utils\n_rebuild_qtensor")
_NAMES += (b"collections\nCounter", b"torch._utils\n_rebuild_sparse_tensor", b"pickle\nloads")


def _other_program(program: bytes, rng: random.Random) -> bytes:
    """A pickle that calls something else, or speaks of other numbers."""
    way = rng.randrange(3)
    if way == 0:
        old = rng.choice((b"torch._utils\n_rebuild_tensor_v2", b"torch\nFloatStorage"))
        return program.replace(old, rng.choice(_NAMES), rng.choice((1, -1)))
    if way == 1:
        ways = (b"K%c", b"M%c\0", b"J%c\0\0\0", b"J\0\0\0%c", b"J\xff\xff\xff%c")
        old = b"K%c" % rng.choice((0, 1, 3, 5, 6, 8, 16, 64))
        return program.replace(old, rng.choice(ways) % rng.randrange(128), rng.choice((1, -1)))
    made = b"cposix\nmkdir\n" + _text(str(_canary())) + b"\x85R"
    return program[:-1] + rng.choice((made + b".", b"0" + made + b".", made))


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(data: bytes, rng: random.Random) -> bytes:
    """Another number where an archive's directory, at the end of a file, has one."""
    found, begin = bytearray(data), data.rfind(b"PK\x01\x02")
    place = rng.randrange(begin, len(data) - 8)
    found[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, len(data))))
    return bytes(found)


def _canary() -> Path:
    """The folder that a malicious pickle makes if its code is run."""
    return Path(os.environ.get("CANARY", "/nonexistent/canary"))


def attempt(path: Path, out: Path, command: str) -> str:
    """Convert a file; "done" or the line that says why not. AssertionError for anything else."""
    from fact_convert.cli import main as cli

    printed, said = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(said):
        status = cli.main([command, str(path), str(out), "--dim-head", "8"])
    lines = said.getvalue().splitlines()
    assert not _canary().exists(), "code was run"
    if status == 0:
        return "done"
    assert status == 2, status
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    assert lines[0].isprintable(), lines
    assert not out.exists(), "half a file"
    return lines[0]


class Nothing:
    """What is left of an object whose class is not known."""

    def __init__(self, *args):
        pass


def expected(path: Path) -> dict[str, np.ndarray] | None:
    """The tensors of a file as its own library reads them, where it has one that believes it."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    if path.is_file():
        # A damaged name is that of a class that nobody has, whose objects are passed over.
        zipped = path.read_bytes()[:2] == b"PK"
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        with torch.serialization.safe_globals([(Nothing, name) for name in names]):
            held = torch.load(path, map_location="cpu", weights_only=True)
        return held.get("state_dict", held)
    return None


def check(path: Path, out: Path) -> None:
    """What was converted is exactly what the file says."""
    import torch
    from safetensors.torch import load_file

    wanted = expected(path)
    if wanted is None:
        return
    found = load_file(out)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        same = found[key].view(torch.uint8) if tensor.ndim else found[key][None].view(torch.uint8)
        other = tensor.contiguous()
        other = other.view(torch.uint8) if tensor.ndim else other[None].view(torch.uint8)
        assert torch.equal(same, other), key


def main() -> None:
    seeds, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # Whether a disk has it does not matter here, and takes most of the time.
    os.fsync, os.sync = lambda file: None, lambda: None
    folder = seeds.parent / f"try-{first}"
    for name in SEEDS:  # what is whole converts; and everything is imported before time counts
        for command, end in (("to-torch", ".safetensors"), ("to-jax", "-jax")):
            out = seeds.parent / f"{first}-{name.replace('.', '-')}{end}"
            assert attempt(seeds / name, out, command) == "done"
    for number in range(first, first + count):
        print(number, end=" ", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = mutant(seeds, number, folder)
        command = "to-jax" if number % 5 == 0 else "to-torch"
        out = folder / ("out" if command == "to-jax" else "out.safetensors")
        faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
        began = time.process_time()
        try:
            said = attempt(path, out, command)
            if said == "done" and command == "to-torch":
                check(path, out)
            assert time.process_time() - began < SECONDS
        except BaseException:
            said = f"FAILED: {traceback.format_exc()!r}"
        faulthandler.cancel_dump_traceback_later()
        print(said, flush=True)
    peak = max(
        int(line.split()[1]) // 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print("peak", peak, flush=True)


if __name__ == "__main__":
    main()
