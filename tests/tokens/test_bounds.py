"""How much longer a tokenizer may make a text: what its parts say, and what it does."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from slipway.errors import DataError
from slipway.tokens import limits
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

FILE = Path("tokenizer.json")


def tokenizer(normalizer=None, decoder=None, processor=None) -> Tokenizer:
    found = Tokenizer(models.WordLevel({"a": 0, "[x]": 1}, unk_token="a"))
    if normalizer is not None:
        found.normalizer = normalizer
    if decoder is not None:
        found.decoder = decoder
    if processor is not None:
        found.post_processor = processor
    return found


N = normalizers


@pytest.mark.parametrize("normalizer, grown", [
    (None, 1), (N.NFKC(), 18), (N.NFKD(), 18), (N.NFD(), 4), (N.NFC(), 3), (N.Lowercase(), 3), (N.Nmt(), 1),
    (N.BertNormalizer(), 4), (N.ByteLevel(), 4), (N.Strip(), 1), (N.Prepend("▁"), 1), (N.Replace(" ", "▁"), 1),
    (N.Replace("a", "bb"), 2), (N.Replace("ab", "c"), 1), (N.Replace("a", ""), 1), (N.Replace(Regex("a"), "bb"), 3),
    (N.Sequence([N.NFC(), N.Replace("a", "bb")]), 6), (N.Sequence([]), 1),
    (N.Sequence([N.Replace("a", "bb")] * 6), 64),
])  # fmt: skip
def test_what_a_normalizer_may_do(normalizer, grown):
    assert limits.check(tokenizer(normalizer), FILE) == grown


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_what_unicode_s_forms_do_at_most(form):
    """To every character there is, once."""
    letters = map(chr, (*range(0xD800), *range(0xE000, 0x110000)))
    assert max(len(unicodedata.normalize(form, letter)) for letter in letters) == limits.STANDARD[form]


@pytest.mark.parametrize("normalizer, times", [
    (N.Replace("a", "b" * 65), 65), (N.Sequence([N.Replace("a", "bb")] * 7), 128),
    (N.Sequence([N.Sequence([N.Replace("a", "bb")] * 4)] * 2), 256), (N.Prepend("a" * 1001), 65),
    (N.Sequence([N.Replace("a", "b" * 50)] * 40), 1 << 60),
])  # fmt: skip
def test_a_normalizer_that_does_more_is_refused(normalizer, times):
    with pytest.raises(DataError) as error:
        limits.check(tokenizer(normalizer), FILE)
    said = f"its normalizer makes a text {times:,} times as long, more than 64; copy it again"
    assert str(error.value) == f"tokenizer.json: {said}"


def test_what_a_file_leaves_out_does_nothing():
    assert (
        limits.growth([{"type": "Replace", "pattern": {"Regex": "a"}}, {"type": "Prepend"}, {"type": "New"}, {}]) == 1
    )


def test_what_may_be_just_so_is_taken():
    assert limits.check(tokenizer(N.Prepend("a" * 1000)), FILE) == 1
    assert limits.check(tokenizer(N.Replace("a", "b" * 64)), FILE) == 64


def test_a_decoder_counts_alone():
    twice = decoders.Replace("a", "bb")
    assert limits.check(tokenizer(N.Replace("a", "b" * 40), decoders.Sequence([decoders.Fuse(), twice])), FILE) == 40
    with pytest.raises(DataError, match=r"its decoder makes a text 128 times as long"):
        limits.check(tokenizer(decoder=decoders.Sequence([twice] * 7)), FILE)


def template(times: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=" ".join(["[x]"] * times + ["$A"]), special_tokens=[("[x]", 1)])


def test_tokens_that_are_put_before_a_text_are_counted():
    both = processors.Sequence([template(500), processors.ByteLevel(), template(500)])
    for processor in (template(1000), both, processors.ByteLevel()):
        assert limits.check(tokenizer(processor=processor), FILE) == 1
    for processor in (template(1001), processors.Sequence([template(501), template(500)])):
        with pytest.raises(DataError, match=r"adds 1,001 tokens to each text, more than 1000; copy it again"):
            limits.check(tokenizer(processor=processor), FILE)


@pytest.mark.parametrize("texts, longest", [([b""], 0), ([b"a" * 30], 30), ([b"b", b"c" * 20, b"dd"], 20)])
def test_the_longest_text_of_a_table_of_sentencepiece(texts, longest):
    index = b"\1" * 300  # its size takes two bytes, the smaller one first
    table = len(index).to_bytes(4, "little") + index + b"\0".join(texts) + b"\0"
    part = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    assert limits.growth([part]) == max(18, longest)
    assert limits.growth([{"type": "Precompiled"}]) == 18


SPIN = """
import time
from slipway.tokens.limits import limited
with limited("a stranger's \\x1b pattern", 0.3):
    begun = time.process_time()
    while time.process_time() - begun < {seconds}:
        pass
print("done")
"""


@pytest.mark.parametrize("seconds, code, out, err", [
    (0.01, 0, "done\n", ""), (60, 65, "", "slipway: a stranger's \\x1b pattern\n")
])  # fmt: skip
def test_what_takes_the_processor_for_too_long_is_ended(seconds, code, out, err):
    done = subprocess.run([sys.executable, "-c", SPIN.format(seconds=seconds)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_it_is_ended_also_where_nobody_reads_why():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", SPIN.format(seconds=3)], stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    assert (done.returncode, done.stdout) == (65, b"")
