"""Train and measure everything that questions ask for: stopped at any moment, it goes on."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write
from fact_jax.utils.miniature import require_miniature
from fact_train.lab.question import REFERENCE, Loaded, Run, load_questions, runs_of
from fact_train.lab.report import write_report

SHIPPED_LOG = Path("miniature/logs/adapter/metrics.jsonl")
JUDGE = Path("miniature/judge")
_RECORD = "lab.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laboratory:
    """What to do, where: ``out`` holds runs and evaluations, ``docs`` is the report's file.

    ``people`` are drawn in ``draw_steps`` steps for each evaluation; ``steps`` shortens every
    training, for a trial.
    """

    questions: Sequence[Loaded]
    out: Path
    docs: Path
    seeds: int
    steps: int | None = None
    people: int = 96
    draw_steps: int = 25

    def runs(self) -> list[Run]:
        common = ("--people", str(self.people), "--steps", str(self.draw_steps))
        return runs_of(list(self.questions), self.seeds, self.steps, common)

    def trained(self, run: Run) -> Path:
        """Folder of its training: that of the first variant with the same experiment."""
        same = next(r for r in self.runs() if r.config == run.config)
        return self.out / "train" / same.key

    def evaluated(self, run: Run) -> Path:
        return self.out / "evaluation" / run.key

    def is_done(self, run: Run, models: str) -> bool:
        """Whether it was measured; UserError if that was in another experiment."""
        try:
            record = json.loads((self.evaluated(run) / _RECORD).read_text())
        except (OSError, ValueError):
            return False
        if record.get("digest") != f"{run.digest()} {models}":
            raise UserError(
                f"{self.evaluated(run)} is of another experiment, number of steps or people, or "
                "of other models: give another --out, or remove it"
            )
        return True


def laboratory(lab: Laboratory, *, dry_run: bool = False) -> int:
    """Do what is not done, then write the report; the exit status, 128 + signal when stopped."""
    runs = lab.runs()
    paths = {path for run in runs for path in _models(run)}
    require_miniature({f"model {path.name}": path for path in sorted(paths)})
    models = _digest(paths)
    missing = [run for run in runs if not lab.is_done(run, models)]
    for loaded in lab.questions:
        print(f"{loaded.name}: {loaded.text.splitlines()[0]}")
    print(announce(lab, runs, missing), flush=True)
    if dry_run:
        return 0
    for number, run in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {run.key}", flush=True)
        began = time.monotonic()
        status = _train(lab, run) or _evaluate(lab, run)
        if status:
            print("the same command goes on from here", file=sys.stderr)
            return status
        record = {"digest": f"{run.digest()} {models}", "seconds": time.monotonic() - began}
        with atomic_write(lab.evaluated(run) / _RECORD) as path:
            path.write_text(json.dumps(record) + "\n")
    for path in write_report(lab.questions, runs, lab.evaluated, lab.docs):
        print(path)
    return 0


def announce(lab: Laboratory, runs: Sequence[Run], missing: Sequence[Run]) -> str:
    """How long it takes, by the pace of what was trained in this folder or of the shipped run."""
    trainings = {lab.trained(run): run.config.steps for run in missing}
    steps = sum(trainings.values())
    logs = [lab.trained(run) / "metrics.jsonl" for run in runs]
    source, paces = "trainings in this folder", [p for log in logs for p in _paces(log)]
    if not paces:
        source, paces = "the shipped adapter's training", _paces(SHIPPED_LOG)
    text = (
        f"{len(runs) - len(missing)} of {len(runs)} evaluations are done; to do: {len(trainings)} "
        f"trainings, {steps:,} steps in all, and {len(missing)} evaluations"
    )
    if not paces:
        return text
    hours = steps / statistics.median(paces) / 3600
    return f"{text}. At the pace of {source} the steps alone take {hours:.1f} hours"


def _paces(log: Path) -> list[float]:
    paces = []
    with contextlib.suppress(OSError):
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                paces.append(float(json.loads(line)["steps_per_second"]))
    return [pace for pace in paces if pace > 0]


def _models(run: Run) -> list[Path]:
    options = run.config.options
    paths = [Path(options.base), Path(options.encoder), JUDGE]
    return paths + ([Path(options.identity.encoder)] if options.identity.encoder else [])


def _digest(paths: set[Path]) -> str:
    """Digest of the files of models: numbers of other models are not compared."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _train(lab: Laboratory, run: Run) -> int:
    folder = lab.trained(run)
    if (folder / "export" / "adapter.safetensors").is_file():
        return 0
    words = [run.question, run.variant, str(run.seed), str(run.config.steps), str(folder)]
    return _call("fact_train.lab.one", *words)


def _evaluate(lab: Laboratory, run: Run) -> int:
    """By ``fact-infer evaluate``, a program of its own, as anybody would measure it."""
    adapter = lab.trained(run) / "export" / "adapter.safetensors"
    words = ["--base", run.config.options.base, "--adapter", str(adapter), "--encoder"]
    words += [run.config.options.encoder, "--judge", str(JUDGE), *run.options]
    words += ["--out", str(lab.evaluated(run))]
    return _call("fact_infer", "evaluate", *words, quiet=True)


def _call(module: str, *words: str, quiet: bool = False) -> int:
    """Run a program of ours to its end; the exit status. It deals with signals itself."""
    command = [sys.executable, "-m", module, *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None)
    # Ctrl-C reaches the child by itself: it is in the terminal's foreground too.
    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        status = child.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def make_laboratory(
    names: list[str], out: Path, docs: Path | None, seeds: int, steps: int | None, people: int
) -> Laboratory:
    """Checked; UserError for what cannot be."""
    for name, value, least in (("seeds", seeds, 1), ("people", people, 2), ("steps", steps, 10)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    questions = []
    for one in load_questions(names):
        wanted = {v.options.identity.encoder for v in one.question.variants.values()} - {None}
        absent = [path for path in sorted(wanted) if not Path(path).exists()]
        if absent and one.name in names:
            raise UserError(f"{one.name}: {absent[0]} is not there: train mini_identity first")
        if absent:
            print(f"note: {one.name} is left out, {absent[0]} is not there", file=sys.stderr)
        else:
            questions.append(one)
    assert questions[0].name == REFERENCE
    return Laboratory(
        questions=questions,
        out=out,
        docs=docs or out / "laboratory.md",
        seeds=seeds,
        steps=steps,
        people=people,
    )
