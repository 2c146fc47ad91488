"""What every program's command line can do."""

import importlib
import importlib.metadata

import pytest


@pytest.mark.parametrize("program", ["fact_convert", "fact_train", "fact_infer"])
def test_version(program, capsys):
    main = importlib.import_module(f"{program}.cli.main").main
    try:
        status = main(["--version"])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status or 0, err) == (0, "")
    name, version, rest = out.strip().split(" ", 2)
    assert name in ("fact-convert", "fact-train", "fact-infer")
    assert version == importlib.metadata.version("fact-jax")
    assert f"jax {importlib.metadata.version('jax')}" in rest
