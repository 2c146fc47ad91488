"""What the tests of training share: the toy experiment, and a random miniature."""

from pathlib import Path

import pytest

from fact_train.config import load_config
from tests.train.tiny import write_tiny_miniature

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(autouse=True, scope="session")
def _whitened_on_few():
    """The start of the resampler is made of fewer portraits: drawing them is what takes long."""
    from fact_train.tasks import adapter

    adapter.WHITENED_ON = 16


@pytest.fixture
def toy_file():
    return TOY


@pytest.fixture
def toy_config():
    return load_config(TOY)[1]


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The folder of :func:`tests.train.tiny.write_tiny_miniature`."""
    folder = tmp_path_factory.mktemp("miniature")
    write_tiny_miniature(folder)
    return folder
