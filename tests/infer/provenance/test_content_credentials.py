"""C2PA manifests in our pictures, read back by c2pa-python itself."""

import datetime
import stat

import numpy as np
import pytest
from PIL import Image

from fact_infer.output_images import save_image
from fact_infer.provenance import Provenance, current, marked
from fact_infer.provenance.settings import check
from fact_jax.utils.errors import UserError
from tests.infer.conftest import read_text

c2pa = pytest.importorskip("c2pa")
pytest.importorskip("cryptography")

from fact_infer.provenance import content_credentials as module  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
TEXT = {"parameters": "Zoë", "fact_jax": '{"seed": 3}'}


@pytest.fixture(autouse=True)
def own_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    module._signer.cache_clear()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
@pytest.mark.parametrize(
    "source", ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
)
def test_a_signed_picture(tmp_path, name, source):
    """The manifest stands beside mark and parameters; pixels are those without it."""
    plain = save_image(IMAGE, tmp_path / f"plain{name[1:]}", TEXT, source)
    assert module.read_credentials(plain) is None
    with marked(Provenance(level="c2pa", provider="Atelier Zoë")):
        path = save_image(IMAGE, tmp_path / name, TEXT, source)
    assert current() == Provenance()
    found = module.read_credentials(path)
    when = datetime.datetime.fromisoformat(found.pop("when"))
    assert abs((datetime.datetime.now(datetime.UTC) - when).total_seconds()) < 60
    program = found.pop("program")
    assert program["name"] == "FACT-JAX"
    assert found == {
        "state": "Valid",
        "source": source,
        "provider": "Atelier Zoë",
        "signer": "FACT-JAX local signer",
    }
    assert read_text(path) == TEXT | {"source": source}
    with Image.open(path) as one, Image.open(plain) as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    # No thumbnail: 20 kB of certificates and hashes at most.
    assert path.stat().st_size - plain.stat().st_size < 20_000


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_changed_picture_is_invalid(tmp_path, name):
    with marked(Provenance(level="c2pa")):
        path = save_image(IMAGE, tmp_path / name, TEXT)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert module.read_credentials(path)["state"] == "Invalid"


def test_off_leaves_every_mark_out_and_parameters_in(tmp_path):
    with marked(Provenance(level="off")):
        path = save_image(IMAGE, tmp_path / "a.png", TEXT)
    assert read_text(path) == TEXT | {"source": None}
    assert module.read_credentials(path) is None


def test_what_no_model_drew_is_never_marked(tmp_path):
    with marked(Provenance(level="c2pa")):
        path = save_image(IMAGE, tmp_path / "a.png", TEXT, None)
    assert read_text(path) == TEXT | {"source": None}
    assert module.read_credentials(path) is None


def test_this_machines_own_signer(tmp_path):
    """Made once, its key for the user alone; said, since nobody trusts it."""
    (note,) = check(Provenance(level="c2pa"))
    assert "certificate.pem), which no other trusts" in note
    folder = tmp_path / "config" / "fact-jax" / "c2pa"
    key, chain = folder / "key.pem", folder / "certificate.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), chain.read_bytes()
    check(Provenance(level="c2pa"))
    assert before == (key.read_bytes(), chain.read_bytes())
    signer = module.open_signer()
    assert "PRIVATE" not in repr(signer)


def test_a_signer_of_the_users(tmp_path):
    """Any key that C2PA knows; here the one of another configuration."""
    module.open_signer()
    folder = tmp_path / "config" / "fact-jax" / "c2pa"
    named = {"certificate": folder / "certificate.pem", "key": folder / "key.pem"}
    assert check(Provenance(level="c2pa", **named)) == []
    with marked(Provenance(level="c2pa", **named)):
        path = save_image(IMAGE, tmp_path / "a.png", TEXT)
    assert module.read_credentials(path)["state"] == "Valid"


def test_a_certificate_that_c2pa_refuses_is_told_before_a_picture_is_drawn(tmp_path):
    """As a web server has it: its key fits, but it is its own issuer."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    made = made.public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "key.pem").write_bytes(secret)
    (tmp_path / "web.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    named = {"certificate": tmp_path / "web.pem", "key": tmp_path / "key.pem"}
    with pytest.raises(UserError, match=r"could not be signed: .*certificate"):
        check(Provenance(level="c2pa", **named))


def test_processes_that_start_together_share_one_signer(monkeypatch, tmp_path):
    """The slower one of two that make it takes what it finds then."""
    folder, make = tmp_path / "config" / "fact-jax" / "c2pa", module._make_signer

    def overtaken(where):
        make(where)
        make(where)

    monkeypatch.setattr(module, "_make_signer", overtaken)
    check(Provenance(level="c2pa"))
    assert sorted(path.name for path in folder.iterdir()) == ["certificate.pem", "key.pem"]


def test_wrong_signers(tmp_path):
    module.open_signer()
    folder = tmp_path / "config" / "fact-jax" / "c2pa"
    chain, key = folder / "certificate.pem", folder / "key.pem"
    other = tmp_path / "other.pem"
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, x25519

    form = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    other.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*form))
    exchange = tmp_path / "exchange.pem"
    exchange.write_bytes(x25519.X25519PrivateKey.generate().private_bytes(*form))
    for given, words in (
        ({"certificate": chain}, "come together: give both"),
        ({"certificate": chain, "key": tmp_path / "none.pem"}, "none.pem: cannot be read: No such"),
        ({"certificate": key, "key": key}, "no certificate and unencrypted key in PEM"),
        ({"certificate": chain, "key": chain}, "no certificate and unencrypted key in PEM"),
        ({"certificate": chain, "key": other}, "other.pem is not the key of the first certificate"),
        ({"certificate": chain, "key": exchange}, "keys of this sort sign no manifest"),
    ):
        with pytest.raises(UserError, match=words):
            check(Provenance(level="c2pa", **given))
    with pytest.raises(UserError, match="'iptc' signs nothing"):
        check(Provenance(certificate=chain, key=key))
    with pytest.raises(UserError, match=r"ends in \.png"):
        module.read_credentials("a.webp")
