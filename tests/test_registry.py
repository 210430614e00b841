"""Attachments to an image in a registry: Debian's docker-registry, where it is installed, with a login and without."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import time
import urllib.request

import bcrypt
import pytest
from conftest import free_port

from images import registry
from images.store import BuildError

pytestmark = pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed")


@pytest.fixture(params=["open", "login"])
def served(tmp_path, monkeypatch, request) -> str:
    """HOST of a registry on this machine; with `login`, docker's configuration has a user and password for it."""
    port = free_port()
    host = f"localhost:{port}"
    lines = [
        "version: 0.1",
        "log: {level: error}",
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}",
        f'http: {{addr: "127.0.0.1:{port}"}}',
    ]
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if request.param == "login":
        hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
        (tmp_path / "htpasswd").write_text(f"user:{hashed}\n")
        lines.append(f"auth: {{htpasswd: {{realm: here, path: {tmp_path}/htpasswd}}}}")
        auth = base64.b64encode(b"user:secret").decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    (tmp_path / "registry.yml").write_text("\n".join(lines) + "\n")
    words = ["docker-registry", "serve", tmp_path / "registry.yml"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://{host}/", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield host
        process.terminate()


def test_files_are_attached_and_can_be_found_from_the_image(tmp_path, served):
    repository = registry.Registry(served, "slipway/x")
    config, layer = repository.put_blob(b"{}"), repository.put_blob(b"layer")
    kinds = {"config": "application/vnd.oci.image.config.v1+json", "layer": "application/vnd.oci.image.layer.v1.tar"}
    text = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": registry.MANIFEST,
            "config": {"mediaType": kinds["config"], **config},
            "layers": [{"mediaType": kinds["layer"], **layer}],
        }
    ).encode()
    digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
    assert repository._ask("PUT", f"{repository.base}/manifests/1", {"Content-Type": registry.MANIFEST}, text)[0] == 201
    files = {tmp_path / "a.json": "application/vnd.in-toto+json", tmp_path / "b.json": "application/vnd.cyclonedx+json"}
    for path in files:
        path.write_text(path.name)
    for _ in range(2):  # a second push of the same changes nothing
        attached = registry.attach(f"{served}/slipway/x:1", digest, files)
    # This registry is older than the list of referrers: the list is under a tag.
    accept = {"Accept": f"{registry.INDEX}, {registry.MANIFEST}"}
    place = f"{repository.base}/manifests/{digest.replace(':', '-')}"
    listed = json.loads(repository._ask("GET", place, accept)[2])["manifests"]
    assert [entry["digest"] for entry in listed] == attached and len(attached) == 2
    manifest = json.loads(repository._ask("GET", f"{repository.base}/manifests/{attached[1]}", accept)[2])
    assert manifest["subject"]["digest"] == digest and manifest["artifactType"] == "application/vnd.cyclonedx+json"
    blob = repository._ask("GET", f"{repository.base}/blobs/{manifest['layers'][0]['digest']}")[2]
    assert blob == b"b.json"


def test_an_image_that_is_not_there_is_one_line(served):
    with pytest.raises(BuildError, match=r"slipway/x has no manifest sha256:0+: the registry answered 4"):
        registry.attach(f"{served}/slipway/x:1", "sha256:" + "0" * 64, {})


def test_docker_s_login_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert registry.credentials("host") == ""
    (tmp_path / "config.json").write_text(json.dumps({"credsStore": "here", "auths": {"a": {"auth": "dTpw"}}}))
    assert registry.credentials("a") == "u:p"
    helper = tmp_path / "docker-credential-here"
    helper.write_text('#!/bin/sh\nread -r host; echo "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"s\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert registry.credentials("host.site") == "host.site:s"


@pytest.mark.parametrize(
    "to, parts", [("h:5000/a/b:tag", ("h:5000", "a/b")), ("h/a", ("h", "a")), ("h/a:1", ("h", "a"))]
)
def test_names_are_split(to, parts):
    assert registry.split(to) == parts


def test_a_registry_that_does_not_answer_is_one_line():
    with pytest.raises(BuildError, match=r"localhost:1: cannot connect"):
        registry.attach("localhost:1/a:b", "sha256:0", {})
