"""build.py sign and verify-signature: an image's provenance signed with a key of yours, and checked without a network.

The signed file is a DSSE envelope (secure-systems-lab/dsse, protocol 1.0.0) around the SLSA statement, the form that
in-toto and cosign read. The statement names the image by its digest. The key is an EC or RSA key in PEM; openssl signs.
"""

from __future__ import annotations

import base64
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from images import provenance
from images.image import inspect
from images.request import command_of, tag
from images.store import BuildError
from images.target import of_platform

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def sign(model: str, variant: str, key: str, statement: str | None = None, platform: str | None = None) -> None:
    """Sign an image's statement of provenance; the envelope appears next to it, with the ending .dsse.json.

    Args:
        model, variant, platform: the image.
        key: the file of a private key.
        statement: another statement than that of the last build: of an archive, or pushed.json.
    """
    target = of_platform(platform)
    path = Path(statement) if statement else provenance.folder_of(model, variant, target) / "provenance.json"
    if not path.exists():
        cure = f"run `{command_of(tag(model, variant, target))}`" if not statement else "check the path"
        raise BuildError(f"{path}: statement not found; {cure}", exit_code=65)
    payload = path.read_bytes()
    signature = _openssl(["dgst", "-sha256", "-sign", key], encoded(payload), f"--key {key}")
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    signed = path.with_suffix(".dsse.json")
    signed.write_text(json.dumps(envelope) + "\n")
    print(f"sign: {signed}")


def verify_signature(file: str, key: str, image: str | None = None, archive: str | None = None) -> None:
    """Check a signed statement, and that it is of this image.

    Args:
        file: the envelope.
        key: the file of the public key.
        image: the name of an image that the engine has.
        archive: an OCI archive that `build.py archive` wrote.

    Errors: BuildError (65) if the signature or the digest is another one.
    """
    payload, signature = _opened(Path(file))
    with tempfile.NamedTemporaryFile() as kept:
        kept.write(signature)
        kept.flush()
        words = ["dgst", "-sha256", "-verify", key, "-signature", kept.name]
        _openssl(words, encoded(payload), f"{file}: the signature is not of this key, or the statement was changed")
    (subject,) = json.loads(payload)["subject"]
    signed = "sha256:" + subject["digest"]["sha256"]
    found = {name: digest for name, digest in ((image, _of_image(image)), (archive, _of_archive(archive))) if name}
    for name, digest in found.items():
        if digest != signed:
            raise BuildError(f"{name} is {digest}, but the signed statement is of {signed}", exit_code=65)
    print(f"verify-signature: {' and '.join(found) or subject['name']} is {signed}, signed by this key")


def encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _opened(path: Path) -> tuple[bytes, bytes]:
    """(payload, signature) of an envelope."""
    try:
        envelope = json.loads(path.read_text())
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its payload is {envelope['payloadType']}, expected {PAYLOAD_TYPE}")
        (signature,) = envelope["signatures"]
        return base64.b64decode(envelope["payload"], validate=True), base64.b64decode(signature["sig"], validate=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path}: cannot read it as a signed statement ({error})", exit_code=65) from None


def _of_image(name: str | None) -> str:
    return inspect(name)[0] if name else ""


def _of_archive(path: str | None) -> str:
    if not path:
        return ""
    try:
        with tarfile.open(path) as tar:
            index = tar.extractfile("index.json")
            assert index
            return json.load(index)["manifests"][0]["digest"]
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise BuildError(f"{path}: cannot read it as an OCI archive ({error})", exit_code=65) from None


def _openssl(words: list[str], given: bytes, what: str) -> bytes:
    try:
        done = subprocess.run(["openssl", *words], input=given, capture_output=True)
    except FileNotFoundError:
        raise BuildError("openssl not found; install it to sign and to verify signatures") from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["verification failure"])[-1]
        raise BuildError(f"{what} ({reason})", exit_code=65)
    return done.stdout
