"""make setup with two small clones of this repository, run as a person runs it: what the second one costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from images import lock, store
from images.store import sha256_of
from images.target import here

ROOT = Path(__file__).parent.parent
MODULES = 50
BYTES = 4_000_000  # size of the small wheel's library, so that a copy shows in the numbers

PYPROJECT = """[project]
name = "slipway"
dynamic = ["version"]
requires-python = "==3.11.*"
dependencies = ["thing"]

[dependency-groups]
build = ["setuptools"]

[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
package-dir = { "" = "entrypoints" }
packages.find.where = ["entrypoints"]
dynamic.version = { attr = "slipway.__version__" }

[tool.uv]
no-index = true
find-links = ["wheelhouse"]
default-groups = ["build"]

[tool.slipway]
"""

LOCK = """version = 1
requires-python = "==3.11.*"

[[package]]
name = "slipway"
source = { editable = "." }
dependencies = [{ name = "thing" }]

[package.dev-dependencies]
build = [{ name = "setuptools" }]
"""


def locked(name: str, version: str, file: Path) -> str:
    """The entry of a wheel in uv.lock."""
    wheel = f'{{ path = "{file.name}", hash = "sha256:{sha256_of(file)}" }}'
    return f"""
[[package]]
name = "{name}"
version = "{version}"
source = {{ registry = "wheelhouse" }}
wheels = [{wheel}]
"""


def make_wheel(folder: Path) -> Path:
    """A wheel with modules and a large library."""
    file = folder / "thing-1.0-py3-none-any.whl"
    contents = {f"thing/module{number}.py": f"VALUE = {number}\n" * 100 for number in range(MODULES)}
    contents |= {"thing/__init__.py": "", "thing/library.so": os.urandom(BYTES)}
    contents["thing-1.0.dist-info/METADATA"] = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
    contents["thing-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents["thing-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in contents)
    with zipfile.ZipFile(file, "w") as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)
    return file


@pytest.fixture
def clones(tmp_path, monkeypatch) -> list[Path]:
    """Two clones with a small lock, and a store that holds its wheels and uv; neither is set up."""
    real = store.store()
    own = tmp_path / "store"
    (own / "wheelhouse").mkdir(parents=True)
    (own / "tools").mkdir()
    shutil.copy(lock.uv(), own / "tools")
    (setuptools,) = [p for p in lock.locked_packages() if p["name"] == "setuptools"]
    shutil.copy(real / "wheelhouse" / lock.wheel_of(setuptools, here())["path"], own / "wheelhouse")
    (setuptools_wheel,) = (own / "wheelhouse").iterdir()
    text = LOCK + locked("setuptools", setuptools["version"], setuptools_wheel)
    text += locked("thing", "1.0", make_wheel(own / "wheelhouse"))
    pin = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["slipway"]["uv"]
    file = ", ".join(f'{key} = "{value}"' for key, value in pin[here().machine].items())
    uv = f'version = "{pin["version"]}", {here().machine} = {{ {file} }}'
    for name in ("one", "two"):
        (tmp_path / name / "entrypoints" / "slipway").mkdir(parents=True)
        (tmp_path / name / "pyproject.toml").write_text(f"{PYPROJECT}uv = {{ {uv} }}\n")
        (tmp_path / name / "uv.lock").write_text(text)
        (tmp_path / name / "entrypoints" / "slipway" / "__init__.py").write_text('__version__ = "0.1"\n')
        shutil.copy(ROOT / "build.py", tmp_path / name)
        shutil.copytree(ROOT / "images", tmp_path / name / "images", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("SLIPWAY_STORE", str(own))
    monkeypatch.setenv("SLIPWAY_LOCAL", str(tmp_path / "local"))
    for variable in ("UV_CACHE_DIR", "UV_LINK_MODE"):
        monkeypatch.delenv(variable, raising=False)
    return [tmp_path / "one", tmp_path / "two"]


def setup(clone: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "build.py", "setup"], cwd=clone, capture_output=True, text=True)


def disk_of(*folders: Path) -> int:
    """Bytes on disk, a file with several names counted once."""
    words = ["du", "-s", "--block-size=1", "--total", *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[0])


def files_of(clone: Path) -> dict[str, int]:
    """Path → inode of every installed file of the small wheel, its bytecode too."""
    site = clone / ".venv" / "lib" / "python3.11" / "site-packages"
    return {str(p.relative_to(site)): p.stat().st_ino for p in site.glob("thing/**/*") if p.is_file()}


def test_a_second_clone_adds_no_copy_of_anything(clones):
    one, two = clones
    shared = [Path(os.environ[name]) for name in ("SLIPWAY_STORE", "SLIPWAY_LOCAL")]
    assert setup(one).returncode == 0
    before_shared, before_all = disk_of(*shared), disk_of(*shared, one)
    assert setup(two).returncode == 0
    # What a clone does add: folders, and the metadata of this project, in blocks of 4 KB.
    assert disk_of(*shared) - before_shared < 200_000
    assert disk_of(*shared, one, two) - before_all < 2_000_000
    files = files_of(one)
    assert files == files_of(two)
    assert len([path for path in files if path.endswith(".pyc")]) == MODULES + 1 and "thing/library.so" in files


def test_unpacked_wheels_in_the_store_are_not_installed(clones):
    """A store that somebody carries in, with the cache of uv that was made where it was filled."""
    one, two = clones
    own_store, local = Path(os.environ["SLIPWAY_STORE"]), Path(os.environ["SLIPWAY_LOCAL"])
    assert setup(one).returncode == 0 and sorted(path.name for path in own_store.iterdir()) == ["tools", "wheelhouse"]
    shutil.rmtree(one / ".venv")
    local.rename(own_store / "planted")
    (own_store / "planted" / "uv").rename(own_store / "uv")
    spoiled = list((own_store / "uv").glob("archive-v0/*/thing/__init__.py"))
    for file in spoiled:
        file.write_text("evil")
    assert spoiled and setup(two).returncode == 0
    assert next(two.glob(".venv/lib/python3.11/site-packages/thing/__init__.py")).read_text() == ""


RUN = """
import slipway, thing.module7
print(slipway.__file__)
print(thing.module7.__loader__.get_code("thing.module7").co_filename)
"""


def test_each_clone_runs_its_own_package_and_shared_bytecode_as_its_own(clones):
    for clone in clones:
        assert setup(clone).returncode == 0
    files = files_of(clones[0])
    for clone in clones:
        words = [clone / ".venv" / "bin" / "python", "-c", RUN]
        package, module = subprocess.run(words, capture_output=True, text=True, cwd="/").stdout.splitlines()
        assert package == str(clone / "entrypoints" / "slipway" / "__init__.py")
        assert module.startswith(str(clone / ".venv"))
        assert files_of(clone) == files  # bytecode that does not fit its source would have been written again


def test_a_wheel_that_is_not_the_locked_one_is_refused(clones):
    wheel = Path(os.environ["SLIPWAY_STORE"]) / "wheelhouse" / "thing-1.0-py3-none-any.whl"
    make_wheel(wheel.parent)  # other bytes
    done = setup(clones[0])
    assert done.returncode == 65 and "is not what the lock names" in done.stderr and "Traceback" not in done.stderr
    assert not (clones[0] / ".venv" / "slipway-setup.sha256").exists()
