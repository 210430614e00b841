"""An OCI archive from what `docker save` writes, for engines whose image store cannot write one.

Docker's older store unpacks the layers of an image and keeps no manifest. `docker save` makes tar archives of them
again, with the hashes that the image's configuration names. They are checked, compressed, and get a manifest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import IO, Any

from images.registry import INDEX, MANIFEST
from images.store import BuildError

CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
LEVEL = 6  # of gzip, as docker push has it
BLOCK = 1 << 20


def repack(saved: Path, target: Path, name: str, scratch: Path) -> str:
    """Write the one image of `saved` as an OCI archive with layers in gzip; returns the digest of its manifest.

    Args:
        saved: what `docker save` wrote, of any version of Docker.
        target: the archive to write.
        name: of the image, FOLDER/NAME:TAG.
        scratch: a folder for the compressed layers.

    Errors: BuildError where a layer is not the one that the configuration names.
    """
    with tarfile.open(saved) as archive, tarfile.open(target, "w") as out:
        (found,) = json.load(_member(archive, "manifest.json"))
        config = _member(archive, found["Config"]).read()
        about = json.loads(config)
        layers = []
        for number, (layer, digest) in enumerate(zip(found["Layers"], about["rootfs"]["diff_ids"], strict=True)):
            file = scratch / str(number)
            if (is_really := _compress(_plain(_member(archive, layer)), file)) != digest:
                raise BuildError(f"layer {number + 1} of {name} is {is_really}, and should be {digest}; build it again")
            layers.append(_add_file(out, LAYER, file))
        image = {"schemaVersion": 2, "mediaType": MANIFEST, "config": _add(out, CONFIG, config), "layers": layers}
        manifest = _add(out, MANIFEST, json.dumps(image).encode())
        # docker.io/ is the whole name's beginning of what docker calls slipway/gpt_oss:cpu.
        whole, tag = f"docker.io/{name}", name.rpartition(":")[2]
        names = {"io.containerd.image.name": whole, "org.opencontainers.image.ref.name": tag}
        platform = {key: about[key] for key in ("architecture", "os")}
        entry = {**manifest, "annotations": names, "platform": platform}
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
        _write(out, "index.json", json.dumps(index).encode())
        _write(out, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    return manifest["digest"]


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None, name
    return file


def _plain(layer: IO[bytes]) -> IO[bytes]:
    """A layer as a tar archive: containerd's store saves it as it was built or pulled, and that may be in gzip."""
    start = layer.read(2)
    layer.seek(0)
    return gzip.GzipFile(fileobj=layer) if start == b"\x1f\x8b" else layer  # type: ignore[return-value]


def _compress(layer: IO[bytes], target: Path) -> str:
    """Write a layer in gzip, without its name and time; returns the digest of what it was before."""
    digest = hashlib.sha256()
    with target.open("wb") as raw, gzip.GzipFile("", "wb", LEVEL, raw, mtime=0) as packed:
        while block := layer.read(BLOCK):
            digest.update(block)
            packed.write(block)
    return f"sha256:{digest.hexdigest()}"


def _add_file(out: tarfile.TarFile, kind: str, file: Path) -> dict[str, Any]:
    """Move a file into the archive as a blob; returns its descriptor."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        content.seek(0)
        entry = tarfile.TarInfo(f"blobs/sha256/{digest}")
        entry.size = file.stat().st_size
        out.addfile(entry, content)
    file.unlink()
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": entry.size}


def _add(out: tarfile.TarFile, kind: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    _write(out, f"blobs/sha256/{digest}", content)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}


def _write(out: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    out.addfile(entry, io.BytesIO(content))
