"""How fast are photographs made into records, and does the memory stay flat?

    python -m benchmarks.data                        # rates by stage, with and without networks
    python -m benchmarks.data --workers 2            # the same by Beam's processes
    python -m benchmarks.data --memory 1000 100000   # memory and time of so many photos

Photos are noise of all scales, 768 x 768 JPEGs with points and captions beside them. The networks
have random weights and about the arithmetic of real ones (a ResNet-50-like embedder at 112 px of
6 GFLOP, a detector at 640 px of 10, a parser at 512 px of 15): what they find is nonsense, so
points come from side files in any case and the detector is timed by itself. The end says what ten
million photos would take on a hundred workers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fact_train.prepare import pairs

PHOTOS = 10_000_000
WORKERS = 100


def write_photos(folder: Path, count: int, side: int = 768, distinct: int = 64) -> None:
    """``count`` photos of four a person; beyond ``distinct`` they are links to the first ones.

    Links have the same pixels, so points are moved: no two faces of one picture count as copies.
    """
    from fact_jax.face import ARCFACE_TEMPLATE

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"p{number // 4:06d}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            layers = [
                np.kron(rng.normal(0, 20, (side // s, side // s, 3)), np.ones((s, s, 1)))
                for s in (1, 4, 16, 64)
            ]
            Image.fromarray(np.clip(sum(layers) + 128, 0, 255).astype(np.uint8)).save(
                path, "JPEG", quality=90
            )
        else:
            own = number % distinct
            os.link(folder / f"p{own // 4:06d}" / f"{own}.jpg", path)
        scale = side / 112 * rng.uniform(0.25, 0.5)
        shift = rng.uniform(0.05 * side, 0.45 * side, 2)
        points = {"points": (ARCFACE_TEMPLATE * scale + shift).tolist()}
        path.with_suffix(".points.json").write_text(json.dumps(points))
        path.with_suffix(".txt").write_text("a portrait of a person")


def save_network(path: Path, side: int, widths: tuple[int, ...], blocks: int, out: str) -> None:
    """Convolutions, halving the side with each width; ``out`` is embedding, parser or scrfd."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, constants = np.random.default_rng(0), [], []

    def convolve(name: str, source: str, inside: int, outside: int, stride: int, size: int) -> str:
        weights = rng.normal(0, (size * size * inside) ** -0.5, (outside, inside, size, size))
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"{name}.w"))
        pads = [size // 2] * 4
        nodes.append(
            helper.make_node("Conv", [source, f"{name}.w"], [name], strides=[stride] * 2, pads=pads)
        )
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"]))
        return f"{name}.r"

    last, inside, levels = "input", 3, []
    for level, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if block == 0 else 1
            last = convolve(f"c{level}.{block}", last, inside, width, stride, 3)
            inside = width
        levels.append((last, width))
    outputs = []
    if out == "embedding":
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["embedding"]))
        outputs.append(("embedding", ["n", inside]))
    elif out == "parser":
        last = convolve("labels", last, inside, 19, 1, 1)
        scale = float(2 ** len(widths))
        constants.append(numpy_helper.from_array(np.float32([1, 1, scale, scale]), "scale"))
        nodes.append(helper.make_node("Resize", [last, "", "scale"], ["scores"], mode="nearest"))
        outputs.append(("scores", ["n", 19, side, side]))
    else:
        for part, width in (("score", 2), ("box", 8), ("points", 20)):
            for stride, (level, channels) in zip((8, 16, 32), levels[2:5], strict=True):
                name = f"{part}{stride}"
                made = convolve(name, level, channels, width, 1, 1)
                nodes.append(
                    helper.make_node("Transpose", [made], [f"{name}.t"], perm=[0, 2, 3, 1])
                )
                shape = np.array([-1, width // 2])
                constants.append(numpy_helper.from_array(shape, f"{name}.s"))
                nodes.append(helper.make_node("Reshape", [f"{name}.t", f"{name}.s"], [f"{name}.o"]))
                outputs.append((f"{name}.o", [f"n{name}", width // 2]))
    real = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", real, ["n", 3, side, side])],
        [helper.make_tensor_value_info(name, real, shape) for name, shape in outputs],
        constants,
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def real_sized(folder: Path) -> dict[str, str]:
    """Files of networks about as large as real ones."""
    folder.mkdir()
    save_network(folder / "embedder.onnx", 112, (64, 128, 256, 512), 6, "embedding")
    save_network(folder / "parser.onnx", 512, (32, 64, 128, 256), 5, "parser")
    save_network(folder / "detector.onnx", 640, (16, 32, 64, 128, 256), 4, "scrfd")
    return {name: str(folder / f"{name}.onnx") for name in ("embedder", "parser", "detector")}


def stages(source: Path, count: int, models: dict[str, str]) -> dict[str, float]:
    """Milliseconds a photo, by stage: one thread, or two that wait for each other."""
    from fact_jax.face.landmarks import parse_faces
    from fact_train.data.dataset_files import Coder, face_features
    from fact_train.data.record_writer import as_row
    from fact_train.prepare.models.detectors import OnnxDetector
    from fact_train.prepare.models.onnx_models import OnnxEmbedder, OnnxParser
    from fact_train.prepare.photos import measures
    from fact_train.prepare.photos.photo import choose_face, decode, finish
    from fact_train.prepare.settings import BuildSettings
    from fact_train.prepare.sources import Item

    settings = BuildSettings(source=str(source))
    coder, spent = Coder(face_features(settings.size, settings.crop)), {}

    def timed(name: str, work: Callable) -> list:
        began = time.perf_counter()
        found = work()
        spent[name] = (time.perf_counter() - began) / count * 1000
        return found

    paths = sorted(source.rglob("*.jpg"))[:count]
    items = timed("reading", lambda: [Item(path.name, path.read_bytes()) for path in paths])
    photos = timed("decoding", lambda: [decode(item, settings) for item in items])
    sides = [json.loads(path.with_suffix(".points.json").read_text()) for path in paths]
    faces = [parse_faces(side, "points") for side in sides]
    timed(
        "gates and alignment",
        lambda: [
            choose_face(photo, face, settings.gates)
            for photo, face in zip(photos, faces, strict=True)
        ],
    )
    views = timed(
        "hash of the picture",
        lambda: [measures.picture_view(photo.image, photo.face.points) for photo in photos],
    )
    timed("hash of the picture, signs", lambda: [measures.view_hash(view) for view in views])
    for name, kind in (("embedder", OnnxEmbedder), ("parser", OnnxParser)):
        network = kind(Path(models[name]), "cpu")
        timed(f"{name} of real size", lambda network=network: network(photos[: count // 4]) * 4)
        spent[f"{name} of real size"] *= 4
    detector = OnnxDetector(Path(models["detector"]), "cpu", 0.99)
    timed("detector of real size", lambda: detector(photos[: count // 4]))
    spent["detector of real size"] *= 4
    made = timed("masks, crop, JPEG and PNG", lambda: [finish(p, settings) for p in photos])
    timed("encoding of the record", lambda: [coder.encode(as_row(one)) for one, _ in made])
    return spent


# In a process between, which is small: a child counts its parent's memory as its own peak.
_BETWEEN = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def measure(
    source: Path, out: Path, *more: str, models: dict[str, str] | None = None
) -> dict[str, float]:
    """One build in a process of its own: seconds, photos a second, memory at most, bytes."""
    command = ["-m", "fact_train", "data", "build", str(source), str(out), *more]
    for name in ("embedder", "parser"):
        command += [f"--{name}", models[name]] if models else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _BETWEEN, sys.executable, *command], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads((out / "summary.json").read_text())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {
        "photos": summary["in"],
        "records": summary["records"],
        "seconds": seconds,
        "photos a second": summary["in"] / seconds,
        "peak megabytes": int(done.stdout) / 1024,
        "bytes a photo": size / summary["in"],
    }


def seconds_of_a_block() -> float:
    """Comparing pictures and faces (512 numbers) of two blocks of photos, on one core."""
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([-1, 1], np.int8), (2, pairs.BLOCK, 255))
    faces = rng.integers(-127, 128, (2, pairs.BLOCK, 512)).astype(np.int8)
    pairs.near_pairs(*faces[:, :2048], 0.5, hashes=False)
    began = time.perf_counter()
    pairs.near_pairs(*signs, 0.56, hashes=True)
    pairs.near_pairs(*faces, 0.5, hashes=False)
    return time.perf_counter() - began


def plan(milliseconds: float, size: float, block: float) -> str:
    """Hours and bytes of ten million photos on a hundred workers of one core, from what was timed.

    People are taken to be unlabelled: with labels, faces are compared by person.
    """
    hours = PHOTOS * milliseconds / 1000 / WORKERS / 3600
    blocks = (PHOTOS / pairs.BLOCK) ** 2 / 2
    return (
        f"{PHOTOS:,} photos on {WORKERS} workers of one core: {hours:.1f} hours at "
        f"{milliseconds:.0f} ms a photo; {blocks * block / WORKERS / 3600:.1f} hours for "
        f"{blocks:,.0f} blocks of pairs at {block:.3f} s; {PHOTOS * size / 1e12:.2f} TB of "
        "records, twice that while they are written"
    )


def memory_of(folder: Path, counts: list[int]) -> None:
    """Small photos, so that it ends: their number is what is asked about.

    A shard's writer keeps its records' places, so shards hold 1,600 of them, as many as of real
    photos' lie in 256 MB.
    """
    for count in counts:
        source = folder / f"{count}"
        write_photos(source, count, side=64, distinct=min(count, 256))
        sizes = ("--size", "32", "--crop", "32", "--gate", "face=8", "--shard-mb", "8")
        found = measure(source, folder / "out", *sizes)
        print(json.dumps({key: round(value, 1) for key, value in found.items()}), flush=True)
        shutil.rmtree(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=int, default=200, help="(200)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="of so many photos")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.memory:
            memory_of(folder, arguments.memory)
            return
        write_photos(folder / "in", arguments.photos, distinct=arguments.photos)
        models = real_sized(folder / "models")
        spent = stages(folder / "in", min(arguments.photos, 48), models)
        for name, milliseconds in spent.items():
            print(f"{name}: {milliseconds:.1f} ms a photo")
        workers = ("--workers", str(arguments.workers))
        stub = measure(folder / "in", folder / "out", *workers)
        print("side files alone:", json.dumps({k: round(v, 2) for k, v in stub.items()}))
        full = measure(folder / "in", folder / "out", *workers, models=models)
        print("networks of real size:", json.dumps({k: round(v, 2) for k, v in full.items()}))
        print(plan(sum(spent.values()), full["bytes a photo"], seconds_of_a_block()))


if __name__ == "__main__":
    main()
