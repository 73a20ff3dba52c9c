"""RoBERTa: imported, trained, fine-tuned, asked and exported, with the logits and tokens of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import checkpoint
import data
import prepare_c4
import train
from common.encoded import encode
from common.labelled import Examples
from common.options import UserError
from common.vocabulary import ROBERTA_TOKENS, load_tokenizer
from finetune_glue import load_classifier
from model import ModelConfig
from tests.toy import flags
from tools import convert_hf, fill_mask, finetune_own
from tools.hf.read import read_hf

transformers = pytest.importorskip("transformers")

TEXT = ["The cat sat on the mat.", "A dog, a cat and 12 naïve mice: Überraschung!", "the  mat sat\non 中文 the dog's tail"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "layer_norm_eps": 1e-3}


def roberta_tokenizer(path, special=("<s>", "<pad>", "</s>", "<unk>", "<mask>"), space=False):
    """RoBERTa's tokenizer.json, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(space), decoders.ByteLevel()
    special = [AddedToken(token, lstrip=token == "<mask>", normalized=False, special=True) for token in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 30, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    ids = {name: tokenizer.token_to_id(name) for name in ("</s>", "<s>")}
    tokenizer.post_processor = processors.RobertaProcessing(*ids.items(), trim_offsets=True, add_prefix_space=space)
    tokenizer.save(str(path))


def save_roberta(path, cls="RobertaForMaskedLM", **config):
    """A RoBERTa with weights so large, and an eps so large, that a difference shows. Returns transformers' model."""
    torch.manual_seed(0)
    path.mkdir(parents=True)
    roberta_tokenizer(path / "tokenizer.json")
    vocab_size = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    config = {"vocab_size": vocab_size, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-3, **config}
    model = getattr(transformers, cls)(transformers.RobertaConfig(**SIZE, **config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight * 4 if weight.ndim == 2 else weight + torch.randn_like(weight) * 0.1)
        model.base_model.embeddings.position_embeddings.weight[1] = 100.0  # of <pad>, which has no position here
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """(transformers' model, its directory, the run made from it)"""
    path = tmp_path_factory.mktemp("roberta")
    theirs = save_roberta(path / "hf")
    convert_hf.main([f"--from_hf={path / 'hf'}", f"--out={path / 'run'}"])
    return theirs, path / "hf", path / "run"


def test_logits_are_those_of_transformers(roberta):
    theirs, hf, run = roberta
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(hf), checkpoint.load_model(str(run))
    texts = [(TEXT[0], None), (TEXT[1], TEXT[2]), ("a", "the <mask> cat"), ("dog " * 300, None), ("", "")]
    for pair in texts:
        batch = tokenizer(*pair, return_tensors="pt")
        with torch.no_grad():
            expected = theirs(**batch).logits
        found = ours.logits(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item() / 10))


def test_a_wrong_eps_or_position_would_show(roberta):
    """What the comparison above allows is far below what an ignored setting changes."""
    theirs, _, run = roberta
    (config, tensors, _), ids = checkpoint.load(str(run)), torch.arange(5, 45)[None]
    position = "bert.embeddings.position_embeddings.weight"
    for wrong in ((config | {"layer_norm_eps": 1e-12}, tensors), (config, tensors | {position: tensors[position].roll(1, 0)})):
        found = checkpoint.make_masked_lm(*wrong, "run").logits(ids, torch.ones_like(ids))
        assert (found - theirs(ids).logits).abs().max() > 1e-2


def test_fine_tuning_joins_texts_as_roberta_does(roberta):
    theirs = transformers.AutoTokenizer.from_pretrained(roberta[1])
    ours = load_tokenizer(*checkpoint_tokenizer(roberta[2]))[0]
    texts = [("the cat",), ("the <mask> mat", " a dog"), ("dog " * 9, "cat " * 30), ("", "a")]
    encoded = encode(Examples(texts), ours, 24, "texts", -1)
    for text, start, length in zip(texts, encoded.starts, encoded.lengths):
        expected = theirs(*text, truncation="longest_first", max_length=24)["input_ids"]
        assert encoded.ids[start : start + length].tolist() == expected
    assert not encoded.types.any()


def checkpoint_tokenizer(run):
    return str(run), checkpoint.load(str(run))[2]


def test_everything_a_run_is_for(roberta, tmp_path, capsys, monkeypatch):
    """Prepare with its tokenizer, continue, fine-tune on pairs, predict, fill a mask, and export both."""
    theirs, hf, run = roberta
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n\n".join(f"{text} {i}" for i, text in enumerate(TEXT * 30)))
    for number, source in enumerate((run, hf)):
        prepare_c4.main(["--source=a.txt", f"--out=d{number}", f"--tokenizer={source}", "--val_docs=10", "--workers=1"])
    assert Path("d0/tokenizer.json").read_text() == Path("d1/tokenizer.json").read_text() == (hf / "tokenizer.json").read_text()

    samples = data.Samples("d0", "train", 16)
    batch = samples.micro_batch(np.arange(8), np.zeros(8, np.int64), 0, 0.5)
    ids, starts = batch.input_ids, batch.cu_seqlens[:9].long()
    assert set(ids[starts[:-1]].tolist()) == {0} and set(ids[starts[1:] - 1].tolist()) == {2}  # <s> text </s>
    assert (ids[batch.num_tokens :] == 1).all()  # <pad>
    assert (ids[batch.masked_positions[: batch.num_masked]] == 4).any()  # <mask>

    argv = flags({**TINY, "data_dir": "d0", "max_steps": 30, "global_batch_size": 16, "seq_length": 32, "lr": 3e-3})
    argv = ["configs/bert_base.py", *argv, f"--init_from={run}", "--out_dir=on", "--device=cpu", "--eval_interval=30"]
    argv[0] = str(Path(train.__file__).parent / argv[0])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([arg for arg in argv if "layer_norm_eps" not in arg])
    assert "layer_norm_eps is 0.001, but this run has 1e-12 (set --layer_norm_eps=0.001)" in capsys.readouterr().err
    train.main(argv)
    losses = [record["loss"] for record in map(json.loads, open("on/log.jsonl")) if record["event"] == "train"]
    assert losses[-1] < losses[0] - 0.5

    fill_mask.main(["--checkpoint=on", "--text=The<mask> sat on the mat."])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-6] == "The<mask> sat on the mat." and len(printed[-1].split()) == 2
    with pytest.raises(SystemExit):
        fill_mask.main(["--checkpoint=on", "--text=The [MASK] sat"])
    assert "--text: no <mask> in the" in (error := capsys.readouterr().err) and "(write <mask> for the word" in error

    rows = [f"{text[:30]}\t{TEXT[i % 2][:20]}\t{i % 2}" for i, text in enumerate(TEXT * 20)]
    Path("l.tsv").write_text("\n".join(["a\tb\tlabel", *(row.replace("\n", " ") for row in rows)]))
    argv = ["--checkpoint=on", "--train_file=l.tsv", "--val_file=l.tsv", "--text_columns=a,b", "--label_column=label"]
    finetune_own.main([*argv, "--out=f", "--max_length=32", "--epochs=1", "--device=cpu"])

    export_and_compare("on", "lm", transformers.AutoModelForMaskedLM)
    assert f"| continued from | {run}, whose data and steps are not counted here |" in Path("lm/README.md").read_text()
    classifier = export_and_compare("f/model", "labels", transformers.AutoModelForSequenceClassification)
    tokenizer = transformers.AutoTokenizer.from_pretrained("labels")
    assert tokenizer("a", "the cat")["input_ids"] == transformers.AutoTokenizer.from_pretrained(hf)("a", "the cat")["input_ids"]
    encoded = encode(Examples([("a", "the cat")]), load_tokenizer(*checkpoint_tokenizer("f/model"))[0], 24, "texts", -1)
    ours = load_classifier("f/model").eval()(encoded.batch(np.arange(1), torch.device("cpu")))
    torch.testing.assert_close(classifier(**tokenizer("a", "the cat", return_tensors="pt")).logits, ours, rtol=0, atol=1e-5)
    convert_hf.main(["--from_hf=lm", "--out=again"])  # what was exported, a BERT, is a run again
    (_, before, _), (config, after, _) = checkpoint.load("on"), checkpoint.load("again")
    assert config["layer_norm_eps"] == 1e-3 and all(torch.equal(before[name], after[name]) for name in after)


def export_and_compare(run, out, auto):
    """transformers' model of an export, whose check has compared logits."""
    convert_hf.main([f"--to_hf={run}", f"--out={out}"])
    model = auto.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token == "<mask>" and tokenizer.pad_token_id == model.config.pad_token_id == 1
    return model


def test_encoders_and_old_checkpoints(tmp_path):
    theirs = save_roberta(tmp_path / "hf", "RobertaModel")
    config, tensors, _ = read_hf(str(tmp_path / "hf"))
    assert "bert.pooler.dense.weight" in tensors and not any(name.startswith("cls.") for name in tensors)
    assert theirs.config.layer_norm_eps == config.pop("layer_norm_eps") == 1e-3
    assert checkpoint.model_config(config).layer_norm_eps == 1e-12  # those written before it was stored


def test_the_published_tokenizer_file(tmp_path):
    """It was written before `use_regex`; tokenizer_config.json says little."""
    save_roberta(tmp_path / "hf")
    contents = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    assert contents["pre_tokenizer"].pop("use_regex")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(contents))
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    convert_hf.main([f"--from_hf={tmp_path / 'hf'}", f"--out={tmp_path / 'run'}"])


def change(**fields):
    def apply(path):
        hf = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**hf, **fields}))

    return apply


@pytest.mark.parametrize(
    "spoil, says",
    [
        (change(type_vocab_size=2), "type_vocab_size is 2 .only 1 is supported"),
        (change(max_position_embeddings=512), "max_position_embeddings is 512 .only 514"),
        (change(pad_token_id=0), "pad_token_id is 0 .only 1"),
        (change(layer_norm_eps=0), "config.json: layer_norm_eps=0: must be above 0"),
        (change(hidden_act="relu"), "hidden_act is 'relu'"),
        (change(model_type="xlm-roberta"), "model_type is 'xlm-roberta' .*would take a SentencePiece tokenizer"),
        (change(model_type="camembert"), "model_type is 'camembert' .*would take a SentencePiece tokenizer"),
        (change(model_type="xlm-roberta-xl"), "model_type is 'xlm-roberta-xl' .*would take LayerNorms before the layers"),
        (lambda path: roberta_tokenizer(path / "tokenizer.json", ROBERTA_TOKENS), "the id of <pad> is 0"),
        (
            lambda path: roberta_tokenizer(path / "tokenizer.json", space=True),
            "RobertaTokenizer would not be what tokenizer.json is .*add_prefix_space False",
        ),
        (
            lambda path: roberta_tokenizer(path / "tokenizer.json", ["<s>", "<pad>", "</s>", "<unk>"]),
            "has no .PAD. token",
        ),
        (
            lambda path: (path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"})),
            "mask_token is '.MASK.' .only '<mask>' is supported",
        ),
    ],
)
def test_what_is_no_roberta(tmp_path, spoil, says):
    save_roberta(tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError, match=says):
        read_hf(str(tmp_path / "hf"))


def test_mosaicbert_keeps_its_eps():
    with pytest.raises(UserError, match="layer_norm_eps=1e-05: MosaicBERT's is 1e-12"):
        ModelConfig(layer_norm_eps=1e-5).check_model()
