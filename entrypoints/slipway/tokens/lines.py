"""Samples of tokens as JSON lines, `{"inputs": {"p_ids": [...], "r_ids": [...]}}`: check, index, pack and read them.

r_ids are learned, p_ids are not. A chat has more turns to learn than one, so a line may say what of r_ids is not
learned: `"context": [[start, end], ...]`, in tokens of r_ids, in order. Without it all of r_ids is learned.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from slipway.errors import DataError
from slipway.untrusted import parse_json

Span = tuple[int, int]  # [start, end)
LINE_BYTES = 1 << 16  # read at once
HIGHEST = 1 << 31  # above every token id: Megatron holds them in 32 bits


class Sample(NamedTuple):
    """Tokens, and which of them are learned.

    Args:
        context: what of the response is not learned, in order.
    """

    prompt: list[int]
    response: list[int]
    context: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Index:
    """The usable samples of a data file, and how many were dropped."""

    offsets: np.ndarray  # int64 [lines]: where each begins, in bytes (.jsonl) or in tokens (.bin)
    lengths: np.ndarray  # int32 [lines]: its tokens
    too_long: int  # samples that were dropped
    lost: int = 0  # tokens of these
    # int32 [lines]: the token at which it begins in its line, where a text is longer than a sequence; None: all at 0
    starts: np.ndarray | None = None
    packs: list[np.ndarray] | None = None  # each int64: the lines that share a sequence; None: one line each
    digest: str = ""  # of all the places; nodes compare it to be sure that they read the same data
    too_short: int = 0  # samples of one token, which predicts nothing: they were dropped too

    def __len__(self) -> int:
        """Number of sequences to train on."""
        return len(self.lengths if self.packs is None else self.packs)

    def describe(self, seq_length: int) -> str:
        """How many samples and sequences there are, in words."""
        dropped = f", {self.too_long} dropped for {seq_length} tokens or more" if self.too_long else ""
        dropped += f", {self.too_short} dropped for one token alone" if self.too_short else ""
        samples = f"{len(self.lengths)} samples of up to {int(self.lengths.max())} tokens{dropped}"
        full = int(np.sum(self.lengths - 1, dtype=np.int64)) / (len(self) * seq_length)
        packed = "" if self.packs is None else f"packed into {len(self)} "
        return f"{samples}; {packed}sequences of {seq_length}, which are {full:.1%} full"

    def save(self, path: Path) -> None:
        """Write what the workers need, as .npz."""
        arrays = {"offsets": self.offsets, "lengths": self.lengths}
        if self.starts is not None:
            arrays["starts"] = self.starts
        if self.packs is not None:
            arrays |= {"members": np.concatenate(self.packs), "sizes": np.array([len(pack) for pack in self.packs])}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            packs = None
            if "members" in arrays:
                packs = np.split(arrays["members"], np.cumsum(arrays["sizes"])[:-1])
            return cls(arrays["offsets"], arrays["lengths"], 0, 0, arrays.get("starts"), packs)


def index_lines(path: Path, seq_length: int, vocab_size: int) -> Index:
    """Read the file once and check every line; samples of `seq_length` tokens or more, and of one, are dropped and
    counted.

    A sample without a prompt is a text: it is cut into samples that are short enough, and nothing of it is dropped.

    Errors: DataError names the file and the first malformed line, or says that no sample is left.
    """
    begins, starts, lengths = array("q"), array("i"), array("i")  # byte of the line, first token, tokens
    too_long, too_short, lost, at = 0, 0, 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            sample = read_line(line, f"{path}:{number}")
            _check_vocabulary(sample, vocab_size, f"{path}:{number}")
            length = len(sample.prompt) + len(sample.response)
            # One token predicts nothing.
            parts = [part for part in _parts(sample, seq_length) if part[1] > 1]
            if not parts and length == 1:
                too_short += 1
            elif not parts:
                too_long += 1
                lost += length
            for start, length in parts:
                begins.append(at)
                starts.append(start)
                lengths.append(length)
            at += len(line)
    if not begins:
        alone = f" and {too_short} one token alone" if too_short else ""
        raise DataError(
            f"{path}: no sample is left, {too_long} have {seq_length} tokens or more{alone}; use a larger --seq-length"
        )
    cut = np.array(starts, np.int32) if any(starts) else None
    digest = hashlib.sha256(begins.tobytes() + (b"" if cut is None else cut.tobytes())).hexdigest()
    places, sizes = np.array(begins, np.int64), np.array(lengths, np.int32)
    return Index(places, sizes, too_long, lost, cut, digest=digest, too_short=too_short)


def _parts(sample: Sample, seq_length: int) -> Iterator[Span]:
    """(first token, tokens) of what is read of a line: all of it, a text's windows, or nothing of what is too long."""
    length, size = len(sample.prompt) + len(sample.response), seq_length - 1
    if length <= size:
        yield 0, length
    elif not sample.prompt and not sample.context:
        # A last window of one token has no label.
        yield from ((start, min(size, length - start)) for start in range(0, length - 1, size))


def _check_vocabulary(sample: Sample, vocab_size: int, where: str) -> None:
    largest = max(max(sample.prompt, default=0), max(sample.response))
    if largest >= vocab_size:
        raise DataError(
            f"{where}: a token id is {largest}, the model's vocabulary has "
            f"{vocab_size} tokens; use the tokenizer of this model in `slipway preprocess`"
        )


def inputs_of(entry: Any) -> Sample:
    """The sample in the JSON value of a line; ValueError, LookupError or TypeError for anything else."""
    inputs = entry["inputs"]
    prompt, response = inputs["p_ids"], inputs["r_ids"]
    if not response or not all(type(token) is int and 0 <= token < HIGHEST for token in prompt + response):
        raise ValueError
    context = tuple((start, end) for start, end in inputs.get("context", ()))
    edges = [edge for span in context for edge in span]
    if edges and not (all(type(edge) is int for edge in edges) and edges[0] >= 0 and edges[-1] <= len(response)):
        raise ValueError
    if any(second < first for first, second in pairwise(edges)) or sum(e - s for s, e in context) >= len(response):
        raise ValueError
    return Sample(prompt, response, context)


def read_line(line: bytes, where: str) -> Sample:
    """The sample of one line; DataError names `where` if it is anything else."""
    try:
        return inputs_of(parse_json(line))
    except (ValueError, LookupError, TypeError):
        raise DataError(
            f'{where}: not a sample, which is {{"inputs": {{"p_ids": [...], "r_ids": [...]}}}} with token ids; '
            "create the file with `slipway preprocess`"
        ) from None


def as_line(prompt: list[int], response: list[int], context: tuple[Span, ...] = ()) -> bytes:
    """The line of a sample."""
    inputs: dict[str, Any] = {"p_ids": prompt, "r_ids": response}
    if context:
        inputs["context"] = context
    return json.dumps({"inputs": inputs}).encode() + b"\n"


def pack(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Put samples into few sequences of `size` tokens: best fit, the longest sample first.

    Args:
        lengths: int32 [samples], each at most `size`.

    Returns: for each sequence the numbers of its samples. Only the lengths decide, so every node finds the same.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left → the packs that have it
    rooms: list[int] = []  # the keys of open_packs, sorted, so that the best fit is found by bisection
    for number in np.argsort(-lengths.astype(np.int64), kind="stable"):
        length = int(lengths[number])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(packs), size
            packs.append([])
        else:
            room = rooms[place]
            chosen = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[place]
        packs[chosen].append(int(number))
        room -= length
        if room not in open_packs:
            open_packs[room] = []
            bisect.insort(rooms, room)
        open_packs[room].append(chosen)
    return [np.asarray(members, dtype=np.int64) for members in packs]


class DataFile:
    """A file of data that is read in pieces, and is the same one when another gets its name.

    It is not mapped: where a mapped file becomes shorter, the process that reads it is killed without a word.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on; DataError where the file ends before that."""
        found = self._some(start, size)
        if len(found) < size:
            raise DataError(
                f"{self.path} has become shorter, it ends before byte {start + size}; restore it, run the same command "
                "again, and leave it as it is while a run reads it"
            )
        return found

    def line(self, start: int) -> bytes:
        """The line that begins there, of whatever length."""
        found = bytearray(self.read(start, 1))
        while b"\n" not in found[-LINE_BYTES:] and (more := self._some(start + len(found), LINE_BYTES)):
            found += more
        return bytes(found.partition(b"\n")[0])

    def _some(self, start: int, size: int) -> bytes:
        if self._file is None:  # in the process that reads: an open file cannot be sent to another
            self._file = self.path.open("rb")
        return os.pread(self._file.fileno(), size, start)


class Lines:
    """The usable lines of a file, read when they are asked for: unit i is the samples of line i, or of pack i."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._file = DataFile(path)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, unit: int) -> list[Sample]:
        lines = [unit] if self.index.packs is None else self.index.packs[unit]
        return [self._sample(int(line)) for line in lines]

    def positions(self, unit: int) -> int:
        """How many positions of a sequence the unit takes: a sample's last token is only a label."""
        lines = [unit] if self.index.packs is None else self.index.packs[unit]
        return sum(int(self.index.lengths[line]) - 1 for line in lines)

    def _sample(self, line: int) -> Sample:
        start = int(self.index.offsets[line])
        sample = read_line(self._file.line(start), f"{self.path} at byte {start}")
        if self.index.starts is None or len(sample.prompt) or sample.context:
            return sample
        first = int(self.index.starts[line])
        return Sample([], sample.response[first : first + int(self.index.lengths[line])])
