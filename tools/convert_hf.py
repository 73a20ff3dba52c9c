"""Hugging Face in and out: the one reader and the one writer of foreign weights.

    python convert_hf.py --from_hf=google-bert/bert-base-uncased --out=out/bert
    python convert_hf.py --to_hf=out/base --out=exported

In: BERT of any size and MosaicBERT, as a run directory that train.py, finetune_glue.py and fill_mask.py start from. They
read a directory in Hugging Face's form directly, too. Out: a directory that stock transformers opens, MosaicBERT with
trust_remote_code=True (its code is in hf/), BERT without. Every export is checked in a process that has transformers
alone.

Read next: hf/modeling_mosaic_bert.py
"""

import datetime
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
from common.options import UserError, command, load_config
from common.files import read_json, write_text
from common.vocabulary import load_tokenizer
from model import LAYER_NORM_EPS, MAX_POSITIONS, MaskedLM, SequenceClassifier, make_masked_lm, model_config
from common.vocabulary import finish, read_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
WORDS, DECODER_BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias"


@dataclass
class ConvertConfig:
    # In
    from_hf: str = ""  # directory, weights file or hub id of a BERT or MosaicBERT: becomes a run directory
    revision: str = ""  # commit, branch or tag of the hub id
    tokenizer: str = ""  # tokenizer.json, BERT vocab.txt or hub id, where none lies beside the weights
    allow_pickle: bool = False  # read .bin and .pt, weights only: nothing in them is run
    # Out
    to_hf: str = ""  # run or checkpoint directory, also one that finetune_glue.py saved: becomes a transformers model
    format: Literal["transformers", "onnx"] = "transformers"  # onnx: model.onnx and its tokenizer
    glue: str = ""  # glue.json, to quote its scores in the model card
    license: str = ""  # of the weights, for the model card; empty: the card says it is not known
    # Both
    out: str = ""  # directory to write


# ---------------------------------------------------------------------------------------------------------------------
# In


def say(text):
    """Print, in one process of however many read the same file."""
    if int(os.environ.get("RANK", 0)) == 0 and multiprocessing.parent_process() is None:
        print(text, flush=True)


def read_model(path):
    """(config, tensors, tokenizer_text) of a run or checkpoint directory of this project, or of what read_hf reads."""
    if not os.path.exists(os.path.join(path, checkpoint.DIGESTS)) and not checkpoint.steps(path):
        return read_hf(path)
    path = checkpoint.find(path)
    with open(os.path.join(path, "tokenizer.json"), encoding="utf-8", errors="replace") as file:
        return checkpoint.read_config(path), checkpoint.read_tensors(path, "model.safetensors"), file.read()


def read_hf(path, revision="", tokenizer="", allow_pickle=False):
    """(config, tensors, tokenizer_text) of a directory or weights file in Hugging Face form, or else of a hub id.

    config: as config.json of a checkpoint of this project. tensors: {name: fp32 tensor} under this project's names,
    with a pooler and a masked-language-model head where there are such. What is left out or changed is printed.
    Raises: UserError, also for anything missing or unexpected.
    """
    if not os.path.exists(path):
        path = download(path, revision, allow_pickle)
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    weights, tensors, hf = read_weights(path, allow_pickle)
    config_path = os.path.join(directory, "config.json")
    if hf is None:
        hf = read_json(config_path, "expected Hugging Face's files: config.json, model.safetensors, tokenizer.json")
    mosaic = any("attention.self.Wqkv" in name for name in tensors)
    check_config(config_path, hf, mosaic)
    tokenizer_text = find_tokenizer(directory, tokenizer)
    vocab_size = load_tokenizer(tokenizer or directory, tokenizer_text)[0].get_vocab_size()

    rename_head(tensors, weights, mosaic)
    if WORDS not in tensors:
        raise UserError(f"{weights}: has no {WORDS} (expected BERT or MosaicBERT)")
    rows = len(tensors[WORDS])
    if rows < vocab_size:
        raise UserError(f"{weights}: {rows:,} word embeddings, but the tokenizer has {vocab_size:,} entries")
    if rows > vocab_size:
        say(f"{weights}: {rows:,} word embeddings trimmed to the {vocab_size:,} of the tokenizer")
    if mosaic and hf["attention_probs_dropout_prob"]:  # in the published one, to switch its kernels off
        say(f"{config_path}: attention dropout {hf['attention_probs_dropout_prob']} set to 0: MosaicBERT has none")
    config = {
        "model": "mosaicbert" if mosaic else "bert",
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "intermediate_size": hf["intermediate_size"],
        "hidden_dropout": hf["hidden_dropout_prob"],
        "attention_dropout": 0.0 if mosaic else hf["attention_probs_dropout_prob"],
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
    }
    fit(tensors, config, weights, config_path)
    return config, tensors, tokenizer_text


def download(name, revision, allow_pickle):
    """The local copy of a hub repository's files."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name}: no such directory (expected a run, a step_* directory, Hugging Face's files, or a hub id)")
    files = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json"]
    try:
        from huggingface_hub import snapshot_download  # comes with datasets

        files += ["pytorch_model.bin"] if allow_pickle else []
        return snapshot_download(name, revision=revision or None, allow_patterns=files)
    except Exception as error:  # whatever the network and the libraries between raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{name}: no such directory, and cannot be had from the hub: {reason}") from None


def read_weights(path, allow_pickle):
    """(file, {our name: fp32 tensor}, configuration if the file holds one) of a weights file or its directory."""
    files = [path] if os.path.isfile(path) else [os.path.join(path, f) for f in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if os.path.exists(file)), None)
    if file is None:
        inside = os.path.join(path, "model")  # where finetune_glue.py leaves its own
        hint = f"they are in {inside}" if os.path.isdir(inside) else "expected a run, a step_* directory, or model.safetensors"
        raise UserError(f"{path}: no weights here ({hint})")
    hf = None
    if file.endswith(".safetensors"):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error} (is it complete?)") from None
    elif not allow_pickle:
        hint = "convert_hf.py --from_hf with --allow_pickle=true reads it, weights only"
        raise UserError(f"{file}: a pickle, which could hold any program ({hint})")
    else:
        tensors, hf = read_pickle(file)
    for prefix in ("module.", "model."):  # of DistributedDataParallel, of Composer
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return file, {our_name(name): tensor.float() for name, tensor in tensors.items()}, hf


def read_pickle(file):
    """(tensors, configuration or None) of a .bin, or of a Composer checkpoint, by PyTorch's weights-only reader."""
    # What Composer keeps beside the weights: times, and the random state, an array (of numpy 1 or 2).
    reconstruct = np._core.multiarray._reconstruct
    harmless = [datetime.timedelta, np.ndarray, np.dtype, reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct")]
    harmless += [type(np.dtype(kind)) for kind in ("uint32", "int64", "float64")]
    try:
        with torch.serialization.safe_globals(harmless):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        found = re.search(r"GLOBAL (\S+)", f"{error}")
        reason = f"it holds {found[1]}" if found else f"no file of torch.save ({type(error).__name__})"
        raise UserError(f"{file}: not weights alone, or damaged: {reason} (nothing in it was run)") from None
    hf = None
    if isinstance(saved, dict) and isinstance(saved.get("state"), dict):
        saved = saved["state"]
        about = saved.get("integrations", {}).get("huggingface", {}).get("model", {})
        hf, saved = about.get("config", {}).get("content"), saved.get("model")
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise UserError(f"{file}: holds no {{name: tensor}} (expected pytorch_model.bin or a Composer checkpoint)")
    return saved, hf


def our_name(name):
    """This project's name of a tensor: a bare BertModel's lack `bert.`, old files say gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def check_config(path, hf, mosaic):
    """Raises: UserError naming the field of config.json that this project's models cannot follow."""
    if hf.get("model_type", "bert") not in ("bert", "mosaic_bert"):
        raise UserError(f"{path}: a model of type {hf['model_type']!r} (only BERT and MosaicBERT can be read)")
    wanted = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS, "type_vocab_size": 2}
    if not mosaic:
        wanted |= {"max_position_embeddings": MAX_POSITIONS, "position_embedding_type": "absolute"}
    for name, value in wanted.items():
        if hf.get(name, value) != value:
            raise UserError(f"{path}: {name} is {hf[name]!r} (only {value!r} can be read)")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if not isinstance(hf.get(name), (int, float)):
            raise UserError(f"{path}: {name} is {hf.get(name)!r} (expected the configuration of BERT or MosaicBERT)")


def find_tokenizer(directory, tokenizer):
    """The contents of the tokenizer.json to use."""
    if tokenizer:
        return read_tokenizer(tokenizer)
    path = os.path.join(directory, "tokenizer.json")
    if os.path.exists(path):
        return read_tokenizer(path)
    vocabulary = os.path.join(directory, "vocab.txt")
    if not os.path.exists(vocabulary):
        raise UserError(f"{directory}: no tokenizer here (give --tokenizer; MosaicBERT's is google-bert/bert-base-uncased)")
    about = os.path.join(directory, "tokenizer_config.json")
    lower = read_json(about, "").get("do_lower_case", True) if os.path.exists(about) else True
    return read_tokenizer(vocabulary, cased=not lower)


def rename_head(tensors, weights, mosaic):
    """Bring what lies above the encoder to this project's names, in place; say what is left out."""
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, tensors.get(WORDS, decoder)):
        raise UserError(f"{weights}: the decoder is not the word embedding (only tied ones can be read)")
    biases = [tensors.pop(name) for name in (DECODER_BIAS, "cls.predictions.bias") if name in tensors]
    if biases:
        if not torch.equal(biases[0], biases[-1]):
            raise UserError(f"{weights}: cls.predictions.bias and {DECODER_BIAS} differ")
        tensors[DECODER_BIAS if mosaic else "cls.predictions.bias"] = biases[0]
    harmless = {
        "cls.seq_relationship.": "next-sentence head", "classifier.": "classifier", "bert.embeddings.position_ids": "",
    }  # fmt: skip
    for prefix, what in harmless.items():
        names = [name for name in tensors if name.startswith(prefix)]
        for name in names:
            del tensors[name]
        if names and what:
            say(f"{weights}: its {what} is left out")


def fit(tensors, config, weights, config_path):
    """Trim the vocabulary and see that names and shapes are exactly the model's. In place. Raises: UserError."""
    cfg = model_config(config)
    try:
        cfg.check_model()
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in MaskedLM(cfg, config["vocab_size"]).named_parameters()}
    except (UserError, TypeError, RuntimeError) as error:
        raise UserError(f"{config_path}: {error}") from None
    for name in {WORDS, DECODER_BIAS, "cls.predictions.bias"} & tensors.keys():  # MosaicBERT's are padded, with zeros here
        tensor, size = tensors[name][: config["vocab_size"]], expected[name][0]
        tensors[name] = torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])
    C = config["hidden_size"]
    expected |= {"bert.pooler.dense.weight": (C, C), "bert.pooler.dense.bias": (C,)}
    missing = sorted(expected.keys() - tensors.keys())
    for part, what in (("cls.", "masked-language-model head"), ("bert.pooler.", "")):
        names = [name for name in expected if name.startswith(part)]
        if not set(names) & tensors.keys():
            missing = [name for name in missing if name not in names]
            if what:
                say(f"{weights}: has no {what}")
    unexpected = sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            raise UserError(f"{weights}: {len(names)} weights {what}: {', '.join(names[:5])}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json says {list(expected[name])}"
            raise UserError(f"{weights}: {name} has shape {shapes}")


def start_from(model, path, tokenizer_path):
    """Give a new MaskedLM the weights of read_model(path), for training with the tokenizer at `tokenizer_path`.

    Entries of a new vocabulary get the embedding of the same word in the old one; those that are new there, and a
    missing head, keep the random weights they have; a pooler or classifier is left out. Returns what was done, as text.
    Raises: UserError.
    """
    config, tensors, old_text = read_model(path)
    for name, value in asdict(model_config(config)).items():
        if "dropout" not in name and value != getattr(model.cfg, name):
            raise UserError(f"{path}: {name} is {value}, that of this run {getattr(model.cfg, name)} (set --{name}={value})")
    fresh, per_word = checkpoint.weights_of(model), {WORDS, DECODER_BIAS, "cls.predictions.bias"}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("bert.pooler.", "classifier."))}
    done = f"started from {path}"
    with open(tokenizer_path, encoding="utf-8") as file:
        new_text = file.read()
    if new_text != old_text:
        old, _ = load_tokenizer(path, old_text)
        new, _ = load_tokenizer(tokenizer_path, new_text)
        old, new = old.get_vocab(), new.get_vocab()
        both = [word for word in new if word in old]
        here, there = [new[word] for word in both], [old[word] for word in both]
        for name in per_word & tensors.keys():
            mixed = fresh[name].clone()
            mixed[here] = tensors[name][there]
            tensors[name] = mixed
        done += f", a new vocabulary: {len(both):,} of its {len(new):,} entries were in the old one"
    if not any(name.startswith("cls.") for name in tensors):
        tensors |= {name: weight for name, weight in fresh.items() if name.startswith("cls.")}
        done += ", with a new masked-language-model head"
    checkpoint.load_weights(model, tensors, path)
    return done


def from_hf(cfg):
    """--from_hf: write a run directory with one checkpoint, of step 0, and read it again."""
    if checkpoint.steps(cfg.out) or os.path.exists(os.path.join(cfg.out, "config.json")):
        raise UserError(f"{cfg.out}: holds a run already (choose another --out)")
    config, tensors, tokenizer_text = read_hf(cfg.from_hf, cfg.revision, cfg.tokenizer, cfg.allow_pickle)
    config["format"] = checkpoint.FORMAT
    config["converted_from"] = {"name": cfg.from_hf, "revision": cfg.revision or None}
    texts = {
        "config.json": json.dumps(config, indent=1),
        "tokenizer.json": tokenizer_text,
        "state.json": json.dumps({"step": 0, "tokens": 0, "samples": 0, "seconds": 0.0}, indent=1),
    }
    os.makedirs(cfg.out, exist_ok=True)
    written = checkpoint.save(cfg.out, 0, {"model.safetensors": dict(sorted(tensors.items()))}, texts)
    write_text(os.path.join(cfg.out, "config.json"), texts["config.json"])
    _, again, _ = read_model(cfg.out)
    if not all(torch.equal(tensor, again[name]) for name, tensor in tensors.items()):
        raise UserError(f"{written}: reads back differently (is the disk sound?)")
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{written}: {config['model']}, {count:,} parameters, vocabulary of {config['vocab_size']:,}; read again: the same")


# ---------------------------------------------------------------------------------------------------------------------
# Out

NAMES = {"mosaicbert": "MosaicBert", "bert": "Bert"}
CODE = ("configuration_mosaic_bert.py", "modeling_mosaic_bert.py")
SPECIAL_NAMES = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
CHECK_TEXTS, CHECK_LONGEST = 64, 64  # of the self-check; tokens of the longest
MAX_DIFFERENCE = 1e-5  # of fp32 outputs; of large ones 1e-6 of the largest, about eight roundings


def hf_config(config, special, labels):
    """What config.json says to transformers. labels: words of a classifier, () of a regression, None of a masked LM."""
    family = NAMES[config["model"]]
    hf = {
        "architectures": [f"{family}ForMaskedLM" if labels is None else f"{family}ForSequenceClassification"],
        "model_type": "mosaic_bert" if config["model"] == "mosaicbert" else "bert",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": config["intermediate_size"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": config["hidden_dropout"],
        "attention_probs_dropout_prob": config["attention_dropout"],
        "type_vocab_size": 2,
        "layer_norm_eps": LAYER_NORM_EPS,
        "pad_token_id": special["[PAD]"],
        "torch_dtype": "float32",
    }
    if config["model"] == "bert":
        hf["max_position_embeddings"] = MAX_POSITIONS
    else:
        configuration, modelling = (name.removesuffix(".py") for name in CODE)
        hf["auto_map"] = {"AutoConfig": f"{configuration}.MosaicBertConfig", "AutoModel": f"{modelling}.MosaicBertModel"}
        for kind in ("MaskedLM", "SequenceClassification", "TokenClassification"):
            hf["auto_map"][f"AutoModelFor{kind}"] = f"{modelling}.MosaicBertFor{kind}"
    if labels == ():
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    elif labels:
        hf |= {"id2label": dict(enumerate(labels)), "label2id": {word: i for i, word in enumerate(labels)}}
        hf["problem_type"] = "single_label_classification"
    return hf


def hf_tokenizer(text):
    """The contents of tokenizer.json for transformers: it adds [CLS] and [SEP] itself, and neither pads nor cuts."""
    tokenizer, _ = load_tokenizer("tokenizer.json", text)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def write_transformers(path, config, tensors, tokenizer_text, labels, card):
    """Fill the directory `path` with what transformers and sentence-transformers read; returns the model's class."""
    _, special = load_tokenizer("tokenizer.json", tokenizer_text)
    tensors = dict(tensors)
    for name in {WORDS, DECODER_BIAS, "cls.predictions.bias"} & tensors.keys():
        tensors[name] = tensors[name][: config["vocab_size"]].clone()
    save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    about_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_NAMES, "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    if config["model"] == "bert":
        about_tokenizer["model_max_length"] = MAX_POSITIONS
    # sentence-transformers: the mean over all tokens, [CLS] and [SEP] included, as fill_mask.py --embed.
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    files = {
        "config.json": hf_config(config, special, labels),
        "tokenizer_config.json": about_tokenizer,
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True},
    }
    os.makedirs(os.path.join(path, "1_Pooling"))
    for name, contents in files.items():
        write_text(os.path.join(path, name), json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    write_text(os.path.join(path, "tokenizer.json"), hf_tokenizer(tokenizer_text))
    write_text(os.path.join(path, "README.md"), card)
    if config["model"] == "mosaicbert":
        for name in CODE:
            shutil.copyfile(os.path.join(HERE, "hf", name), os.path.join(path, name))
    return files["config.json"]["architectures"][0]


def expectation(config, tensors, tokenizer_text, labels, source):
    """What the export must give: texts, their ids, and this project's outputs, for hf/self_check.py."""
    tokenizer, special = load_tokenizer("tokenizer.json", tokenizer_text)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, CHECK_LONGEST, CHECK_TEXTS)
    words = [rng.integers(0, config["vocab_size"], length).tolist() for length in lengths]
    texts = tokenizer.decode_batch(words, skip_special_tokens=True)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:CHECK_LONGEST] for text in texts]
    ids = [[special["[CLS]"], *row, special["[SEP]"]] for row in ids]
    if labels is None:
        model = make_masked_lm(config, tensors, source)
    else:
        model = SequenceClassifier(model_config(config), config["vocab_size"], max(1, len(labels))).eval()
        checkpoint.load_weights(model, tensors, source)
    outputs = []
    with torch.no_grad():
        for row in ids:
            row = torch.tensor([row])
            if labels is None:
                outputs.append(model.logits(row, torch.ones_like(row))[0])
            else:
                outputs.append(model(row[0], torch.tensor([0, row.shape[1]], dtype=torch.int32), row.shape[1]))
    return texts, ids, torch.cat(outputs).numpy()


def self_check(path, texts, ids, outputs, architecture, onnx=False):
    """Run hf/self_check.py on the export in a process of its own; print its verdict. Raises: UserError if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        np.save(os.path.join(scratch, "outputs.npy"), outputs)
        about = {"texts": texts, "ids": ids, "architecture": architecture, "onnx": onnx}
        write_text(os.path.join(scratch, "about.json"), json.dumps(about))
        # -I: no path of this project. Nothing is fetched, and the copies transformers makes of the code are thrown away.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}
        script = os.path.join(HERE, "hf", "self_check.py")
        command_line = [sys.executable, "-I", script, os.path.abspath(path), scratch]
        done = subprocess.run(command_line, env=environment, cwd=scratch, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "killed").splitlines()[-1]
            raise UserError(f"self-check: {reason} (nothing was written)")
        verdict = read_json(os.path.join(scratch, "verdict.json"), "no verdict")
    print(
        f"self-check in {verdict['by']}: {len(texts)} texts, {len(outputs):,} rows of outputs, largest difference "
        f"{verdict['difference']:.1e}, likeliest entry the same in {verdict['same']:,}"
    )
    limit = 1e-4 if onnx else max(MAX_DIFFERENCE, 1e-6 * float(np.abs(outputs).max()))
    if not verdict["difference"] <= limit or verdict["same"] != len(outputs):
        raise UserError(f"self-check failed: the difference may be {limit:.1e} at most (nothing was written)")


def to_hf(cfg):
    """--to_hf: write a directory for transformers, or an ONNX model, after its check has passed."""
    needed = ("transformers", *(("onnx", "onnxscript", "onnxruntime") if cfg.format == "onnx" else ()))
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--to_hf, format {cfg.format}: needs {', '.join(missing)} (pip install {' '.join(missing)})")
    if os.path.exists(cfg.out) and os.listdir(cfg.out):
        raise UserError(f"{cfg.out}: not empty (choose another --out)")
    config, tensors, tokenizer_text = read_model(cfg.to_hf)
    labels = tuple(config["task"]["labels"]) if "task" in config else None
    expected = expectation(config, tensors, tokenizer_text, labels, cfg.to_hf)
    partial = f"{cfg.out.rstrip('/')}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        os.makedirs(partial)
        card = model_card(cfg, config, labels)
        architecture = write_transformers(partial, config, tensors, tokenizer_text, labels, card)
        self_check(partial, *expected, architecture)
        if cfg.format == "onnx":
            export_onnx(partial, architecture)
            self_check(partial, *expected, architecture, onnx=True)
        if os.path.isdir(cfg.out):
            os.rmdir(cfg.out)
        os.rename(partial, cfg.out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{cfg.out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{cfg.out}: {architecture}, {sum(t.numel() for t in tensors.values()):,} parameters")


def export_onnx(path, architecture):
    """Turn the transformers directory `path` into model.onnx, of any batch and length, and its tokenizer."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{architecture.partition('For')[2]}")
    model = auto.from_pretrained(path, trust_remote_code=True).eval()
    model.config.return_dict = False
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    examples = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}  # one tensor for all would be one input
    torch.onnx.export(
        model, kwargs=examples, f=os.path.join(path, "model.onnx"), input_names=names,
        output_names=["logits"], dynamic_shapes=dict.fromkeys(names, dimensions), dynamo=True, verbose=False,
    )  # fmt: skip
    for name in os.listdir(path):
        if name not in ("model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "README.md"):
            leftover = os.path.join(path, name)
            shutil.rmtree(leftover) if os.path.isdir(leftover) else os.remove(leftover)


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def model_card(cfg, config, labels):
    """README.md of an export, from the run's log and its shards; what is not known says so."""
    unknown = "not known"
    start, last, held_out = {}, {}, {}
    run = os.path.abspath(cfg.to_hf)
    for log in (os.path.join(directory, "log.jsonl") for directory in (os.path.dirname(run), run)):
        if os.path.exists(log):
            with open(log, encoding="utf-8") as file:
                records = {record["event"]: record for record in map(json.loads, file)}  # the last of each kind
            start, last, held_out = (records.get(event, {}) for event in ("start", "train", "eval"))
    options = start.get("config", {})

    def known(value, text="{}"):
        return unknown if value is None else text.format(value)

    scores = unknown
    if cfg.glue:
        results = read_json(cfg.glue, "expected a glue.json of finetune_glue.py")
        scores = ", ".join(f"{name} {task['score']:.1f}" for name, task in results["tasks"].items())
        scores += f"; mean {results['average']:.1f} (GLUE's development sets, recipe {results['recipe']})"
    name = os.path.basename(os.path.abspath(cfg.out))
    mosaic = config["model"] == "mosaicbert"
    task = "MaskedLM" if labels is None else "SequenceClassification"
    pipeline = "fill-mask" if labels is None else "text-classification"
    trust = ", trust_remote_code=True" if mosaic else ""
    rows = {
        "architecture": ("MosaicBERT (arXiv 2312.17482)" if mosaic else "BERT")
        + f", {config['num_layers']} layers of {config['hidden_size']}, {config['num_heads']} heads",
        "data": known(options.get("data_dir")),
        "tokens seen": known(last.get("tokens"), "{:,}"),
        "steps": known(last.get("step"), "{:,}") + known(options.get("global_batch_size"), " of {:,} samples"),
        "sequence length": known(options.get("seq_length")),
        "held-out loss, 15 % masked": known(held_out.get("loss"), "{:.4f}"),
        "held-out accuracy": known(held_out.get("accuracy"), "{:.1%}"),
        "hardware": known(start.get("device")) + known(start.get("world_size"), ", {} process(es)"),
        "GPU-hours": known(last.get("gpu_hours"), "{:.2f}"),
        "dollars": known(last.get("dollars"), "{:.2f}"),
        "GLUE": scores,
        "code": known(start.get("commit")),
        "converted from": known((config.get("converted_from") or {}).get("name")),
        "tokenizer": f"{config['vocab_size']:,} entries, sha256 {config['tokenizer_sha256'] or unknown}",
        "licence": cfg.license or unknown,
    }
    front = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}"]
    front += [f"license: {cfg.license}"] if cfg.license else []
    table = [f"| {what} | {value} |" for what, value in rows.items()]
    example = "Paris is the [MASK] of France." if labels is None else "A text."
    use = [
        "    from transformers import pipeline",
        f'    ask = pipeline("{pipeline}", "{name}"{trust})',
        f'    ask("{example}")',
    ]
    if cfg.format == "onnx":
        use = [
            "    import onnxruntime",
            f'    session = onnxruntime.InferenceSession("{name}/model.onnx")',
            '    session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})',
        ]
    about = f"A {task} model, padded batches of any length." if mosaic else f"A {task} model."
    return "\n".join([*front, "---", "", f"# {name}", "", about, "", *use, "", "| | |", "|---|---|", *table, ""])


@command
def main(argv):
    cfg = load_config(ConvertConfig, argv)
    if bool(cfg.from_hf) == bool(cfg.to_hf):
        raise UserError("give either --from_hf or --to_hf")
    if not cfg.out:
        raise UserError("--out: not given (the directory to write)")
    if cfg.from_hf:
        from_hf(cfg)
    else:
        to_hf(cfg)


if __name__ == "__main__":
    main()
