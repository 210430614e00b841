"""Files about an image in its registry: SBOM and provenance, attached as the OCI distribution spec 1.1 says.

Each file is a manifest of its own whose `subject` is the image. A registry lists them as the image's referrers. An
older registry gets the list under the tag sha256-DIGEST, as the spec asks of clients. The login is docker's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from images.store import BuildError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKERS = "application/vnd.docker.distribution.manifest.v2+json"  # what Docker's older image store pushes
EMPTY = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": "sha256:" + hashlib.sha256(b"{}").hexdigest(),
    "size": 2,
}


def attach(to: str, digest: str, files: dict[Path, str]) -> list[str]:
    """Attach files to a pushed image; returns the digest of each attachment.

    Args:
        to: HOST/NAME:TAG.
        digest: of the image's manifest.
        files: path → media type.

    Errors: BuildError (78) with the registry's answer.
    """
    registry = Registry(*split(to))
    subject = registry.describe(digest)
    registry.put_blob(b"{}")
    made = [registry.put_artifact(subject, path.read_bytes(), kind, path.name) for path, kind in files.items()]
    return [descriptor["digest"] for descriptor in made]


def split(to: str) -> tuple[str, str]:
    """(host, name) of HOST/NAME:TAG."""
    host, _, rest = to.partition("/")
    return host, re.sub(r":[^/:]+$", "", rest)


class Registry:
    """One repository of a registry."""

    def __init__(self, host: str, name: str) -> None:
        # As docker does: a registry on this machine needs no certificate.
        scheme = "http" if re.fullmatch(r"(localhost|127\.0\.0\.1)(:\d+)?", host) else "https"
        self.host, self.name = host, name
        self.base = f"{scheme}://{host}/v2/{name}"
        self.headers: dict[str, str] = {}

    def describe(self, reference: str) -> dict[str, Any]:
        """The descriptor of a manifest."""
        status, headers, body = self._ask(
            "GET", f"{self.base}/manifests/{reference}", {"Accept": f"{MANIFEST}, {INDEX}, {DOCKERS}"}
        )
        if status != 200:
            raise self._wrong(f"has no manifest {reference}", status, body)
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        return {"mediaType": headers.get_content_type(), "digest": digest, "size": len(body)}

    def put_blob(self, content: bytes) -> dict[str, Any]:
        """Upload a blob, unless it is there; returns digest and size."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if self._ask("HEAD", f"{self.base}/blobs/{digest}")[0] != 200:
            status, headers, body = self._ask("POST", f"{self.base}/blobs/uploads/", data=b"")
            if status != 202:
                raise self._wrong("takes no upload", status, body)
            place = urllib.parse.urljoin(self.base, headers["Location"])
            place += ("&" if "?" in place else "?") + urllib.parse.urlencode({"digest": digest})
            status, _, body = self._ask("PUT", place, {"Content-Type": "application/octet-stream"}, content)
            if status != 201:
                raise self._wrong("refused a file", status, body)
        return {"digest": digest, "size": len(content)}

    def put_artifact(self, subject: dict[str, Any], content: bytes, kind: str, title: str) -> dict[str, Any]:
        """Upload a file and its manifest, which names the image as its subject; returns the manifest's descriptor."""
        layer = {"mediaType": kind, **self.put_blob(content), "annotations": {"org.opencontainers.image.title": title}}
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "config": EMPTY}
        text = json.dumps({**manifest, "layers": [layer], "subject": subject}).encode()
        digest = f"sha256:{hashlib.sha256(text).hexdigest()}"
        found = {"mediaType": MANIFEST, "digest": digest, "size": len(text), "artifactType": kind}
        status, headers, body = self._ask("PUT", f"{self.base}/manifests/{digest}", {"Content-Type": MANIFEST}, text)
        if status != 201:
            raise self._wrong(f"refused to attach {title}", status, body)
        if not headers.get("OCI-Subject"):
            self._list_by_tag(subject["digest"], found)
        return found

    def _list_by_tag(self, subject: str, descriptor: dict[str, Any]) -> None:
        """Add an attachment to the list under the tag sha256-DIGEST: this registry keeps no list of its own."""
        place = f"{self.base}/manifests/{subject.replace(':', '-')}"
        status, _, body = self._ask("GET", place, {"Accept": INDEX})
        others = json.loads(body)["manifests"] if status == 200 else []
        listed = [*(other for other in others if other["digest"] != descriptor["digest"]), descriptor]
        text = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}).encode()
        status, _, body = self._ask("PUT", place, {"Content-Type": INDEX}, text)
        if status != 201:
            raise self._wrong("refused the list of attachments", status, body)

    def _ask(self, method: str, url: str, headers: dict[str, str] | None = None, data: bytes | None = None):
        """(status, headers, body) of a request; a login is fetched when the registry first asks for one."""
        for last in (False, True):
            request = urllib.request.Request(url, data, {**(headers or {}), **self.headers}, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return response.status, response.headers, response.read()
            except urllib.error.HTTPError as error:
                if error.code == 401 and not last and not self.headers:
                    self.headers = {"Authorization": self._login(error.headers.get("WWW-Authenticate", ""))}
                    continue
                return error.code, error.headers, error.read()
            except OSError as error:
                raise BuildError(f"{self.host}: cannot connect ({error}); check the registry's name") from None

    def _login(self, challenge: str) -> str:
        """The Authorization header that a registry's challenge asks for."""
        user = credentials(self.host)
        basic = f"Basic {base64.b64encode(user.encode()).decode()}" if user else ""
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        if not challenge.lower().startswith("bearer"):
            return basic
        query = {"service": fields.get("service", ""), "scope": f"repository:{self.name}:pull,push"}
        url = f"{fields['realm']}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, headers={"Authorization": basic} if basic else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)
        except OSError as error:
            raise BuildError(f"{self.host}: login failed ({error}); run `docker login {self.host}`") from None
        return f"Bearer {answer.get('token') or answer.get('access_token')}"

    def _wrong(self, what: str, status: int, body: bytes) -> BuildError:
        answer = " ".join(body.decode(errors="replace").split())[:200]
        return BuildError(f"{self.host}: {self.name} {what}: the registry answered {status} {answer}")


def credentials(host: str) -> str:
    """USER:PASSWORD for a registry, from docker's configuration or from the helper that it names; empty without one."""
    folder = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    if auth := config.get("auths", {}).get(host, {}).get("auth"):
        return base64.b64decode(auth).decode()
    helper = config.get("credHelpers", {}).get(host) or config.get("credsStore")
    if not helper:
        return ""
    try:
        done = subprocess.run([f"docker-credential-{helper}", "get"], input=host, capture_output=True, text=True)
        found = json.loads(done.stdout)
        return f"{found['Username']}:{found['Secret']}"
    except (OSError, ValueError, KeyError):
        return ""
