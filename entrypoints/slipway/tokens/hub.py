"""Data sets of the Hugging Face hub, by name: hf://datasets/org/name[@revision][/path][:split].

Only the files of the split are downloaded, into the hub's cache. What is there already is used without the network.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint.locate import ATTEMPTS, OF_ODD_ANSWERS, _explained, _progress, _status, no_hub
from slipway.checkpoint.stream import write_errors
from slipway.errors import SlipwayError, Stopped, UsageError
from slipway.tokens.folders import ABOUT, CARD, chosen, is_rows, splits_of
from slipway.tokens.sources import ROW_SUFFIXES, TEXT_SUFFIXES

DATASETS = "hf://datasets/"
MODELS = "hf://"


@dataclass(frozen=True)
class Name:
    """What stands after hf://datasets/."""

    repository: str
    revision: str
    path: str  # of a file or folder in it; empty: all of it
    split: str | None

    def __str__(self) -> str:
        return f"{DATASETS}{self.repository}@{self.revision}"


def parse(data: str) -> Name:
    """The parts of hf://datasets/org/name[@revision][/path][:split]; UsageError for anything else."""
    name, _, split = data.removeprefix(DATASETS).partition(":")
    parts = name.split("/")
    size = 2 if len(parts) > 1 else 1  # the oldest data sets have no organisation
    repository, _, revision = "/".join(parts[:size]).partition("@")
    if not all(repository.split("/")) or "//" in name:
        raise UsageError(f"{data} is not the name of a data set; give {DATASETS}ORG/NAME[@REVISION][:SPLIT]")
    return Name(repository, revision or "main", "/".join(parts[size:]), split or None)


def located(data: str) -> tuple[Path, str | None]:
    """(the local path of DATA, the split that its name gives); a data set of the hub is downloaded."""
    if data.startswith(DATASETS):
        name = parse(data)
        return _fetched(name) / name.path, name.split
    if data.startswith(MODELS) and not data.startswith("hf:///"):
        raise UsageError(f"DATA {data} names a model; a data set is {DATASETS}{data.removeprefix(MODELS)}")
    return Path(data.removeprefix(MODELS)), None


def _fetched(name: Name) -> Path:
    """The snapshot's folder in the hub's cache; a download that is interrupted continues where it stopped."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub")  # that the disk may become full: the error says it
    for attempt in range(ATTEMPTS):
        try:
            with write_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
                return Path(
                    huggingface_hub.snapshot_download(
                        name.repository, revision=name.revision, repo_type="dataset",
                        allow_patterns=_patterns(name), **_progress(),
                    )
                )  # fmt: skip
        except HFValidationError:
            raise UsageError(f"{name} is not the name of a data set; give {DATASETS}ORG/NAME") from None
        except (OSError, RuntimeError) as error:  # of the client; RuntimeError of its library for large files
            if (known := _explained(error, str(name))) is not None:
                raise _of_data_set(known) from None
            reason = type(error).__name__
        except OF_ODD_ANSWERS as error:
            raise no_hub(str(name), error) from None
        time.sleep(2**attempt / 10)  # longer each time, so that a server with too much to do can recover
    raise Stopped(
        f"{name}: the download was interrupted {ATTEMPTS} times ({reason}); "
        "run the same command again, it continues where it stopped"
    )


def _of_data_set(error: SlipwayError) -> SlipwayError:
    """What is said of models, said of a data set."""
    return type(error)(str(error).replace("model", "data set"))


def _patterns(name: Name) -> list[str]:
    """The files to download: those of the split where the hub can be asked for names, else every one that is read."""
    from huggingface_hub import HfApi, constants

    known = [f"*{suffix}{packed}" for suffix in (*ROW_SUFFIXES, *TEXT_SUFFIXES) for packed in ("", ".gz", ".zst")]
    if name.path:
        return [CARD, name.path, f"{name.path}/*"]
    if constants.HF_HUB_OFFLINE:
        return [CARD, *known]
    try:
        info: Any = HfApi().dataset_info(name.repository, revision=name.revision)
    except OSError as error:
        if _status(error) is not None:
            raise
        return [CARD, *known]  # not reachable: what is in the cache may do
    files = sorted(each.rfilename for each in info.siblings or ())
    rows = [file for file in files if is_rows(file) and Path(file).name not in ABOUT]
    if not rows:
        return [CARD, *known]
    splits = splits_of(rows, info.card_data.to_dict() if info.card_data else {})
    return [CARD, *(file.replace("[", "[[]") for file in splits[chosen(str(name), splits, name.split)])]
