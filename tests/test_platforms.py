"""Images for x86-64 and for arm64: what is locked for each, and what an engine can build."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import pytest

from images import debian, engine, image, lock, request
from images.store import BuildError
from images.target import AARCH64, TARGETS, X86_64, Target, here, of_platform

BOTH = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def test_a_platform_has_dockers_name_and_is_this_machines_unless_said(monkeypatch):
    assert of_platform("linux/arm64") is AARCH64 and of_platform(None) is here()
    with pytest.raises(BuildError, match="--platform arm64: images are made for linux/amd64 and linux/arm64") as error:
        of_platform("arm64")
    assert error.value.exit_code == 2
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(BuildError, match="this machine is riscv64, and packages are locked for x86_64 and aarch64"):
        here()


@BOTH
def test_every_package_of_an_image_is_locked_for_the_processor(target):
    groups = [word for group in ("build", "te", "cuda") for word in ("--group", group)]
    needed = lock.requirements("--no-default-groups", *groups, target=target)
    files = {file.project for file in lock.locked_files(lock.locked_packages(), target)}
    assert needed.keys() <= files and {"torch", "transformer-engine-cu13", "triton"} <= needed.keys()
    assert ("cython" in needed) == (target == AARCH64)


@BOTH
def test_one_wheel_of_a_package_is_for_one_processor(target):
    (other,) = [one for one in TARGETS.values() if one != target]
    names = [file.name for file in lock.locked_files(lock.locked_packages(), target)]
    assert not [name for name in names if other.machine in name]
    assert target.machine in lock.uv_file(target).name


@BOTH
def test_debian_packages_are_locked_for_the_processor(target):
    endings = {package.path.rpartition("_")[2] for package in debian.read_lock(target)}
    assert endings == {f"{target.debian}.deb", "all.deb"}
    assert {"libc6", "tini", "gcc-12"} <= {package.name for package in debian.read_lock(target)}


@pytest.fixture
def answers(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Makes `docker` an engine on a machine with this processor, which says that it builds for these platforms."""

    def write(machine: str, platforms: str) -> None:
        docker = tmp_path / "docker"
        docker.write_text(f'#!/bin/sh\n[ "$1" = info ] && echo {machine} || echo "Platforms:  {platforms}"\n')
        docker.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    return write


@pytest.mark.parametrize("machine, target", [("x86_64", X86_64), ("aarch64", AARCH64), ("arm64", AARCH64)])
def test_an_engine_builds_everything_for_its_own_processor(answers, machine: str, target: Target):
    answers(machine, "")
    engine.require_platform(target, compiles_cuda=True)


@pytest.mark.parametrize("machine, target", [("x86_64", AARCH64), ("aarch64", X86_64)])
def test_another_processor_is_emulated_but_not_to_compile_cuda(answers, machine: str, target: Target):
    answers(machine, "linux/386, linux/s390x")
    with pytest.raises(BuildError, match=rf"cannot run programs of {target.machine}; missing there: an emulator"):
        engine.require_platform(target, compiles_cuda=False)
    answers(machine, f"linux/386, {target.platform}*")
    engine.require_platform(target, compiles_cuda=False)
    with pytest.raises(BuildError, match=r"missing: an engine on a machine with .* `--context built-wheels=FOLDER`"):
        engine.require_platform(target, compiles_cuda=True)


def test_an_image_of_another_processor_has_a_name_of_its_own():
    assert request.tag("qwen3", "cpu", X86_64) == "slipway/qwen3:cpu"
    assert request.tag("qwen3", "cpu", AARCH64) == "slipway/qwen3:cpu-arm64"


def test_an_image_that_is_not_there_is_named_with_what_builds_it(answers, tmp_path):
    answers("x86_64", "")
    (tmp_path / "docker").write_text("#!/bin/sh\necho none >&2\nexit 1\n")
    with pytest.raises(BuildError, match=r"run `make image MODEL=qwen3 VARIANT=cpu PLATFORM=linux/arm64`"):
        image.inspect("slipway/qwen3:cpu-arm64")


def test_a_root_file_system_of_another_processor_needs_an_emulator(monkeypatch, tmp_path):
    monkeypatch.setattr(debian, "BINFMT", tmp_path)
    (other,) = [target for target in TARGETS.values() if target != here()]
    debian.require_emulator(here())
    with pytest.raises(BuildError, match=r"qemu-user-static and arch-test"):
        debian.require_emulator(other)
    (tmp_path / f"qemu-{other.machine}").touch()
    debian.require_emulator(other)
