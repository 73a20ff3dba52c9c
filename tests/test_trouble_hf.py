"""Other people's models: the same tokens and numbers as transformers gives, or one line that names what is not supported."""

import json
import os
import pickle
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import checkpoint
from common.options import UserError
from common.vocabulary import load_tokenizer, read_tokenizer
from tests.toy import SPECIAL, make_run
from tools import convert_hf, fill_mask
from tools.hf import card, write
from tools.hf.read import read_hf

transformers = pytest.importorskip("transformers")

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéÉ中國ガカ:[],", "\u0301", "\u3099"]
WORDS = [*SPECIAL, "<x>", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
TEXTS = [*write.HARD_TEXTS, "École É 中國 ガ", "the <x> and <new>b [NEW]A <NEW> new news", " <new> [MASK]x [UNK]", "", "x" * 101]


def fails(capsys, main, *argv):
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    lines = [line for line in capsys.readouterr().err.split("\n")[:-1] if "it/s]" not in line]  # transformers' progress bars
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def foreign(path, *, json_file=True, cased=False, model_type="bert", files=(), **about):
    """A tokenizer's directory. about: what tokenizer_config.json holds; files: {name: contents}, of other JSON files."""
    path.mkdir()
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<x>", normalized=False)])
    if json_file:
        tokenizer.save(str(path / "tokenizer.json"))
    else:
        (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    for name, contents in {"config.json": {"model_type": model_type}, "tokenizer_config.json": about, **dict(files)}.items():
        (path / name).write_text(json.dumps(contents))
    return str(path)


NEW = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
FIRST = len(WORDS)
SETTINGS = {
    "nothing": {},
    "cased": {"do_lower_case": False},
    "cased_file": {"cased": True},
    "both_cased": {"cased": True, "do_lower_case": False},
    "accents": {"strip_accents": False},
    "cased_without_accents": {"do_lower_case": False, "strip_accents": True},
    "chinese": {"tokenize_chinese_chars": False},
    "plain_class": {"cased": True, "tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True},
    "no_bert": {"cased": True, "model_type": "mosaic_bert"},
    "vocabulary": {"json_file": False},
    "cased_vocabulary": {"json_file": False, "do_lower_case": False, "tokenize_chinese_chars": False},
    "decoder": {"added_tokens_decoder": {str(FIRST): NEW}},
    "decoder_plain": {"added_tokens_decoder": {str(FIRST): NEW}, "tokenizer_class": "TokenizersBackend"},
    "decoder_flags": {"added_tokens_decoder": {str(FIRST): {**NEW, "lstrip": True, "normalized": False, "single_word": True}}},
    "decoder_mask": {"added_tokens_decoder": {"4": {**NEW, "content": "[MASK]", "lstrip": True, "special": True}}},
    "added": {"files": {"added_tokens.json": {"[NEW]": FIRST + 1, "<new>": FIRST}}},
    "added_to_vocabulary": {"files": {"added_tokens.json": {"<new>": FIRST}}, "json_file": False},
    "special": {"additional_special_tokens": ["<new>"]},
    "special_map": {"files": {"special_tokens_map.json": {"additional_special_tokens": ["<new>"]}}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_transformers(tmp_path, name):
    path = foreign(tmp_path / "model", **SETTINGS[name])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours, _ = load_tokenizer("ours", read_tokenizer(path))
    assert len(theirs) == ours.get_vocab_size()
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_file_that_says_everything_stays_as_it_is(tmp_path):
    path = foreign(tmp_path / "model")
    text = (tmp_path / "model/tokenizer.json").read_text()
    assert read_tokenizer(path) == read_tokenizer(f"{path}/tokenizer.json") == text


def test_a_setting_that_wins_over_the_file_is_printed(tmp_path, capsys):
    read_tokenizer(foreign(tmp_path / "model", cased=True))
    assert 'normalizer set as BertTokenizer has them: "do_lower_case": true' in capsys.readouterr().out


@pytest.mark.parametrize(
    "about, says",
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class is 'BertJapaneseTokenizer'"),
        ({"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}, "tokenizer_class is {'AutoTok"),
        ({"cls_token": "<s>"}, "cls_token is '<s>'"),
        ({"files": {"special_tokens_map.json": {"mask_token": {"content": "<mask>"}}}}, "mask_token is '<mask>'"),
        ({"do_lower_case": "yes"}, "do_lower_case is 'yes'"),
        ({"added_tokens_decoder": {"200": NEW}}, f"'<new>' has id 200, but would get {FIRST}"),
        ({"added_tokens_decoder": {"x": NEW}}, "added tokens cannot be read"),
        ({"added_tokens_decoder": []}, "added tokens cannot be read"),
        ({"files": {"added_tokens.json": {"<new>": None}}}, "added tokens cannot be read"),
        ({"files": {"tokenizer_config.json": []}}, "tokenizer_config.json: holds a list"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, about, says):
    with pytest.raises(UserError) as error:
        read_tokenizer(foreign(tmp_path / "model", **about))
    assert says in str(error.value)


def make_bert(path, cls=transformers.BertForMaskedLM, **options):
    """A random BERT with a tokenizer, as on the hub. options: of its BertConfig."""
    foreign(path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = cls(transformers.BertConfig(vocab_size=len(WORDS), **sizes, **options)).eval()
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    "options, says",
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, options, says):
    make_bert(tmp_path / "model", **options)
    with pytest.raises(UserError, match=says):
        read_hf(str(tmp_path / "model"))


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@pytest.mark.parametrize("name", [*SIZES, "hidden_dropout_prob"])
def test_strange_sizes(tmp_path, name):
    make_bert(tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    values = [-1, 10**9, 10**30, 32.5, True, None, "32", [], float("nan")]
    for value in values if name == "hidden_dropout_prob" else [0, *values]:
        path.write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError, match="config.json"):
            read_hf(str(tmp_path / "model"))


def test_half_precision_is_read_as_it_is_stored(tmp_path, check_in_process):
    make_bert(tmp_path / "model").half().save_pretrained(tmp_path / "model")
    convert_hf.main([f"--from_hf={tmp_path / 'model'}", f"--out={tmp_path / 'run'}"])


def test_the_encoder_of_a_question_answerer(tmp_path, capsys):
    make_bert(tmp_path / "model", transformers.BertForQuestionAnswering)
    convert_hf.main([f"--from_hf={tmp_path / 'model'}", f"--out={tmp_path / 'run'}"])
    printed = capsys.readouterr().out
    assert "dropped its question-answering head" in printed and "self-check in transformers" in printed


@pytest.fixture
def check_in_process(monkeypatch):
    """Run the self-check here: a process of its own spends seconds on importing transformers."""
    from tools.hf import self_check

    def run(argv, **_):
        try:
            self_check.main(*argv[-2:])
        except AssertionError as error:
            return subprocess.CompletedProcess(argv, 1, "", f"AssertionError: {error}")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(write, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))


def test_an_import_is_compared_with_transformers(tmp_path, capsys, monkeypatch, check_in_process):
    make_bert(tmp_path / "model")
    argv = [f"--from_hf={tmp_path / 'model'}", f"--out={tmp_path / 'run'}"]
    monkeypatch.setattr(convert_hf, "read_hf", lambda path, **_: (*read_hf(path)[:2], read_tokenizer(cased)))
    cased = foreign(tmp_path / "cased", do_lower_case=False)  # as if a setting had been missed
    assert "in transformers, " in fails(capsys, convert_hf.main, *argv) and not (tmp_path / "run").exists()

    def other_numbers(path, **_):
        config, tensors, text = read_hf(path)
        tensors["bert.embeddings.position_embeddings.weight"][1] *= 1.1
        return config, tensors, text

    monkeypatch.setattr(convert_hf, "read_hf", other_numbers)
    assert "outputs may differ by at most" in fails(capsys, convert_hf.main, *argv) and not (tmp_path / "run").exists()
    monkeypatch.setattr(convert_hf, "read_hf", read_hf)
    convert_hf.main(argv)
    assert "same tokens; " in capsys.readouterr().out and (tmp_path / "run").exists()


def make_sentence_model(path, pooling=None, modules=("Transformer", "Pooling"), **about):
    theirs = make_bert(path, transformers.BertModel)
    (path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{name}"} for name in modules]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps(pooling or {"pooling_mode_cls_token": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps(about))
    return theirs


def test_sentence_vectors_are_those_of_the_model(tmp_path, check_in_process):
    """CLS pooling, normalization and the longest text are sentence-transformers', in --embed and in an export."""
    modules = ("Transformer", "Pooling", "Normalize")
    theirs = make_sentence_model(tmp_path / "model", modules=modules, max_seq_length=6)
    run = str(tmp_path / "run")
    convert_hf.main([f"--from_hf={tmp_path / 'model'}", f"--out={run}"])
    texts = ["a b", "École a b c d e f g h"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    fill_mask.main([f"--checkpoint={run}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text, vector in zip(texts, np.load(tmp_path / "v.npy")):
        ids = tokenizer(text, truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(theirs(**ids).last_hidden_state[:, 0])[0]
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)
    config, _, _ = checkpoint.load(run)
    files = write.sentence_files(config)
    assert [module["type"].rpartition(".")[2] for module in files["modules.json"]] == list(modules)
    assert files["1_Pooling/config.json"]["pooling_mode_cls_token"] is True
    assert files["1_Pooling/config.json"]["pooling_mode_mean_tokens"] is False
    assert files["sentence_bert_config.json"]["max_seq_length"] == 6


@pytest.mark.parametrize(
    "options, says",
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "need max"),
        ({"pooling": {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}}, "need max+mean"),
        ({"modules": ("Transformer", "Pooling", "Dense")}, "need cls+Dense"),
        ({"do_lower_case": True}, "need cls+do_lower_case"),
    ],
)
def test_other_sentence_vectors_are_refused(tmp_path, capsys, check_in_process, options, says):
    make_sentence_model(tmp_path / "model", **options)
    convert_hf.main([f"--from_hf={tmp_path / 'model'}", f"--out={tmp_path / 'run'}"])
    (tmp_path / "texts.txt").write_text("a\n")
    argv = [f"--checkpoint={tmp_path / 'run'}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"]
    assert f"its vectors {says}, of sentence-transformers" in fails(capsys, fill_mask.main, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files


def save_pickle(path, entries):
    os.remove(path / "model.safetensors")
    torch.save(entries, path / "pytorch_model.bin")


class Huge:
    """Its pickle asks NumPy for an array of a petabyte."""

    def __reduce__(self):
        return (np.ndarray, ((10**15,), np.dtype("uint8")))


def deep_pickle(path):
    """A list in a list in a list ..., 100,000 times."""
    contents = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", contents)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


@pytest.mark.parametrize(
    "entries, says",
    [
        ({1: torch.ones(1), "a": torch.ones(1)}, "no {name: tensor} dictionary"),
        ({"a": torch.ones(1).expand(10**12)}, "no {name: tensor} dictionary"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "no {name: tensor} dictionary"),
        ({"a": torch.ones(2, 2).to_sparse()}, "not weights alone|no {name: tensor} dictionary"),
        ({"a": Huge()}, "not weights alone|no {name: tensor} dictionary"),
        ({"state": {"model": {}, "integrations": 5}}, "of 0 weights in all"),
        ({"state": {"model": {}, "integrations": {"huggingface": {"model": []}}}}, "of 0 weights in all"),
        ([], "no {name: tensor} dictionary"),
    ],
)
def test_hostile_pickles(tmp_path, entries, says):
    make_bert(tmp_path / "model")
    save_pickle(tmp_path / "model", entries)
    with pytest.raises(UserError, match=says):
        read_hf(str(tmp_path / "model"), allow_pickle=True)


def test_a_tokenizer_that_is_not_the_models_own_is_refused(tmp_path):
    """Its own, given once more, is none; another with as many entries would turn every word into another."""
    make_bert(tmp_path / "model")
    read_hf(str(tmp_path / "model"), tokenizer=str(tmp_path / "model"))
    words = Tokenizer.from_str(read_hf(str(tmp_path / "model"))[2]).get_vocab()
    order = sorted(words, key=words.get)
    order[-1], order[-2] = order[-2], order[-1]
    (tmp_path / "other.txt").write_text("\n".join(order))
    with pytest.raises(UserError, match="^--tokenizer=.*other.txt: not that of .*model, which has its own [(]leave"):
        read_hf(str(tmp_path / "model"), tokenizer=str(tmp_path / "other.txt"))


def test_a_deep_pickle(tmp_path):
    make_bert(tmp_path / "model")
    os.remove(tmp_path / "model/model.safetensors")
    deep_pickle(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(UserError, match="no {name: tensor} dictionary|not weights alone"):
        read_hf(str(tmp_path / "model"), allow_pickle=True)
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps({1: 2}))
    with pytest.raises(UserError, match="no {name: tensor} dictionary|not weights alone"):
        read_hf(str(tmp_path / "model"), allow_pickle=True)


DEEP = "[" * 100_000


@pytest.mark.parametrize("contents", ["[]", "3", DEEP, '{"a": ' + DEEP, "\x00", ""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "added_tokens.json", "modules.json"])
def test_strange_json(tmp_path, capsys, name, contents):
    if not (tmp_path / "model").exists():
        make_bert(tmp_path / "model")
    (tmp_path / "model" / name).write_text(contents)
    if (name, contents) == ("modules.json", "[]"):
        read_hf(str(tmp_path / "model"))
        return
    error = fails(capsys, convert_hf.main, f"--from_hf={tmp_path / 'model'}", f"--out={tmp_path / 'run'}")
    assert name in error and len(error) < 1000


def test_paths_that_are_nearly_right(tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    run = make_run(tmp_path / "out/smoke")
    monkeypatch.chdir(tmp_path)
    file = checkpoint.find("out/smoke") + "/model.safetensors"
    assert f"{file}: a file (give its directory" in fails(capsys, fill_mask.main, f"--checkpoint={file}", "--text=[MASK]")
    assert "did you mean out/smoke?" in fails(capsys, fill_mask.main, "--checkpoint=out/smok", "--text=[MASK]")
    assert "did you mean out/smoke?" in fails(capsys, convert_hf.main, "--from_hf=out/smok", "--out=x")
    assert "out/other: no such directory" in fails(capsys, convert_hf.main, "--from_hf=out/other", "--out=x")
    for path in (file, os.path.dirname(file), run):
        says = f"{run} is a run of this project: it needs" if path == run else "a checkpoint of this project (it needs no conversion"
        assert says in fails(capsys, convert_hf.main, f"--from_hf={path}", "--out=x")


@pytest.mark.parametrize("text", ["a [MASK] \ud800", os.fsdecode(b"caf\xe9 [MASK]")])
def test_text_outside_utf8(tmp_path, capsys, text):
    run = make_run(tmp_path / "run")
    assert "--text: not UTF-8" in fails(capsys, fill_mask.main, f"--checkpoint={run}", f"--text={text}")
    (tmp_path / "texts.txt").write_bytes(b"w1\n" + text.encode(errors="surrogatepass") + b"\nw2\n")
    argv = [f"--checkpoint={run}", f"--embed={tmp_path}/texts.txt", f"--out={tmp_path}/v.npy"]
    assert "texts.txt:2: not UTF-8" in fails(capsys, fill_mask.main, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# Exports


def test_an_export_removes_nothing(tmp_path, check_in_process):
    """Neither OUT.tmp, which is the user's, nor anything else beside it."""
    (tmp_path / "exported.tmp").mkdir()
    (tmp_path / "exported.tmp/thesis.txt").write_text("mine")
    run = make_run(tmp_path / "run")
    convert_hf.main([f"--to_hf={run}", f"--out={tmp_path / 'exported'}"])
    assert (tmp_path / "exported.tmp/thesis.txt").read_text() == "mine"
    assert not [name for name in os.listdir(tmp_path / "exported") if name.startswith("partial")]
    assert sorted(os.listdir(tmp_path)) == ["exported", "exported.tmp", "run"]


def write_log(run, records, cut=0):
    text = "".join(json.dumps(record) + "\n" for record in records)
    with open(f"{run}/log.jsonl", "w") as file:
        file.write(text[: len(text) - cut])


def card_of(run, path, out):
    cfg = convert_hf.ConvertConfig(to_hf=path, out=out)
    return card.model_card(cfg, checkpoint.load(run)[0], None)


@pytest.mark.parametrize("contents", ["[]", "{}", '{"tasks": {"cola": 3}}', DEEP])
def test_a_strange_glue_file_for_the_card(tmp_path, contents):
    run = make_run(tmp_path / "run")
    (tmp_path / "glue.json").write_text(contents)
    cfg = convert_hf.ConvertConfig(to_hf=run, out="exported", glue=f"{tmp_path}/glue.json")
    with pytest.raises(UserError, match="glue.json: "):
        card.model_card(cfg, checkpoint.load(run)[0], None)


def test_a_card_is_of_its_checkpoint(tmp_path, capsys):
    """An older checkpoint does not carry the run's last figures, and none at all where the log has no line for it."""
    run = make_run(tmp_path / "run")
    path = checkpoint.find(run)
    state = json.loads(open(f"{path}/state.json").read()) if os.path.exists(f"{path}/state.json") else {}
    step = checkpoint.step_of(path)
    state |= {"step": step, "tokens": 1234, "gpu_seconds": 7200}
    texts = {"state.json": json.dumps(state), "config.json": open(f"{path}/config.json").read()}
    texts["tokenizer.json"] = open(f"{path}/tokenizer.json").read()
    tensors = checkpoint.load(path)[1]
    checkpoint.save(run, step, {"model.safetensors": tensors}, texts)
    config = {"price_per_gpu_hour": 2.5, "data_dir": "here", "global_batch_size": 16}
    later = [
        {"event": "start", "config": {**config, "data_dir": "elsewhere"}, "resumed_from": path, "device": "later"},
        {"event": "train", "step": step + 1, "tokens": 99999, "gpu_hours": 88.0, "dollars": 220.0},
        {"event": "eval", "step": step + 1, "loss": 0.5, "accuracy": 0.9},
    ]
    log = [{"event": "start", "config": config, "resumed_from": None, "device": "then", "world_size": 2}]
    write_log(run, [*log, {"event": "eval", "step": step, "loss": 3.25, "accuracy": 0.25}, *later])
    card = card_of(run, path, str(tmp_path / "exported"))
    for row in ("tokens seen | 1,234", f"steps | {step:,} of 16", "masked | 3.2500", "GPU-hours | 2.00", "dollars | 5.00"):
        assert row in card
    assert "| data | here |" in card and "| hardware | then, 2 process(es) |" in card
    write_log(run, [{**log[0], "device": "x86_64"}])
    assert "| CPU-hours | 2.00 |" in card_of(run, path, str(tmp_path / "exported"))
    write_log(run, [*log, *later])
    card = card_of(run, path, str(tmp_path / "exported"))
    assert "masked | not known" in card and "held-out accuracy | not known" in card and "| hardware | then" in card
    capsys.readouterr()
    write_log(run, [*log, *later], cut=20)  # by a kill, or a full disk
    assert "masked | not known" in card_of(run, path, str(tmp_path / "exported"))
    assert "log.jsonl: its last line was cut" in capsys.readouterr().out
