"""Runs whose ``--out`` is a URL, against an object store on loopback that speaks S3."""

import contextlib
import itertools
import logging
import shutil
import sys
import time
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from safetensors.numpy import load_file

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.overrides import override
from fact_train.run import remote
from fact_train.run.loop import run
from fact_train.run.remote import RemoteFolder
from tests.train.conftest import TOY
from tests.train.multihost.test_processes import finish, free_address, start
from tests.train.run.test_loop import rows
from tests.train.toy import assert_same

pytestmark = pytest.mark.heavy

URL, FOLDER = "s3://bucket/some/run", Path("runs/s3/bucket/some/run")


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    """An empty bucket; the working folder is below a new one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    store = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    with contextlib.suppress(FileNotFoundError):
        store.rm("bucket", recursive=True)
    store.mkdir("bucket")
    return store


def listed(store):
    return [int(name[-13:-5]) for name in sorted(store.glob("bucket/some/run/checkpoints/*.json"))]


def break_store(monkeypatch, method, is_down):
    """The store refuses what ``is_down`` says of the call's first argument and number."""
    works, calls = getattr(S3FileSystem, method), itertools.count()

    async def call(self, path, *arguments, **options):
        if is_down(path, next(calls)):
            raise OSError("the network is down")
        return await works(self, path, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, method, call)


def test_killed_between_files_and_list_it_resumes_elsewhere_from_the_step_before(
    store, toy_config, tmp_path, monkeypatch
):
    for name in ("run2/log.txt", "run/checkpoints/"):  # a neighbour, and a console's folder
        store.pipe_file(f"bucket/some/{name}", b"")
    with monkeypatch.context() as patch:
        break_store(patch, "_pipe_file", lambda path, _: path.endswith("00000021.json"))
        with pytest.raises(UserError, match="network is down") as caught:
            run(override(toy_config, ["steps=21"]), URL)
    assert str(caught.value).startswith(f"{URL} is not up to date, {FOLDER} is")
    assert store.exists("bucket/some/run/checkpoints/00000021/_CHECKPOINT_METADATA")
    assert listed(store) == [7, 14]
    Path("runs").rename("other-host")
    config = override(toy_config, ["steps=28"])
    ended = run(config, URL).state
    assert "resuming at step 14" in (FOLDER / "log.txt").read_text()
    assert_same(ended, run(config, tmp_path / "reference").state)
    assert listed(store) == [14, 21, 28]
    store.get("bucket/some/run", "fetched", recursive=True)
    names = {"config.json", "environment.json", "log.txt", "tensorboard", "lock.json"}
    assert names <= {path.name for path in Path("fetched").iterdir()}
    assert rows(Path("fetched")) == rows(FOLDER)
    ends = [load_file(f"{folder}/export/toy.safetensors") for folder in ("fetched", "reference")]
    assert_same(*ends)
    # The host whose upload failed holds what is not the newest any more.
    shutil.rmtree("runs")
    Path("other-host").rename("runs")
    assert_same(run(config, URL).state, ended)
    assert (FOLDER.with_name("run-before") / "checkpoints" / "00000021").is_dir()


def test_a_lost_upload_is_tried_again_here_and_by_the_next_start(
    store, toy_config, monkeypatch, capsys
):
    config = override(toy_config, ["steps=14"])
    with monkeypatch.context() as patch:
        break_store(patch, "_put_file", lambda *_: True)
        with pytest.raises(UserError, match="is not up to date"):
            run(config, URL)
    assert listed(store) == []
    monkeypatch.setattr(remote, "UPLOAD_SECONDS", 0.01)
    break_store(monkeypatch, "_put_file", lambda _, number: number < 1)
    run(config, URL)
    assert listed(store) == [7, 14]
    said = capsys.readouterr().err
    assert "resuming at step 14" in said
    assert said.count(f"warning: cannot upload to {URL} (the network is down); trying again") == 1


def test_one_run_at_a_time_until_it_is_silent(store, monkeypatch):
    monkeypatch.setattr(remote, "EXPIRE_SECONDS", 0.5)
    first, second = RemoteFolder(URL), RemoteFolder(URL)
    second.folder = Path("elsewhere")
    monkeypatch.setattr(remote, "RENEW_SECONDS", 0.05)
    held = first.connected()
    held.__enter__()
    with pytest.raises(UserError, match="another run is using s3://bucket/some/run"):
        second.connected().__enter__()
    first._write_lock = lambda _: None  # as if its host had been frozen
    with second.connected():
        pass
    time.sleep(0.2)
    assert first.failure is not None  # which ends the loop
    with pytest.raises(UserError, match="another run has taken s3://bucket/some/run over"):
        held.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://nobucket/run", "cannot be used (The specified bucket does not exist)"),
        ("s3://bucket/data", "holds files that are not of a run"),
        ("s3://bucket", "expected s3://BUCKET/RUN"),
        ("s3://bucket/../run", "expected s3://BUCKET/RUN"),
        ("foo://bucket/run", "Protocol not known: foo"),
        ("gs://bucket/run", "needs: pip install 'fact-jax[cloud]'"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything(store, url, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    store.pipe_file("bucket/data/photo.jpg", b"0")
    assert main(["run", str(TOY), "--out", url]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --out {url}")
    assert words in error
    assert not Path("runs").exists()
    assert store.find("bucket") == ["bucket/data/photo.jpg"]


@pytest.mark.slow
def test_hosts_that_share_no_folder(store, tmp_path):
    """Two processes in two folders; each start finds nothing but what the URL holds."""

    def train(out, steps, number):
        place = ["--coordinator", free_address(), "--processes", "2", "mesh.fsdp=2"]
        programs = []
        for process in range(2):
            folder = tmp_path / f"{number}-{process}"
            folder.mkdir(exist_ok=True)
            command = ["-m", "fact_train", "run", str(TOY), "--out", out, f"steps={steps}"]
            command += [*place, "--process", str(process)]
            programs.append(start(*command, cwd=folder))
        ends = finish(programs)
        assert [status for status, _, _ in ends] == [0, 0], ends
        assert not list((tmp_path / f"{number}-1").iterdir())
        return ends[0][2]

    train(URL, 30, 0)
    assert "resuming at step 30" in train(URL, 60, 1)
    train(str(tmp_path / "shared"), 60, 2)
    store.get("bucket/some/run/export", "export", recursive=True)
    ends = [load_file(f"{folder}/toy.safetensors") for folder in ("export", "shared/export")]
    assert_same(*ends)
    shutil.rmtree(tmp_path / "1-0")
    main(["run", str(TOY), "--out", URL])  # alone, from what two have written
    store.get("bucket/some/run/export", "export-alone", recursive=True)
    assert_same(ends[0], load_file("export-alone/toy.safetensors"))
