"""C2PA manifests (Content Credentials), signed and embedded by c2pa-python.

A manifest names the program, the time, IPTC's Digital Source Type and the provider, and is bound to
the file's bytes: whoever changes a pixel or the parameters makes it invalid.
"""

import dataclasses
import datetime
import functools
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fact_jax.utils.command_line import version_of
from fact_jax.utils.errors import UserError, first_line
from fact_jax.utils.files import replace_folder

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_MAX_PEM = 1 << 20
_YEARS = 10
_CHAIN, _SECRET = "certificate.pem", "key.pem"
# A thumbnail would be several times the size of the picture's file.
_BUILDER = {"builder": {"thumbnail": {"enabled": False}}}
_READER = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}


@dataclasses.dataclass(frozen=True)
class CredentialSigner:
    """Certificate chain and key in PEM, C2PA's name of the algorithm, lines for the user."""

    certificate: bytes
    key: bytes = dataclasses.field(repr=False)
    algorithm: str
    notes: tuple[str, ...] = ()


def open_signer(
    certificate: str | os.PathLike | None = None, key: str | os.PathLike | None = None
) -> CredentialSigner:
    """A signer from PEM files (the chain, the signer's first), or this machine's own.

    Its own is made at first use, in the user's configuration, and is trusted by nobody else: it
    tells that a file is unchanged, not who made it. UserError for files that are none.
    """
    if certificate is not None and key is not None:
        return _signer(Path(certificate), Path(key))
    configured = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folder = configured / "fact-jax" / "c2pa"
    chain, secret = folder / _CHAIN, folder / _SECRET
    if not (chain.exists() and secret.exists()):
        _make_signer(folder)
    note = (
        f"pictures are signed with this machine's own certificate ({chain}), which no other "
        "trusts: give --c2pa-certificate and --c2pa-key"
    )
    return dataclasses.replace(_signer(chain, secret), notes=(note,))


def try_signer(signer: CredentialSigner) -> None:
    """UserError unless it signs a picture: C2PA refuses many certificates, and expired ones."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    sign(picture.getvalue(), ".png", signer, "trainedAlgorithmicMedia")


def sign(
    picture: bytes, suffix: str, signer: CredentialSigner, source: str, provider: str | None = None
) -> bytes:
    """The file with a manifest in it; ``source`` is the end of IPTC's Digital Source Type."""
    import c2pa

    made = c2pa.Builder(
        json.dumps(manifest(source, provider)), c2pa.Context(c2pa.Settings.from_dict(_BUILDER))
    )
    info = c2pa.C2paSignerInfo(signer.algorithm.encode(), signer.certificate, signer.key, None)
    out = io.BytesIO()
    try:
        made.sign(c2pa.Signer.from_info(info), MIME[suffix.lower()], io.BytesIO(picture), out)
    except c2pa.C2paError as error:
        raise UserError(f"the picture could not be signed: {first_line(error)}") from None
    return out.getvalue()


def manifest(source: str, provider: str | None = None) -> dict[str, Any]:
    """What is signed: one action, that a model drew this, by which program, when, for whom."""
    program = {"name": "FACT-JAX", "version": version_of()}
    action: dict[str, Any] = {
        "action": "c2pa.created",
        "digitalSourceType": SOURCE_TYPES + source,
        "softwareAgent": program,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if provider is not None:
        action["parameters"] = {"org.fact-jax.provider": provider}
    actions = {"label": "c2pa.actions", "data": {"actions": [action]}}
    return {"claim_generator_info": [program], "assertions": [actions]}


def read_credentials(path: str | os.PathLike) -> Mapping[str, Any] | None:
    """What a picture's manifest says and whether it holds; None where there is none.

    ``state`` is ``Valid`` (unchanged), ``Trusted`` (and of a signer on the trust list) or
    ``Invalid``; ``source``, ``program``, ``when``, ``provider`` and ``signer``. Nothing is fetched.
    """
    import c2pa

    mime = MIME.get(Path(path).suffix.lower())
    if mime is None:
        raise UserError(f"{path}: a picture's name ends in {', '.join(MIME)}")
    try:
        context = c2pa.Context(c2pa.Settings.from_dict(_READER))
        with open(path, "rb") as opened:
            reader = c2pa.Reader.try_create(mime, opened, context=context)
            if reader is None:
                return None
            state, said = reader.get_validation_state(), json.loads(reader.json())
    except c2pa.C2paError as error:
        raise UserError(f"{path}: its manifest cannot be read: {first_line(error)}") from None
    found = said["manifests"][said["active_manifest"]]
    labels = {a["label"].partition(".v")[0]: a["data"] for a in found.get("assertions", ())}
    actions = labels.get("c2pa.actions", {}).get("actions") or [{}]
    source = str(actions[0].get("digitalSourceType", ""))
    signature = found.get("signature_info", {})
    return {
        "state": state,
        "source": source.removeprefix(SOURCE_TYPES) or None,
        "program": actions[0].get("softwareAgent"),
        "when": actions[0].get("when"),
        "provider": actions[0].get("parameters", {}).get("org.fact-jax.provider"),
        "signer": signature.get("common_name") or signature.get("issuer"),
    }


@functools.lru_cache(maxsize=4)
def _signer(certificate: Path, key: Path) -> CredentialSigner:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    chain, secret = (_read(path) for path in (certificate, key))
    try:
        first = x509.load_pem_x509_certificates(chain)[0]
        private = serialization.load_pem_private_key(secret, None)
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{certificate}, {key}: no certificate and unencrypted key in PEM: {first_line(error)}"
        ) from None
    if isinstance(private, ec.EllipticCurvePrivateKey):
        algorithm = {256: "es256", 384: "es384", 521: "es512"}.get(private.key_size)
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    else:
        algorithm = "ps256" if isinstance(private, rsa.RSAPrivateKey) else None
    if algorithm is None:
        raise UserError(
            f"{key}: keys of this sort sign no manifest: P-256 to P-521, Ed25519 or RSA"
        )
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != first.public_key().public_bytes(*form):
        raise UserError(f"{key} is not the key of the first certificate in {certificate}")
    plain = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return CredentialSigner(chain, plain, algorithm)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as opened:
            content = opened.read(_MAX_PEM + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_PEM:
        raise UserError(f"{path}: too large for PEM")
    return content


def _make_signer(folder: Path) -> None:
    """A root that signs one certificate of the profile that C2PA asks for, its key thrown away.

    Both appear at once: of processes that start together one's are taken by all.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    ends = begins + datetime.timedelta(days=365 * _YEARS)
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def certificate(name: str, key: Any, authority: bool) -> Any:
        def named(common: str) -> Any:
            pairs = (NameOID.COMMON_NAME, common), (NameOID.ORGANIZATION_NAME, "FACT-JAX, local")
            return x509.Name([x509.NameAttribute(*pair) for pair in pairs])

        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        ) | {"digital_signature": not authority, "key_cert_sign": authority, "crl_sign": authority}
        made = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named("FACT-JAX local root"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False
            )
        )
        if not authority:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            made = made.add_extension(purpose, critical=False)
        return made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    key = own.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificates = certificate("FACT-JAX local signer", own, False)
    certificates += certificate("FACT-JAX local root", root, True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replace_folder(folder, replace=False) as temporary:
            (temporary / _SECRET).touch(mode=0o600)
            (temporary / _SECRET).write_bytes(key)
            (temporary / _CHAIN).write_bytes(certificates)
    except UserError:
        if not (folder / _CHAIN).exists():
            raise
