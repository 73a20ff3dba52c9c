"""Other people's trouble with preparing data: text that is lost or changed, rows that are swallowed, bombs, sources that change."""

import csv
import errno
import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import prepare_c4
from common import corpus_report, encoded, lines, sources, tables, vocabulary, workers
from common.options import UserError, similar
from common.sources import files_below, list_files
from tests.corpus import VOCAB, frame, ids, interrupted, make_texts, prepare, prepare_fails, stored, text_report, texts_of, workplace, write_files, write_texts, write_vocab  # noqa: F401
from tests.toy import SPECIAL, make_tokenizer

SCRIPTS = ["मैंने उससे कहा", "かぎ と ガイド", "กรุณา รอ สักครู่", "й и Ёлка", "má mạ ma", "École naïve"]


# ---------------------------------------------------------------------------------------------------------------------
# A. Text that a tokenizer loses


def train(lines, **options):
    write_texts("a.txt", lines)
    prepare(source="a.txt", val_fraction=0, tokenizer=None, **{"train_tokenizer": 400, **options})
    return vocabulary.load_tokenizer("out/tokenizer.json")[0]


def test_a_new_vocabulary_keeps_accents_and_vowel_signs(capsys):
    tokenizer = train(SCRIPTS * 20)
    for line in SCRIPTS:
        assert tokenizer.decode(tokenizer.encode(line, add_special_tokens=False).ids) == line.lower()
    report = text_report()
    assert report["changed_characters_percent"] == report["unknown_characters_percent"] == 0
    assert "warning" not in capsys.readouterr().out


def test_characters_that_were_lost_before_are_said(capsys):
    write_texts("a.txt", ["w1", "w2 M\ufffdw3 G\ufffd\ufffd", "w4"])
    write_texts("b.txt", ["w5\ufffd"])
    prepare(source="a.txt,b.txt", val_fraction=0)
    assert (text_report()["documents_broken"], text_report()["broken"]) == (2, ["a.txt: 'w2 M\ufffdw3 G\ufffd\ufffd'"])
    assert "warning: 2 documents hold U+FFFD (see broken): characters were lost" in capsys.readouterr().out


def test_stripped_accents_are_asked_for_counted_and_shown(capsys):
    tokenizer = train(SCRIPTS * 20, strip_accents=True)
    assert tokenizer.decode(tokenizer.encode("मैंने má mạ ma й", add_special_tokens=False).ids) == "मन ma ma ma и"
    report = text_report()
    changed = [vocabulary.changed_characters(tokenizer, line) for line in SCRIPTS]
    assert changed == [4, 3, 4, 2, 2, 2]
    total = sum(len("".join(line.split())) for line in SCRIPTS)
    assert report["changed_characters_percent"] == round(100 * sum(changed) / total, 4) and report["unknown_percent"] == 0
    assert [set(example) for example in report["decoded"]] == [{"text", "tokens"}] * 3
    assert {"text": SCRIPTS[2], "tokens": "กรณา รอ สกคร"} in report["decoded"]
    assert "% of the characters other than blanks lose accents, vowel signs or other marks" in capsys.readouterr().out


@pytest.mark.parametrize("english", ["a.txt", "c.txt"])
def test_a_long_text_does_not_hide_what_others_lose(english, capsys):
    """A first document of 2^16 characters was all that was looked at: 0.0 % changed, where a third of the letters were."""
    write_texts(english, ["a plain word " * 9000])
    vietnamese = [f"Người nông dân số {i} đã sửa chiếc thuyền gỗ ở chợ." for i in range(3000)]
    write_texts("b.txt", vietnamese)
    prepare(source="[abc].txt", val_fraction=0, tokenizer=None, train_tokenizer=500, strip_accents=True)
    tokenizer, texts = vocabulary.load_tokenizer("out/tokenizer.json")[0], ["a plain word " * 9000, *vietnamese]
    true = 100 * sum(vocabulary.changed_characters(tokenizer, text) for text in texts) / sum(map(vocabulary.letters, texts))
    assert 15 < true < 25 and text_report()["changed_characters_percent"] == pytest.approx(true, rel=0.1)
    assert "lose accents" in capsys.readouterr().out and "đ" in text_report()["decoded"][0]["text"]


def test_a_short_batch_counts_as_what_it_is(capsys):
    """Every batch of 2^20 characters gave as many passages, so 4 % of the text counted as half: 6.5 % instead of 1.1 %."""
    english, vietnamese = ["a plain word " * 100] * 900, [f"Người nông dân số {i} đã sửa chiếc thuyền." for i in range(1000)]
    write_texts("a.txt", english)
    write_texts("b.txt", vietnamese)
    prepare(source="[ab].txt", val_fraction=0, tokenizer=None, train_tokenizer=500, strip_accents=True)
    tokenizer = vocabulary.load_tokenizer("out/tokenizer.json")[0]
    changed = sum(vocabulary.changed_characters(tokenizer, text) for text in vietnamese)
    true = 100 * changed / sum(map(vocabulary.letters, english + vietnamese))
    assert true < 1.2 and text_report()["changed_characters_percent"] == pytest.approx(true, rel=0.15)


def test_what_is_shown_is_where_a_text_changes_and_ends_between_letters():
    """Beginnings alone were shown, cut after 80 code points: in decomposed text inside a letter, which decoded to [UNK]."""
    line = "Thành phố Huế đã sửa cuốn tiểu thuyết ở chợ. Đội bóng mượn bản đồ cũ. Người nông dân mượn bản đồ."
    train([unicodedata.normalize("NFD", line)] * 12)
    assert text_report()["unknown_percent"] == 0
    assert not [example for example in text_report()["decoded"] if "[UNK]" in example["tokens"]]
    shutil.rmtree("out")
    train([unicodedata.normalize("NFD", f"{'먹었다있' * i}!") for i in range(1, 40)])  # no blanks to cut at
    assert not [example for example in text_report()["decoded"] if "[UNK]" in example["tokens"]]
    shutil.rmtree("out")
    train(["plain words without any accent " * 6 + "déjà vu là-bas"] * 20, strip_accents=True)
    assert "déjà" in text_report()["decoded"][0]["text"] and "deja" in text_report()["decoded"][0]["tokens"]


@pytest.mark.parametrize("text", ["w1 w2 " * 50, "か" * 500, "e\u0301" * 300, " ", ""])
def test_passages_are_the_whole_text_or_an_even_sample(monkeypatch, text):
    def found(most):
        monkeypatch.setattr(corpus_report, "INSPECT_CHARS", most)
        sample, weight = corpus_report.passages("abc", [text, "", text])
        size = sum(len(passage) for _, passage in sample)
        assert weight == (1 if most == 2**16 or 2 * len(text) <= most else pytest.approx(2 * len(text) / size))
        return sample

    assert "".join(passage for _, passage in found(2**16)).replace(" ", "") == (2 * text).replace(" ", "")
    assert sum(vocabulary.letters(passage) for _, passage in found(2**16)) == 2 * vocabulary.letters(text)
    few = found(200)
    assert all(passage and len(passage) <= 2 * corpus_report.EXAMPLE_CHARS and passage[0] != "\u0301" for _, passage in few)
    assert len(text) < 200 or 1 <= sum(len(passage) for _, passage in few) <= 400


def test_removed_control_characters_are_called_so(capsys):
    write_texts("a.txt", ["w1 \0\ufffd w2"])
    prepare(source="a.txt", val_fraction=0)
    assert "or are removed as control characters (see decoded)" in capsys.readouterr().out


@pytest.mark.parametrize("space", "\x0b\x0c\x1c\x1d\x1e\x1f\x85")
def test_white_space_that_bert_removes_joins_no_words(space):
    """pdftotext ends pages by form feeds: w1 and w2 became w1w2, and 0.0 % changed characters were reported."""
    text = f"w1{space}w2"
    write_texts("a.txt", [text])
    Path("b.jsonl").write_text(json.dumps({"text": text}))
    Path("c.csv").write_bytes(frame(",", ["text"], [text]))
    prepare(source="a.txt,b.jsonl,c.csv", val_fraction=0)
    assert stored() == [ids("w1 w2")] * 3
    tokenizer, special = vocabulary.load_tokenizer("out/tokenizer.json")
    examples = SimpleNamespace(texts=[(text,), (text, text)], labels=None, index=None)
    labelled = encoded.encode(examples, tokenizer, 24, "texts", special["[UNK]"])
    assert labelled.ids.tolist() == ids("[CLS] w1 w2 [SEP] [CLS] w1 w2 [SEP] w1 w2 [SEP]")


def test_names_of_special_tokens_in_a_text_are_text():
    write_texts("a.txt", ["w1 [MASK] w2[SEP] [CLS] [PAD] [UNK]"])
    names = [*VOCAB, "[", "]", "mask", "sep", "cls", "pad", "unk"]
    write_vocab(names)
    prepare(source="a.txt", val_fraction=0, compare_tokenizer="vocab.txt")
    assert " ".join(names[i] for i in stored()[0]) == "w1 [ mask ] w2 [ sep ] [ cls ] [ pad ] [ unk ]"
    assert text_report()["compared"]["this"] == text_report()["compared"]["other"]
    byte_level = Tokenizer(models.BPE({name: i for i, name in enumerate([*vocabulary.ROBERTA_TOKENS, *"<mask>"])}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.finish(byte_level)
    for literal, expected in ((False, [4]), (True, [5, 6, 7, 8, 9, 10])):
        tokenizer, _ = vocabulary.load_tokenizer("b", byte_level.to_str(), literal)
        assert vocabulary.encode(tokenizer, ["<mask>"])[1] == [expected]


def test_accents_of_berts_own_vocabulary_follow_its_rule():
    write_texts("a.txt", ["é w1", "中w2"])
    prepare(source="a.txt", val_fraction=0)
    assert texts_of(stored()) == ["e w1", "中 w2"] and text_report()["changed_characters_percent"] > 0
    prepare(source="a.txt", val_fraction=0, cased=True, out="cased")
    assert texts_of(stored(out="cased")) == ["é w1", "中 w2"]


def test_strip_accents_without_a_new_vocabulary_is_refused(capsys):
    write_texts("a.txt", ["w1"])
    assert prepare_fails(capsys, source="a.txt", strip_accents=True).startswith("error: strip_accents: only with --train_tok")


def test_composed_and_decomposed_letters_are_the_same():
    """Uncased BERT takes Hangul apart, and case may change: that is no loss."""
    tokenizer = Tokenizer.from_str(vocabulary.read_tokenizer("vocab.txt"))
    assert vocabulary.changed_characters(tokenizer, "한국어 ΣΑΣ Straße") == 0
    assert vocabulary.changed_characters(tokenizer, "می\u200cخواهم") == 1  # a joiner, which the tokenizer removes


@pytest.mark.parametrize("cased", [False, True])
def test_a_new_vocabulary_composes_letters(cased):
    """Umlauts from a PDF or a Mac are two characters: of mixed texts a vocabulary had both, and so half the words twice."""
    lines = [*SCRIPTS, "Gr\u00fc\u00dfe aus K\u00f6ln", "\ud55c\uad6d\uc5b4 \uc0ac\ub78c"]
    decomposed = [unicodedata.normalize("NFD", line) for line in lines]
    tokenizer = train((lines + decomposed) * 20, cased=cased)
    composed = [unicodedata.normalize("NFC", entry) for entry in tokenizer.get_vocab()]
    assert set(composed) == set(tokenizer.get_vocab()) and len(set(composed)) == len(composed)
    for line, other in zip(lines, decomposed):
        assert tokenizer.encode(line).ids == tokenizer.encode(other).ids
    assert text_report()["changed_characters_percent"] == text_report()["unknown_characters_percent"] == 0
    syllables = "".join(chr(0xAC00 + i) for i in range(2000))
    assert vocabulary.alphabet_size([unicodedata.normalize("NFD", syllables)], 10**4) == 2000


def test_lost_characters_are_reported_not_only_tokens(capsys):
    """One long word is one [UNK] of seven tokens, but most of the text."""
    write_texts("a.txt", ["ก" * 120 + " w1 w2 w3 w4 w5 w6"])
    prepare(source="a.txt", val_fraction=0)
    report = text_report()
    assert report["unknown_percent"] == round(100 / 7, 4)
    assert report["unknown_characters_percent"] == round(100 * 120 / 132, 4)
    says = "are unknown to the tokenizer, and hidden by [UNK] (see decoded; one for this text: --train_tokenizer)"
    printed = capsys.readouterr().out
    assert f"warning: 90.9 % of the characters other than blanks {says}" in printed
    assert "90.9091  (of the characters other than blanks are hidden by [UNK])\n" in printed


@pytest.mark.parametrize("words", [1, 50])
def test_a_new_vocabulary_that_knows_little_is_not_told_to_be_trained(capsys, words):
    """The held-out text is in another script."""
    texts = ["".join(map(chr, range(0x4E00, 0x4E00 + 800))), "w1 w2 " * words]
    while prepare_c4.text_hash(texts[0]) > prepare_c4.text_hash(texts[1]):
        texts[1] += "a"
    write_texts("a.txt", texts)
    options = {"source": "a.txt", "train_tokenizer": 100, "val_docs": 1}
    if words > 1:
        prepare(**options)
        assert "hidden by [UNK] (see decoded; a new vocabulary needs more entries, or more text)" in capsys.readouterr().out
    else:
        hint = "a new vocabulary needs more entries, or more text; or choose an existing --tokenizer"
        assert f"and become [UNK] ({hint})" in prepare_fails(capsys, **options)


@pytest.mark.parametrize("letters", ["กขคงจฉชซ", "ACGT"])
def test_text_without_blanks_is_learned_and_nothing_of_it_is_lost(letters):
    """Thai, and DNA, one sequence a line. Words of more than 100 characters were [UNK]."""
    rng = random.Random(0)
    motifs = ["".join(rng.choices(letters, k=6)) for _ in range(30)]
    lines = ["".join(rng.choices(motifs, k=60)) for _ in range(200)]
    tokenizer = train(lines, train_tokenizer=120, cased=True)
    report = text_report()
    assert report["unknown_percent"] == report["unknown_characters_percent"] == 0
    assert report["vocab_size"] == 120 and report["bytes_per_token"] > 2 * len(letters[0].encode())
    for line in lines[:20]:
        pieces = tokenizer.encode(line, add_special_tokens=False).tokens
        assert "".join(piece.removeprefix("##") for piece in pieces) == line


def test_a_new_vocabulary_reads_only_some_of_much_text_without_blanks(monkeypatch):
    """Training takes 60 bytes of memory a character of it."""
    steps, islice = [], vocabulary.itertools.islice
    monkeypatch.setattr(vocabulary, "UNSPACED_CHARS", 3000)
    monkeypatch.setattr(vocabulary.itertools, "islice", lambda *args: steps.append(args[-1]) or islice(*args))
    vocabulary.train_tokenizer(lambda: iter(["acgt" * 100] * 30), 100, False)
    vocabulary.train_tokenizer(lambda: iter(make_texts(300)), 100, False)
    assert steps == [5, 1]


def test_text_that_is_nearly_all_unknown_is_refused_and_can_be_prepared_otherwise(capsys):
    """DNA with BERT's vocabulary: unknown_percent was 100, the status 0."""
    write_texts("a.txt", ["".join(random.Random(i).choices("ACGT", k=300)) for i in range(50)])
    error = prepare_fails(capsys, source="a.txt", val_docs=5, compare_tokenizer="vocab.txt", out="new")
    assert error.startswith("error: a.txt: 100% of the characters other than blanks are unknown to the tokenizer, and become [UNK] (choose another")
    assert "--train_tokenizer=" in error and not list(Path().rglob("*.bin"))
    prepare(source="a.txt", val_fraction=0.1, train_tokenizer=100, out="new")
    write_texts("b.txt", ["ACGT" * 100] * 50)
    assert "100% of the characters other" in prepare_fails(capsys, source="b.txt", val_fraction=0, out="again")
    prepare(source="b.txt", val_fraction=0, train_tokenizer=100, out="again")


@pytest.mark.parametrize("size, says", [(100, "more than the 100 asked for"), (10_000, "fewer than the 10,000 asked for"), (200, "")])
def test_what_a_new_vocabulary_became_and_why(capsys, size, says):
    rng = random.Random(0)
    characters = [chr(0x410 + i) for i in range(32)] + [chr(0x3B1 + i) for i in range(17)] + list("abcdefghijklmnopqrstuvwxyz")
    tokenizer = train(["".join(rng.choices(characters, k=5)) + " " + " ".join(characters) for _ in range(300)], train_tokenizer=size)
    printed = capsys.readouterr().out
    assert f"trained a vocabulary of {tokenizer.get_vocab_size():,} entries, " in printed and says in printed
    assert ("asked for" in printed) == (tokenizer.get_vocab_size() != size) == bool(says)


# ---------------------------------------------------------------------------------------------------------------------
# B. Settings beside a tokenizer


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ["[UNK]", "e", "中"]), ({"do_lower_case": True}, ["[UNK]", "e", "中"]),
        ({"do_lower_case": False}, ["W1", "é", "中"]), ({"strip_accents": False}, ["[UNK]", "é", "中"]),
        ({"do_lower_case": True, "tokenize_chinese_chars": False}, ["[UNK]", "e", "[UNK]"]),
    ],
)  # fmt: skip
def test_the_settings_beside_a_vocabulary_are_followed(settings, expected):
    transformers = pytest.importorskip("transformers")
    write_vocab([*SPECIAL, "W1", "e", "é", "中"], "d.txt")
    write_files({"d/vocab.txt": Path("d.txt").read_bytes(), "d/tokenizer_config.json": json.dumps(settings).encode()})
    tokenizer = Tokenizer.from_str(vocabulary.read_tokenizer("d/vocab.txt"))
    assert tokenizer.encode("W1 é 中中", add_special_tokens=False).tokens[:3] == expected
    theirs = transformers.BertTokenizerFast.from_pretrained("d", **settings)
    assert tokenizer.encode("W1 é 中中").ids == theirs("W1 é 中中").input_ids


@pytest.mark.parametrize(
    "files, cased, says",
    [
        ({"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, False, "d/tokenizer_config.json: tokenizer_class is 'BertJ"),
        ({"tokenizer_config.json": {"do_basic_tokenize": False}}, False, "d/tokenizer_config.json: do_basic_tokenize is false"),
        ({"tokenizer_config.json": {"do_lower_case": True}}, True, "d/tokenizer_config.json: says do_lower_case, but --cased=true"),
        ({"tokenizer_config.json": []}, False, "d/tokenizer_config.json: holds a list"),
        ({"added_tokens.json": {"[NEW]": 400}}, False, "d/tokenizer_config.json: added token '[NEW]' has id 400"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"400": {"content": "[X]"}}}}, False, "d/tokenizer_config.json: added token '[X]' has id 400"),
    ],
)  # fmt: skip
def test_settings_that_are_not_followed_are_refused(capsys, files, cased, says):
    write_files({"a.txt": b"w1\n", "d/vocab.txt": Path("vocab.txt").read_bytes()})
    write_files({f"d/{name}": json.dumps(contents).encode() for name, contents in files.items()})
    assert prepare_fails(capsys, source="a.txt", tokenizer="d/vocab.txt", cased=cased).startswith(f"error: {says}")


@pytest.mark.parametrize("setting", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_settings_that_contradict_a_tokenizer_json_win(capsys, setting):
    """As for tools.convert_hf --from_hf, which reads them by the same code."""
    write_vocab([*SPECIAL, "w1", "W1", "e", "é", "中", "中中"], "v.txt")
    write_files({"d/tokenizer.json": vocabulary.read_tokenizer("v.txt").encode(), "a.txt": "w1 W1 é 中中\n".encode()})
    write_files({"d/tokenizer_config.json": json.dumps({setting: False}).encode()})
    prepare(source="a.txt", val_fraction=0, tokenizer="d", out="other")
    expected = {"do_lower_case": "w1 W1 é 中 中", "strip_accents": "w1 w1 é 中 中", "tokenize_chinese_chars": "w1 w1 e 中中"}
    encoding = Tokenizer.from_file("other/tokenizer.json").encode("w1 W1 é 中中", add_special_tokens=False)
    assert " ".join(encoding.tokens) == expected[setting]
    assert "d/tokenizer.json: normalizer set as BertTokenizer has them: " in capsys.readouterr().out


@pytest.mark.parametrize("shift", ["gap", "double"])
def test_ids_with_gaps_are_refused_before_any_work(capsys, shift):
    """They ended as a damaged shard, or an OverflowError, after the work."""
    make_tokenizer("t.json")
    tokenizer = json.loads(Path("t.json").read_text())
    tokenizer["model"]["vocab"]["w94"] = 70_000 if shift == "gap" else 50
    Path("t.json").write_text(json.dumps(tokenizer))
    write_texts("a.txt", ["w1 w94"])
    error = prepare_fails(capsys, source="a.txt", val_fraction=0, tokenizer="t.json")
    assert error.startswith("error: t.json: its 100 entries have ids up to ") and "(they must be 0 to 99, each once)" in error
    assert not os.path.exists("out/tokenizer.json")


# ---------------------------------------------------------------------------------------------------------------------
# D. Rows


def test_an_open_quote_swallows_no_rows(capsys):
    """It took the 49 rows up to the next quote, and counted as one bad line."""
    rows = [f"{i},w{i}" for i in range(100)]
    rows[5], rows[54] = '5,"w5', '54,"w54"'
    write_files({"a.csv": "\n".join(["id,text", *rows]).encode()})
    error = prepare_fails(capsys, source="a.csv", val_fraction=0)
    assert error.startswith("error: a.csv:7: ',' expected after '\"' on line 56 (is a quote not closed?; --skip_bad_lines")
    prepare(source="a.csv", val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == [f"w{i}" for i in range(100) if i != 5]
    assert text_report()["skipped"] == ["a.csv:7: ',' expected after '\"' on line 56 (is a quote not closed?)"]


def test_an_open_quote_at_the_end_swallows_no_rows():
    write_files({"a.csv": b'id,text\n1,w1\n2,"w2\n3,w3\n4,"w4\n5,w5\n'})
    prepare(source="a.csv", val_fraction=0, skip_bad_lines=2)
    assert texts_of(stored()) == ["w1", "w3", "w5"]
    assert [text.partition(" ")[0] for text in text_report()["skipped"]] == ["a.csv:3:", "a.csv:5:"]


@pytest.mark.parametrize("name, table", [
    ("a.csv", 'text,id\n"w1\nw1",1\n"{}",2\nw5,3\nw6,4\n'), ("a.csv.gz", 'id,text\n1,"w1\nw1"\n2,"{}"\n3,w5\n4,w6\n'),
    ("a.csv.xz", 'text\n"w1\nw1"\n"{}"\nw5\nw6\n'), ("a.tsv", 'text;id\n"w1\nw1";1\n"{}";2\nw5;3\nw6;4\n'),
])  # fmt: skip
@pytest.mark.parametrize("cell, bad", [
    (b"w2 Sch\xf6ne\nw3,\nw4", 4), (b"w2\nw3 Gr\xfc\xdfen,\nw4", 5), (b'w2\n\nw3 ""K\xf6ln""', 6), (b"w2\n\xff\nw3", 5),
])  # fmt: skip
def test_a_row_with_a_line_that_is_not_utf8_is_skipped_whole(capsys, name, table, cell, bad):
    """Its other lines became documents, or a single one."""
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(name[-3:], bytes)
    write_files({name: pack(table.encode().replace(b"{}", cell))})
    says = f"{name}:4: {'' if bad == 4 else f'line {bad}: '}not UTF-8: invalid "
    assert prepare_fails(capsys, source=name, val_fraction=0).startswith(f"error: {says}")
    prepare(source=name, val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w1 w1", "w5", "w6"]
    (skipped,) = text_report()["skipped"]
    assert skipped.startswith(says)


def test_an_open_quote_before_a_line_that_is_not_utf8_swallows_no_rows():
    write_files({"a.csv": b'id,text\n1,w1\n2,"w2\n3,w3\n4,\xff\n5,w5\n', "b.csv": b'id,text\n1,"\xff\n2,w1\n3,"w2"\n'})
    prepare(source="?.csv", val_fraction=0, skip_bad_lines=3)
    assert texts_of(stored()) == ["w1", "w3", "w5", "w1", "w2"]
    assert [text[:8] for text in text_report()["skipped"]] == ["a.csv:3:", "a.csv:5:", "b.csv:2:"]


def test_names_of_columns_with_a_line_that_is_not_utf8(capsys):
    write_files({"a.csv": b'id,"te\nxt \xff",text\n1,2,w1\n'})
    assert prepare_fails(capsys, source="a.csv", skip_bad_lines=9).startswith("error: a.csv:1: line 2: not UTF-8: invalid start b")


def test_a_cell_that_may_have_swallowed_rows_is_named():
    """Valid CSV, so it is kept; every line of it has the columns of a row."""
    write_files({"a.csv": b'id,text\n1,w1\n2,"w2\n3,w3\n4,w4"\n5,"w5\nw6"\n'})
    prepare(source="a.csv", val_fraction=0)
    assert text_report()["suspect"] == ["a.csv:3: a cell holds the next lines, to 5 (is a quote not closed?)"]
    assert text_report()["documents"] == 3


@pytest.mark.parametrize("names", [("id", "text"), ("text", "id")])
def test_a_cell_with_lines_of_prose_is_not_named(names):
    """Every line with one comma looked like a row of two columns."""
    letters = ["Sehr geehrte Frau Li,\nvielen Dank", "Gut.\nMit freundlichen Gr\u00fc\u00dfen,\nIhr Team", "Hallo, Anna\nBis bald, Li"]
    rows = [{"id": f"{i}", "text": text} for i, text in enumerate(letters)]
    write_files({"a.csv": frame(",", names, *([row[name] for name in names] for row in rows))})
    prepare(source="a.csv", val_fraction=0)
    assert text_report()["suspect"] == [] and text_report()["documents"] == 3


@pytest.mark.parametrize("table", [
    b'text,id\nw1,1\n"w2,2\nw3,3\nw4",4\n', b'text,id\nw1,\n"w2,\nw3,\nw4",\n', b'id,text,x\n1,w1,\n2,"w2,\n3,w3,\n4,w4",\n',
])  # fmt: skip
def test_a_cell_with_rows_is_named_in_any_column(table):
    write_files({"a.csv": table})
    prepare(source="a.csv", val_fraction=0)
    assert text_report()["suspect"] == ["a.csv:3: a cell holds the next lines, to 5 (is a quote not closed?)"]


def test_an_open_quote_swallows_no_documents_of_a_single_column():
    """Most rows are one line, and one is 30; where most have several lines, long ones are nothing odd."""
    lines = [f"w{i}" for i in range(100)]
    lines[50], lines[79] = '"w50', 'w79"'
    write_files({"a.csv": "\n".join(["text", *lines]).encode(), "b.csv": b"text\n" + b'"w1\nw2"\n' * 2 + b'"%s"\n' % (b"w3\n" * 30)})
    prepare(source="a.csv,b.csv", val_fraction=0)
    assert text_report()["suspect"] == ["a.csv:52: a cell holds the next lines, to 81 (is a quote not closed?)"]


@pytest.mark.parametrize("cell, documents", [('w1 "w2" w3', 3), ("w1\n\nw2 w3", 4), ('"w1" w2\nw3\nw4', 5)])
def test_a_tsv_with_the_quotes_of_a_csv_is_named(cell, documents):
    """Quotes are literal: of such a cell each line became a document, and nothing was said."""
    write_files({"a.tsv": frame("\t", ["text"], ["w5"], [cell], [cell])})
    prepare(source="a.tsv", val_fraction=0)
    says = "a.tsv:3: a cell in quotes, as a .csv has them; a .tsv's are part of the text (save it as .csv)"
    assert text_report()["suspect"] == [says] and text_report()["documents"] == 2 * documents - 3


def test_a_tsv_whose_texts_have_quotes_is_not():
    """As GLUE's."""
    texts = ['"w1" w2', 'w1 "w2"', '"w1 w2', 'w3 w4"', '"w5"', '"w1 ""w2"" w3', 'w1 ""w2""', '"', '"w1 w2', '"w3" "w4"']
    write_files({"a.tsv": "".join(f"{text}\n" for text in ["id\ttext", *(f"1\t{text}" for text in texts)]).encode()})
    prepare(source="a.tsv", val_fraction=0)
    assert text_report()["suspect"] == [] and text_report()["documents"] == len(texts)


@pytest.mark.parametrize("max_docs, says", [(2, "2 documents (--max_docs), in a.txt; 2 files not read"), (5, "5 documents (--max_docs), in c.txt")])
def test_where_max_docs_stopped_is_said(capsys, max_docs, says):
    for name in "abc":
        write_texts(f"{name}.txt", [f"w{i} {name}" for i in range(2)])
    prepare(source="a.txt,b.txt,c.txt", max_docs=max_docs, val_docs=1)
    assert capsys.readouterr().out.count(f"stopped after {says}\n") == 1


@pytest.mark.parametrize("options, said", [({"val_fraction": 0}, 1), ({"val_fraction": 0, "val_docs": 1}, 0), ({}, 0)])
def test_holding_out_nothing_is_said(capsys, options, said):
    """train.py refused the result."""
    write_texts("a.txt", make_texts(9))
    prepare(source="a.txt", **options)
    assert capsys.readouterr().out.count("val_fraction=0 holds out nothing, and train.py needs held-out text") == said


@pytest.mark.parametrize("mark, called", [(";", "semicolon"), (",", "")])
def test_excels_line_before_the_names(mark, called):
    write_files({"a.csv": f"sep={mark}\nid{mark}text\n1{mark}w1\n2{mark}w2\n".encode(), "b.csv": f"sep={mark}\n".encode()})
    prepare(source="a.csv,b.csv", val_fraction=0)
    assert texts_of(stored()) == ["w1", "w2"]
    assert text_report()["suspect"] == [f"a.csv: read with a {called} between columns, as in its first line"] * bool(called)


@pytest.mark.parametrize("name, mark", [("a.csv", b","), ("a.tsv", b"\t")])
def test_joined_tables_repeat_their_names(capsys, name, mark):
    write_files({name: b"id,text\n1,w1\nid,text\n2,w2\n".replace(b",", mark)})
    assert f"error: {name}:3: the names of the columns again (" in prepare_fails(capsys, source=name, val_fraction=0)
    prepare(source=name, val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w1", "w2"]


def test_json_that_loses_or_is_no_text(capsys):
    """Python keeps the last value of a key. One that is not asked for may be there twice."""
    twice = b'{"text": "w1", "text": "w2"}'
    write_files({"a.jsonl": b'{"text": "w3", "id": 1, "id": {"text": 2, "text": 3}}\n' + twice, "b.json": b'["w1",\n"w2"]\n'})
    error = prepare_fails(capsys, source="a.jsonl", val_fraction=0)
    assert error.startswith("error: a.jsonl:2: 'text' is there more than once (--skip_bad_lines=")
    write_files({"c.json": b"[" + twice + b"]"})
    assert "error: c.json: record 1: 'text' is there more than once" in prepare_fails(capsys, source="c.json", val_fraction=0)
    error = prepare_fails(capsys, source="b.json", val_fraction=0)
    assert error.startswith("error: b.json: record 1: a string, not an object (expected {\"text\": ...} for each text; ")
    prepare(source="a.jsonl", val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w3"]


def test_a_tsv_all_in_quotes():
    write_files({"a.tsv": b'"id"\t"text"\n"1"\t"w1\tw2"\n"2"\t"w3"\n', "b.tsv": b'id\ttext\n"1"\t"w4"\n2\t"w5"\n'})
    prepare(source="a.tsv,b.tsv", val_fraction=0)
    assert len(stored()) == 4 and texts_of(stored())[:2] == ["w1 w2", "w3"]
    literal = "b.tsv:2: a cell in quotes, as a .csv has them; a .tsv's are part of the text (save it as .csv)"
    assert sorted(text_report()["suspect"]) == ["a.tsv: read with the quotes of a .csv, as in its first line", literal]


@pytest.mark.parametrize("name, contents", [("a.csv", b"id;text\n1;w1\n2;w2\n"), ("a.tsv", b"id,text\n1,w1\n2,w2\n")])
def test_another_separator_is_read_and_said(name, contents):
    write_files({name: contents})
    prepare(source=name, val_fraction=0)
    assert texts_of(stored()) == ["w1", "w2"]
    mark = "semicolon" if name == "a.csv" else "comma"
    assert text_report()["suspect"] == [f"{name}: read with a {mark} between columns, as in its first line"]


def test_every_row_is_kept_or_named():
    rng = random.Random(0)
    for trial in range(60):
        rows = [f"{i},w{i}" for i in range(40)]
        for i in rng.sample(range(40), 6):
            rows[i] = rng.choice([f'{i},"w{i}', f'{i},"w{i}"', f'{i},"w{i}"x', f"{i}", f"{i},w{i},w1", f'{i},w{i}"'])
        Path("a.csv").write_text("\n".join(["id,text", *rows]))
        cfg, stats = SimpleNamespace(text_key="text", skip_bad_lines=99, doc_sep="line"), Counter()
        kept = list(sources.documents(*sources.file_segments("a.csv", "line"), cfg, stats))
        named = {int(name.split(":")[1]) for name in stats if name.startswith("skipped ")}
        suspect = any(name.startswith("suspect ") for name in stats)
        lines = {line for number, line in enumerate(rows, 2) if number not in named}
        assert suspect or len(kept) == len(lines) == 40 - stats["bad lines"], trial


def test_objects_and_half_surrogates_are_named(capsys):
    write_files({"a.jsonl": b'{"text": "w1"}\n{"text": {"a": "w2"}}\n{"text": "\\ud800"}\n'})
    prepare(source="a.jsonl", val_fraction=0, skip_bad_lines=2)
    assert texts_of(stored()) == ["w1"]
    assert [text.partition("'text'")[0] for text in text_report()["skipped"]] == ["a.jsonl:2: ", "a.jsonl:3: "]


# ---------------------------------------------------------------------------------------------------------------------
# F. Sources that change, and the output among them


def test_a_source_edited_to_the_same_size_is_another_source(capsys):
    write_texts("a.txt", ["w1", "w2"])
    prepare(source="a.txt", val_fraction=0)
    write_texts("a.txt", ["w1", "w3"])
    os.utime("a.txt", ns=(1, 10**18))  # the clock of the file system may be coarse
    assert prepare_fails(capsys, source="a.txt", val_fraction=0).startswith("error: out: holds shards that differ: a.txt was changed (")


def test_a_source_edited_while_it_is_read_is_an_error(monkeypatch, capsys):
    write_texts("a.txt", ["w1", "w2"])
    real = prepare_c4.write_shard

    def edits(*arguments):
        os.utime("a.txt", ns=(1, 10**18))
        return real(*arguments)

    monkeypatch.setattr(prepare_c4, "write_shard", edits)
    assert prepare_fails(capsys, source="a.txt", val_fraction=0).startswith("error: a.txt: was changed while it was read")
    assert not os.path.exists("out/manifest.json")


def test_a_manifest_without_times_is_accepted(capsys):
    """Of an earlier version of this project."""
    write_texts("a.txt", ["w1", "w2"])
    prepare(source="a.txt", val_fraction=0)
    manifest = json.loads(Path("out/manifest.json").read_text())
    del manifest["modified"], manifest["options"]["strip_accents"]
    Path("out/manifest.json").write_text(json.dumps(manifest))
    prepare(source="a.txt", val_fraction=0)
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("source", [".", "*", "**/*.json,d"])
def test_an_output_inside_the_source_is_not_read(capsys, source):
    write_files({"d/a.txt": b"w1\nw2\n", "e/b.json": b'{"text": "w3"}'})
    if source == "*":
        source = "d/*"
    options = {"source": source, "val_fraction": 0, "out": "d/out" if source == "d/*" else "out", "tokenizer": "../v.txt"}
    write_vocab(VOCAB, "../v.txt")
    os.remove("vocab.txt")
    prepare(**options)
    assert set(texts_of(stored(out=options["out"]))) >= {"w1", "w2"}
    prepare(**options)
    assert "nothing to do" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Directories


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """glob leaves it out without a word."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts.txt").write_text("w1")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path}/b: Permission denied [(]make it readable"):
        files_below(tmp_path)


def test_links_to_directories_are_followed_and_a_loop_ends(tmp_path):
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for path in ("texts/a/1.txt", "elsewhere/2.txt", "texts/.3.txt"):
        (tmp_path / path).write_text("w1")
    (tmp_path / "texts" / "a" / "loop").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(path, tmp_path) for path in files_below(tmp_path / "texts")]
    assert found == ["texts/.3.txt", "texts/a/1.txt", "texts/link/2.txt"]


@pytest.mark.parametrize("name", ["a_link.txt", "link.txt"])
def test_a_link_to_a_file_beside_it_is_named(capsys, name):
    write_files({"texts/el.txt": b"w1\n"})
    os.symlink("el.txt", f"texts/{name}")
    says = f"error: texts/{name}: a link, to the same file as texts/el.txt (remove the link)\n"
    assert prepare_fails(capsys, source="texts") == says


def test_a_named_pipe_is_left_out(capsys):
    """Reading one waits for its writer."""
    write_files({"d/a.txt": b"w1\n"})
    os.mkfifo("d/p.txt")
    assert list_files("d") == ["d/a.txt"]
    assert "d: 1 files to read; skipped 1 pipes or devices" in capsys.readouterr().out
    with pytest.raises(UserError, match="^d/p.txt: has no file that can be read: 1 pipes or devices"):
        list_files("d/p.txt")


def test_an_empty_directory_is_no_misspelling(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^{tmp_path}/empty: an empty directory"):
        list_files(f"{tmp_path}/empty")
    assert similar(tmp_path / "empty") is None  # itself


# ---------------------------------------------------------------------------------------------------------------------
# G. Messages, and the time left


@pytest.mark.parametrize(
    "files, options, says",
    [
        ({"texts/a.txt": b"w1"}, {"source": "./textz"}, "./textz: no such source (did you mean ./texts?;"),
        ({}, {"source": "../textz"}, "../textz: no such source ("),
        ({"d/a.pdf": b"", "d/b.pdf": b"", "d/README.md": b""}, {"source": "d"}, "d: has no file that can be read: 2 .pdf, 1 .md (expected .txt,"),
        ({"b.csv": b"id;body\n1;w1\n"}, {"source": "b.csv"}, "b.csv:1: no column 'text' (the first row has id;body; see --text_key)"),
        ({"b.csv": b"text,text\nw1,w2\n"}, {"source": "b.csv"}, "b.csv:1: 2 columns are named 'text' (rename all but one)"),
        ({"b.jsonl": b'{"text": "w1"}\n{"text": null}\n'}, {"source": "b.jsonl"}, "b.jsonl:2: 'text' is null (--skip_bad_lines=100 skips such lines)"),
        ({"b.jsonl": b'{"text": ' + b"[" * 10**5}, {"source": "b.jsonl"}, "b.jsonl:1: not valid JSON: "),
        ({"b.json": b"[" * 10**5}, {"source": "b.json"}, "b.json: not valid JSON: "),
        ({b"d/\xff.txt".decode(errors="surrogateescape"): b"w1"}, {"source": "d"}, "'d/\\udcff.txt': the file name is not UTF-8 (rename it)"),
        ({"c.py": b'source = "a\\0b"\nout = "out"\n'}, {"source": None, "out": None}, "c.py:1: source: 'a\\x00b' is not a string"),
    ],
)  # fmt: skip
def test_messages(capsys, files, options, says):
    write_files(files)
    if "c.py" in files:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            prepare_c4.main(["c.py"])
        error = capsys.readouterr().err
    else:
        error = prepare_fails(capsys, val_fraction=0, **options)
    assert error.startswith(f"error: {says}") and len(error) < 500


def test_what_a_directory_holds_beside_texts_is_said(capsys):
    write_files({"d/a.txt": b"w1\n", "d/README.md": b"", "d/.DS_Store": b"", "d/x/b.pdf": b"", "d/x/c.pdf": b"", "d/x/LICENSE": b""})
    prepare(source="d", val_fraction=0)
    assert "d: 1 files to read; skipped 2 .pdf, 1 hidden, 1 .md, 1 LICENSE" in capsys.readouterr().out
    write_files({"e/a.txt": b"w1\n", "e/sub/b.txt": b"w2\n"})
    prepare(source="e/*", val_fraction=0, out="of_a_pattern")
    assert "e/*: 1 files to read; skipped 1 directories" in capsys.readouterr().out


def test_the_time_left_counts_finished_text_and_is_never_zero(monkeypatch, capsys):
    """It counted what had been read ahead, and said 0:00:00 long before the end."""
    monkeypatch.setattr(workers, "REPORT_SECONDS", -1)
    monkeypatch.setattr(prepare_c4, "BATCH_CHARS", 500)
    write_texts("a.txt", make_texts(200))
    updates = []
    monkeypatch.setattr(prepare_c4, "report_progress", lambda counts: updates.append((counts["characters"], counts["source bytes"])))
    prepare(source="a.txt", val_fraction=0)
    size = os.path.getsize("a.txt")
    assert len(updates) > 10 and updates[-1][1] == size
    # A batch is written while the next is read: nothing counts before it is written.
    written = [i / len(updates) for i in range(1, len(updates) + 1)]
    assert all(abs(read / size - share) < 0.1 for (_, read), share in zip(updates, written))
    printed = capsys.readouterr().out
    assert "checking 0.0 MB of shards" in printed
    progress = workers.Progress(1000)
    progress.totals[3] = 1000
    assert "0:00:01 left" in progress.line(10)


# ---------------------------------------------------------------------------------------------------------------------
# H. Bombs


@pytest.mark.parametrize("name, doc_sep", [
    ("b.txt.gz", "line"), ("b.txt.gz", "file"), ("b.jsonl.gz", "line"), ("b.csv.gz", "line"), ("b.tsv.gz", "line"),
])  # fmt: skip
def test_a_line_that_fills_any_memory_is_an_error(monkeypatch, capsys, name, doc_sep):
    """A 1 MB .gz that holds a line of 1 GB took 20 GB."""
    monkeypatch.setattr(lines, "MAX_TEXT", 2**20)
    csv.field_size_limit(2**20)
    first = {"b.jsonl.gz": b'{"text": "w1"}'}.get(name, b"text\nw1" if name[2] in "ct" and "txt" not in name else b"w1")
    write_files({name: gzip.compress(first + b"\n" + b"x" * 2**24 + b"\n" + first.split(b"\n")[-1] + b"\n")})
    error = prepare_fails(capsys, source=name, val_fraction=0, doc_sep=doc_sep, max_doc_tokens=126, out="no")
    number = 2 + first.count(b"\n")
    assert error.startswith(f"error: {name}:{number}: a line of more than 1.0 MB (split it; --skip_bad_lines=100 skips such lines)")
    prepare(source=name, val_fraction=0, doc_sep=doc_sep, skip_bad_lines=1)
    assert sum(stored(), []) == ids("w1 w1") and text_report()["bad_lines_skipped"] == 1
    csv.field_size_limit(sources.MAX_TEXT)


@pytest.mark.parametrize("long", ["{}\nw3\nw4", "w3\n{}\nw4", "w3\nw4 {}"])
@pytest.mark.parametrize("table", ['text,id\nw1,1\n"{}",2\nw2,3\n"w5\nw5",4\n', 'id,text\r\n1,w1\r\n2,"{}"\r\n3,w2\r\n4,"w5\nw5"\r\n'])
def test_a_row_with_a_line_that_fills_any_memory_is_skipped_whole(monkeypatch, table, long):
    monkeypatch.setattr(lines, "MAX_TEXT", 2**20)
    text = table.format(long.format(('x, ""y"" ' + "z" * 90) * 2**15))
    write_files({"a.csv.gz": gzip.compress(text.encode())})
    prepare(source="a.csv.gz", val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w1", "w2", "w5 w5"] and text_report()["bad_lines_skipped"] == 1


@pytest.mark.parametrize("doc_sep", ["blank", "file"])
def test_a_document_of_many_lines_is_bounded(monkeypatch, capsys, doc_sep):
    monkeypatch.setattr(sources, "MAX_TEXT", 1000)
    write_files({"b.txt": b"w1\n\n" + b"w2\n" * 999 + b"\nw3\n"})
    error = prepare_fails(capsys, source="b.txt", val_fraction=0, doc_sep=doc_sep)
    assert error.startswith(f"error: b.txt:{3 if doc_sep == 'blank' else 1}: a document of more than 0.0 MB (try another --doc_sep;")
    if doc_sep == "blank":
        prepare(source="b.txt", val_fraction=0, doc_sep=doc_sep, skip_bad_lines=1)
        assert texts_of(stored()) == ["w1", "w3"]


@pytest.mark.parametrize("begin, end", [(b"[", b"]"), (b'{"texts": [\n', b"]}")])
def test_what_is_read_whole_is_bounded(monkeypatch, capsys, begin, end):
    monkeypatch.setattr(sources, "MAX_WHOLE", 1000)
    write_files({"b.json": begin + b'{"text": "w1"},\n' * 99 + b'{"text": "w1"}' + end})
    error = prepare_fails(capsys, source="b.json", val_fraction=0)
    assert error.startswith("error: b.json: a list or object of more than 0.0 MB (write")


def test_an_object_over_several_lines(capsys):
    """As json.dump(indent=2) writes one a file. Each was "not valid JSON" at its first line."""
    texts = {"a": {"text": "w1", "tags": ["w9"]}, "b": {"tags": [], "text": "w2 w3"}}
    write_files({f"d/{name}.json": json.dumps(record, indent=2).encode() for name, record in texts.items()})
    write_files({"d/c.json": b'{"id": 3,\n "text": "w4"}\n', "d/lines.json": b'{"text": "w5"}\n{"text": "w6"}\n'})
    prepare(source="d", val_fraction=0)
    assert texts_of(stored()) == ["w1", "w2 w3", "w4", "w5", "w6"]
    write_files({"no.json": b'{\n "txt": "w1"\n}', "two.json": b'{\n "text": "w1"\n}\n{\n "text": "w1"\n}'})
    assert prepare_fails(capsys, source="no.json", out="no").startswith("error: no.json: record 1: no 'text' (keys: txt")
    error = prepare_fails(capsys, source="two.json", out="no")
    assert error.startswith("error: two.json: not valid JSON: Extra data: line 4") and "one object per line" in error


def test_a_text_without_blanks_is_tokenized_in_pieces(monkeypatch):
    monkeypatch.setattr(vocabulary, "PART_CHARS", 1000)
    monkeypatch.setattr(vocabulary, "WORD_CHARS", 500)
    assert [len(part) for part in vocabulary.parts("x" * 4000 + " " + "y" * 100)] == [1500, 1500, 1000, 101]
    assert "".join(vocabulary.parts("x" * 3999 + " y" * 999)) == "x" * 3999 + " y" * 999
    tokenizer = Tokenizer.from_str(vocabulary.read_tokenizer("vocab.txt"))
    for limit in (0, 5):
        read, tokens = vocabulary.encode(tokenizer, ["x" * 10**5], limit)
        assert set(tokens[0]) == {1} and len(read[0]) <= 10**5


@pytest.mark.slow
@pytest.mark.parametrize("max_doc_tokens", [0, 126])
def test_a_long_text_without_blanks_takes_bounded_memory(max_doc_tokens):
    """A line of 17 MB in a small .gz. At the tokenizer's 56 bytes a character it would be a gigabyte."""
    write_files({"b.txt.gz": gzip.compress(b"w1 w2\n" * 200_000 + b"x" * 2**24 + b"\n")})
    code = [sys.executable, prepare_c4.__file__, "--source=b.txt.gz", "--tokenizer=vocab.txt", "--out=out"]
    options = [f"--max_doc_tokens={max_doc_tokens}", "--workers=1", "--val_fraction=0"]
    _, status, usage = os.wait4(subprocess.Popen([*code, *options], stdout=subprocess.DEVNULL).pid, 0)
    assert status == 0 and usage.ru_maxrss < 700_000  # kB


def test_of_a_small_corpus_the_smallest_hashes_are_held_out(capsys):
    """It ended after all the work, with nothing held out."""
    texts = make_texts(60)
    write_texts("a.txt", texts[:40])
    write_texts("b.txt", texts[40:])
    prepare(source="a.txt,b.txt", val_fraction=1e-9)
    says = "val_fraction=1e-09 holds out none of 60 distinct texts; held out instead: 3, with the smallest hashes\n"
    assert says in capsys.readouterr().out
    assert set(texts_of(stored("val"))) == set(sorted(texts, key=prepare_c4.text_hash)[:3]) and len(stored()) == 57
    prepare(source="a.txt,b.txt", val_docs=3, out="same", workers=2)
    assert [stored(split, "same") for split in ("train", "val")] == [stored(split) for split in ("train", "val")]
    prepare(source="a.txt,b.txt", val_fraction=0.2, out="by_share")  # where the hash holds some out, nothing changes
    assert set(texts_of(stored("val", "by_share"))) == {text for text in texts if prepare_c4.text_hash(text) < 0.2 * 2**64}
    write_texts("c.txt", texts[:1])
    assert "c.txt: no text to train on: there is a single distinct text (one is always held out" in prepare_fails(capsys, source="c.txt", out="no")
    assert not list(Path("no").rglob("*.bin"))


@pytest.mark.parametrize("count, options, held_out", [
    (900, {}, 45), (3000, {}, 100), (900, {"val_fraction": 0.004}, None), (900, {"val_docs": 3}, 3),
])  # fmt: skip
def test_the_default_share_of_a_small_corpus_is_large_enough(capsys, count, options, held_out):
    """300 texts held out 15, but 900 only a few: too few for a loss that means something. A share that is given stays."""
    texts = [f"w1 {number}" for number in range(count)]
    write_texts("a.txt", texts)
    prepare(source="a.txt", **options)
    by_share = sum(prepare_c4.text_hash(text) < options.get("val_fraction", 0.005) * 2**64 for text in texts)
    assert 0 < by_share < 45 and len(stored("val")) == (held_out or by_share)
    says = f"holds out {by_share} of {count:,} distinct texts; held out instead: {held_out}, with the smallest hashes\n"
    assert (f"val_fraction=0.005 {says}" in capsys.readouterr().out) == (not options)


@pytest.mark.parametrize("copies", [1, 12, 20, 200])
def test_copies_of_a_text_hold_out_no_others(copies):
    """Of 30 texts 20 times each, all were held out."""
    texts = make_texts(45)
    write_texts("a.txt", texts * copies)
    prepare(source="a.txt", val_fraction=1e-9)
    held_out = set(sorted(texts, key=prepare_c4.text_hash)[:2])
    assert set(texts_of(stored("val"))) == held_out and set(texts_of(stored())) == set(texts) - held_out
    assert len(stored("val")) == 2 * copies


@pytest.mark.parametrize(
    "options, says",
    [
        ({"val_docs": 3}, "val_docs=3 holds out all 3 distinct texts (lower it)"),
        ({"val_docs": 9}, "val_docs=9 holds out all 3 distinct texts (lower it)"),
        ({"val_fraction": 0.9999}, "val_fraction=0.9999 holds out all 3 distinct texts (lower it)"),
        ({"source": "b.txt"}, "there is a single distinct text (one is always held out; a line is"),
        ({"source": "b.txt", "val_docs": 1}, "there is a single distinct text (one is always held out; a line is"),
    ],
)  # fmt: skip
def test_a_split_that_leaves_nothing_to_train_on_is_refused(capsys, options, says):
    """Before a tokenizer is trained: the error blamed that."""
    write_texts("a.txt", ["w1", "w2", "w3"] * 4)
    write_texts("b.txt", ["w1"] * 12)
    options = {"source": "a.txt", "train_tokenizer": 100, "tokenizer": None, **options}
    assert prepare_fails(capsys, **options).startswith(f"error: {options['source']}: no text to train on: {says}")
    assert not Path("out/tokenizer.json").exists()
    prepare(source="a.txt", val_docs=2)
    assert len(stored()) == 4 and len(stored("val")) == 8


def test_what_became_of_all_documents_is_said_when_none_is_left(capsys):
    write_files({"a.jsonl": b'\n{"body": "w1"}\n{"body": "w2"}\n{"text": " "}\n'})
    error = prepare_fails(capsys, source="a.jsonl", skip_bad_lines=9, tokenizer=None, train_tokenizer=100)
    says = "1 empty, 2 skipped as unreadable, the first was a.jsonl:2: no 'text' (keys: body; see --text_key)"
    assert error == f"error: a.jsonl: no text to train on: {says}\n"
    write_files({"e.txt": b""})
    assert "e.txt: no text to train on: its files are empty" in prepare_fails(capsys, source="e.txt", out="e")


@pytest.mark.parametrize(
    "contents, says",
    [
        (b"%PDF-1.4\n%\xe2\xe3\n", "b.txt: looks like a PDF, not UTF-8 text (convert it, or leave it out;"),
        (b"w1 w2\0\0\0\n", "b.txt: looks like a binary file, not UTF-8 text"),
        ("w1 w2\n".encode("utf-16"), "b.txt: looks like UTF-16, not UTF-8 text (iconv -f UTF-16 -t UTF-8 converts it;"),
        ("w1 w2\n".encode("utf-16-le"), "b.txt: looks like UTF-16LE, not UTF-8 text (iconv -f UTF-16LE -t UTF-8 converts it;"),
        ("w1 w2\n".encode("utf-16-be"), "b.txt: looks like UTF-16BE, not UTF-8 text (iconv -f UTF-16BE -t UTF-8 converts it;"),
        ("w1 w2\n".encode("utf-32"), "b.txt: looks like UTF-32, not UTF-8 text (iconv -f UTF-32 -t UTF-8 converts it;"),
        ("w1\ncaf\u00e9 w2\n".encode("latin-1"), "b.txt:2: not UTF-8: invalid continuation byte (Latin-1 or Windows-1252?"),
        ("\u043c\u0430\u043c\u0430 w1\n".encode("cp1251"), "b.txt:1: not UTF-8: invalid continuation byte (an older encoding, as GBK or"),
    ],
)
def test_what_is_no_text_is_named(capsys, contents, says):
    write_files({"a.txt": b"w3\nw4\n", "b.txt": contents, "c.txt": b"\n"})
    assert prepare_fails(capsys, source="?.txt", val_fraction=0).startswith(f"error: {says}")
    prepare(source="?.txt", val_fraction=0, skip_bad_lines=1)
    report, printed = text_report(), capsys.readouterr().out
    assert report["bad_lines_skipped"] == len(report["skipped"]) == 1 and "b.txt: 1 skipped, the first " in printed
    assert report["files_without_text"] == ["c.txt"] if contents.startswith(b"w1\n") else ["b.txt", "c.txt"]
    assert [3 + len(SPECIAL)] in stored()


def test_names_of_columns_are_never_skipped(capsys):
    """The second row was taken for them. A table that is no text can be skipped, beside others."""
    write_files({"a.csv": b"text\nw1\n", "b.csv": "gr\u00f6\u00dfe,text\n1,w2\n".encode("latin-1")})
    for lines in (0, 100):
        error = prepare_fails(capsys, source="?.csv", val_fraction=0, skip_bad_lines=lines)
        assert error.startswith("error: b.csv:1: not UTF-8: ") and "skip" not in error
    write_files({"b.csv": "text\nw2\n".encode("utf-16")})
    assert "--skip_bad_lines=100" in prepare_fails(capsys, source="?.csv", val_fraction=0)
    prepare(source="?.csv", val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w1"]


def test_old_mac_line_ends_are_named(capsys):
    """Such a file counted as one document."""
    write_files({"d/a.txt": b"w1\nw2\n", "d/b.txt": b"w3\rw4\rw5\r", "d/c.txt": b"w6\r"})
    says = "d/b.txt: a single line, with \\r inside: old Mac line ends (convert it: tr '\\r' '\\n' < FILE > NEW; or --doc_sep=file; --sk"
    for doc_sep in ("line", "blank"):
        assert prepare_fails(capsys, source="d", val_fraction=0, doc_sep=doc_sep).startswith(f"error: {says}")
    prepare(source="d", val_fraction=0, skip_bad_lines=1)
    assert texts_of(stored()) == ["w1", "w2", "w6"] and text_report()["skipped"][0].startswith("d/b.txt: a single line, with \\r")
    prepare(source="d", val_fraction=0, doc_sep="file", out="files")
    assert texts_of(stored(out="files")) == ["w1 w2", "w3 w4 w5", "w6"]


def test_skipped_lines_are_printed_by_file(capsys):
    skipped = [f"a.jsonl:{i}: bad (worse)" for i in range(7, 12)] + ["b.json: record 3: null", "c.txt: looks like a PDF (no)"]
    assert corpus_report.by_file(skipped, 9) == [
        "a.jsonl: 5 skipped, the first 7: bad (worse)", "b.json: 1 skipped, the first record 3: null",
        "c.txt: 1 skipped, the first looks like a PDF (no)", "and 2 more",
    ]  # fmt: skip


def test_samples_are_shown_of_several_files(capsys):
    """Three of the first file were shown."""
    write_texts("a.txt", ["w1 w2"] * 9)
    write_texts("b.txt", ["w1 w3"] * 9 + ["\u4e2d w3"])
    write_texts("c.txt", ["w1 \u0416 w3"] * 9)
    prepare(source="?.txt", val_fraction=0)
    assert [example["text"] for example in text_report()["decoded"]] == ["w1 \u0416 w3", "\u4e2d w3", "w1 w2"]


def test_a_damaged_finished_directory_is_not_called_finished(capsys):
    write_texts("a.txt", make_texts(20))
    prepare(source="a.txt", val_docs=2)
    (shard,) = Path("out").glob("train*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    error = prepare_fails(capsys, source="a.txt", val_docs=2)
    assert error.startswith(f"error: {shard}: ") and "(damaged: copy it again, or remove out and prepare it again, with --t" in error
    shutil.rmtree("out")
    prepare(source="a.txt", val_docs=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_what_is_kept(monkeypatch, capsys, number):
    write_texts("a.txt", make_texts(20))
    monkeypatch.setattr(prepare_c4, "process_unit", lambda *_: signal.raise_signal(number))
    with interrupted(number):
        prepare(source="a.txt")
    assert capsys.readouterr().err == "stopped; the same command goes on from 0 of 1 units of work\n"


def test_a_tokenizer_of_the_hub_without_a_connection(monkeypatch, capsys):
    """It took half a minute, and did not say what to do instead."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    write_texts("a.txt", make_texts(20))
    error = prepare_fails(capsys, source="a.txt", tokenizer="someone/nothing")
    assert error.startswith("error: someone/nothing: no such tokenizer, and it cannot be read from the hub: OSError: no network (")
    assert "--train_tokenizer=30000" in error and not os.path.exists("out")


def test_a_dictionary_in_parquet_takes_bounded_memory(monkeypatch, capsys):
    """A large cell that a dictionary stores once would be copied for every row of a batch."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(tables, "MAX_BATCH", 10_000)
    parquet.write_table(pyarrow.table({"id": range(300), "text": ["w1 " * 1000] * 300}), "a.parquet")
    sizes, real = [], parquet.ParquetFile.iter_batches

    def recorded(self, rows, **options):
        for batch in real(self, rows, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", recorded)
    cfg = SimpleNamespace(text_key="text", skip_bad_lines=0)
    (segment,) = sources.list_segments("a.parquet")
    assert sum(1 for _ in sources.documents(segment, cfg, Counter())) == 300 and max(sizes) < 11_000
    monkeypatch.setattr(sources, "MAX_TEXT", 2_000)
    assert "a.parquet:1: a text of more than 0.0 MB (split it" in prepare_fails(capsys, source="a.parquet")
