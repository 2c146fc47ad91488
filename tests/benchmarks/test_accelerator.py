"""The one command for accelerators: its table and exit code, and that its comparisons can fail."""

import json

import pytest

from benchmarks import accelerator
from benchmarks import accelerator_parity as parity
from benchmarks.accelerator import Part
from fact_jax.ops.attention import attention_plain

STEP = {"first_seconds": 9.0, "device_bytes": 2_000_000_000, "model_flops": None, "peak": None}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``main`` on parts whose processes print these answers, or fail with None: (status, table)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answer.py").write_text(
        "import sys\nif sys.argv[1] == 'null': raise MemoryError('no more')\n"
        "if sys.argv[1] != '{}': print(sys.argv[1])\n"
    )
    versions = {"platform": "gpu", "text": "1 x device, library 1.0"}
    monkeypatch.setattr(accelerator, "_in_process", lambda name: ("answer", json.dumps(versions)))

    def run(*answers):
        parts = [Part(**part, command=("answer", json.dumps(found))) for part, found in answers]
        monkeypatch.setattr(accelerator, "parts", lambda *_, **__: parts)
        status = accelerator.main(["--json", "found.json"])
        written = json.loads((tmp_path / "found.json").read_text())
        return status, capsys.readouterr().out.splitlines(), written

    return run


def test_one_table_with_ratios(run):
    def step(by, seconds, **more):
        part = {"group": "step", "library": "jax", "by": by, "case": "4 samples"}
        return part, STEP | {"seconds": seconds} | more

    def picture(side, seconds):
        return {"side": side, "seconds": seconds, "first_seconds": 3.0, "device_bytes": None}

    drawn = {"group": "pictures", "library": "torch", "by": "PyTorch eager", "case": "8 at a time"}
    status, lines, _ = run(
        step("JAX, remat=block", [1.0, 2.0, 9.0], model_flops=100, peak=1000.0),
        step("PyTorch compiled", [4.0, 4.0, 4.0]),
        (drawn, {"pictures": [picture("plain", [0.5]), picture("face", [0.75])]}),
    )
    assert status == 0
    assert lines[2:] == [
        "| versions | jax | 1 x device, library 1.0 | |",
        "| versions | torch | 1 x device, library 1.0 | |",
        "| step | JAX, remat=block, 4 samples | 2 samples a second (2000 ms), MFU 5%, "
        "peak 2.0 GB, the first 9 s | PyTorch compiled: 0.50 |",
        "| step | PyTorch compiled, 4 samples | 1 samples a second (4000 ms), MFU 2%, "
        "peak 2.0 GB, the first 9 s |  |",
        "| pictures | PyTorch eager, plain, 8 at a time | 0.5 s a picture, the first 3 s |  |",
        "| pictures | PyTorch eager, face, 8 at a time | 0.75 s a picture, the first 3 s "
        "| plain: 1.50 |",
    ]


@pytest.mark.parametrize(
    ("found", "status", "cell"),
    [
        ({"error": 1e-5}, 0, "error 1.0e-05 of 1e-04 allowed"),
        ({"error": 2e-4}, 1, "error 2.0e-04 of 1e-04 allowed, **too large**"),
        ({"error": float("nan")}, 1, "error nan of 1e-04 allowed, **too large**"),
        ({"failed": "out of memory"}, 1, "**failed**: out of memory"),
        (None, 1, "**failed**: MemoryError: no more"),
        ({}, 1, "**failed**: ended without a result"),
    ],
)
def test_the_exit_code_is_parity(run, found, status, cell):
    """A comparison that was not made does not hold either; what comes after it is still run."""
    compared = {"group": "models", "library": "jax"}
    found = found and {"rows": [{"case": "UNet, float32", "most": 1e-4, **found}]}
    after = ({"group": "step", "library": "jax", "by": "JAX", "case": "4 samples"}, None)
    got, lines, written = run((compared, found), after)
    assert got == status
    assert lines[-2].split(" | ")[2].removesuffix(" |") == cell
    assert lines[-1] == "| step | JAX, 4 samples | **failed**: MemoryError: no more |  |"
    assert written["parity"] == (status == 0)
    assert len(written["rows"]) == 2


def test_models_are_compared(monkeypatch):
    """On one device float32 is float32, and bfloat16 differs from it as it should."""
    resampler = [model for model in parity._models("mini") if model[0] == "resampler"]
    monkeypatch.setattr(parity, "_models", lambda size: resampler)
    exact, half = parity.models("mini")
    assert (exact["case"], half["case"]) == ("resampler, float32", "resampler, bfloat16")
    assert exact["error"] == 0
    assert 1e-3 < half["error"] <= half["most"]


def test_attention_is_compared_under_regions(monkeypatch):
    """A kernel that looks through no mask is found out by it alone."""

    def attention_blind(q, k, v, hidden):
        return attention_plain(q, k, v)

    monkeypatch.setattr(parity, "installed_kernels", lambda q: {"cpu": attention_blind})
    monkeypatch.setattr(parity, "LEVELS", {"mini": ((24, 8),)})
    monkeypatch.setattr(parity, "PRECISIONS", ("bfloat16",))
    cases = {name: parity.FACES[name] for name in ("1 face", "2 regions")}
    monkeypatch.setattr(parity, "FACES", cases)
    (row,) = parity.attention_forms("mini", runs=1)
    assert row["case"] == "blind, 24 queries of width 8, bfloat16"
    assert [error > row["most"] for error in row["errors"].values()] == [False, True]
    assert row["error"] == row["errors"]["2 regions"]
    assert min(row["seconds"], row["plain_seconds"]) > 0


def test_one_gpu_and_a_cpu_for_every_part(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    variables = accelerator._environment()
    assert (variables["JAX_PLATFORMS"], variables["CUDA_VISIBLE_DEVICES"]) == ("cuda,cpu", "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    variables = accelerator._environment()
    assert (variables["JAX_PLATFORMS"], variables["CUDA_VISIBLE_DEVICES"]) == ("cpu", "0")


def test_the_folder_of_the_numbers_is_looked_for_first(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(["--json", str(tmp_path / "absent" / "found.json")])
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_of_the_miniature(tmp_path):
    file = tmp_path / "found.json"
    words = ["--size", "mini", "--runs", "1", "--no-compile", "--json", str(file)]
    assert accelerator.main(words) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["group"] for row in rows} == set(accelerator.GROUPS)
    assert not [row for row in rows if "failed" in row]
