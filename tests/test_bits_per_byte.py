"""tools/bits_per_byte.py: the same words for every model, all their tokens scored, and what is refused."""

import math
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch

from common import vocabulary
from tests.corpus import workplace, write_texts, write_vocab  # noqa: F401
from tests.toy import SPECIAL, make_run, reseal
from tools import bits_per_byte

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,"]
WHOLE = ["alpha", "beta", "gamma"]


def make_reader(path, entries):
    """A run with random weights, and a WordPiece vocabulary of 100 entries: these, then fillers."""
    make_run(path)
    write_vocab([*entries, *(f"x{i}" for i in range(100 - len(entries)))], "entries.txt")
    text = vocabulary.read_tokenizer("entries.txt")
    checkpoint = next(path.glob("step_*"))
    for place in (path, checkpoint):
        (place / "tokenizer.json").write_text(text)
    reseal(checkpoint)
    return bits_per_byte.Reader(str(path), torch.device("cpu"))


TEXT = "Alpha, beta.gamma zz"
WORDS = [match.span() for match in bits_per_byte.WORD.finditer(TEXT)]


def test_tokens_belong_to_their_words(tmp_path):
    pieces, whole = make_reader(tmp_path / "pieces", PIECES), make_reader(tmp_path / "whole", [*PIECES, *WHOLE][:100])
    assert [TEXT[a:b] for a, b in WORDS] == ["Alpha", "beta", "gamma", "zz"]
    ids, owners, unfit = pieces.read(TEXT, WORDS)
    assert owners.tolist() == [-1] + [0] * 5 + [-1] + [1] * 4 + [-1] + [2] * 5 + [3] * 2 + [-1] and not unfit
    assert len(ids) == len(owners) and ids[0] == SPECIAL.index("[CLS]") and ids[-1] == SPECIAL.index("[SEP]")
    assert whole.read(TEXT, WORDS)[1].tolist() == [-1, 0, -1, 1, -1, 2, 3, 3, -1]
    # An unknown word, and one that gives no token, cannot be scored.
    _, _, unfit = pieces.read("alpha \u4e2d \u0301 zz", [(0, 5), (6, 7), (8, 9), (10, 12)])
    assert unfit == {1, 2}


def test_the_same_words_are_chosen_whatever_the_tokenizer():
    """A hash of the text and the word's index chooses them: 15 %, within 5 standard deviations."""
    texts = [f"text number {i}" for i in range(2000)]
    chosen = [bits_per_byte.choose_words(text, 20, 0.15) for text in texts]
    assert chosen == [bits_per_byte.choose_words(text, 20, 0.15) for text in texts]
    assert abs(sum(map(len, chosen)) / 40_000 - 0.15) < 5 * (0.15 * 0.85 / 40_000) ** 0.5
    assert len({tuple(words) for words in chosen}) > 500 and len({word for words in chosen for word in words}) == 20


def test_the_score_is_the_cross_entropy_of_every_token_of_a_masked_word(tmp_path):
    reader = make_reader(tmp_path / "run", PIECES)
    ids, owners, _ = reader.read(TEXT, WORDS)
    expected = 0.0
    for fit in ([0, 3], [1]):
        masked = np.isin(owners, fit)
        inputs = torch.tensor(np.where(masked, SPECIAL.index("[MASK]"), ids))[None]
        log_p = reader.model.logits(inputs, torch.ones_like(inputs))[0].log_softmax(-1)
        expected -= sum(log_p[i, ids[i]].item() for i in np.flatnonzero(masked)) / math.log(2)
    reader.score([(ids, np.isin(owners, [0, 3])), (ids, np.isin(owners, [1]))])
    assert reader.tokens == 5 + 2 + 4 and reader.bits == pytest.approx(expected, rel=1e-4)


def test_command_line(tmp_path, capsys):
    make_reader(tmp_path / "pieces", PIECES)
    make_reader(tmp_path / "whole", [*PIECES, *WHOLE])
    write_texts("a.txt", ["alpha beta gamma zz alpha beta " * 5, "zz", " ".join(f"alpha beta gamma beta \u4e2d {c}" for c in LETTERS)])
    bits_per_byte.main(["--checkpoints=pieces, whole", "--files=a.txt", "--words=6", "--mask_prob=0.5", "--split=alphabet"])
    read, head, *lines = capsys.readouterr().out.splitlines()
    assert read == "3 documents, 187 words: 1 fill no passage (1 documents have fewer than 6), 0 passages have no word to score"
    assert "in 31 passages of 6 words" in head and " 0 passages left out" in head and "(0 words" not in head
    assert lines[0].endswith(" tokens a word: pieces") and lines[2].endswith(" tokens a word: whole")
    assert lines[1].split() == ["alphabet:", "a", *(f"##{letter}" for letter in "lphabet")] and "bits per byte" in lines[0]
    bits_per_byte.main(["--checkpoints=whole", "--files=a.txt", "--words=6", "--max_tokens=8"])
    assert " 5 passages left out" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["मैंने किताब पढ़ी बाज़ार में", "Đội bóng mượn đồ cũ", "שָׁלוֹם לְךָ יֶלֶד טוֹב מְאֹד"])
def test_vowel_signs_and_accents_belong_to_their_words(workplace, line):  # noqa: F811
    """Each cut a word in two: of 130 Hindi words six pieces were scored, and decomposed text had other words."""
    for form in ("NFC", "NFD"):
        write_texts(f"{form}.txt", [unicodedata.normalize(form, f"{line} " * 26)])
        cfg = bits_per_byte.BitsConfig(files=f"{form}.txt", words=5)
        passages = list(bits_per_byte.text_passages(cfg, stats := Counter()))
        assert stats["words read"] == 130 and len(passages) == 26
        assert {text for text, _ in passages} == {unicodedata.normalize("NFC", line)}
        assert [text[a:b] for text, words in passages[:1] for a, b in words] == unicodedata.normalize("NFC", line).split()


def test_every_word_is_in_a_passage_or_counted(tmp_path, capsys):
    """Of 70 documents, 68 of them short, two passages were scored, and nothing was said of the rest."""
    reader = make_reader(tmp_path / "run", PIECES)
    write_texts("a.txt", ["alpha " * 5, "beta " * 13, "", *(f"{letter} beta gamma alpha beta gamma" for letter in LETTERS)])
    cfg = bits_per_byte.BitsConfig(files="a.txt", words=6)
    counts = bits_per_byte.compare(cfg, [reader])
    assert counts["documents"] == 28 and counts["short documents"] == 1 and counts["words read"] == 5 + 13 + 26 * 6
    assert counts["words outside"] == 5 + 1 and counts["passages without"] > 0
    assert 6 * (counts["passages"] + counts["passages without"]) + counts["words outside"] == counts["words read"]
    bits_per_byte.main(["--checkpoints=run", "--files=a.txt", "--words=6"])
    assert capsys.readouterr().out.startswith("28 documents, 174 words: 6 fill no passage (1 documents have fewer than 6), ")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--files=a.txt"], "--checkpoints: not given"),
        (["--checkpoints=run"], "--files: not given"),
        (["--checkpoints=run", "--files=a.txt", "--mask_prob=1"], "words=64, mask_prob=1.0: must be at least 1"),
        (["--checkpoints=nowhere", "--files=a.txt"], "nowhere: no such directory (expected a run or step_* directory"),
        (["--checkpoints=.", "--files=a.txt"], ".: no checkpoint here (did you mean ./run?)"),
        (["--checkpoints=run", "--files=no.txt"], "no.txt: no such source"),
        (["--checkpoints=run", "--files=a.txt", "--split=\udcff"], "split='\\udcff': has characters that are not text"),
        (["--checkpoints=run", "--files=b.jsonl,c.jsonl", "--skip_bad_lines=1"], "c.jsonl:1: not valid JSON"),  # the second in all
        (["--checkpoints=run", "--files=a.txt"], "a.txt: no passage of 64 words that all models can read (try --words=16)"),
        (["--checkpoints=run", "--files=a.txt", "--words=16"], "a.txt: no passage of 16 words that all models can read (try --words=4)"),
        (["--checkpoints=run", "--files=a.txt", "--words=3"], "a.txt: no passage of 3 words that all models can read (words are what blanks and punctuation separate)"),
    ],
)
def test_refused(tmp_path, capsys, argv, says):
    for name, texts in {"a.txt": ["alpha beta"], "b.jsonl": ["{"], "c.jsonl": ["{"]}.items():
        write_texts(name, texts)
    make_reader(tmp_path / "run", PIECES)
    with pytest.raises(SystemExit) as stopped:
        bits_per_byte.main(argv)
    error = capsys.readouterr().err
    assert ("already skipped: 1; --skip_bad_lines=100" in error) == ("--skip_bad_lines=1" in argv)
    assert stopped.value.code == 2 and error.startswith(f"error: {says}") and error.count("\n") == 1


def test_more_tokens_than_a_bert_has_positions(tmp_path, workplace, capsys):  # noqa: F811
    make_run(tmp_path / "bert", "bert")
    with pytest.raises(SystemExit):
        bits_per_byte.main([f"--checkpoints={tmp_path}/bert", "--files=a.txt", "--max_tokens=600"])
    assert "max_tokens=600: " in capsys.readouterr().err
