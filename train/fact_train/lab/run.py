"""Train and measure everything that questions ask for: stopped at any moment, it goes on."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write, folder_lock
from fact_jax.utils.miniature import require_miniature
from fact_train.lab.programs import Programs
from fact_train.lab.question import REFERENCE, Loaded, Run, load_questions, runs_of
from fact_train.lab.report import write_report
from fact_train.run.folder import check_export

SHIPPED_LOG = Path("miniature/logs/adapter/metrics.jsonl")
JUDGE = Path("miniature/judge")
DIVERGED = 3
"""Exit status of a training that came to nothing finite."""
START, EACH_PERSON = 30, 0.6
"""Seconds of one core, on a machine of 2026: to start a training whose data and program are there,
and to draw and measure a person whose base picture is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laboratory:
    """What to do, where: ``out`` holds runs and evaluations, ``docs`` is the report's file.

    ``people`` are drawn in ``draw_steps`` steps for each evaluation; ``steps`` shortens every
    training, for a trial. ``jobs`` trainings or evaluations go on at a time, each on its share of
    the processors.
    """

    questions: Sequence[Loaded]
    out: Path
    docs: Path
    seeds: int
    steps: int | None = None
    people: int = 96
    draw_steps: int = 25
    jobs: int = 1

    def runs(self) -> list[Run]:
        common = ("--people", str(self.people), "--steps", str(self.draw_steps))
        return runs_of(list(self.questions), self.seeds, self.steps, common)

    def trained(self, run: Run) -> Path:
        """Folder of its training: that of the first variant with the same experiment."""
        same = next(r for r in self.runs() if r.config == run.config)
        return self.out / "train" / same.key

    def evaluated(self, run: Run) -> Path:
        return self.out / "evaluation" / run.key

    @functools.cached_property
    def models(self) -> dict[str, str]:
        """Digest of the files of each run's models: numbers of other models are not compared."""
        runs = {run.key: frozenset(_models(run)) for run in self.runs()}
        digests = {paths: _digest(paths) for paths in set(runs.values())}
        return {key: digests[paths] for key, paths in runs.items()}

    def training_digest(self, run: Run) -> str:
        """Of all that decides its adapter."""
        return f"{run.training_digest()} {self.models[run.key]}"

    def digest(self, run: Run) -> str:
        """Of all that decides its numbers."""
        return f"{run.digest()} {self.models[run.key]}"

    def result(self, run: Run) -> str | None:
        """``measured`` or ``diverged``, None before that; UserError for another experiment's."""
        said = self._claimed(_record(self.evaluated(run)), self.digest(run))
        trained = self._claimed(_record(self.trained(run)), self.training_digest(run))
        if trained.get("diverged"):
            return "diverged"
        done = said and (self.evaluated(run) / "evaluation.json").is_file()
        return "measured" if done else None

    def _claimed(self, record: Path, digest: str) -> dict:
        try:
            found = json.loads(record.read_text())
            other = found["digest"] != digest
        except FileNotFoundError:
            if not record.with_suffix("").exists():
                return {}
            found, other = {}, True
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{record} is damaged: remove it and {record.with_suffix('')}"
            ) from None
        if other:
            raise UserError(
                f"{record.with_suffix('')} is of another experiment, number of steps or people, of "
                "other models or of another version: give another --out, or remove it and "
                f"{record.name} beside it"
            )
        return found


def laboratory(lab: Laboratory, *, dry_run: bool = False) -> int:
    """Do what is not done, then write the report; the exit status, 128 + signal when stopped."""
    runs = lab.runs()
    paths = {path for run in runs for path in _models(run)}
    require_miniature({f"model {path.name}": path for path in sorted(paths)})
    missing = [run for run in runs if lab.result(run) is None]
    for loaded in lab.questions:
        print(f"{loaded.name}: {loaded.text.splitlines()[0]}")
    print(announce(lab, runs, missing), flush=True)
    if dry_run:
        return 0
    lab.out.mkdir(parents=True, exist_ok=True)
    _check_report(lab.docs)
    with folder_lock(lab.out), Programs(lab.out / "programs", lab.jobs) as programs:
        # Variants that share a training are one after the other's.
        groups: dict[Path, list[Run]] = {}
        for run in missing:
            groups.setdefault(lab.trained(run), []).append(run)
        numbers = {run.key: i for i, run in enumerate(missing, start=1)}

        def work(group: list[Run]) -> int:
            for run in group:
                print(f"[{numbers[run.key]}/{len(missing)}] {run.key}", flush=True)
                if status := _do(lab, run, programs):
                    return status
            return 0

        if status := programs.run(work, list(groups.values())):
            print("the same command goes on from here", file=sys.stderr)
            return status
    results = {run.key: lab.result(run) for run in runs}
    diverged = [run for run in runs if results[run.key] == "diverged"]
    for path in write_report(lab.questions, runs, lab.evaluated, lab.docs, diverged):
        print(path)
    return 0


def _check_report(docs: Path) -> None:
    """UserError if the report could not be written: before a night's work, not after."""
    docs.parent.mkdir(parents=True, exist_ok=True)
    if docs.is_dir() or not os.access(docs.parent, os.W_OK):
        raise UserError(f"--docs {docs}: no file can be written there")


def _do(lab: Laboratory, run: Run, programs: Programs) -> int:
    """Train and measure one; the status, 0 if its training diverged too."""
    if lab.result(run) == "diverged":  # with another variant, whose training it shares
        return 0
    began = time.monotonic()
    _write(lab.trained(run), {"digest": lab.training_digest(run)})
    status = _train(lab, run, programs)
    if status == DIVERGED:
        print(f"{run.key} diverged: the report says so", flush=True)
        _write(lab.trained(run), {"digest": lab.training_digest(run), "diverged": True})
        return 0
    if status:
        return status
    record: dict = {"digest": lab.digest(run)}
    # Beforehand, so that nobody takes the numbers of another experiment for this one's.
    _write(lab.evaluated(run), record)
    status = _evaluate(lab, run, programs)
    if not status:
        if not (lab.evaluated(run) / "evaluation.json").is_file():
            raise UserError(
                f"{lab.evaluated(run)} holds part of another evaluation: remove it, the same "
                "command goes on"
            )
        _write(lab.evaluated(run), {**record, "seconds": round(time.monotonic() - began, 1)})
    return status


def _record(folder: Path) -> Path:
    """What is there to be said of a folder, beside it."""
    return folder.with_suffix(".json")


def _write(folder: Path, record: dict) -> None:
    _record(folder).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(_record(folder)) as path:
        path.write_text(json.dumps(record) + "\n")


def announce(lab: Laboratory, runs: Sequence[Run], missing: Sequence[Run]) -> str:
    """How long it takes, by the pace of what was done in this folder or of the shipped run."""
    trainings = {lab.trained(run): run.config.steps for run in missing}
    trainings = {path: n for path, n in trainings.items() if not _trained(path, n)}
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
    pace = statistics.median(paces)
    seconds = steps / pace + len(trainings) * START + len(missing) * lab.people * EACH_PERSON
    jobs = "" if lab.jobs == 1 else f", {lab.jobs} at a time"
    return (
        f"{text}. About {seconds / lab.jobs / 3600:.1f} hours{jobs}, by the pace of {source} "
        f"({pace:.2f} steps/s)"
    )


def _trained(folder: Path, steps: int) -> bool:
    """Whether the export is of the last step: there is one of each checkpoint."""
    return not check_export(folder / "export", steps)


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


def _digest(paths: Collection[Path]) -> str:
    """Digest of the files of models."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def _train(lab: Laboratory, run: Run, programs: Programs) -> int:
    folder = lab.trained(run)
    if _trained(folder, run.config.steps):
        return 0
    words = [run.question, run.variant, str(run.seed), str(run.config.steps), str(folder)]
    return programs.call("fact_train.lab.one", *words, str(lab.out / "drawn"))


def _evaluate(lab: Laboratory, run: Run, programs: Programs) -> int:
    """By ``fact-infer evaluate``, a program of its own, as anybody would measure it."""
    if (lab.evaluated(run) / "evaluation.json").is_file():
        return 0
    adapter = lab.trained(run) / "export" / "adapter.safetensors"
    words = ["--base", run.config.options.base, "--adapter", str(adapter), "--encoder"]
    words += [run.config.options.encoder, "--judge", str(JUDGE), *run.options]
    words += ["--base-pictures", str(lab.out / "base"), "--out", str(lab.evaluated(run))]
    return programs.call("fact_infer", "evaluate", *words, quiet=True)


def make_laboratory(
    names: list[str],
    out: Path,
    docs: Path | None,
    seeds: int,
    steps: int | None,
    people: int,
    jobs: int = 1,
) -> Laboratory:
    """Checked; UserError for what cannot be."""
    for name, value, least in (("seeds", seeds, 1), ("people", people, 2), ("steps", steps, 5)):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not 1 <= jobs <= cores:
        raise UserError(f"--jobs must be from 1 to {cores}, the processors there are, got {jobs}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is no folder")
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
        jobs=jobs,
    )
