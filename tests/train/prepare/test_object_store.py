"""Source and output in an object store that is asked over HTTP: S3, as moto serves it."""

import hashlib
import logging
import urllib.request

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from fact_train.cli.main import main
from tests.train.prepare.conftest import rejected, write_photo

pytestmark = pytest.mark.heavy

SIZES = ["--size", "64", "--crop", "48", "--chunk", "2", "--shard-mb", "0.1"]


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket ``data``."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()  # of an earlier test
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    store = fsspec.filesystem("s3")
    store.mkdir("data")
    yield store
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in ("summary.json", "README.md")  # which name the source
    }


def build(*arguments):
    return main(["data", "build", *map(str, arguments), *SIZES])


def test_from_a_bucket_to_a_bucket(bucket, tmp_path, capsys):
    """The same bytes as from folder to folder; again it is there, a changed photo is noticed."""
    for number in range(6):
        write_photo(tmp_path / "people" / f"p{number // 3}" / f"{number % 3}.png", seed=number)
    (tmp_path / "people" / "p1" / "1.png").write_bytes(b"no picture")
    bucket.put(str(tmp_path / "people"), "data/people", recursive=True)
    assert build(tmp_path / "people", tmp_path / "local", "--split", "test=0.5") in (0, 1)
    assert build("s3://data/people", "s3://data/sets/out", "--split", "test=0.5") in (0, 1)
    assert capsys.readouterr().out.count("6 photos in, 5 records of 2 people, 1 rejected") == 2
    assert not bucket.exists("data/sets/out/work")
    bucket.get("data/sets/out", str(tmp_path / "out"), recursive=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "local")
    assert rejected(tmp_path / "out")["p1/1.png"][0] == "not readable"
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    assert build("s3://data/people", "s3://data/sets/out", "--split", "test=0.5") in (0, 1)
    assert "it was there already" in capsys.readouterr().out
    write_photo(tmp_path / "new.png", seed=9)
    bucket.put(str(tmp_path / "new.png"), "data/people/p0/0.png")
    assert build("s3://data/people", "s3://data/sets/out", "--split", "test=0.5") == 2
    assert "holds records of another source" in capsys.readouterr().err


def test_other_sources_in_a_bucket(bucket, tmp_path, capsys):
    """A table, Parquet and a tar shard."""
    from tests.train.prepare.test_sources import image_folder, parquet, tars

    for kind, count in ((image_folder, 3), (parquet, 5), (tars, 5)):
        source, bad = kind(tmp_path / kind.__name__)
        bucket.put(str(source), f"data/{kind.__name__}", recursive=True)
        url = f"s3://data/{kind.__name__}"
        assert build(url, f"s3://data/out/{kind.__name__}", "--column", "identity=who") == 0
        said = capsys.readouterr().out
        assert f"{count} photos in, 3 records of 2 people, {len(bad)} rejected" in said


def test_missing_credentials_are_one_line(bucket, tmp_path, capsys, monkeypatch):
    write_photo(tmp_path / "people" / "anna" / "1.png")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    for arguments in (("s3://data/in", tmp_path / "out"), (tmp_path / "people", "s3://data/out")):
        assert build(*arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "cannot be reached: Unable to locate credentials" in said


def test_wrong_buckets_are_one_line(bucket, tmp_path, capsys):
    write_photo(tmp_path / "people" / "anna" / "1.png")
    bucket.pipe_file("data/other/file", b"somebody's")
    bucket.pipe_file("data/words.txt", b"a file")
    people = tmp_path / "people"
    for arguments, line in (
        (("s3://data/nothing", "s3://data/out"), "s3://data/nothing does not exist"),
        (("s3://nobody/people", "s3://data/out"), "s3://nobody/people does not exist"),
        ((people, "s3://nobody/out"), "s3://nobody/out cannot be written"),
        ((people, "s3://data/other"), "which no build wrote"),
        (("s3://data/words.txt", "s3://data/out"), "is not a folder, a table"),
    ):
        assert build(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert line in said
    for action in ("verify", "report"):
        assert main(["data", action, "s3://data/other"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
