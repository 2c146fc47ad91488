"""The whole path once: portraits, training, conversion, pictures by two backends, a report.

    python demo.py [--scratch] [--out DIR]

Stopped at any moment and started again, it goes on: finished stages are not done again, and a
training resumes at its newest checkpoint. ``make demo`` and ``make demo-scratch`` call it.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SHIPPED_LOG = Path("miniature/logs/adapter/metrics.jsonl")
"""Of the training from nothing; the shipped adapter went on from it."""
LAST_LOG = Path("miniature/logs/points/metrics.jsonl")
PEOPLE = ("080000", "080001")
PROMPTS = (
    "a portrait of a smiling person wearing a red shirt on a blue plain background",
    "a portrait of a neutral person with round glasses wearing a white shirt"
    " on a green striped background",
)
# Several of the programs compile the same functions.
CACHE = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / "demo" / "compiled")}
SETTINGS = ("--sampler", "ddim", "--steps", "25", "--guidance", "3", "--face-scale", "1")


class Stage(NamedTuple):
    """Commands, one after the other, and what is there when they are done.

    ``emptied`` are files and folders of an earlier attempt that must not be there.
    """

    name: str
    commands: list[list[str]]
    result: Path
    emptied: tuple[Path, ...] = ()


def stages(out: Path, scratch: bool) -> list[Stage]:
    """The whole demo; ``scratch`` trains from nothing instead of going on from the shipped run."""
    adapter, run, evaluation = out / "adapter.safetensors", out / "train", out / "evaluation"
    models = ["--base", "miniature/base", "--adapter", adapter, "--encoder", "miniature/encoder"]
    before = [] if scratch else ["--before", LAST_LOG]
    return [
        _stage(
            "draw photos of people whom nothing was trained on",
            [["fact-infer", "portraits", "--people", len(PEOPLE), "--out", out / "portraits"]],
            out / "portraits" / f"{PEOPLE[-1]}-0.png",
            emptied=(out / "portraits",),
        ),
        _stage(
            "train the adapter" if scratch else "train the adapter, going on from the shipped one",
            [["fact-train", "run", "mini" if scratch else "mini_demo", "--out", run]],
            run / "export" / "adapter.safetensors",
        ),
        _stage("convert to PyTorch's layout", _convert(run, out), adapter),
        *(
            _stage(
                f"pictures by {name}",
                [_generate(models, person, backend, out) for person in PEOPLE],
                out / backend / PEOPLE[-1],
                emptied=(out / backend,),
            )
            for name, backend in (("JAX", "flax"), ("PyTorch", "torch"))
        ),
        _stage(
            "evaluate on 96 people",
            [["fact-infer", "evaluate", *models, "--people", 96, *SETTINGS, "--out", evaluation]],
            evaluation / "evaluation.json",
            emptied=(evaluation,),
        ),
        _stage(
            "report",
            [
                ["fact-infer", "report", "--training", run, *before, "--evaluation", evaluation]
                + ["--flax", out / "flax", "--torch", out / "torch"]
                + ["--stages", out / "stages.json", "--out", out]
            ],
            out / "report.html",
            emptied=(out / "report.html", out / "grid.png"),
        ),
    ]


def _stage(name: str, commands: list[list], result: Path, emptied: tuple[Path, ...] = ()) -> Stage:
    return Stage(name, [[str(word) for word in command] for command in commands], result, emptied)


def _convert(run: Path, out: Path) -> list[list]:
    ours, released = out / "adapter.safetensors", out / "adapter.ckpt"
    return [
        ["fact-convert", "to-torch", run, released, "--force"],
        ["fact-convert", "to-torch", run, ours, "--force"],
        ["fact-convert", "verify", ours, released],
    ]


def _generate(models: list, person: str, backend: str, out: Path) -> list:
    photo = out / "portraits" / f"{person}-0"
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return [
        *["fact-infer", "generate", *models, "--photo", f"{photo}.png"],
        *["--mask", f"{photo}.mask.png", *prompts, *SETTINGS, "--seed", 1],
        *["--backend", backend, "--out", out / backend / person],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", action="store_true", help="train from nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(demo, or demo/scratch)")
    arguments = parser.parse_args()
    out = arguments.out or Path("demo/scratch" if arguments.scratch else "demo")
    if arguments.scratch:
        print(announce(ROOT / SHIPPED_LOG), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out / "stages.json")
    todo = stages(out, arguments.scratch)
    began = time.monotonic()
    redo = False
    for number, stage in enumerate(todo, start=1):
        head = f"[{number}/{len(todo)}] {stage.name}"
        if not redo and record.is_done(stage):
            print(f"{head}: done before", flush=True)
            continue
        redo = True  # what comes after was made from older files
        print(head, flush=True)
        status = run(stage, record)
        if status:
            print(f"stopped in: {stage.name}. The same command goes on from here.", file=sys.stderr)
            return status
    print(f"{time.monotonic() - began:.0f} s. Open {out / 'report.html'}; the grid: {out}/grid.png")
    page = Path(sys.executable).parent / "fact-infer"
    shown = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    print(f"make portraits in the browser: {shown} ui, then open http://127.0.0.1:7860")
    return 0


def announce(log: Path) -> str:
    """How long training from nothing takes, judged by the shipped run's log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps = rows[-1]["step"]
    speed = statistics.median(row["steps_per_second"] for row in rows)
    minutes = steps / speed / 60
    return (
        f"training from nothing: {steps} steps. The shipped run made {speed:.2f} steps a second, "
        f"{minutes:.0f} minutes in all; your machine's own pace is shown on every line. "
        "Ctrl-C saves and stops; the same command goes on."
    )


class Record:
    """What was done and how long it took, kept in a file that the report reads."""

    def __init__(self, path: Path):
        self.path = path
        self.stages: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}
        stamp = ROOT / ".venv" / "installed"
        if stamp.exists() and stamp.read_text().strip():
            installation = {"seconds": float(stamp.read_text()), "done": True}
            self.stages = {"install (once)": installation} | self.stages

    def is_done(self, stage: Stage) -> bool:
        """Was this very stage finished, and is its result still there?"""
        known = self.stages.get(stage.name, {})
        return (
            known.get("done", False)
            and known["commands"] == stage.commands
            and stage.result.exists()
        )

    def add(self, stage: Stage, seconds: float, done: bool) -> None:
        """Count time in a stage; what an interrupted one took before is kept."""
        known = self.stages.get(stage.name, {"seconds": 0.0, "done": False})
        before = 0.0 if known["done"] else known["seconds"]
        self.stages[stage.name] = {
            "seconds": round(before + seconds, 1),
            "done": done,
            "commands": stage.commands,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.stages, indent=1) + "\n")
        temporary.replace(self.path)


def run(stage: Stage, record: Record) -> int:
    """Run a stage's commands; the exit status of the first that fails, else 0."""
    began = time.monotonic()
    if stage.name in record.stages:
        for path in stage.emptied:
            # fact-infer replaces nothing, and what reads this expects the first name.
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    # From here on what is there is the demo's own.
    record.add(stage, 0.0, done=False)
    for command in stage.commands:
        print(f"  $ {shlex.join(command)}", flush=True)
        status = call(command)
        if status:
            record.add(stage, time.monotonic() - began, done=False)
            return status
    record.add(stage, time.monotonic() - began, done=True)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return 0


def call(command: list[str]) -> int:
    """Run one of the programs installed beside this Python. Signals are the program's to handle."""
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        print(f"error: no {command[0]} beside {sys.executable}: run `make demo`", file=sys.stderr)
        return 2
    child: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        # Ctrl-C reaches the child by itself: it is in the terminal's foreground too.
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen([str(program), *command[1:]], cwd=ROOT, env=CACHE | os.environ)
        status = child.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
