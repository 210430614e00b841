"""Models by name. A command that takes the folder of a model also takes:

hf://org/name[@revision]   a model of the Hugging Face hub, which is downloaded into the hub's cache; the hub's client
                           reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
hf:///folder               that folder
nemo:///folder             that folder
nemo://name                $NEMO_MODELS_CACHE/name, else $NEMO_HOME/models/name, else ~/.cache/nemo/models/name: the
                           places that NeMo itself uses

The folder of a training run stands for its newest complete checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

from slipway.checkpoint.companions import SUBFOLDERS
from slipway.checkpoint.stream import existing_folder, write_errors
from slipway.errors import DataError, PreflightError, SlipwayError, Stopped, UsageError
from slipway.report import LOG_INTERVAL_SECONDS
from slipway.untrusted import shown_url, tell

HUB, NEMO = "hf://", "nemo://"
RUNS_CHECKPOINTS = "checkpoints"  # in the folder of a run
RUNS_RECIPE, RUNS_STATUS = "recipe.json", "status.json"  # there from its first start on
# In the context of a run's checkpoint once everything is there. NeMo's own marker is removed before the context is
# written.
COMPLETE = ".complete"
TOKENIZER = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
OTHERS = ["*.py", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", *TOKENIZER]
MODEL = ["*.safetensors", *OTHERS]
OLD = ["pytorch_model*.bin", *OTHERS]  # where there are no safetensors
# The same weights in other formats: what is in folders that begin otherwise than SUBFOLDERS.
IN_FOLDERS = [f"[!{''.join(name[0] for name in SUBFOLDERS)}]*/*", *(f"{name[0]}[!{name[1]}]*/*" for name in SUBFOLDERS)]
ATTEMPTS = 5
# What the hub's client raises where an answer is none of the hub's.
OF_ODD_ANSWERS = (TypeError, ValueError, LookupError, AttributeError, RecursionError)


def locate(path: str, *, files: list[str] = MODEL) -> Path:
    """The local path of what a command was given; a model of the hub is downloaded.

    Args:
        path: a path or a name of one of the forms above.
        files: patterns of the files to download.

    Errors: UsageError for a model or revision that the hub does not have, PreflightError if the hub cannot be reached
    or refuses access, Stopped if the download was interrupted, WriteError if the cache cannot be written.
    """
    if not path.startswith(HUB):
        return nemo_path(path)
    name = path.removeprefix(HUB)
    if name.startswith("/"):
        return Path(name)
    repository, _, revision = name.partition("@")
    found = _fetch(repository, revision or "main", files)
    if files is MODEL and not any(found.glob("*.safetensors")):
        return _fetch(repository, revision or "main", OLD)
    return found


def folder(path: str) -> Path:
    """The existing folder of a Hugging Face model."""
    return existing_folder(str(locate(path)))


def configuration(path: str) -> Path:
    """The folder with a model's config.json and tokenizer, or of a config.json; from the hub, without the weights."""
    found = locate(path, files=OTHERS)
    return found.parent if found.name == "config.json" and found.is_file() else existing_folder(str(found))


def config_file(path: str | None) -> Path | None:
    """The file of a config.json that a command was given: the file, its folder, or a model of the hub."""
    if not path:
        return None
    file = configuration(path) / "config.json"
    if not file.is_file():
        raise UsageError(f"--config {path} has no config.json; give the file, its folder, or {HUB}NAME")
    return file


def nemo_folder(path: str) -> Path:
    """The existing folder of a NeMo checkpoint."""
    return existing_folder(str(nemo_path(path)))


def output(path: str) -> Path:
    """Where a command writes."""
    if path.startswith(HUB):
        raise UsageError(f"cannot write to {path}; give a folder or {NEMO}NAME")
    return _named(path)


def nemo_path(path: str) -> Path:
    """The path of a NeMo checkpoint, which need not exist; of a run's folder the newest checkpoint.

    Errors: DataError where a run has none yet.
    """
    found = _named(path)
    newest = latest_checkpoint(found / RUNS_CHECKPOINTS)
    if newest is None and (found / RUNS_RECIPE).is_file() and (found / RUNS_STATUS).is_file():
        raise DataError(f"{path} is a run without a complete checkpoint; `slipway watch {path}` shows how far it is")
    if newest is None or (found / "weights").exists():
        return found
    tell(f"slipway: {path} is a run; its newest checkpoint is {newest[1].name}")
    return newest[1]


def latest_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest complete checkpoint in the folder checkpoints/ of a run."""
    return next(iter(complete_checkpoints(checkpoints)), None)


def complete_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint there, the newest first."""
    # The names are sorted as numbers: step=1000 comes after step=200.
    matches = [(re.fullmatch(r"step=(\d+)", folder.name), folder) for folder in checkpoints.glob("step=*")]
    return sorted(((int(match[1]), folder) for match, folder in matches if match and is_complete(folder)), reverse=True)


def is_complete(checkpoint: Path) -> bool:
    """It was saved to its end."""
    return (checkpoint / "context" / COMPLETE).exists() and not unfinished(checkpoint).exists()


def unfinished(checkpoint: Path) -> Path:
    """NeMo's mark beside a checkpoint that is being written or removed."""
    return Path(f"{checkpoint}-unfinished")


def _named(path: str) -> Path:
    if path.startswith(HUB + "/"):
        return Path(path.removeprefix(HUB))
    if path.startswith(HUB):
        name = path.removeprefix(HUB).partition("@")[0]
        raise UsageError(
            f"{path} is a Hugging Face model, but a NeMo checkpoint is needed; run `slipway import {path} {NEMO}{name}`"
        )
    if not path.startswith(NEMO):
        return Path(path)
    name = path.removeprefix(NEMO)
    if name.startswith("/"):
        return Path(name)
    # The name becomes a path to write to: it must stay inside the folder of models.
    if not name.strip("/") or ".." in Path(name).parts:
        raise UsageError(f"{path} does not name a model; give {NEMO}NAME")
    home = os.environ.get("NEMO_HOME") or Path.home() / ".cache" / "nemo"
    return Path(os.environ.get("NEMO_MODELS_CACHE") or Path(home) / "models") / name


# ---------------------------------------------------------------------------- the hub


def _fetch(repository: str, revision: str, files: list[str]) -> Path:
    """The snapshot's folder in the hub's cache; a download that is interrupted continues where it stopped."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub")  # that the disk may become full: the error says it
    where = f"{HUB}{repository}@{revision}"
    for attempt in range(ATTEMPTS):
        try:
            with write_errors(Path(huggingface_hub.constants.HF_HUB_CACHE)):
                return Path(
                    huggingface_hub.snapshot_download(
                        repository,
                        revision=revision,
                        allow_patterns=files,
                        ignore_patterns=IN_FOLDERS,
                        **_progress(),
                    )
                )
        except HFValidationError:
            raise UsageError(f"{where} is not the name of a model; give {HUB}ORG/NAME") from None
        except (OSError, RuntimeError) as error:  # of the client; RuntimeError of its library for large files
            if (known := _explained(error, where)) is not None:
                raise known from None
            reason = type(error).__name__
        except OF_ODD_ANSWERS as error:
            raise no_hub(where, error) from None
        time.sleep(2**attempt / 10)  # longer each time, so that a server with too much to do can recover
    raise Stopped(
        f"{where}: the download was interrupted {ATTEMPTS} times ({reason}); "
        "run the same command again, it continues where it stopped"
    )


def no_hub(where: str, error: Exception) -> PreflightError:
    """The error where a server does not answer as the hub does."""
    from huggingface_hub import constants

    kind, endpoint = type(error).__name__, shown_url(constants.ENDPOINT)
    return PreflightError(f"{where}: {endpoint} does not answer as the hub does ({kind}); check HF_ENDPOINT")


def _explained(error: Exception, where: str) -> SlipwayError | None:
    """The error in our words; None if another attempt may help."""
    from huggingface_hub import constants, errors

    if isinstance(error, json.JSONDecodeError):  # the client's is an OSError too
        return no_hub(where, error)
    status = _status(error)
    endpoint = shown_url(constants.ENDPOINT)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return PreflightError(
            f"{where}: {endpoint} refuses access; accept the model's terms on its page and set HF_TOKEN to your token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"{where}: {endpoint} has no such model; correct the name, or set HF_TOKEN if it is private")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{where}: the model has no such revision; give a branch, tag or commit of the model")
    if status == 401:
        return PreflightError(f"{where}: {endpoint} refuses the token; set HF_TOKEN to a valid one")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return PreflightError(f"{where} is not in {constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE to download it")
        if status is None:
            return PreflightError(f"{where}: cannot reach {endpoint}; check the network, the proxy and HF_ENDPOINT")
    if status is not None and status != 429:
        return PreflightError(f"{where}: {endpoint} answers with status {status}; try again later")
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or its cause: the hub's client wraps some errors in others. None if it has none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _progress() -> dict[str, Any]:
    """Options of the client for progress: bars on a terminal, a line from time to time in a log."""
    if sys.stderr.isatty():
        return {}
    from huggingface_hub.utils import disable_progress_bars, tqdm

    disable_progress_bars("huggingface_hub")

    class Lines(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "mininterval": LOG_INTERVAL_SECONDS, "file": StringIO()})

        def display(self, *_: Any, **__: Any) -> None:
            tell(f"download: {self.n} of {self.total} files")

    return {"tqdm_class": Lines}
