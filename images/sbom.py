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
from images.manifest import COMPILED, Manifest, Source, check_variant, read_manifest, sources
from images.target import Target, of_platform

SPEC = "1.6"
_UNKNOWN = licences.named(licences.NOT_STATED)
# CycloneDX wants a UUID for each bill. A random one would change the image's digest: it is made from the content.
# Packages of which headers are compiled into what a source builds.
HEADERS = {"transformer-engine": ("nvidia-mathdx", "nvidia-cuda-cccl"), "apex": ("nvidia-cuda-cccl",)}
NAMESPACE = uuid.UUID("6f1f1a3c-7f0e-5d2a-9d0b-2b8d0c6f5a11")


def sbom(model: str, variant: str, platform: str | None = None) -> None:
    """Print the bill of materials of an image; the image need not be built."""
    check_variant(variant)
    manifest, target = read_manifest(model), of_platform(platform)
    lock.fetch_wheels([*_distributions(variant, target), *(name for n in HEADERS.values() for name in n)], target)
    print(text(manifest, variant, sources(manifest, variant), target), end="")


def text(manifest: Manifest, variant: str, wanted: list[Source], target: Target) -> str:
    """The bill of materials as JSON text."""
    components = [
        *(_source(source, target) for source in wanted),
        *_python(variant, wanted, target),
        *_programs(target),
        *_debian(target),
    ]
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


def _source(source: Source, target: Target) -> dict[str, Any]:
    """A source as it was taken: a commit with the submodules that were read, an archive, or a build context.

    What a submodule or a package of headers holds is compiled into the source's libraries: it is a part of it.
    """
    name = installed_name(source)
    if source.replaced:
        properties = [{"name": "slipway:context", "value": source.replaced}]
        return _component(f"pkg:generic/{name}", name, "unknown", _UNKNOWN) | {"properties": properties}
    if not source.by_git and source.archive:
        purl = f"pkg:pypi/{name}@{source.version}?file_name={source.archive.name}"
        return _component(purl, name, source.version, {"expression": source.license}, source.archive.sha256)
    parts = [_submodule(source, part, sub) for part, sub in source.read_submodules().items()]
    parts += [_headers(source, package, target) for package in HEADERS.get(source.name, ())]
    component = _commit(source.repository, source.commit, name, source.version, source.license)
    component["properties"] = [{"name": "slipway:commit", "value": source.commit}]
    return component | ({"components": parts} if parts else {})


def installed_name(source: Source) -> str:
    """The distribution that a source is installed as: an archive can be of a part of the source."""
    of_archive = not source.by_git and not source.replaced and source.archive
    return source.archive.project if of_archive and source.archive else source.distribution


def _commit(repository: str, commit: str, name: str, version: str, license: str | None) -> dict[str, Any]:
    place = urllib.parse.urlsplit(repository).path.strip("/").lower()
    licence = {"expression": license} if license else _UNKNOWN
    return _component(f"pkg:github/{place}@{commit}", name, version, licence)


def _submodule(source: Source, name: str, sub: dict[str, Any]) -> dict[str, Any]:
    part = _commit(sub["repository"], sub["commit"], name, sub["commit"], sub.get("license"))
    return part | {"bom-ref": f"{source.name}/{part['purl']}"}


def _headers(source: Source, name: str, target: Target) -> dict[str, Any]:
    """A package of which only headers were used, by the compiler."""
    (package,) = (package for package in lock.locked_packages() if package["name"] == name)
    part = _locked(package, target)
    return part | {"bom-ref": f"{source.name}/{part['purl']}"}


def _distributions(variant: str, target: Target) -> dict[str, str]:
    words = ["--group", "te"] if variant != "cpu" else []
    return lock.requirements("--no-default-groups", *words, target=target)


def _python(variant: str, wanted: list[Source], target: Target) -> list[dict[str, Any]]:
    """The distributions that are installed from wheels, or from archives of pure Python."""
    names = _distributions(variant, target).keys() - {installed_name(s) for s in wanted} - set(COMPILED[variant])
    return [_locked(package, target) for package in lock.locked_packages() if package["name"] in names]


def _locked(package: dict, target: Target) -> dict[str, Any]:
    """The wheel of a package, or the archive that it is built from."""
    entry = lock.wheel_of(package, target) or package["sdist"]
    purl = f"pkg:pypi/{package['name']}@{package['version']}"
    licence = licences.of_distribution(entry["path"])
    return _component(purl, package["name"], package["version"], licence, entry["hash"].removeprefix("sha256:"))


def _programs(target: Target) -> list[dict[str, Any]]:
    """Slipway itself, and uv for images on top. They are no distributions in the image."""
    number, version = lock.pins()["uv"]["version"], lock.version()
    licence = {"expression": "MIT OR Apache-2.0"}
    uv = _component(f"pkg:pypi/uv@{number}", "uv", number, licence, lock.uv_file(target).sha256)
    slipway = _component(f"pkg:generic/slipway@{version}", "slipway", version, {"expression": "Apache-2.0"})
    return [part | {"type": "application"} for part in (slipway, uv)]


def _debian(target: Target) -> list[dict[str, Any]]:
    stated = licences.of_debian(target)
    found = []
    for package in debian.read_lock(target):
        if "base" in package.sets:
            version = urllib.parse.quote(package.version, safe="")
            purl = f"pkg:deb/debian/{urllib.parse.quote(package.name)}@{version}?arch={target.debian}&distro=debian-12"
            licence = licences.named(stated[package.name])
            found.append(_component(purl, package.name, package.version, licence, package.sha256))
    return found
