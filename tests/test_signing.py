"""Signed provenance: made and checked by build.py, and checked by others' code."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from images import manifest, provenance, request, signing
from images.store import BuildError
from images.target import X86_64

DIGEST = "ab" * 32


@pytest.fixture
def signed(tmp_path, monkeypatch) -> Path:
    """A folder with a pair of keys, a statement, its envelope, and an archive of the image that it is of."""
    monkeypatch.setattr(provenance, "tools", lambda: {"docker": "26.1.5", "buildx": "v0.13.1"})
    words = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "key.pem"]
    subprocess.run(words, check=True)
    words = ["openssl", "ec", "-in", tmp_path / "key.pem", "-pubout", "-out", tmp_path / "key.pub"]
    subprocess.run(words, check=True, capture_output=True)
    found = manifest.read_manifest("gpt_oss")
    asked = request.Request(found, "full", manifest.sources(found, "full"), {}, {}, X86_64)
    provenance.write_statement(
        tmp_path / "image.tar.provenance.json", asked, "slipway/gpt_oss:full", f"sha256:{DIGEST}"
    )
    index = json.dumps({"manifests": [{"digest": f"sha256:{DIGEST}"}]}).encode()
    with tarfile.open(tmp_path / "image.tar", "w") as tar:
        entry = tarfile.TarInfo("index.json")
        entry.size = len(index)
        tar.addfile(entry, io.BytesIO(index))
    signing.sign("gpt_oss", "full", str(tmp_path / "key.pem"), str(tmp_path / "image.tar.provenance.json"))
    return tmp_path


def _check(folder: Path, **options: str) -> None:
    envelope = str(folder / "image.tar.provenance.dsse.json")
    signing.verify_signature(envelope, options.pop("key", str(folder / "key.pub")), **options)


def test_a_signed_statement_is_of_its_archive(signed, capsys):
    _check(signed, archive=str(signed / "image.tar"))
    assert f"image.tar is sha256:{DIGEST}, signed by this key" in capsys.readouterr().out


def test_a_changed_statement_another_key_and_another_image_are_refused(signed):
    path = signed / "image.tar.provenance.dsse.json"
    whole = json.loads(path.read_text())
    other = base64.b64decode(whole["payload"]).replace(DIGEST.encode(), b"cd" * 32)
    path.write_text(json.dumps({**whole, "payload": base64.b64encode(other).decode()}))
    with pytest.raises(BuildError, match="the signature is not of this key, or the statement was changed") as error:
        _check(signed)
    assert error.value.exit_code == 65
    path.write_text(json.dumps(whole))
    subprocess.run(["openssl", "genrsa", "-out", signed / "b.pem", "2048"], check=True, capture_output=True)
    words = ["openssl", "rsa", "-in", signed / "b.pem", "-pubout", "-out", signed / "b.pub"]
    subprocess.run(words, check=True, capture_output=True)
    with pytest.raises(BuildError, match="not of this key"):
        _check(signed, key=str(signed / "b.pub"))
    with tarfile.open(signed / "image.tar", "w") as tar:
        index = b'{"manifests": [{"digest": "sha256:ef"}]}'
        entry = tarfile.TarInfo("index.json")
        entry.size = len(index)
        tar.addfile(entry, io.BytesIO(index))
    with pytest.raises(BuildError, match=r"image\.tar is sha256:ef, but the signed statement is of sha256:abab"):
        _check(signed, archive=str(signed / "image.tar"))
    path.write_text("{}")
    with pytest.raises(BuildError, match="cannot read it as a signed statement"):
        _check(signed)


def test_others_code_reads_the_envelope_and_finds_the_signature_good(signed):
    """The library cryptography, over DSSE's encoding written down once more."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    envelope = json.loads((signed / "image.tar.provenance.dsse.json").read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    text = " ".join(["DSSEv1", str(len(kind)), kind, str(len(payload)), ""]).encode() + payload
    key = serialization.load_pem_public_key((signed / "key.pub").read_bytes())
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), text, ec.ECDSA(hashes.SHA256()))


def test_the_statement_has_what_slsa_asks_for(signed):
    """The fields that SLSA's provenance, version 1, and in-toto's Statement require, with URIs where they want them."""
    from urllib.parse import urlsplit

    statement = json.loads((signed / "image.tar.provenance.json").read_text())
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    build, run = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    needed = {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert set(build) == needed and run["builder"]["id"]
    uris = [statement["_type"], statement["predicateType"], build["buildType"], run["builder"]["id"]]
    uris += [dependency["uri"] for dependency in build["resolvedDependencies"]]
    assert all(urlsplit(uri).scheme for uri in uris), uris
    assert all(isinstance(version, str) for version in run["builder"]["version"].values())
    names = {dependency["name"]: dependency for dependency in build["resolvedDependencies"]}
    assert {"nemo", "megatron-core", "transformer-engine", "cutlass", "cudnn-frontend", "apex", "uv.lock"} <= set(names)
    assert "googletest" not in names and names["apex"]["digest"].keys() == {"gitCommit"}
