"""The bill of materials of an image as CycloneDX JSON: Debian packages, Python distributions, sources with commits.

It is made from the locks and from the locked files, not from a built image: the same pins give the same bytes, and
tests/image/labels compares it with what is installed in the image.
"""

from __future__ import annotations

import json
import urllib.parse
import uuid
from typing import Any

from images import debian, licences, lock
from images.manifest import Manifest, Source, check_variant, read_manifest, sources

SPEC = "1.6"
_UNKNOWN = licences.named(licences.NOT_STATED)
# CycloneDX wants a UUID for each bill. A random one would change the image's digest: it is made from the content.
NAMESPACE = uuid.UUID("6f1f1a3c-7f0e-5d2a-9d0b-2b8d0c6f5a11")


def sbom(model: str, variant: str) -> None:
    """Print the bill of materials of an image; the image need not be built."""
    check_variant(variant)
    manifest = read_manifest(model)
    lock.fetch_wheels(_distributions(variant))
    print(text(manifest, variant, sources(manifest, variant)), end="")


def text(manifest: Manifest, variant: str, wanted: list[Source]) -> str:
    """The bill of materials as JSON text."""
    components = [*map(_source, wanted), *_python(variant, {s.distribution for s in wanted}), *_debian()]
    content = json.dumps(components, sort_keys=True)
    image = {"type": "container", "bom-ref": "image", "name": f"slipway/{manifest.family}", "version": variant}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, f'{manifest.family} {variant} {content}')}",
        "version": 1,
        "metadata": {
            "component": image,
            "tools": {"components": [{"type": "application", "name": "slipway", "version": lock.version()}]},
        },
        "components": components,
        "dependencies": [{"ref": "image", "dependsOn": [component["bom-ref"] for component in components]}],
    }
    return json.dumps(document, indent=1) + "\n"


def _component(purl: str, name: str, version: str, licence: dict, sha256: str | None = None) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if sha256:
        component["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    return component | {"licenses": [licence]}


def _source(source: Source) -> dict[str, Any]:
    """A source with its commit and those of its submodules."""
    if source.replaced:
        properties = [{"name": "slipway:context", "value": source.replaced}]
        component = _component(f"pkg:generic/{source.distribution}", source.distribution, "unknown", _UNKNOWN)
        return component | {"properties": properties}
    place = urllib.parse.urlsplit(source.repository).path.strip("/").lower()
    purl = f"pkg:github/{place}@{source.commit}"
    component = _component(purl, source.distribution, source.version, {"expression": source.license})
    if source.archive:
        component["hashes"] = [{"alg": "SHA-256", "content": source.archive.sha256}]
    properties = [{"name": "slipway:commit", "value": source.commit}]
    for name, sub in source.submodules.items():
        properties.append({"name": f"slipway:submodule:{name}", "value": sub["commit"]})
    return component | {"properties": properties}


def _distributions(variant: str) -> dict[str, str]:
    words = ["--group", "te"] if variant != "cpu" else []
    return lock.requirements("--no-default-groups", *words)


def _python(variant: str, built: set[str]) -> list[dict[str, Any]]:
    names = _distributions(variant).keys() - built
    found = []
    for package in lock.locked_packages():
        if package["name"] in names:
            entry = package["wheels"][0] if "wheels" in package else package["sdist"]
            purl = f"pkg:pypi/{package['name']}@{package['version']}"
            licence = licences.of_distribution(entry["path"])
            digest = entry["hash"].removeprefix("sha256:")
            found.append(_component(purl, package["name"], package["version"], licence, digest))
    return found


def _debian() -> list[dict[str, Any]]:
    stated = licences.of_debian()
    found = []
    for package in debian.read_lock():
        if "base" in package.sets:
            version = urllib.parse.quote(package.version, safe="")
            purl = f"pkg:deb/debian/{urllib.parse.quote(package.name)}@{version}?arch=amd64&distro=debian-12"
            licence = licences.named(stated[package.name])
            found.append(_component(purl, package.name, package.version, licence, package.sha256))
    return found
