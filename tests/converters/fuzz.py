"""Coverage-guided fuzzing of the converter's readers with atheris, which finds its own mutants.

    pip install atheris
    python -m tests.converters.fuzz FOLDER KIND -max_total_time=3600

``FOLDER`` keeps what was found interesting, ``KIND`` is the ending of the files: safetensors, ckpt
(an archive), pkl (the pickle inside one), pt (the layout before archives) or zarray. A finding is
written to the current folder as ``crash-...``; it belongs into ``test_lies``.
"""

import os
import sys
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["fact_convert", "zipfile", "torch._weights_only_unpickler"]
):
    from fact_convert.cli import main as cli  # noqa: F401
    from fact_convert.cli import opening as formats  # noqa: F401
    from fact_convert.cli import saving  # noqa: F401
    from fact_convert.io import torch_io as pickles  # noqa: F401
    from fact_convert.io import weight_files as readers  # noqa: F401
    from fact_convert.io import zarr_io as zarr  # noqa: F401
    from tests.converters import mutants

SEEDS = {
    "safetensors": ("adapter.safetensors", "encoder.safetensors"),
    "ckpt": ("adapter.ckpt", "encoder.pt", "trainer.ckpt"),
    "pkl": ("adapter.ckpt", "encoder.pt", "trainer.ckpt"),
    "pt": ("legacy.pt",),
    "zarray": ("plain/state/params.encoder.pos_embed/.zarray",),
}


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    corpus, seeds, work = folder / kind, folder / "seeds", Path(f"/dev/shm/fuzz-{kind}")
    for path in (corpus, work):
        path.mkdir(parents=True, exist_ok=True)
    if not seeds.exists():
        seeds.mkdir()
        mutants.write_seeds(seeds)
    for number, name in enumerate(SEEDS[kind]):
        content = (seeds / name).read_bytes()
        if kind == "pkl":
            with zipfile.ZipFile(seeds / name) as archive:
                content = archive.read(_program(archive))
        (corpus / f"seed-{number}").write_bytes(content)
    os.environ["CANARY"] = str(work / "canary")
    os.fsync, os.sync = lambda file: None, lambda: None
    path, out = _path(kind, seeds, work), work / "out.safetensors"

    out.unlink(missing_ok=True)  # of a run before
    # Everything is imported before time counts.
    assert mutants.attempt(seeds / "legacy.pt", out, "to-torch") == "done"

    def once(data: bytes) -> None:
        _write(kind, seeds, path, data)
        out.unlink(missing_ok=True)
        source = work / "plain" if kind == "zarray" else path
        if mutants.attempt(source, out, "to-torch") == "done":
            mutants.check(source, out)

    atheris.Setup(
        [sys.argv[0], str(corpus), "-timeout=10", "-rss_limit_mb=2048", *sys.argv[3:]], once
    )
    atheris.Fuzz()


def _program(archive: zipfile.ZipFile) -> str:
    return next(name for name in archive.namelist() if name.endswith("data.pkl"))


def _path(kind: str, seeds: Path, work: Path) -> Path:
    if kind != "zarray":
        return work / f"x.{'ckpt' if kind == 'pkl' else kind}"
    import shutil

    shutil.copytree(seeds / "plain", work / "plain", dirs_exist_ok=True)
    return work / SEEDS[kind][0]


def _write(kind: str, seeds: Path, path: Path, data: bytes) -> None:
    if kind != "pkl":
        path.write_bytes(data)
        return
    with zipfile.ZipFile(seeds / "adapter.ckpt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name == _program(old) else old.read(name))


if __name__ == "__main__":
    main()
