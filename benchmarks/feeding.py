"""Does the feeding outrun the training step, and does its memory stay flat?

    python -m benchmarks.feeding                     # rates and memory, 1,000 and 100,000 records
    python -m benchmarks.feeding --sets big          # 512 x 512 only: rate, and the step's waiting
    python -m benchmarks.feeding --train 40          # and 40 steps of `mini` fed from records

Each measurement is a process of its own. The 100,000 records are links to the shards of 1,000: the
files are as many and as large as they would be, and nothing of them is held but who is who.
"""

import argparse
import dataclasses
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCHES, BATCH = 60, 16
STEPS = 40
SLOWER = (1.0, 1.25, 1.5, 2.0, 3.0)
"""A step's time, of the time that its batch takes to make."""
# Forward and backward pass of SD 1.5 with adapters at 512 x 512, as `fact-train plan` counts them.
SD15_TERAFLOP = 2.8
V5E_TERAFLOPS = 197.0


def big_examples(count: int) -> Iterator:
    """Photos of 512 x 512 with detail at every scale, crops of 112 x 112, people of four photos."""
    from fact_train.data.records import Example, encode_mask, encode_png

    rng = np.random.default_rng(0)
    sides = (8, 32, 128, 512)
    mask = np.zeros((512, 512), np.float32)
    mask[100:400, 150:360] = 1
    for number in range(count):
        layers = [
            np.kron(rng.normal(0, 16, (side, side, 3)), np.ones((512 // side, 512 // side, 1)))
            for side in sides
        ]
        pixels = np.clip(sum(layers) + 128, 0, 255).astype(np.uint8)
        photo = io.BytesIO()
        Image.fromarray(pixels).save(photo, "JPEG", quality=95, subsampling=0)
        yield Example(
            identity=str(number // 4),
            name=str(number),
            photo=photo.getvalue(),
            caption="a portrait of a person",
            face_mask=encode_mask(mask),
            head_mask=encode_mask(mask),
            crop=encode_png(np.ascontiguousarray(pixels[200:312, 200:312])),
            points=np.zeros((5, 2), np.float32),
        )


def repeat_shards(records: Path, out: Path, times: int) -> None:
    """A data set of ``times`` as many records, whose shards are links to those of ``records``."""
    from fact_train.data.records import IDENTITIES, NAME, SIZES, VERSION

    old, new = (folder / NAME / VERSION for folder in (records, out))
    new.mkdir(parents=True)
    shards = sorted(old.glob("*.array_record*"))
    count = len(shards) * times
    paths = [new / f"{NAME}-train.array_record-{i:05d}-of-{count:05d}" for i in range(count)]
    for i, path in enumerate(paths):
        os.link(shards[i % len(shards)], path)
    info = json.loads((old / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] *= times
    (new / "dataset_info.json").write_text(json.dumps(info))
    (new / "features.json").write_bytes((old / "features.json").read_bytes())
    identities = np.load(old / "identities.npy")
    people = (identities + i * (identities.max() + 1) for i in range(times))
    np.save(new / IDENTITIES, np.concatenate(list(people)).astype(np.int32))
    sizes = {path.name: path.stat().st_size for path in paths}
    (new / SIZES).write_text(json.dumps(sizes, indent=1))


def measure(records: Path) -> dict[str, Any]:
    """Rates and memory of this process, which does nothing but feed."""
    from fact_convert.models.tokenizer import read_tokenizer
    from fact_train.data.loader import GrainSource
    from fact_train.data.pixel_dataset import PixelDataset
    from fact_train.data.records import Records

    tokenizer = read_tokenizer(Path("miniature/base/tokenizer"), 77)
    before = memory()
    stored = Records(records)
    rows = PixelDataset(stored, tokenizer, region="head", cell=8)
    batches: Any = GrainSource(rows, BATCH, 0).batches(0, np.arange(BATCH))
    next(batches)
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        next(batches)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    samples = BATCH * BATCHES
    waits = {f"{slower:g}": waiting(batches, slower * wall / BATCHES) for slower in SLOWER}
    batches.close()
    return {
        "records": len(stored),
        "samples_per_second": samples / wall,
        "samples_per_core_second": samples / cpu,
        "waiting": waits,
        "megabytes_of_feeding": memory() - before,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def waiting(batches: Any, seconds: float) -> float:
    """Share of its time that the training loop waits for batches whose step takes ``seconds``.

    Batches come as in training; the step sleeps, as the host does while an accelerator computes.
    """
    import jax

    from fact_train.engine.prefetch import prefetch

    waited = 0.0
    with prefetch(batches, jax.device_put, 0, STEPS) as ready:
        next(ready)
        began = time.perf_counter()
        for _ in range(STEPS - 1):
            time.sleep(seconds)
            asked = time.perf_counter()
            next(ready)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - began)


def memory() -> float:
    """Resident megabytes now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(records: Path, steps: int, folder: Path) -> dict[str, float]:
    """The miniature's training step, fed from records: how much of the time it waits for them."""
    from fact_train.config import CheckpointConfig, LogConfig
    from fact_train.configs.mini import config as mini
    from fact_train.run.loop import run

    options = dataclasses.replace(mini.options, records=str(records))
    config = dataclasses.replace(
        mini,
        steps=steps,
        options=options,
        log=LogConfig(every=max(1, steps // 4)),
        checkpoint=CheckpointConfig(every=10 * steps),
    )
    run(config, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "speed/data_wait" in line][-1]
    return {name: value for name, value in last.items() if name.startswith("speed/")}


def prepare(folder: Path, wanted: str) -> dict[str, Path]:
    """The data sets: 1,000 and 100,000 miniature records, 200 of full size."""
    from fact_train.data.portraits import portrait_examples
    from fact_train.data.record_writer import write_records

    small, large, big = (folder / name for name in ("small", "large", "big"))
    sets: dict[str, Path] = {}
    if wanted in ("all", "small"):
        sizes = {"size": 128, "crop_size": 48}
        write_records(portrait_examples("adapter", 250, 4, **sizes), small, **sizes)
        repeat_shards(small, large, 100)
        sets |= {"128 x 128": small, "128 x 128, repeated": large}
    if wanted in ("all", "big"):
        write_records(big_examples(200), big, size=512, crop_size=112)
        sets["512 x 512"] = big
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="of `mini`")
    parser.add_argument("--sets", choices=("all", "small", "big"), default="all")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    if arguments.train and arguments.sets == "big":
        parser.error("--train takes the small records")
    with tempfile.TemporaryDirectory() as temporary:
        sets = prepare(Path(temporary), arguments.sets)
        for name, folder in sets.items():
            command = [sys.executable, "-m", "benchmarks.feeding", "--measure", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{name}: {found['records']:,} records, {found['samples_per_second']:,.0f} "
                f"samples/s here, {found['samples_per_core_second']:,.0f} for each core's second, "
                f"{found['megabytes_of_feeding']:.0f} MB for feeding (peak of the process "
                f"{found['peak_megabytes']:.0f} MB)"
            )
            made = BATCH / found["samples_per_second"]
            for slower, share in found["waiting"].items():
                print(
                    f"  a step of {float(slower) * made:.3f} s for {BATCH} samples waits "
                    f"{100 * share:.1f} % of its time"
                )
        need = 0.5 * V5E_TERAFLOPS / SD15_TERAFLOP
        print(f"a v5e chip at half of its peak takes {need:.0f} samples/s of 512 x 512")
        if arguments.train:
            found = train(sets["128 x 128, repeated"], arguments.train, Path(temporary) / "run")
            print("mini fed from 100,000 records:", json.dumps(found))


if __name__ == "__main__":
    main()
