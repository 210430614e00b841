"""What images are made from, without an engine: manifests, sources, bills of materials, what is taken out."""

from __future__ import annotations

import ast
import base64
import datetime
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import git

from images import (
    debian,
    engine,
    image,
    licences,
    lock,
    machine,
    manifest,
    objects,
    process,
    provenance,
    publish,
    request,
    sbom,
    slim,
    sources,
    store,
    verify,
)
from images.manifest import Source
from images.store import BuildError

ROOT = Path(__file__).parent.parent
FAMILIES = ["deepseek_v3", "gpt_oss", "llama31", "qwen25", "qwen3"]


# ---------------------------------------------------------------------------- the code itself


def imports_of(path: Path) -> set[str]:
    """The modules of images/ that a file imports, also inside functions and for types only."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    whole = {name.name for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "images" for name in n.names}
    parts = {n.module.partition(".")[2] for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    return (whole | parts) & {file.stem for file in manifest.HERE.glob("*.py")}


def test_imports_in_images_have_no_cycle():
    graph = {path.stem: imports_of(path) for path in manifest.HERE.glob("*.py")}
    assert graph["image"] >= {"request", "staging", "provenance"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError for a cycle


# ---------------------------------------------------------------------------- manifests


def test_every_family_of_the_package_has_an_image():
    from slipway.families import FAMILIES as in_package

    assert manifest.families() == FAMILIES == sorted(in_package)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_and_recipe_of_a_manifest_are_nemos(family):
    import importlib.util

    found = manifest.read_manifest(family)
    recipes = Path(importlib.util.find_spec("nemo").origin).parent / "collections" / "llm" / "recipes"
    assert found.recipe in found.models
    assert [model for model in found.models if not (recipes / f"{model}.py").exists()] == []


GOOD = 'family = "x"\nmodels = ["m"]\nrecipe = "m"\ncuda_architectures = ["9.0"]\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("family = ", "x.toml: "),
        (GOOD + "colour = 1", "unknown key colour in the manifest; the known keys are family,"),
        (GOOD.replace("models", "model"), "unknown key model in the manifest (did you mean models?)"),
        ('family = "x"', "the key cuda_architectures is missing in the manifest"),
        (GOOD.replace('"m"\ncuda', "1\ncuda"), "recipe is 1, expected text in quotes"),
        (GOOD.replace('family = "x"', 'family = "y"'), "family is 'y', expected the name of the file, 'x'"),
        (GOOD.replace("9.0", "90"), "cuda_architectures has '90'; write it like \"9.0\""),
        (GOOD + "[pins.nemmo]", "unknown key nemmo in pins (did you mean nemo?)"),
        (GOOD + '[pins.nemo]\nversion = "1"', "the key commit is missing in pins.nemo"),
        (GOOD + '[pins.nemo]\nversion = "1"\ncommit = "c"\narchive = "a"', "has only one of archive and sha256"),
        (GOOD + "[pins.apex.submodules.cutlass]\n[pins.nemo]", "the key commit is missing in pins.apex"),
        (
            GOOD + '[pins.apex]\nversion = "1"\ncommit = "c"\n[pins.apex.submodules.cutlass]\ncommit = "d"',
            "the key repository is missing in pins.apex.submodules.cutlass",
        ),
    ],
)
def test_a_wrong_manifest_is_said_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "x.toml").write_text(text)
    monkeypatch.setattr(manifest, "HERE", tmp_path)
    with pytest.raises(BuildError) as error:
        manifest.read_manifest("x")
    assert message in str(error.value) and error.value.exit_code == 65 and "\n" not in str(error.value)


def test_a_familys_own_commit_has_submodules_of_its_own(tmp_path, monkeypatch):
    pin = '[pins.apex]\nversion = "1"\ncommit = "c"\n[pins.apex.submodules.part]\ncommit = "d"\nrepository = "r"\n'
    (tmp_path / "x.toml").write_text(GOOD + pin)
    monkeypatch.setattr(manifest, "HERE", tmp_path)
    found = {source.name: source for source in manifest.sources(manifest.read_manifest("x"), "full")}
    assert found["apex"].submodules == {"part": {"commit": "d", "repository": "r"}}
    assert "cutlass" in found["transformer-engine"].submodules


def test_a_familys_own_pin_changes_that_source_alone(tmp_path, monkeypatch):
    own = '[pins.megatron-core]\nversion = "9"\ncommit = "cc"\narchive = "m-9.tar.gz"\nsha256 = "aa"\n'
    (tmp_path / "x.toml").write_text(GOOD + own)
    monkeypatch.setattr(manifest, "HERE", tmp_path)
    general = manifest.sources(manifest.Manifest("y", ["m"], "m", []), "cpu")
    found = manifest.sources(manifest.read_manifest("x"), "cpu")
    assert found[0] == general[0] and found[0].name == "nemo"
    assert (found[1].version, found[1].commit, found[1].archive.sha256) == ("9", "cc", "aa")
    assert found[1].repository == general[1].repository and general[1].archive.sha256 != "aa"


@pytest.mark.parametrize("jobs_of, cores, gigabytes", [(1, 2, 4), (2, 2, 100), (8, 64, 33)])
def test_compile_jobs_fit_cores_and_memory(monkeypatch, jobs_of, cores, gigabytes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 10**9 // 4096}.get)
    monkeypatch.setattr(machine, "_of_engine", lambda: (float("inf"), float("inf")))
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert machine.compile_jobs() == jobs_of
    # An engine on a smaller machine, and one that is not on this machine.
    monkeypatch.setattr(machine, "_of_engine", lambda: (16.0, 8e9))
    assert machine.compile_jobs() == min(jobs_of, 2)
    monkeypatch.setenv("DOCKER_HOST", "tcp://builder.invalid:2376")
    assert machine.compile_jobs() == 2


def _files(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    "own, groups, limits",
    [
        ("0::/a/b\n", {"a/b/memory.max": "9000\n", "a/b/cpu.max": "max 100000\n", "a/memory.max": "max"}, (None, 9000)),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "700\n", "a/cpu.max": "150000 100000\n"}, (1.5, 700)),
        # A container whose own groups are mounted at the root.
        ("0::/seen/from/the/host\n", {"memory.max": "800\n"}, (None, 800)),
        (
            "4:memory:/x\n1:cpu,cpuacct:/x\n",
            {
                "memory/x/memory.limit_in_bytes": "900\n",
                "cpu/x/cpu.cfs_quota_us": "200000\n",
                "cpu/x/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            (2, 900),
        ),
        ("", {}, (None, None)),
    ],
)
def test_limits_of_control_groups_are_read(tmp_path, own, groups, limits):
    _files(tmp_path / "groups", groups)
    _files(tmp_path, {"own": own})
    found = machine.cgroup_limits(tmp_path / "own", tmp_path / "groups")
    assert found == tuple(float("inf") if limit is None else limit for limit in limits)


# ---------------------------------------------------------------------------- sources


def test_a_commit_and_its_submodules_come_from_the_clones_given(clone):
    folder, source = clone
    places = {"whole": str(folder / "whole"), "part": str(folder / "part")}
    tree = sources.trees([source], "full", places)["whole"]
    assert (tree / "file.txt").read_text() == "whole" and (tree / "inner" / "part" / "file.txt").read_text() == "part"
    shutil.rmtree(folder / "whole")  # what is in the store is not asked for again
    assert sources.trees([replace(source, by_git=True)], "full", {})["whole"] == tree


def test_the_preflight_names_what_cannot_be_reached_within_seconds(clone):
    folder, source = clone
    started = time.monotonic()
    with pytest.raises(BuildError) as error:
        sources.trees([source], "full", {"whole": str(folder / "whole")})
    assert time.monotonic() - started < 30 and error.value.exit_code == 78
    message = str(error.value)
    assert "cannot reach part (https://host.invalid/part)" in message and "--source part=CLONE" in message
    assert "--source whole" not in message and "\n" not in message


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"commit": "1" * 40},
            r"does not have all of commit 1111\w+: the commit \(object 1111\w+\) is missing; run `git",
        ),
        ({"submodules": {}}, r"submodule inner/part is at commit \w+, which has no pin"),
    ],
)
def test_a_clone_that_is_not_as_pinned_is_refused(clone, change, message):
    folder, source = clone
    with pytest.raises(BuildError, match=message):
        other = replace(source, **change)
        sources.trees([other], "full", {name: str(folder / name) for name in ("whole", *other.submodules)})
    assert not [path for path in (folder / "store").rglob("*") if path.name == "file.txt"]


def test_a_wrong_source_is_one_line_with_the_names_that_exist(clone):
    with pytest.raises(BuildError, match="--source hole: unknown source; use one of part, whole") as error:
        sources.trees([clone[1]], "full", {"hole": "/"})
    assert error.value.exit_code == 2
    with pytest.raises(BuildError, match="its pin has no source archive") as error:
        sources.trees([clone[1]], "cpu", {})
    assert error.value.exit_code == 65


def test_a_clone_that_is_not_whole_will_do_if_it_has_what_the_build_reads(clone):
    """A shallow clone by another owner, with a submodule that lacks a file, and of which the build reads one folder."""
    folder, source = clone
    part = folder / "part"
    _files(part, {"include/a/b.h": "b", "docs/picture": "p" * 1000, "include/run": "r"})
    (part / "include" / "run").chmod(0o755)
    (part / "include" / "link").symlink_to("a/b.h")
    git(part, "add", ".")
    git(part, "commit", "--quiet", "-m", "two")
    commit = git(part, "rev-parse", "HEAD").strip()
    git(folder / "whole" / "inner" / "part", "fetch", "--quiet", str(part), "HEAD")
    git(folder / "whole" / "inner" / "part", "checkout", "--quiet", commit)
    git(folder / "whole", "commit", "--quiet", "--all", "-m", "three")
    top = git(folder / "whole", "rev-parse", "HEAD").strip()
    git(folder, "clone", "--quiet", "--bare", "--depth=1", f"file://{folder}/whole", "shallow")
    picture = git(part, "rev-parse", "HEAD:docs/picture").strip()
    (part / ".git" / "objects" / picture[:2] / picture[2:]).unlink()
    subprocess.run(["chown", "-R", "4242:4343", part, folder / "shallow"], check=True)
    places = {"whole": str(folder / "shallow"), "part": str(part)}

    def pinned(**keys: object) -> Source:
        return replace(source, commit=top, submodules={"part": {"commit": commit, "repository": "x", **keys}})

    with pytest.raises(
        BuildError, match=rf"part: \S+ does not have all of .*docs/picture \(object {picture}\) is missing"
    ):
        sources.trees([pinned()], "full", places)
    tree = sources.trees([pinned(paths=["include"])], "full", places)["whole"] / "inner" / "part"
    assert sorted(str(p.relative_to(tree)) for p in tree.rglob("*")) == [
        "include", "include/a", "include/a/b.h", "include/link", "include/run",
    ]  # fmt: skip
    assert (tree / "include" / "link").read_text() == "b" and os.access(tree / "include" / "run", os.X_OK)
    # A submodule of which nothing is read need not be anywhere.
    bare = sources.trees([pinned(paths=[])], "full", {"whole": places["whole"], "part": "/nonexistent"})["whole"]
    assert bare != tree.parents[1] and not (bare / "inner" / "part" / "include").exists()


def test_a_file_with_other_content_than_its_hash_says_is_refused(clone):
    folder, source = clone
    objects = folder / "whole" / ".git" / "objects"
    sha = git(folder / "whole", "rev-parse", "HEAD:file.txt").strip()
    other = git(folder / "part", "rev-parse", "HEAD:file.txt").strip()
    shutil.copy(folder / "part" / ".git" / "objects" / other[:2] / other[2:], objects / "new")
    os.replace(objects / "new", objects / sha[:2] / sha[2:])
    with pytest.raises(BuildError, match=rf"file.txt \(object {sha}\) (is missing|has other content)"):
        sources.trees([source], "full", {"whole": str(folder / "whole"), "part": str(folder / "part")})


def test_no_file_of_a_tree_leaves_its_folder():
    for name in (b"..", b".git", b"a/b"):
        with pytest.raises(BuildError, match="no valid name in a git tree"):
            list(objects.parsed("", b"100644 " + name + b"\0" + b"x" * 20))


def test_a_source_that_a_context_makes_needless_is_said_and_no_error(clone, capsys):
    source = clone[1]
    given = {"whole": "/nonexistent", "part": "/nonexistent"}
    assert sources.trees([replace(source, replaced="whole-source")], "full", given) == {}
    assert "--source part is not needed: a --context replaces" in capsys.readouterr().err


def test_full_without_a_git_host_is_said_in_seconds(tmp_path):
    words = [sys.executable, ROOT / "build.py", "image", "--variant", "full", "--source", "nemo=/nonexistent"]
    started = time.monotonic()
    environment = {**os.environ, "GIT_SSL_NO_VERIFY": "1", "https_proxy": "http://127.0.0.1:9", "DOCKER_HOST": "x"}
    environment["SLIPWAY_STORE"] = str(tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 78 and time.monotonic() - started < 60
    assert len(done.stderr.splitlines()) == 1 and "--source nemo=CLONE" in done.stderr and "apex" in done.stderr


# ---------------------------------------------------------------------------- bills of materials


@pytest.fixture(scope="module")
def bill() -> str:
    """The bill of materials of an image with everything that needs no git host."""
    found = manifest.read_manifest("gpt_oss")
    lock.fetch_wheels(lock.requirements("--no-default-groups", "--group", "te"))
    return sbom.text(found, "index", manifest.sources(found, "index"))


def test_the_bill_of_materials_fits_cyclonedx(bill):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill) is None
    wrong = bill.replace('"bomFormat"', '"bomFormt"')
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(wrong) is not None


def test_the_bill_of_materials_names_everything_with_a_licence(bill):
    components = json.loads(bill)["components"]
    names = {component["name"] for component in components}
    assert {"nemo-toolkit", "megatron-core", "transformer-engine", "torch", "libc6", "tini"} <= names
    assert names >= {package.name for package in debian.read_lock() if "base" in package.sets}
    nemo = next(component for component in components if component["name"] == "nemo-toolkit")
    assert nemo["purl"] == "pkg:pypi/nemo-toolkit@2.7.3?file_name=nemo_toolkit-2.7.3.tar.gz" and nemo["licenses"] == [
        {"expression": "Apache-2.0"}
    ]
    assert all(component["licenses"] for component in components)
    silent = [c["name"] for c in components if c["licenses"] == [licences.named(licences.NOT_STATED)]]
    assert len(silent) < 10, silent
    assert bill == sbom.text(manifest.read_manifest("gpt_oss"), "index", _sources_of("index"))


def _sources_of(variant: str) -> list[Source]:
    return manifest.sources(manifest.read_manifest("gpt_oss"), variant)


# ---------------------------------------------------------------------------- upkeep


@pytest.mark.parametrize(
    "url, said",
    [
        ("https://git.example.org/team/slipway.git", "https://git.example.org/team/slipway.git"),
        ("https://me:secret@git.example.org/slipway?x=1", "https://git.example.org/slipway"),
        ("git@git.example.org:team/slipway.git", ""),
        ("/srv/slipway", ""),
    ],
)
def test_the_label_of_the_source_is_an_address_without_a_password(url, said, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    assert provenance.origin() == ""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", url], check=True)
    assert provenance.origin() == said


def test_the_age_of_the_locks_is_said():
    day = debian.locked_on() + datetime.timedelta(days=40)
    assert f"Debian packages of {debian.locked_on()} (40 days old), Python packages of " in image.ages(day)


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_debian_packages_that_are_behind_are_named_from_a_carried_list(tmp_path, ending):
    locked = {package.name: package for package in debian.read_lock()}
    stanza = "Package: {}\nVersion: {}\nFilename: pool/{}\n"
    table = [
        stanza.format("libssl3", locked["libssl3"].version + ".1", "updates/main/o/openssl/x.deb"),
        stanza.format("bash", "1.0", "main/b/bash/x.deb"),  # older than the lock
        stanza.format("g++", "99", "main/g/x.deb"),  # not in an image
        stanza.format("tini", locked["tini"].version + "+b9", "main/t/tini/x.deb"),
    ]
    path = tmp_path / f"Packages{ending}"
    {"": open, ".gz": gzip.open, ".xz": lzma.open}[ending](path, "wb").write("\n".join(table).encode())
    version = locked["libssl3"].version
    found = debian.newer([path])
    assert found[0] == f"libssl3 {version}: {version}.1 is in security" and len(found) == 2
    assert found[1].startswith("tini ") and found[1].endswith(" is in a release")
    with pytest.raises(BuildError, match="no package in it"):
        path.write_bytes(b"" if not ending else {".gz": gzip.compress, ".xz": lzma.compress}[ending](b""))
        debian.newer([path])


@pytest.fixture
def web(tmp_path) -> Iterator[str]:
    """The address of a server of the files in tmp_path."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_package_that_the_mirror_no_longer_has_comes_from_a_snapshot(tmp_path, monkeypatch, web):
    content = b"a package"
    package = debian.Package(
        ("base",), "x", "1", hashlib.sha256(content).hexdigest(), "pool/updates/main/x/x_1_all.deb"
    )
    monkeypatch.setattr(debian, "read_lock", lambda: [package])
    monkeypatch.setattr(debian, "locked_on", lambda: datetime.date(2026, 11, 25))
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    for name in ("SLIPWAY_DEBIAN_MIRROR", "SLIPWAY_DEBIAN_SECURITY_MIRROR"):
        monkeypatch.setenv(name, f"{web}/mirror")
    with pytest.raises(BuildError, match=r"set SLIPWAY_DEBIAN_SNAPSHOT to .* \(the lock is of 2026-11-25\)"):
        debian.fetch()
    place = tmp_path / "snapshots" / "debian-security" / "20261125T235959Z" / package.path
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    monkeypatch.setenv("SLIPWAY_DEBIAN_SNAPSHOT", f"{web}/snapshots")
    assert (debian.fetch() / "x_1_all.deb").read_bytes() == content


def test_a_ready_root_file_system_is_taken_if_it_has_the_locked_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SLIPWAY_ROOTFS", str(tmp_path))
    monkeypatch.setattr(debian, "HASHES", tmp_path / "rootfs.lock")
    (tmp_path / "rootfs.lock").write_text(f"base {hashlib.sha256(b'right').hexdigest()}\nbuild {'0' * 64}\n")
    with pytest.raises(BuildError, match=r"base\.tar not found"):
        debian.root_file_system("base")
    (tmp_path / "base.tar").write_text("wrong")
    with pytest.raises(BuildError, match=r"base\.tar has SHA-256 \w+, expected \w+ from images/rootfs.lock") as error:
        debian.root_file_system("base")
    assert error.value.exit_code == 65 and not list((tmp_path / "store" / "rootfs").iterdir())
    (tmp_path / "base.tar").write_text("right")
    assert debian.root_file_system("base").read_text() == "right"


def test_the_hashes_in_the_lock_are_of_both_root_file_systems():
    assert set(debian.hashes()) == set(debian.SETS) and all(len(digest) == 64 for digest in debian.hashes().values())


def test_two_builds_at_once_may_make_the_same_tree(clone):
    folder, source = clone
    places = {"whole": str(folder / "whole"), "part": str(folder / "part")}
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: sources.trees([source], "full", places)["whole"], range(8)))
    assert len(set(made)) == 1 and (made[0] / "inner" / "part" / "file.txt").read_text() == "part"
    assert sorted(path.name for path in made[0].parent.iterdir()) == [made[0].name, f"{made[0].name}.objects"]


@pytest.mark.parametrize("policy", ["ACCEPT", "DROP"])
def test_the_engine_leaves_packet_forwarding_as_it_was(tmp_path, policy):
    """In a network namespace of its own, with docker's change made by hand."""
    program = (
        "import subprocess; from images import engine; engine.home().mkdir(parents=True)\n"
        f"subprocess.run(['iptables', '-P', 'FORWARD', '{policy}'], check=True)\n"
        "engine.IP_FORWARD.write_text('0'); engine._keep_forwarding()\n"
        "subprocess.run(['iptables', '-P', 'FORWARD', 'DROP'], check=True); engine.IP_FORWARD.write_text('1')\n"
        "engine._restore_forwarding()\n"
        "shown = subprocess.run(['iptables', '-S', 'FORWARD'], capture_output=True, text=True).stdout\n"
        "print(shown.splitlines()[0], engine.IP_FORWARD.read_text())"
    )
    words = [
        "unshare",
        "--net",
        "--mount",
        "sh",
        "-c",
        'mount -t proc proc /proc && exec "$@"',
        "-",
        sys.executable,
        "-c",
    ]
    environment = {**os.environ, "SLIPWAY_LOCAL": str(tmp_path)}
    done = subprocess.run([*words, program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["-P", "FORWARD", policy, "0"], done.stderr


@pytest.mark.parametrize("machine_is, engine_is", [("aarch64", ""), ("x86_64", "aarch64")])
def test_another_architecture_is_refused_with_what_is_missing(tmp_path, monkeypatch, machine_is, engine_is):
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\necho {engine_is}\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    monkeypatch.setattr(platform, "machine", lambda: machine_is)
    with pytest.raises(BuildError, match=r"is aarch64, .* missing for aarch64: its wheels in uv.lock"):
        engine.require_architecture()


def test_an_engine_with_the_older_image_store_compresses_with_gzip(tmp_path, monkeypatch):
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho \'[["Backing Filesystem","extfs"],["Native Overlay Diff","true"]]\'\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    assert publish._compression(None) == publish._compression("gzip") == "gzip"
    with pytest.raises(BuildError, match=r'has gzip alone; use gzip, or set .*"containerd-snapshotter": true') as error:
        publish._compression("zstd")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "kind, name", [(tarfile.SYMTYPE, "t/link"), (tarfile.REGTYPE, "t/../../x"), (tarfile.REGTYPE, "/x")]
)
def test_a_source_archive_holds_plain_files_below_its_folder(kind, name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(BuildError, match="is no plain file below its folder"):
        sources._as_ours(member)


def test_what_a_source_archive_holds_is_this_users_with_plain_modes():
    """As tarfile's own filter makes it, which Debian 12's Python does not have."""
    for mode, is_folder in ((0o600, False), (0o4777, False), (0o700, True)):
        member = tarfile.TarInfo("t/a")
        member.mode, member.uid, member.type = mode, 4242, tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
        expected = 0o755 if is_folder or mode & 0o100 else 0o644
        assert (sources._as_ours(member).mode, member.uid) == (expected, os.getuid())


# ---------------------------------------------------------------------------- what is taken out


def test_what_is_taken_out_leaves_the_records_true(tmp_path, monkeypatch):
    (tmp_path / "a" / "tests").mkdir(parents=True)
    (tmp_path / "a-1.dist-info").mkdir()
    for name, content in (("__init__.py", ""), ("tests/t.py", "x"), ("lib.a", "y"), ("lib.so", "z")):
        (tmp_path / "a" / name).write_text(content)
    record = tmp_path / "a-1.dist-info" / "RECORD"
    record.write_text('a/__init__.py,,0\na/tests/t.py,,1\na/lib.a,,1\na/lib.so,sha256=old,1\n"a, b",,\n')
    gone = slim.remove(tmp_path, [("**/tests/", "tests"), ("**/*.a", "static")])
    (tmp_path / "a" / "lib.so").write_text("smaller")
    slim.correct_records(tmp_path, gone, {tmp_path / "a" / "lib.so"})
    digest = hashlib.sha256(b"smaller").digest()
    expected = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert record.read_text() == f'a/__init__.py,,0\na/lib.so,sha256={expected},7\n"a, b",,\n'
    assert not (tmp_path / "a" / "tests").exists() and not (tmp_path / "a" / "lib.a").exists()
    with pytest.raises(SystemExit, match="matches nothing; delete it from the list"):
        slim.remove(tmp_path, [("**/tests/", "tests")])


def test_the_difference_of_two_layers_names_the_file_and_what_of_it(tmp_path):
    def layer(text: str, mtime: int) -> io.BytesIO:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, content in (("same", b"s"), ("other", text.encode())):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(content), mtime if name == "other" else 0
                tar.addfile(entry, io.BytesIO(content))
        stream.seek(0)
        return stream

    one, two = verify.entries(layer("a", 1)), verify.entries(layer("b", 2))
    assert one["same"] == two["same"]
    assert verify.what_differs(one["other"], two["other"]) == "time, content"
    assert verify.what_differs(one["other"], None) == "only in the first"


# ---------------------------------------------------------------------------- builds


@pytest.fixture
def request_of_gpt_oss() -> request.Request:
    found = manifest.read_manifest("gpt_oss")
    return request.Request(found, "cpu", manifest.sources(found, "cpu"), {}, {})


def test_a_full_disk_is_said_before_the_build(monkeypatch, tmp_path, request_of_gpt_oss):
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path))
    monkeypatch.setattr(image, "NEEDED_BYTES", 10**18)
    with pytest.raises(BuildError, match="GB are needed") as error:
        image.build(request_of_gpt_oss, "x", "type=image")
    assert error.value.exit_code == 73 and not list(store.store().iterdir())


def test_what_a_killed_build_left_is_removed_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for owner in (ended.pid, os.getpid()):
        (tmp_path / f"{image.STAGING}{owner}-x" / "rootfs").mkdir(parents=True)
    image.remove_abandoned()
    assert [folder.name for folder in tmp_path.iterdir()] == [f"{image.STAGING}{os.getpid()}-x"]


@pytest.mark.parametrize(
    "word, code, message",
    [
        ("te-sauce=/tmp", 2, r"unknown stage or source tree \(did you mean te-source\?\); use one of nemo-source"),
        ("te-source", 2, "write it as NAME=PLACE"),
        ("te-source=/nonexistent", 65, "--context te-source=/nonexistent: folder not found"),
    ],
)
def test_a_wrong_context_is_said_in_one_line(word, code, message):
    with pytest.raises(BuildError, match=message) as error:
        request.contexts_of([word])
    assert error.value.exit_code == code and "\n" not in str(error.value)


def test_a_source_that_a_context_replaces_is_not_asked_for_and_not_claimed(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        request, "trees", lambda wanted, *_: asked.extend(s.name for s in wanted if not s.replaced) or {}
    )
    monkeypatch.setattr(request, "fetch_packages", lambda _: None)
    monkeypatch.setattr(engine, "require", lambda: None)
    contexts = [f"te-source={tmp_path}", "apex=docker-image://site/apex:1"]
    found = request.Request.of("gpt_oss", "full", context=contexts)
    assert asked == ["nemo", "megatron-core"]
    assert found.contexts == {"te-source": str(tmp_path), "apex": "docker-image://site/apex:1"}
    named = provenance.pins(found.wanted)
    assert (named["transformer-engine"], named["apex"]) == ("context te-source", "context apex")
    assert named["nemo"].startswith("2.")
    listed = {c["name"]: c for c in json.loads(sbom.text(found.manifest, "full", found.wanted))["components"]}
    assert listed["apex"]["purl"] == "pkg:generic/apex" and "hashes" not in listed["apex"]
    assert listed["apex"]["properties"] == [{"name": "slipway:context", "value": "apex"}]


@pytest.mark.parametrize(
    "version, message", [("v0.12.1", "has buildx v0.12.1, expected 0.13 or newer"), ("", "has no buildx")]
)
def test_an_engine_that_is_too_old_is_said(monkeypatch, tmp_path, version, message):
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\n[ "$1" = info ] || echo "github.com/docker/buildx {version} 30feaa1"\n')
    if not version:
        docker.write_text('#!/bin/sh\n[ "$1" = info ]\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent.sock")
    with pytest.raises(BuildError, match=message) as error:
        engine.require()
    assert error.value.exit_code == 78


# As build.py does: SIGINT may be ignored, as it is in what a shell starts in the background.
INTERRUPTED = """
import os, signal, sys
from images import process
signal.signal(signal.SIGTERM, signal.default_int_handler)
if sys.argv[1] == "while it starts":
    os.register_at_fork(after_in_child=lambda: os.kill(os.getppid(), signal.SIGTERM))
process.run(sys.argv[2:])
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("when", ("while it starts", "when it runs"))
def test_an_interrupted_program_is_over_before_our_last_line(tmp_path, when):
    program = tmp_path / "program"
    stops = "trap 'sleep 0.5; echo cleaned >&2; exit 1' TERM"
    program.write_text(f"#!/bin/sh\n{stops}\necho running >&2\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    command = [sys.executable, "-c", INTERRUPTED, when, program]
    with subprocess.Popen(command, cwd=image.HERE.parent, stderr=subprocess.PIPE, text=True) as build:
        if when == "when it runs":
            assert build.stderr.readline() == "running\n"
            build.terminate()
        said = build.stderr.read()  # to the end of whatever holds it, the program too
    assert "stopping program\n" in said and said.endswith("KeyboardInterrupt\n")
    assert when == "while it starts" or "cleaned\n" in said


def test_a_program_hears_what_stops_it():
    mask = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    ours = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert process.run([sys.executable, "-c", mask], capture_output=True, text=True).stdout == f"{ours}\n"
