"""Write a model in Hugging Face form, and check an export against this project's outputs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from safetensors.torch import save_file

import checkpoint
from common.batch import Batch
from common.files import read_json, write_text
from common.options import UserError
from common.vocabulary import finish, load_tokenizer
from model import LAYER_NORM_EPS, MAX_POSITIONS, SequenceClassifier

HERE = os.path.dirname(os.path.abspath(__file__))
CODE = ("configuration_mosaic_bert.py", "modeling_mosaic_bert.py")  # copied into every MosaicBERT export
NAMES = {"mosaicbert": "MosaicBert", "bert": "Bert"}
SPECIAL_NAMES = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
CHECK_TEXTS, CHECK_LONGEST = 64, 64  # of the self-check: random texts, and tokens in the longest
# What the settings of a tokenizer change: case, accents, Chinese characters, punctuation, control characters.
HARD_TEXTS = ["The ÉCOLE was naïve: Ünïcödé, e\u0301, Ça!", "中文 and 日本語のガイド mixed中國in"]
HARD_TEXTS += ["İstanbul ß ﬁ x\u200by\tz\u00a0w [MASK]a"]
LONGEST = {"mosaicbert": 8192, "bert": MAX_POSITIONS}  # tokens; ALiBi has no limit, but tokenizers and servers want a number
MAX_DIFFERENCE = 1e-5  # of fp32 outputs; for large outputs 1e-6 of the largest, about eight roundings
MAX_ONNX_DIFFERENCE = 1e-4  # onnxruntime's operators round differently
ONNX, INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"  # where Optimum and transformers.js look for them
MIN_INT8_COSINE = 0.9  # mean over the rows of outputs; a trained six-layer BERT has 0.986
MAX_FOREIGN_DIFFERENCE = 1e-4  # of an import, of any size; an ignored setting changes more, is_decoder 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Files. labels: a classifier's words, () for a regression, None for a masked LM or an encoder.
# task: fill-mask, feature-extraction (the encoder alone) or text-classification, as Hugging Face calls them.

CLASSES = {
    "fill-mask": "ForMaskedLM", "feature-extraction": "Model", "text-classification": "ForSequenceClassification"
}  # fmt: skip


def hf_config(config, special, labels, task):
    """The contents of transformers' config.json."""
    family = NAMES[config["model"]]
    hf = {
        "architectures": [family + CLASSES[task]],
        "model_type": "mosaic_bert" if config["model"] == "mosaicbert" else "bert",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": config["intermediate_size"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": config["hidden_dropout"],
        "attention_probs_dropout_prob": config["attention_dropout"],
        "max_position_embeddings": LONGEST[config["model"]],
        "type_vocab_size": 2,
        "initializer_range": 0.02,  # of new heads; TEI refuses a configuration without it
        "layer_norm_eps": LAYER_NORM_EPS,
        "pad_token_id": special["[PAD]"],
        "torch_dtype": "float32",
    }
    if config["model"] == "mosaicbert":
        configuration, modeling = (name.removesuffix(".py") for name in CODE)
        hf["auto_map"] = {"AutoConfig": f"{configuration}.MosaicBertConfig", "AutoModel": f"{modeling}.MosaicBertModel"}
        for kind in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"):
            hf["auto_map"][f"AutoModelFor{kind}"] = f"{modeling}.MosaicBertFor{kind}"
    if labels == ():
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    elif labels:
        hf |= {"id2label": dict(enumerate(labels)), "label2id": {word: i for i, word in enumerate(labels)}}
        hf["problem_type"] = "single_label_classification"
    return hf


def hf_tokenizer(text):
    """The contents of transformers' tokenizer.json: it adds [CLS] and [SEP], and neither pads nor truncates."""
    tokenizer, _ = load_tokenizer("tokenizer.json", text)
    finish(tokenizer)
    return tokenizer.to_str(pretty=True)


def vocabulary(text):
    """The lines of a BERT vocab.txt, in the order of their ids; None where the tokenizer is no WordPiece."""
    contents = json.loads(text)
    if contents["model"]["type"] != "WordPiece":
        return None
    tokens = {token["content"]: token["id"] for token in contents.get("added_tokens", [])} | contents["model"]["vocab"]
    words = sorted(tokens, key=tokens.get)
    return None if any(word.splitlines() != [word] for word in words) else words


def write_transformers(path, config, tensors, tokenizer_text, labels, task):
    """Write what transformers reads, and sentence-transformers unless it classifies, into the directory `path`.

    Returns the name of the model's class.
    """
    _, special = load_tokenizer("tokenizer.json", tokenizer_text)
    tensors = dict(tensors)
    for name in set(checkpoint.PER_WORD) & tensors.keys():
        tensors[name] = tensors[name][: config["vocab_size"]].clone()
    if task == "feature-extraction":  # vLLM, unlike transformers, wants an encoder's names without "bert."
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
    save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    # Both major versions take tokenizer.json as it is for this class. BertTokenizer would drop what it has beyond BERT's,
    # such as the cutting of long words, and version 4 does not know version 5's name, TokenizersBackend.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_NAMES, "clean_up_tokenization_spaces": False,
        "model_max_length": config["task"]["max_length"] if "task" in config else LONGEST[config["model"]],
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    files = {"config.json": hf_config(config, special, labels, task), "tokenizer_config.json": tokenizer_config}
    files |= sentence_files(config) if labels is None else {}
    for name, contents in files.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        write_text(os.path.join(path, name), json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    write_text(os.path.join(path, "tokenizer.json"), hf_tokenizer(tokenizer_text))
    if words := vocabulary(tokenizer_text):
        write_text(os.path.join(path, "vocab.txt"), "".join(f"{word}\n" for word in words))
    if config["model"] == "mosaicbert":
        for name in CODE:
            shutil.copyfile(os.path.join(HERE, name), os.path.join(path, name))
    return files["config.json"]["architectures"][0]


def sentence_files(config):
    """{name: contents} for sentence-transformers, whose vectors are then those of tools/fill_mask.py --embed.

    The default is the mean over all tokens, [CLS] and [SEP] included.
    """
    how = {"pooling": "mean", "normalize": False, "max_tokens": None, **config.get("sentence_vectors", {})}
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")  # TEI wants all four
    modes = {f"pooling_mode_{name}": name == {"cls": "cls_token", "mean": "mean_tokens"}.get(how["pooling"]) for name in names}
    if not any(modes.values()):
        raise UserError(f"sentence vectors with pooling {how['pooling']} cannot be exported (only with mean or cls)")
    types = ["Transformer", "Pooling", *(["Normalize"] if how["normalize"] else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    # These names and the pooling modes as booleans are read by sentence-transformers 2 to 6, vLLM and TEI. From version 5.4
    # sentence-transformers itself writes others, which vLLM and its own older versions do not know.
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(types, paths))
    ]
    longest = {"max_seq_length": how["max_tokens"] or LONGEST[config["model"]], "do_lower_case": False}
    about = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    return {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], **modes},
        "sentence_bert_config.json": longest,
        "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "__version__": {}, **about},
    }


# ---------------------------------------------------------------------------------------------------------------------
# The self-check


def expected_outputs(config, tensors, tokenizer_text, labels, source, encoder_only=False):
    """(texts, their token ids, this project's outputs), for tools/hf/self_check.py to reproduce.

    The texts are random, and some that try the tokenizer's settings and added tokens. Outputs are a classifier's scores,
    the vocabulary's, or the encoder's last hidden states.
    """
    tokenizer, special = load_tokenizer("tokenizer.json", tokenizer_text)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, CHECK_LONGEST, CHECK_TEXTS)
    words = [rng.integers(0, config["vocab_size"], length).tolist() for length in lengths]
    texts = tokenizer.decode_batch(words, skip_special_tokens=True)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content not in special]
    texts += HARD_TEXTS + [f"a {token} b{token}c {token.upper()}" for token in added[:CHECK_TEXTS]]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:CHECK_LONGEST] for text in texts]
    ids = [[special["[CLS]"], *row, special["[SEP]"]] for row in ids]
    if labels is None:
        model = checkpoint.make_masked_lm(config, tensors, source, encoder_only)
    else:
        model = SequenceClassifier(checkpoint.model_config(config), config["vocab_size"], max(1, len(labels))).eval()
        checkpoint.load_weights(model, tensors, source)
    outputs = []
    with torch.no_grad():
        for row in map(torch.tensor, ids):
            batch = Batch(row, torch.tensor([0, len(row)], dtype=torch.int32), len(row), windows=None)
            if labels is not None:
                outputs.append(model(batch))
            elif encoder_only:
                outputs.append(model.bert(batch))
            else:
                outputs.append(model.logits(row[None], torch.ones_like(row)[None])[0])
    return texts, ids, torch.cat(outputs).numpy()


def self_check(path, texts, ids, outputs, architecture, onnx="", foreign=False):
    """Run self_check.py on the model in a directory, in its own process, and print the verdict.

    architecture: the class to load, or None to compare tokens only. onnx: the file in the directory to open instead.
    foreign: not an export of this project, so none of the code beside the weights is run, and another top entry is no
    fault where two are equal up to rounding.
    Returns the verdict, a dictionary, which holds "failure" alone where the model could not be loaded. Raises: UserError
    when tokens or outputs differ.
    """
    with tempfile.TemporaryDirectory() as scratch:
        np.save(os.path.join(scratch, "outputs.npy"), outputs)
        about = {"texts": texts, "ids": ids, "architecture": architecture, "onnx": onnx, "trust": not foreign}
        write_text(os.path.join(scratch, "about.json"), json.dumps(about))
        # -I hides this project from the process. It downloads nothing, and transformers' copies of the code are thrown away.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "TRANSFORMERS_VERBOSITY": "error"}
        argv = [sys.executable, "-I", os.path.join(HERE, "self_check.py"), os.path.abspath(path), scratch]
        done = subprocess.run(
            argv, env=environment, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )  # fmt: skip
        if done.returncode != 0:
            reason = (done.stderr.strip() or "killed").splitlines()[-1]
            if not reason.startswith("AssertionError"):
                return {"failure": reason}
            raise UserError(f"self-check: {reason.removeprefix('AssertionError: ')} (nothing was written)")
        verdict = read_json(os.path.join(scratch, "verdict.json"), "no verdict")
    found = f"self-check in {verdict['by']}: {len(texts)} texts have the same tokens"
    if not architecture:
        print(found)
        return verdict
    print(
        f"{found}; {len(outputs):,} rows of outputs, largest difference {verdict['difference']:.1e}, "
        f"mean cosine {verdict['cosine']:.7f}, same top entry in {verdict['same']:,}"
    )
    if onnx == INT8:
        if not verdict["cosine"] >= MIN_INT8_COSINE:
            raise UserError(f"self-check failed: the cosine of {onnx} must be {MIN_INT8_COSINE} (nothing was written)")
        return verdict
    limit = max(MAX_DIFFERENCE, 1e-6 * float(np.abs(outputs).max()))
    limit = MAX_FOREIGN_DIFFERENCE if foreign else MAX_ONNX_DIFFERENCE if onnx else limit
    if not verdict["difference"] <= limit or (verdict["same"] != len(outputs) and not foreign):
        raise UserError(f"self-check failed: outputs may differ by at most {limit:.1e} (nothing was written)")
    return verdict


def check_export(path, expected, architecture, onnx=""):
    """The verdict of self_check on an export. Raises: UserError also where it could not be loaded."""
    verdict = self_check(path, *expected, architecture, onnx)
    if "failure" in verdict:
        raise UserError(f"self-check: {verdict['failure']} (nothing was written)")
    return verdict
