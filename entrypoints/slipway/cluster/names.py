"""What images, nodes, and the objects of Kubernetes can be called."""

from __future__ import annotations

import ipaddress
import re

WORD = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME = re.compile(WORD)  # as Kubernetes has them
DOMAIN = re.compile(rf"{WORD}(\.{WORD})*")  # as most of its objects are called
LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
# As the schema of Kubernetes has it, but for signs: less than nothing cannot be asked for.
QUANTITY = re.compile(r"(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?", re.ASCII)
RESOURCE = re.compile(r"cpu|memory|ephemeral-storage|hugepages-[1-9][0-9]*[KMG]i")  # and devices, VENDOR/NAME
# A name of an image as registries have it, and what enroot has before it: USER@REGISTRY#NAME.
HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?"
PART = r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*"
DIGEST = r"@sha(256:[0-9a-f]{64}|512:[0-9a-f]{128})"
OF_A_REGISTRY = rf"{PART}(/{PART})*(:\w[\w.-]{{0,127}})?({DIGEST})?"
IMAGE = re.compile(rf"(?!.*\.(sqsh|squashfs)$)((?=[^/]*[.:]|localhost/){HOST}/)?{OF_A_REGISTRY}", re.ASCII)
OF_ENROOT = re.compile(rf"((docker|dockerd|podman)://)?(([\w.+-]+@)?{HOST}#)?", re.ASCII)
WITH_A_USER = re.compile(r"ssh://[\w.-]+@[^@]+", re.ASCII)  # as `ssh` takes it, without a password


def image_name(image: str) -> str:
    """An image as Kubernetes names it; pyxis has # behind the registry."""
    return image.removeprefix("docker://").replace("#", "/", 1)


def is_image(name: str) -> bool:
    """Whether an image of a registry can be called so."""
    return bool(IMAGE.fullmatch(name))


def is_image_of_enroot(name: str) -> bool:
    """The same with what enroot takes before it."""
    return is_image(OF_ENROOT.sub("", name, 1))


def is_ipv6(host: str) -> bool:
    """Whether a host is an address of IPv6, without brackets; it may name its interface, behind %."""
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


def is_qualified(key: str) -> bool:
    """Whether a label or a device can be called so: NAME, or the domain of who has made it, / and NAME."""
    domain, slash, name = key.rpartition("/")
    return bool(LABEL.fullmatch(name)) and (not slash or (bool(DOMAIN.fullmatch(domain)) and len(domain) <= 253))


def is_resource(key: str) -> bool:
    """Whether a pod can ask for it. What Kubernetes itself has is no device."""
    is_device = "/" in key and is_qualified(key) and not key.partition("/")[0].endswith("kubernetes.io")
    return is_device or bool(RESOURCE.fullmatch(key))
