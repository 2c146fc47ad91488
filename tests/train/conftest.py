"""The toy experiment that the engine's tests train."""

from pathlib import Path

import pytest

from fact_train.config import load_config

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture
def toy_file():
    return TOY


@pytest.fixture
def toy_config():
    return load_config(TOY)[1]
