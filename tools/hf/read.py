"""Read BERT, RoBERTa, MosaicBERT or jina-bert-v2 in Hugging Face form: config.json, model.safetensors, and a tokenizer."""

import datetime
import glob
import hashlib
import json
import os
import re

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import PER_WORD, model_config, run_inside, steps
from common.files import read_if_there, read_json
from common.hub import download
from common.options import UserError
from common.vocabulary import TOKENIZER_FILES, load_tokenizer, read_tokenizer
from model import LAYER_NORM_EPS, MAX_POSITIONS, MaskedLM

WORDS, DECODER_BIAS, BERT_BIAS = PER_WORD
# Related models that do not fit the two architectures here: what model.py, data.py or the tokenizer lacks.
TAKES = {
    **dict.fromkeys(("xlm-roberta", "camembert"), "a SentencePiece tokenizer, whose settings are not read here"),
    "xlm-roberta-xl": "LayerNorms before the layers",
    "distilbert": "an encoder without token types, under other names",
    "electra": "another head, and embeddings of their own width",
    "mpnet": "relative positions",
    "nomic_bert": "rotary positions and SwiGLU",
    "modernbert": "LayerNorms before the layers, rotary positions and local attention",
    "deberta-v2": "disentangled attention",
}
# RoBERTa is BERT under other names. Position 0 is row 2 there, after that of its [PAD], 1; all tokens have type 0.
ROBERTA_PAD = 1
ROBERTA_NAMES = {
    "roberta.": "bert.", "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.", "lm_head.": "cls.predictions.",
}  # fmt: skip
SENTENCE_FILES = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/config.json"]


def read_hf(path, tokenizer="", allow_pickle=False):
    """(config, tensors, tokenizer_text) of a directory or weights file.

    config: what config.json of a checkpoint holds. tensors: {name: fp32 tensor} under this project's names, with the
    pooler and masked-language-model head if there are any. Prints what was dropped or changed.
    Raises: UserError for anything missing, unexpected or unsupported.
    """
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    weights, tensors, hf = read_weights(path, allow_pickle)
    config_path = os.path.join(directory, "config.json")
    if hf is None:
        hf = read_json(config_path, "expected Hugging Face's files: config.json, model.safetensors, tokenizer.json")
    if "num_layers" in hf and "vocab_size" in hf and "model" in hf:
        raise UserError(f"{directory}: a checkpoint of this project (it needs no conversion: use it as it is)")
    if hf.get("position_embedding_type") == "alibi":
        tensors = from_jina(config_path, hf, tensors)
    mosaic = any("attention.self.Wqkv" in name for name in tensors)
    check_config(config_path, hf, mosaic, len(tensors))
    tokenizer_text = read_tokenizer(tokenizer or directory)
    if tokenizer and any(os.path.exists(os.path.join(directory, name)) for name in TOKENIZER_FILES[:2]):
        if tokenizer_text != read_tokenizer(directory):
            raise UserError(f"--tokenizer={tokenizer}: not that of {directory}, which has its own (leave --tokenizer out)")
    loaded, special = load_tokenizer(tokenizer or directory, tokenizer_text)
    vocab_size = loaded.get_vocab_size()

    if hf.get("model_type") == "roberta":
        if special["[PAD]"] != ROBERTA_PAD:
            raise UserError(f"{tokenizer or directory}: the id of <pad> is {special['[PAD]']} (RoBERTa's is {ROBERTA_PAD})")
        from_roberta(tensors)
    rename_head(tensors, weights, mosaic)
    if WORDS not in tensors:
        raise UserError(f"{weights}: has no {WORDS} (expected BERT or MosaicBERT)")
    rows = len(tensors[WORDS])
    if rows < vocab_size:
        raise UserError(f"{weights}: {rows:,} word embeddings, but the tokenizer has {vocab_size:,} entries")
    if rows > vocab_size:
        print(f"{weights}: trimmed {rows:,} word embeddings to the tokenizer's {vocab_size:,} entries")
    if mosaic and hf["attention_probs_dropout_prob"]:  # the published config sets 0.1, which disables its fast kernels
        print(f"{config_path}: attention dropout set to 0, was {hf['attention_probs_dropout_prob']}: MosaicBERT has none")
    config = {
        "model": "mosaicbert" if mosaic else "bert",
        "hidden_size": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "intermediate_size": hf["intermediate_size"],
        "hidden_dropout": hf["hidden_dropout_prob"],
        "attention_dropout": 0.0 if mosaic else hf["attention_probs_dropout_prob"],
        "layer_norm_eps": hf.get("layer_norm_eps", LAYER_NORM_EPS),
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
    }
    fit_to_model(tensors, config, weights, config_path)
    if vectors := sentence_vectors(directory):
        config["sentence_vectors"] = vectors
    return config, tensors, tokenizer_text


def find_model(name, revision="", allow_pickle=False):
    """`name`, if there is such a path; otherwise the local copy of this hub repository."""
    weights = ["model.safetensors", *(["pytorch_model.bin"] if allow_pickle else [])]
    files = [*weights, *TOKENIZER_FILES, *SENTENCE_FILES]
    hint = "expected a directory in Hugging Face form, or a hub id"
    return name if os.path.exists(name) else download(name, files, "directory", hint, revision)


def read_weights(path, allow_pickle):
    """(file, {name: fp32 tensor}, Hugging Face config if the file holds one) of a weights file or its directory."""
    files = [path] if os.path.isfile(path) else [os.path.join(path, f) for f in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if os.path.exists(file)), None)
    if file is None:
        run = path if steps(path) else run_inside(path)
        hint = f"{run} is a run of this project: it needs no conversion" if run else "expected model.safetensors"
        raise UserError(f"{path}: no weights here ({hint})")
    hf = None
    if file.endswith(".safetensors"):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error} (is it complete?)") from None
    elif not allow_pickle:
        raise UserError(f"{file}: a pickle, which can run code (--allow_pickle=true reads it, weights only)")
    else:
        tensors, hf = read_pickle(file)
    for prefix in ("module.", "model."):  # from DistributedDataParallel, from Composer
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return file, {our_name(name): tensor.float() for name, tensor in tensors.items()}, hf


def read_pickle(file):
    """(tensors, Hugging Face config or None) of a .bin or a Composer checkpoint, through PyTorch's weights-only loader."""
    # Composer stores timings and the random state, a NumPy array (of NumPy 1 or 2), beside the weights.
    reconstruct = np._core.multiarray._reconstruct
    harmless = [datetime.timedelta, np.ndarray, np.dtype, reconstruct, (reconstruct, "numpy.core.multiarray._reconstruct")]
    harmless += [type(np.dtype(kind)) for kind in ("uint32", "int64", "float64")]
    try:
        with torch.serialization.safe_globals(harmless):
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes the loader raise
        found = re.search(r"GLOBAL (\S+)", f"{error}")
        reason = f"it holds {found[1]}" if found else f"not a torch.save file ({type(error).__name__})"
        raise UserError(f"{file}: not weights alone, or damaged: {reason} (no code was run)") from None
    hf = None
    if isinstance(saved, dict) and isinstance(saved.get("state"), dict):
        hf = saved["state"]
        for key in ("integrations", "huggingface", "model", "config", "content"):
            hf = hf.get(key) if isinstance(hf, dict) else None
        saved = saved["state"].get("model")
    if not isinstance(saved, dict) or not all(map(is_weight, saved, saved.values())):
        raise UserError(f"{file}: no {{name: tensor}} dictionary (expected pytorch_model.bin or a Composer checkpoint)")
    return saved, hf if isinstance(hf, dict) else None


def is_weight(name, tensor):
    """Whether a pickle's entry is an ordinary named tensor: one that claims more numbers than are stored is none."""
    ordinary = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return ordinary and not tensor.is_complex() and tensor.nbytes <= tensor.untyped_storage().nbytes()


def our_name(name):
    """This project's name for a tensor: a bare BertModel lacks the `bert.` prefix, old files say gamma and beta."""
    theirs = next(filter(name.startswith, ROBERTA_NAMES), "")
    name = ROBERTA_NAMES.get(theirs, "") + name.removeprefix(theirs)
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def from_jina(path, hf, tensors):
    """The tensors of a jina-bert-v2 under MosaicBERT's names: the same model, but query, key and value are apart.

    Raises: UserError for its variants. path: of its config.json.
    """
    if hf.get("feed_forward_type") != "geglu":
        raise UserError(f"{path}: feed_forward_type is {hf.get('feed_forward_type')!r} (only 'geglu' is supported)")
    if any("layer_norm_q" in name for name in tensors):
        raise UserError(f"{path}: a jina-bert-v2 with LayerNorms on queries and keys (MosaicBERT's attention has none)")
    joined = {}
    for name, tensor in tensors.items():
        if ".self.query." not in name:
            joined[name] = tensor
            continue
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in tensors for part in parts):  # else what is left of them is unexpected, by name
            joined[name.replace(".query.", ".Wqkv.")] = torch.cat([tensors[part] for part in parts])
    used = {name.replace(".Wqkv.", f".{part}.") for name in joined for part in ("key", "value") if ".Wqkv." in name}
    return {name: tensor for name, tensor in joined.items() if name not in used}


def from_roberta(tensors):
    """Give a RoBERTa's tensors BERT's shapes, in place: drop the two rows before position 0, repeat its one token type."""
    for name, rows in tensors.items():
        if name == "bert.embeddings.position_embeddings.weight" and rows.ndim == 2:  # else its shape is named later
            tensors[name] = rows[ROBERTA_PAD + 1 :]
        elif name == "bert.embeddings.token_type_embeddings.weight" and rows.ndim == 2:
            tensors[name] = rows.repeat(2, 1)


def check_config(path, hf, mosaic, num_weights):
    """Raises: UserError naming the field of config.json that this project's models do not support."""
    kind = hf.get("model_type", "bert")
    if kind not in ("bert", "mosaic_bert", "roberta"):
        takes = f"; this one would take {TAKES[kind]}" if kind in TAKES else ""
        supported = "only BERT, RoBERTa, MosaicBERT and jina-bert-v2 are supported"
        raise UserError(f"{path}: model_type is {kind!r} ({supported}{takes})")
    supported = {
        "hidden_act": "gelu", "type_vocab_size": 2, "is_decoder": False, "tie_word_embeddings": True,
        "quantization_config": None,
    }  # fmt: skip
    if not mosaic:
        supported |= {"max_position_embeddings": MAX_POSITIONS, "position_embedding_type": "absolute"}
    if kind == "roberta":
        rows = MAX_POSITIONS + ROBERTA_PAD + 1
        supported |= {"max_position_embeddings": rows, "type_vocab_size": 1, "pad_token_id": ROBERTA_PAD}
    for name, value in supported.items():
        if hf.get(name, value) != value:
            raise UserError(f"{path}: {name} is {hf[name]!r} (only {value!r} is supported)")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "hidden_dropout_prob", "attention_probs_dropout_prob"):
        kind = int if name in sizes else (int, float)
        if not isinstance(hf.get(name), kind) or isinstance(hf[name], bool):
            raise UserError(f"{path}: {name} is {hf.get(name)!r} (expected the config of a BERT or MosaicBERT)")
    if not 1 <= hf["num_hidden_layers"] <= num_weights:
        raise UserError(f"{path}: num_hidden_layers is {hf['num_hidden_layers']}, of {num_weights} weights in all")


def sentence_vectors(directory):
    """How sentence-transformers makes vectors with this model: {pooling, normalize, max_tokens}; None without its files.

    pooling: mean, cls, or what else it needs, which tools/fill_mask.py refuses.
    """
    if not os.path.exists(os.path.join(directory, "modules.json")):
        return None
    try:
        with open(os.path.join(directory, "modules.json"), encoding="utf-8") as file:
            modules = [module["type"].rpartition(".")[2] for module in json.load(file)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{os.path.join(directory, 'modules.json')}: not sentence-transformers' list of modules") from None
    about = read_if_there(os.path.join(directory, "sentence_bert_config.json"))
    pools = sorted(glob.glob(f"{glob.escape(directory)}/*_Pooling/config.json"))
    pooling = read_json(pools[0], "is it complete?") if pools else {}
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for name in modes]
    needs = [module for module in modules if module not in ("Transformer", "Pooling", "Normalize")]
    needs += ["do_lower_case"] if about.get("do_lower_case") else []
    prompts = read_if_there(os.path.join(directory, "config_sentence_transformers.json"))
    needs += ["prompts"] if prompts.get("default_prompt_name") else []
    how = {
        "pooling": "+".join([*(modes or [pooling.get("pooling_mode") or "mean"]), *needs]),
        "normalize": "Normalize" in modules,
        "max_tokens": about.get("max_seq_length"),
    }
    print(f"{directory}: sentence vectors: {', '.join(f'{name} {value}' for name, value in how.items())}")
    return how


def rename_head(tensors, weights, mosaic):
    """Rename the masked-language-model head, in place, and drop other heads."""
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    if decoder is not None and not torch.equal(decoder, tensors.get(WORDS, decoder)):
        raise UserError(f"{weights}: the decoder differs from the word embeddings (only tied weights are supported)")
    biases = [tensors.pop(name) for name in (DECODER_BIAS, BERT_BIAS) if name in tensors]
    if biases:
        if not torch.equal(biases[0], biases[-1]):
            raise UserError(f"{weights}: {BERT_BIAS} and {DECODER_BIAS} differ")
        tensors[DECODER_BIAS if mosaic else BERT_BIAS] = biases[0]
    unused = {
        "cls.seq_relationship.": "next-sentence head", "classifier.": "classifier", "qa_outputs.": "question-answering head",
        "bert.embeddings.position_ids": "",
    }  # fmt: skip
    for prefix, what in unused.items():
        names = [name for name in tensors if name.startswith(prefix)]
        for name in names:
            del tensors[name]
        if names and what:
            print(f"{weights}: dropped its {what}")


def fit_to_model(tensors, config, weights, config_path):
    """Trim or pad the vocabulary, in place, then require exactly the model's names and shapes. Raises: UserError."""
    cfg = model_config(config)
    try:
        cfg.check_model()
        with torch.device("meta"):
            expected = {name: tuple(p.shape) for name, p in MaskedLM(cfg, config["vocab_size"]).named_parameters()}
    except (UserError, TypeError, RuntimeError) as error:
        raise UserError(f"{config_path}: {error}") from None
    for name in set(PER_WORD) & tensors.keys():  # MosaicBERT pads its vocabulary, here with zeros
        tensor, size = tensors[name][: config["vocab_size"]], expected[name][0]
        tensors[name] = torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])
    C = config["hidden_size"]
    expected |= {"bert.pooler.dense.weight": (C, C), "bert.pooler.dense.bias": (C,)}
    missing = sorted(expected.keys() - tensors.keys())
    for part, what in (("cls.", "masked-language-model head"), ("bert.pooler.", "")):  # may be missing as a whole
        names = [name for name in expected if name.startswith(part)]
        if not set(names) & tensors.keys():
            missing = [name for name in missing if name not in names]
            if what:
                print(f"{weights}: has no {what}")
    unexpected = sorted(tensors.keys() - expected.keys())
    for names, what in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            raise UserError(f"{weights}: {len(names)} weights {what}: {', '.join(names[:5])}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            shapes = f"{list(tensor.shape)}, but config.json says {list(expected[name])}"
            raise UserError(f"{weights}: {name} has shape {shapes}")
