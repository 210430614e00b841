"""Which files of DATA are read: a file, or those of one split of a folder. The rest is left, and said to be left.

A folder is read as the hub of Hugging Face reads one: the splits stand in the head of README.md, else the words train,
validation and test in the files' paths tell which split they belong to.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from slipway.checkpoint import finished
from slipway.errors import DataError, UsageError
from slipway.options import suggestion
from slipway.tokens.indexed import index_of
from slipway.tokens.sources import ROW_SUFFIXES, TEXT_SUFFIXES, Source, bare_name, recognise
from slipway.untrusted import NotYaml, parse_yaml, read_bytes, read_object, unreadable

TRAIN = "train"
# The hub's words for its three splits; NeMo's data root has training.jsonl, validation.jsonl and test.jsonl.
WORDS = {
    "train": TRAIN, "training": TRAIN,
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
BETWEEN_WORDS = re.compile(r"[-._ 0-9]")
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")  # data/train_sft-00000-of-00003.parquet
SPECIAL = "__"  # such folders are read only where a pattern names them
ABOUT = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
)  # beside a data set's files
CARD = "README.md"
HEAD = re.compile(r"---[ \t]*\r?\n(.*?)\n---[ \t]*(?:\r?\n|$)", re.DOTALL)  # YAML between two such lines
LONGEST_HEAD = 1 << 20  # characters; cards with hundreds of configurations have a tenth
MADE = "made by Slipway"  # why a file is left
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Inputs:
    """The files that are read, in order, and what is left: its path in the folder → why."""

    sources: list[Source]
    left: dict[str, str]

    def all_files(self, data: Path) -> set[Path]:
        """The files of DATA, resolved, without outputs of Slipway."""
        names = [name for name, why in self.left.items() if why != MADE]
        return {path.resolve() for path in (*(source.path for source in self.sources), *map(data.joinpath, names))}

    def describe(self, data: Path) -> str:
        """One line on what is read, and one on what is left."""
        names = [source.path.name if data == source.path else _inside(data, source.path) for source in self.sources]
        kinds = ", ".join(dict.fromkeys(source.describe() for source in self.sources))
        said = f"reading {_few(names)} ({kinds})"
        if columns := self._columns_of_folders(data):
            said += f"; what the names of folders say is not read: {_few(columns)}"
        left = [f"{name} ({why})" for name, why in self.left.items()]
        return f"{said}; left: {_few(left)}" if left else said

    def _columns_of_folders(self, data: Path) -> list[str]:
        """As Spark and others write them: language in language=de/part-0.parquet."""
        parts = (part for each in self.sources for part in PurePosixPath(_inside(data, each.path)).parent.parts)
        return list(dict.fromkeys(name for part in parts for name, is_given, _ in [part.partition("=")] if is_given))


def inputs_of(data: Path, split: str | None, targets: Iterable[Path] = ()) -> Inputs:
    """What DATA is made of; UsageError or DataError where there is nothing to read.

    Args:
        targets: the files that the command writes, which may be in DATA.
    """
    if not data.exists():
        raise UsageError(f"DATA {data} does not exist; give a file, a folder or hf://datasets/ORG/NAME")
    if not data.is_dir():
        if not data.is_file():
            raise UsageError(f"DATA {data} is a device or a pipe, which cannot be read twice; write it to a file first")
        if split:
            raise UsageError(f"--split {split} is for a folder, and DATA {data} is a file; leave it out")
        return Inputs([recognise(data)], {})
    _check_revisions(data)
    files, left = _sorted_out(data, {path.resolve() for path in targets})
    return Inputs([recognise(data / name) for name in _of_split(data, files, split, left)], left)


def _check_revisions(data: Path) -> None:
    """UsageError for a data set as the hub's cache has it, with several revisions: each would be read as more data."""
    main = data / "refs" / "main"
    revisions = sorted(each.name for each in (data / "snapshots").glob("*") if each.is_dir())
    if len(revisions) > 1 and (data / "blobs").is_dir():
        newest = read_bytes(main).decode(errors="replace").strip() if main.is_file() else ""
        one = newest if newest in revisions else revisions[0]
        raise UsageError(
            f"DATA {data} is a folder of the hub's cache with {len(revisions)} revisions of the same data "
            f"({_few(revisions)}); give one of them: {data / 'snapshots' / one}"
        )


def _sorted_out(data: Path, targets: set[Path]) -> tuple[list[str], dict[str, str]]:
    """(files with a name of ours, what is left and why); hidden files and folders are not spoken of."""
    paths = {_inside(data, path): path for path in _shown_in(data)}
    left = {name: why for name in sorted(paths) if (why := _not_entered(paths[name]))}
    every = [name for name in sorted(paths) if name not in left and paths[name].is_file()]
    files = [name for name in every if bare_name(Path(name)).endswith((*ROW_SUFFIXES, *TEXT_SUFFIXES))]
    left |= dict.fromkeys((name for name in every if name not in files), "not of a kind that is read")
    left |= dict.fromkeys((name for name in files if PurePosixPath(name).name in ABOUT), "about the data")
    left |= dict.fromkeys(_made(data, targets), MADE)
    rows = [name for name in files if is_rows(name) and name not in left]
    if rows and any(name.lower().startswith("readme") for name in every):
        # A data set with its card: what is written about the data is not learned.
        left |= dict.fromkeys((name for name in files if not is_rows(name)), "about the data")
    files = [name for name in files if name not in left]
    if not files:
        known = ", ".join((*ROW_SUFFIXES, *TEXT_SUFFIXES))
        found = f"; it has {_few([f'{name} ({why})' for name, why in left.items()])}" if left else ""
        raise DataError(
            f"{data} has no file that is read: {known}, or one of them packed; give a folder with such files{found}"
        )
    return files, left


def _shown_in(data: Path) -> Iterator[Path]:
    """All that is in a folder and not hidden; DataError where it may not be looked at: data would be missing."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error)

    for folder, folders, names in os.walk(data, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            if not name.startswith("."):
                try:
                    os.lstat(Path(folder, name))  # of a folder whose names alone may be read
                except PermissionError as error:
                    refuse(error)
                yield Path(folder, name)


def _not_entered(path: Path) -> str:
    """Why nothing is read of what is neither a file nor a folder of this folder; empty for these."""
    if path.is_file() or (path.is_dir() and not path.is_symlink()):
        return ""
    if path.is_symlink():
        return "a link to a folder" if path.is_dir() else "a link to nothing"
    return "no file"


def _made(data: Path, targets: set[Path]) -> Iterator[str]:
    """Outputs of `preprocess` in a folder, by their notes (finished.py): they would be learned as if they were data.

    What was changed since is another's. Of a target the note alone tells: it is half replaced if a run was killed.
    """
    for note in data.rglob(f".*{finished.NOTE}"):
        try:
            states = read_object(note)["files"].items()
        except (DataError, LookupError, AttributeError):
            continue
        for name, state in states:
            file = note.with_name(Path(name).name)
            if file.is_file() and (file.resolve() in targets or finished.state_of(file) == state):
                yield _inside(data, file)
                if file.suffix == ".bin":
                    yield _inside(data, index_of(file))


def _of_split(data: Path, files: list[str], split: str | None, left: dict[str, str]) -> list[str]:
    """The files of one split; the others are added to what is left."""
    splits = splits_of(files, _card(data))
    wanted = chosen(str(data), splits, split)
    left |= dict.fromkeys(files, "of no split")
    left |= {name: f"split {other}" for other, names in splits.items() for name in names}
    for name in splits[wanted]:
        left.pop(name, None)
    return splits[wanted]


def chosen(data: str, splits: dict[str, list[str]], split: str | None) -> str:
    """The split to read: the one that is asked for, else train; UsageError where there is none of this name."""
    asked = split or TRAIN
    for wanted in (asked, WORDS.get(asked)):  # NeMo says training, others dev
        if wanted in splits:
            return wanted
    near = suggestion(split, splits) if split else ""
    raise UsageError(f"DATA {data} has no split {asked}{near}; it has {', '.join(splits)}: give one by --split")


def splits_of(files: Iterable[str], card: dict[str, Any]) -> dict[str, list[str]]:
    """Split → its files, by the card's words or by theirs. A file may be of several splits, or of none.

    Args:
        files: paths in the folder, sorted.
        card: the head of README.md.

    Errors: DataError where the card names files, and none of them is there.
    """
    files = list(files)
    return _by_card(files, card) or _by_words(files)


def is_rows(name: str) -> bool:
    """A file of this name holds rows, not one text."""
    return bare_name(Path(name)).endswith(ROW_SUFFIXES)


def _by_words(files: Iterable[str]) -> dict[str, list[str]]:
    """The splits that the paths name: those of shards, else those of folders, else those of the files' own names.

    The first of the three that tells any split counts for all files. Where it names no files of the split train, those
    without a split are of it; the hub gives nothing then. Texts have no splits.
    """
    files = [name for name in files if not _special(name) or not is_rows(name)]
    found: dict[str, set[str]] = {}
    for rule in (_split_of_shard, _splits_of_folders, _splits_of_name):
        found = {name: rule(PurePosixPath(name)) if is_rows(name) else set() for name in files}
        if any(found.values()):
            break
    has_train = any(TRAIN in each for each in found.values())
    splits: dict[str, list[str]] = {}
    for name, each in found.items():
        for split in sorted(each) or ([] if has_train and is_rows(name) else [TRAIN]):
            splits.setdefault(split, []).append(name)
    return splits


def _split_of_shard(path: PurePosixPath) -> set[str]:
    match = SHARD.fullmatch(str(path))
    return {match[1]} if match else set()


def _splits_of_folders(path: PurePosixPath) -> set[str]:
    words = [word for part in path.parent.parts for word in BETWEEN_WORDS.split(part.lower())]
    return {WORDS[word] for word in words if word in WORDS}


def _splits_of_name(path: PurePosixPath) -> set[str]:
    *words, _ = BETWEEN_WORDS.split(path.name.lower())
    return {WORDS[word] for word in words if word in WORDS}


def _special(path: str) -> int:
    """How many of its folders are special."""
    return sum(part.startswith(SPECIAL) for part in PurePosixPath(path).parent.parts)


def _by_card(files: list[str], card: dict[str, Any]) -> dict[str, list[str]]:
    """What the card's `configs` say; those of a second configuration have its name before them: "main/train"."""
    splits: dict[str, list[str]] = {}
    said = card.get("configs")
    configs = [config for config in said if isinstance(config, dict)] if isinstance(said, list) else []
    default = next((c for c in configs if c.get("default") or c.get("config_name") == "default"), None)
    asked = list[str]()
    for config in configs:
        is_first = config is (default or (configs[0] if len(configs) == 1 else None))
        before = "" if is_first else f"{_word(config.get('config_name'))}/"
        folder = normpath(_word(config.get("data_dir")) or ".")
        patterns = [(split, [normpath(f"{folder}/{path}") for path in paths])
                    for split, paths in _data_files(config.get("data_files"))]  # fmt: skip
        asked += [pattern for _, paths in patterns for pattern in paths]
        found = {split: [name for name in files if any(matches(name, path) for path in paths)]
                 for split, paths in patterns}  # fmt: skip
        if not patterns and folder != ".":
            inside = {name.removeprefix(f"{folder}/"): name for name in files if name.startswith(f"{folder}/")}
            found = {split: [inside[name] for name in names] for split, names in _by_words(inside).items()}
            asked.append(folder)
        splits |= {before + split: names for split, names in found.items() if names}
    if asked and not splits:
        raise DataError(f"{CARD} says that the data is {_few(asked)}, and no such file is read; correct its data_files")
    return splits


def matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern of the hub's: * stays inside of a folder's name, ** is any number of folders.

    Errors: DataError for a ** that is not all between two slashes.
    """
    parts, patterns = name.split("/"), pattern.split("/")
    if odd := next((each for each in patterns if "**" in each and each != "**"), None):
        raise DataError(f"{CARD}: in the pattern {pattern}, {odd} is not known; write **/{odd.replace('**', '*')}")
    if _special(name) != _special(pattern):
        return False
    ends = {0}  # how many parts of the name those of the pattern so far may take
    for each in patterns[:-1]:
        if each == "**":
            ends = set(range(min(ends), len(parts))) if ends else ends
        else:
            ends = {end + 1 for end in ends if end < len(parts) and fnmatch.fnmatchcase(parts[end], each)}
    if patterns[-1] == "**":
        return any(end < len(parts) for end in ends)
    return len(parts) - 1 in ends and fnmatch.fnmatchcase(parts[-1], patterns[-1])


def _data_files(entry: Any) -> Iterable[tuple[str, list[str]]]:
    """(split, patterns) of a card's data_files: a pattern, patterns, or objects with split and path."""
    for each in entry if isinstance(entry, list) else [entry]:
        if isinstance(each, str):
            yield TRAIN, [each]
        elif isinstance(each, dict) and isinstance(each.get("path"), str | list):
            paths = [each["path"]] if isinstance(each["path"], str) else each["path"]
            yield _word(each.get("split")) or TRAIN, [path for path in paths if isinstance(path, str)]


def _word(value: Any) -> str:
    """A name in a card; what else may stand there can be of any size in a few bytes."""
    is_number = isinstance(value, int) and abs(value) < 1 << 64
    return str(value) if isinstance(value, str) or is_number else ""


def _card(data: Path) -> dict[str, Any]:
    """The head of README.md, {} without one."""
    readme = data / CARD
    if not readme.is_file():
        return {}
    match = HEAD.match(read_bytes(readme).decode(errors="replace"))
    if match is None:
        return {}
    if len(match[1]) > LONGEST_HEAD:
        raise DataError(f"{readme}: its head has more than {LONGEST_HEAD:,} characters; give the files of the split")
    try:
        found = parse_yaml(match[1])
    except NotYaml:
        raise DataError(f"{readme}: its head, which says what is of which split, is not YAML; correct it") from None
    return found if isinstance(found, dict) else {}


def _inside(data: Path, file: Path) -> str:
    return file.relative_to(data).as_posix() if data.is_dir() else file.name


def _few(names: list[str]) -> str:
    """A list for a message: the first names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
