"""What comes from outside, made safe to use: files and lines of JSON, and text that is printed.

A foreign file may be a device that never ends, may be nested so deeply that Python gives up, or may say a thing twice
so that two readers understand it in two ways. Each of these is one sentence here, for every file that is read.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import secrets
import stat
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from slipway.errors import DataError
from slipway.streams import put

# Of a file: the index of a model with a million tensors has 100 MB, and a tokenizer.json 30 MB.
LARGEST_FILE = 256 << 20
DEEPEST = 100  # brackets in one another; a chat with tools, the deepest that is read, has about ten
LARGEST_TOML = 1 << 16  # a recipe with all its comments has a tenth
AGAIN = "download it again"
POINTER = b"version https://git-lfs.github.com/spec/"  # stands in a clone in place of a large file
LONGEST_LINE = 100_000  # characters of a line that is printed
LONGEST_BESIDE = 100  # characters of a file's name that the name of a file beside it repeats; names have 255 bytes
# A terminal obeys control characters, and a surrogate is no character. The others change the direction of what follows
# or end a line: a name could be shown as another one.
HARMFUL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
# Also with one slash, as a path of Python's shows a URL. It begins where a word does: at each letter of a long word it
# would search the rest of the word again.
CREDENTIALS = re.compile(r"(?<![\w+.-])([\w+.-]+:/{1,2})[^\s/?#\"<>]*@", re.ASCII)


class NotJson(ValueError):
    """Why some bytes are not JSON that is read, in words."""


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text; NotJson for anything else, for brackets too deep, and for a name that stands twice."""
    with _said():
        value = json.loads(text, object_pairs_hook=_named_once)
    check_depth(text, value)
    return value


def parse_next(text: str, begins: int) -> tuple[Any, int]:
    """(the value that begins there, where it ends) of a text with several; NotJson as above."""
    with _said():
        value, ends = DECODER.raw_decode(text, begins)
    check_depth(text[begins:ends], value)
    return value, ends


@contextmanager
def _said() -> Iterator[None]:
    """What Python's reader raises as a NotJson."""
    try:
        yield
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except NotJson:
        raise
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise NotJson(f"{error.msg} at {place}") from None
    except ValueError:  # of Python, for a whole number of thousands of digits
        raise NotJson("a number is too long") from None


def check_depth(text: bytes | str, value: Any) -> None:
    """NotJson where a value, read from this text, is nested too deeply: whoever walks it may call itself each time."""
    opens: Any = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, opens)) > DEEPEST and _is_deeper(value, DEEPEST):
        raise NotJson("nested too deeply")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotJson(f"the name {harmless(repr(twice), 80)} is given twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_named_once)


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        if not (level := [child for parent in level for child in _held(parent) if isinstance(child, (dict, list))]):
            return False
    return True


def _held(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


reading = ""  # the last file or place that was read, for the message of an error that nobody expected


def note(place: Path | str) -> None:
    """From here on this is what is read; nothing if it is empty."""
    global reading
    reading = str(place)


def open_file(path: Path) -> BinaryIO:
    """A file that others gave, opened; OSError for what is no file, DataError for what only stands in place of one.

    Not waiting: whoever opens a FIFO waits for a writer, and a device such as /dev/zero never ends.
    """
    note(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file but a device, a pipe or a folder")
    if os.pread(descriptor, len(POINTER), 0) == POINTER:
        os.close(descriptor)
        raise DataError(f"{path} is not the file itself but Git LFS's pointer to it; get the file with `git lfs pull`")
    return os.fdopen(descriptor, "rb")


def unreadable(path: object, error: BaseException, cure: str = AGAIN) -> DataError:
    """The error for a file that others gave and that could not be read.

    Args:
        cure: what to do where the file itself is wrong.
    """
    if isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read (Permission denied); let its owner allow it, with chmod for example")
    if isinstance(error, MemoryError):
        return DataError(
            f"{path}: there is too little memory to read it; free some, or raise the limit of this process (`ulimit "
            f"-v`, a container's). If there is enough, it is damaged: {cure}"
        )
    if isinstance(error, OSError):
        return DataError(f"{path} cannot be read ({error.strerror}); {cure}")
    return DataError(f"{path} is damaged ({type(error).__name__}); {cure}")


def read_bytes(path: Path, most: int = LARGEST_FILE, cure: str = AGAIN) -> bytes:
    """The content of a file that others gave; DataError for one that is no file, is larger or cannot be read."""
    try:
        with open_file(path) as file:
            content = file.read(most + 1)  # not by its size: files of /proc, and those that grow, do not tell it
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {cure}") from None
    except OSError as error:
        raise unreadable(path, error, cure) from None
    if len(content) > most:
        raise DataError(f"{path} has more than {most:,} bytes, the most that such a file has; {cure}")
    return content


def read_text(path: Path, most: int = LARGEST_FILE, cure: str = AGAIN) -> str:
    """The same as text; DataError for what is not UTF-8."""
    try:
        return read_bytes(path, most, cure).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); {cure}") from None


def read_json(path: Path, most: int = LARGEST_FILE, cure: str = AGAIN) -> Any:
    """The value of a JSON file that others gave; DataError, in one line, for everything else."""
    try:
        return parse_json(read_bytes(path, most, cure))
    except NotJson as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); {cure}") from None


def read_object(path: Path, most: int = LARGEST_FILE, cure: str = AGAIN) -> dict[str, Any]:
    """The same of a file that holds one object."""
    value = read_json(path, most, cure)
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object; {cure}")
    return value


def read_toml(path: Path, cure: str) -> dict[str, Any]:
    """The tables of a TOML file that others gave; DataError, in one line, for everything else."""
    text = read_text(path, LARGEST_TOML, cure).removeprefix("\ufeff")  # with which editors of Windows begin a file
    if any(line.count(".") > DEEPEST for line in text.splitlines()):  # the reader's memory grows as their square
        raise DataError(f"{path} has a line of more than {DEEPEST} dots; {cure}")
    try:
        tables = tomllib.loads(text)
        repr(tables)  # a hexadecimal number may be longer than Python prints
        return tables
    except RecursionError:
        raise DataError(f"{path} is nested too deeply; {cure}") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is not TOML: {error}; {cure}") from None
    except ValueError:  # of Python, for a whole number of thousands of digits
        raise DataError(f"{path}: a number is too long; {cure}") from None


class NotYaml(ValueError):
    """Some text is not YAML that is read."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; NotYaml for anything else, and for merge keys.

    An alias is another name of one object, but merge keys copy it: a few lines would fill the memory. The value may
    hold itself, and the same list many times: look only at the parts that are known. PyYAML takes ten seconds for 1 MB.
    """
    import yaml  # type: ignore[import-untyped]

    class Plain(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("a merge key")

    try:
        return yaml.load(text, Plain)
    except (
        yaml.YAMLError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        ValueError,
        ArithmeticError,
    ) as error:
        raise NotYaml(type(error).__name__) from None


def harmless(text: str, most: int = 4000) -> str:
    """A text on its way to a terminal or a log: no controls, nothing that is no character, no passwords in URLs.

    Args:
        most: characters; what is longer loses its middle.
    """
    text = without_credentials(HARMFUL.sub(_spelled, text))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def harmless_lines(text: str) -> str:
    """The same of a text of several lines, whose ends are ours."""
    return "\n".join(harmless(line, LONGEST_LINE) for line in text.split("\n"))


def tell(text: str) -> None:
    """Print to standard error what may hold words of others."""
    put(f"{harmless_lines(text)}\n", sys.stderr)


class Harmless(io.TextIOBase):
    """A stream that spells out what a terminal would obey: for libraries that print words of others by themselves.

    It is no terminal, so they print plain text.

    Args:
        stream: what is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override] # some libraries ask for it
        return self.stream.encoding or "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stream.write(harmless_lines(text))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def replace_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Give a file this content; a reader sees the old file or the new one.

    By way of a name that nobody can know: at a fixed one somebody could have put a link to another file of the user's.

    Args:
        durable: on disk before it has its name.
    """
    part = path.with_name(f".{path.name[:LONGEST_BESIDE]}.{secrets.token_hex(8)}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def without_credentials(text: str) -> str:
    """The text with `***` in place of user and password in every URL."""
    return CREDENTIALS.sub(r"\1***@", text)


def shown_url(value: str) -> str:
    """A setting that may be a URL, without user and password and without what follows a question mark."""
    return re.sub(r"(://[^?\s]*)\?\S*", r"\1?***", harmless(value, 300))
