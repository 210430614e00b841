"""The scripts of images/compile, which run in the stages that compile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from images.compile import wheel

SCRIPTS = Path(__file__).parent.parent / "images" / "compile"


def test_folders_are_listed_by_name_on_every_file_system(tmp_path):
    """Two file systems, which list the same names in different orders; the second test below shows that they do."""
    names = [f"{number * 7919 % 1000}.cpp" for number in range(200)]
    ask = "import glob, os, sys; os.chdir(sys.argv[1]); "
    ask += "print(os.listdir(), next(os.walk('.'))[2], glob.glob('*'), [e.name for e in os.scandir()])"
    said = {}
    for folder in (tmp_path, Path("/dev/shm") / f"slipway-{os.getpid()}"):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).touch()
        environment = {**os.environ, "PYTHONPATH": str(SCRIPTS / "sorted")}
        for key, variables in (("ours", environment), ("plain", os.environ)):
            words = [sys.executable, "-c", ask, str(folder)]
            said.setdefault(key, []).append(subprocess.run(words, env=variables, capture_output=True, text=True).stdout)
        if folder != tmp_path:
            subprocess.run(["rm", "-r", folder], check=True)
    ours = said["ours"]
    assert ours[0] == ours[1] and ours[0].count(str(sorted(names))) == 4
    assert said["plain"][0].count(str(sorted(names))) == 0


def test_a_scan_can_be_left_early(tmp_path):
    (tmp_path / "a").touch()
    ask = "import os, sys\nwith os.scandir(sys.argv[1]) as entries: print(next(entries).name, list(entries))"
    words = [sys.executable, "-c", ask, str(tmp_path)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(SCRIPTS / "sorted")}, capture_output=True, text=True
    )
    assert done.stdout == "a []\n", done.stderr


@pytest.mark.timeout(60)
def test_two_stages_together_run_no_more_compilers_than_one_may(tmp_path):
    """Eight compilers at once, two places: each takes a fifth of a second, and one calls another, as nvcc calls gcc."""
    (tmp_path / "jobs").mkdir()
    script = tmp_path / "compiler"
    script.write_text(
        "#!/bin/bash\n[ -z ${CCACHE_PREFIX+set} ] || exit 9\n"
        "mkdir $1/running-$$\nls -d $1/running-* | wc -l >>$1/counts\n"
        "sleep 0.2\nrmdir $1/running-$$\nexit 3\n"
    )
    script.chmod(0o755)
    environment = {**os.environ, "JOBS": str(tmp_path / "jobs"), "MAX_JOBS": "2", "CCACHE_PREFIX": "x"}
    words = [SCRIPTS / "one-job", script, tmp_path]
    started = time.monotonic()
    compilers = [subprocess.Popen(words, env=environment) for _ in range(8)]
    assert [compiler.wait() for compiler in compilers] == [3] * 8
    assert time.monotonic() - started > 0.8
    assert max(map(int, (tmp_path / "counts").read_text().split())) <= 2


def test_a_compiler_that_is_killed_frees_its_place(tmp_path):
    environment = {**os.environ, "JOBS": str(tmp_path), "MAX_JOBS": "1"}
    first = subprocess.Popen([SCRIPTS / "one-job", "sleep", "60"], env=environment)
    while not (tmp_path / "1").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    second = subprocess.Popen([SCRIPTS / "one-job", "true"], env=environment)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    first.kill()
    assert second.wait(10) == 0 and first.wait() < 0


def test_progress_says_how_many_objects_of_how_many(capsys):
    lines = ["Building CMake extension transformer_engine\n", "[1/3] nvcc a.cu\n", "noise\n", "[2/3] nvcc b.cu\n"]
    lines += ["[3/3] link\n", "building 'binding' extension\n", "[1/1] g++ c.cpp " + "-I" * 2000 + "\n"]
    last = wheel.watch("te", lines)
    shown = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in shown] == [
        "te, transformer_engine: 3 of 3 objects",
        "te, binding: 1 of 1 objects",
    ]
    assert len(last) == 7 and max(map(len, last)) == wheel.SHOWN_WIDTH


@pytest.mark.parametrize("architectures, is_changed", [("100", True), ("100;120", True), ("90;100", False)])
def test_transformer_engine_is_compiled_for_new_architectures_alone(tmp_path, architectures, is_changed):
    lists = tmp_path / wheel.LISTS
    lists.parent.mkdir(parents=True)
    text = 'list(REMOVE_ITEM CMAKE_CUDA_ARCHITECTURES "100")\n\n# cuDNN frontend API\nset(X)\n'
    lists.write_text(text)
    for _ in range(2):
        wheel.allow_new_architectures_alone(tmp_path, architectures)
    assert (lists.read_text() != text) == is_changed and lists.read_text().count(wheel.NOT_EMPTY) == is_changed
    assert lists.read_text().replace(wheel.NOT_EMPTY, "") == text


def test_another_transformer_engine_is_compiled_as_it_is(tmp_path, capsys):
    (tmp_path / wheel.LISTS).parent.mkdir(parents=True)
    (tmp_path / wheel.LISTS).write_text("project(x)\n")
    wheel.allow_new_architectures_alone(tmp_path, "100")
    assert (tmp_path / wheel.LISTS).read_text() == "project(x)\n" and "as it is" in capsys.readouterr().out


def test_no_file_of_a_source_keeps_its_time(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "scale.cu").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    wheel.forget_times(tmp_path)
    assert {file.lstat().st_mtime for file in tmp_path.rglob("*")} == {0}
