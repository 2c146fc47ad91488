"""Pickled files of trainers: objects beside the tensors are neither imported nor run."""

import argparse
import collections
import datetime
import functools
import pathlib
import sys
import types

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fact_convert.cli.main import main
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.torch_io import read_torch_file, write_torch_file
from fact_convert.io.weight_files import read_file
from fact_jax.utils.errors import UserError

MODULE = "trainer_that_is_not_here"


class Callback:
    """An object with attributes, as a trainer's callbacks are."""

    def __init__(self):
        self.monitor, self.best = "val/loss", torch.full((3,), 7.0)


class Settings(dict):
    """A dictionary of another class, as hyperparameters are."""


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 5


@pytest.fixture
def trainer(monkeypatch):
    """A module whose classes the file names, and which is gone when it is read."""
    module = types.ModuleType(MODULE)
    for kind in (Callback, Settings, Slotted):
        own = (
            type(kind.__name__, kind.__bases__, dict(kind.__dict__))
            if kind is not Slotted
            else kind
        )
        monkeypatch.setattr(own, "__module__", MODULE)
        setattr(module, kind.__name__, own)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def saved(path, held, monkeypatch) -> pathlib.Path:
    torch.save(held, path)
    monkeypatch.delitem(sys.modules, MODULE)
    return path


def test_what_a_trainer_stores_beside_the_weights(trainer, tmp_path, monkeypatch, capsys):
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3).half()}
    held = {
        "state_dict": collections.OrderedDict(state),
        "global_step": 470000,
        "callbacks": {trainer.Callback: {"best": np.float64(0.5)}, "one": trainer.Callback()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}}],
        "lr": functools.partial(trainer.Callback, 3),
        "when": [datetime.datetime(2022, 8, 1), pathlib.PurePosixPath("a/b")],
        "arguments": argparse.Namespace(x=1),
        "array": np.arange(3),
    }
    file = saved(tmp_path / "x.ckpt", held, monkeypatch)
    read, about = read_file(file)
    assert {key: array.tolist() for key, array in read.items()} == {
        "weight": [[0, 1, 2], [3, 4, 5]],
        "bias": [1, 1, 1],
    }
    assert about["step"] == "470000"
    assert f"{MODULE}.Callback" in about["not loaded"]
    assert MODULE not in sys.modules
    assert main(["inspect", str(file)]) == 0
    assert f"{MODULE}.Callback" in capsys.readouterr().out


def test_dictionaries_of_other_classes(trainer, tmp_path, monkeypatch):
    settings = trainer.Settings(x=torch.ones(2), y=trainer.Callback())
    counted = collections.defaultdict(int, {"a": 1, "b": np.float32(2)})
    held = {"state_dict": {"a": torch.ones(4)}, "hyper_parameters": settings, "counted": counted}
    file = saved(tmp_path / "x.ckpt", held, monkeypatch)
    assert read_torch_file(file)[0]["a"].tolist() == [1, 1, 1, 1]


def test_a_whole_object_is_no_state(trainer, tmp_path, monkeypatch):
    file = saved(tmp_path / "x.pt", trainer.Callback(), monkeypatch)
    with pytest.raises(UserError, match=rf"no dictionary of tensors but a {MODULE}\.Callback"):
        read_torch_file(file)


class Calls:
    """Calls a function of the standard library when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (exec, "builtins.exec"),
        (getattr, "builtins.getattr"),
        (__import__("subprocess").call, r"commands\.call"),
        (__import__("os").mkdir, "posix.mkdir"),
        (__import__("shutil").rmtree, "shutil.rmtree"),
        (__import__("runpy").run_path, "runpy.run_path"),
    ],
)
def test_what_could_run_code_is_refused_by_name(
    trainer, tmp_path, monkeypatch, function, name, beside
):
    held = {"state_dict": {"a": torch.ones(4)}, "x": Calls(function, "never")}
    held |= {"y": trainer.Callback()} if beside else {}
    file = saved(tmp_path / "x.ckpt", held, monkeypatch)
    with pytest.raises(UserError, match=rf"could run code \({name}\)"):
        read_torch_file(file)


def test_a_function_of_other_packages_is_not_called(tmp_path):
    called = tmp_path / "called"
    held = {"state_dict": {"a": torch.ones(4)}, "x": Calls(np.savez, str(called), 1)}
    torch.save(held, tmp_path / "x.ckpt")
    assert read_torch_file(tmp_path / "x.ckpt")[0]["a"].tolist() == [1, 1, 1, 1]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_numbers(name, same_bits, tmp_path):
    numbers = np.array([[0.5, -3.0], [0.0, 448.0]], np.float32).astype(getattr(ml_dtypes, name))
    theirs = torch.tensor(numbers.astype(np.float32)).to(getattr(torch, name))
    state = {"vae.weight": numbers, "vae.bias": numbers[:, 0].copy()}
    tensors = {"vae.weight": theirs, "vae.bias": theirs[:, 0].contiguous()}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.ckpt")
    for file in ("x.safetensors", "x.ckpt"):
        same_bits(read_file(tmp_path / file)[0], state)
    write_safetensors(tmp_path / "y.safetensors", state, {})
    same_bits(read_file(tmp_path / "y.safetensors")[0], state)
    with pytest.raises(UserError, match=f"{name}, which the format does not have"):
        write_torch_file(tmp_path / "y.ckpt", state)
