"""What images are made from, without an engine: manifests, sources, bills of materials, what is taken out."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from images import (
    debian,
    engine,
    image,
    licences,
    lock,
    machine,
    manifest,
    process,
    provenance,
    publish,
    request,
    sbom,
    slim,
    store,
    verify,
)
from images.manifest import Source
from images.store import BuildError
from images.target import X86_64

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


# ---------------------------------------------------------------------------- bills of materials


@pytest.fixture(scope="module")
def bill() -> str:
    """The bill of materials of an image with everything that needs no git host."""
    found = manifest.read_manifest("gpt_oss")
    lock.fetch_wheels(lock.requirements("--no-default-groups", "--group", "te"))
    return sbom.text(found, "index", manifest.sources(found, "index"), X86_64)


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
    assert names >= {package.name for package in debian.read_lock(X86_64) if "base" in package.sets}
    nemo = next(component for component in components if component["name"] == "nemo-toolkit")
    assert nemo["purl"] == "pkg:pypi/nemo-toolkit@2.7.3?file_name=nemo_toolkit-2.7.3.tar.gz" and nemo["licenses"] == [
        {"expression": "Apache-2.0"}
    ]
    assert all(component["licenses"] for component in components)
    silent = [c["name"] for c in components if c["licenses"] == [licences.named(licences.NOT_STATED)]]
    assert len(silent) < 10, silent
    assert bill == sbom.text(manifest.read_manifest("gpt_oss"), "index", _sources_of("index"), X86_64)


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


@pytest.mark.parametrize("policy", ["ACCEPT", "DROP"])
def test_the_engine_leaves_packet_forwarding_as_it_was(tmp_path, policy):
    """In a network namespace of its own, with docker's change made by hand."""
    engine.install_programs()  # iptables, which a new machine has not
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
    return request.Request(found, "cpu", manifest.sources(found, "cpu"), {}, {}, X86_64)


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
    monkeypatch.setattr(request, "fetch_packages", lambda *_: None)
    monkeypatch.setattr(engine, "require", lambda: None)
    monkeypatch.setattr(engine, "require_platform", lambda *_, **__: None)
    contexts = [f"te-source={tmp_path}", "apex=docker-image://site/apex:1"]
    found = request.Request.of("gpt_oss", "full", context=contexts)
    assert asked == ["nemo", "megatron-core"]
    assert found.contexts == {"te-source": str(tmp_path), "apex": "docker-image://site/apex:1"}
    named = provenance.pins(found.wanted, X86_64)
    assert (named["transformer-engine"], named["apex"]) == ("context te-source", "context apex")
    assert named["nemo"].startswith("2.")
    listed = {c["name"]: c for c in json.loads(sbom.text(found.manifest, "full", found.wanted, X86_64))["components"]}
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
