"""How fast weights are moved between the two worlds, against copying the file, and in what memory.

    python -m benchmarks.convert                     # the UNet of SD 1.5, 3.4 GB, random weights
    python -m benchmarks.convert --model mini        # the miniature's

Each conversion is a process of its own; its time is that of `fact-convert` without the imports,
until everything is on disk, as the time of `cp` is with `sync`. Private memory is what no other
process shares: read pages of the source file that nobody else has mapped count too.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROUNDS = 3
_CHILD = """
import json, sys, time
from fact_convert.cli import main as cli, opening, saving
began = time.perf_counter()
status = cli.main(sys.argv[1:])
print(json.dumps(time.perf_counter() - began))
sys.exit(status)
"""


def write_source(path: Path, model: str) -> None:
    """A UNet's file with random weights, never in memory as a whole."""
    from benchmarks.random_weights import random_state
    from fact_convert.io.safetensors_io import write_safetensors
    from fact_jax.models.unet import UNetConfig

    state = random_state("unet", getattr(UNetConfig, model)())
    write_safetensors(path, state, {"format": "pt"})


def copy(source: Path, out: Path) -> float:
    """Seconds that ``cp`` takes until the copy is on disk."""
    began = time.perf_counter()
    subprocess.run(["cp", source, out], check=True)
    subprocess.run(["sync", out], check=True)
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def convert(*words: str | Path) -> tuple[float, float]:
    """Seconds and the peak of private megabytes of one ``fact-convert``."""
    command = [sys.executable, "-c", _CHILD, *map(str, words)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        watch = Watch(child.pid)
        watch.start()
        said, _ = child.communicate()
        watch.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command[3:])}: failed")
    return float(said.splitlines()[-1]), watch.peak


class Watch(threading.Thread):
    """Looks at a process's memory ten times a second until it ends."""

    def __init__(self, process: int):
        super().__init__(daemon=True)
        self._file, self.peak = Path(f"/proc/{process}/smaps_rollup"), 0.0

    def run(self) -> None:
        while True:
            try:
                lines = self._file.read_text().splitlines()
            except OSError:
                return
            private = [int(line.split()[1]) for line in lines if line.startswith("Private_")]
            if not private:
                return
            self.peak = max(self.peak, sum(private) / 1024)
            time.sleep(0.1)


def content(path: Path) -> str:
    from fact_convert.io.hashing import CONTENT
    from fact_convert.io.safetensors_io import read_safetensors

    return read_safetensors(path)[1][CONTENT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("sd15", "mini"), default="sd15")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        source, there, back = (
            Path(temporary) / name for name in ("a.safetensors", "b", "c.safetensors")
        )
        write_source(source, arguments.model)
        gigabytes = source.stat().st_size / 1e9
        subprocess.run(["sync", source], check=True)
        times: dict[str, list[float]] = {"cp": [], "to-jax": [], "to-torch": []}
        peaks: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name, words in (("to-jax", (source, there)), ("to-torch", (there, back))):
                times["cp"].append(copy(source, back))
                seconds, peak = convert(name, *words)
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0), peak)
            if content(source) != content(back):
                raise SystemExit("what came back is not what was sent")
            back.unlink()
            shutil.rmtree(there)
        print(
            f"{gigabytes:.2f} GB, {ROUNDS} rounds, medians; {os.cpu_count()} cores with "
            f"{os.getloadavg()[1]:.1f} programs running on them"
        )
        base = statistics.median(times["cp"])
        print(f"cp and sync: {base:.2f} s ({min(times['cp']):.2f} to {max(times['cp']):.2f})")
        for name, peak in peaks.items():
            seconds = statistics.median(times[name])
            print(
                f"{name}: {seconds:.2f} s ({min(times[name]):.2f} to {max(times[name]):.2f}), "
                f"{base / seconds:.2f} of the speed of cp, {peak:.0f} MB of private memory at most"
            )


if __name__ == "__main__":
    main()
