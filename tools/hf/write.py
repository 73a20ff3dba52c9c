"""Write a model in Hugging Face form, for transformers or as ONNX, and check the result against this project's outputs."""

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
from common.run_directory import read_log
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
MAX_FOREIGN_DIFFERENCE = 1e-4  # of an import, of any size; an ignored setting changes more, is_decoder 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Files. labels: a classifier's words, () for a regression, None for a masked LM.


def hf_config(config, special, labels):
    """The contents of transformers' config.json."""
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
        "max_position_embeddings": LONGEST[config["model"]],
        "type_vocab_size": 2,
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


def write_transformers(path, config, tensors, tokenizer_text, labels, card):
    """Write what transformers reads, and for an encoder sentence-transformers, into the directory `path`.

    Returns the name of the model's class.
    """
    _, special = load_tokenizer("tokenizer.json", tokenizer_text)
    tensors = dict(tensors)
    for name in set(checkpoint.PER_WORD) & tensors.keys():
        tensors[name] = tensors[name][: config["vocab_size"]].clone()
    save_file(tensors, os.path.join(path, "model.safetensors"), {"format": "pt"})
    # Both major versions take tokenizer.json as it is for this class. BertTokenizer would drop what it has beyond BERT's,
    # such as the cutting of long words, and version 4 does not know version 5's name, TokenizersBackend.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_NAMES, "clean_up_tokenization_spaces": False,
        "model_max_length": LONGEST[config["model"]],
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }  # fmt: skip
    files = {"config.json": hf_config(config, special, labels), "tokenizer_config.json": tokenizer_config}
    files |= sentence_files(config) if labels is None else {}
    for name, contents in files.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        write_text(os.path.join(path, name), json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    write_text(os.path.join(path, "tokenizer.json"), hf_tokenizer(tokenizer_text))
    if words := vocabulary(tokenizer_text):
        write_text(os.path.join(path, "vocab.txt"), "".join(f"{word}\n" for word in words))
    write_text(os.path.join(path, "README.md"), card)
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


def export_onnx(path, architecture):
    """Turn the transformers directory `path` into model.onnx, for any batch size and length, and its tokenizer."""
    import transformers

    auto = getattr(transformers, f"AutoModelFor{architecture.partition('For')[2]}")
    model = auto.from_pretrained(path, trust_remote_code=True).eval()
    model.config.return_dict = False
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    examples = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}  # a shared tensor would become one input
    torch.onnx.export(
        model, kwargs=examples, f=os.path.join(path, "model.onnx"), input_names=names,
        output_names=["logits"], dynamic_shapes=dict.fromkeys(names, dimensions), dynamo=True, verbose=False,
    )  # fmt: skip
    for name in os.listdir(path):
        if name not in ("model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "README.md"):
            leftover = os.path.join(path, name)
            shutil.rmtree(leftover) if os.path.isdir(leftover) else os.remove(leftover)


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


def self_check(path, texts, ids, outputs, architecture, onnx=False, foreign=False):
    """Run self_check.py on the model in a directory, in its own process, and print the verdict.

    architecture: the class to load, or None to compare tokens only. foreign: not an export of this project, so none of the
    code beside the weights is run, and another top entry is no fault where two are equal up to rounding.
    Returns None, or why transformers could not load it. Raises: UserError when tokens or outputs differ.
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
                return reason
            raise UserError(f"self-check: {reason.removeprefix('AssertionError: ')} (nothing was written)")
        verdict = read_json(os.path.join(scratch, "verdict.json"), "no verdict")
    found = f"self-check in {verdict['by']}: {len(texts)} texts have the same tokens"
    if not architecture:
        return print(found)
    print(
        f"{found}; {len(outputs):,} rows of outputs, largest difference {verdict['difference']:.1e}, "
        f"same top entry in {verdict['same']:,}"
    )
    limit = max(MAX_DIFFERENCE, 1e-6 * float(np.abs(outputs).max()))
    limit = MAX_FOREIGN_DIFFERENCE if foreign else MAX_ONNX_DIFFERENCE if onnx else limit
    if not verdict["difference"] <= limit or (verdict["same"] != len(outputs) and not foreign):
        raise UserError(f"self-check failed: outputs may differ by at most {limit:.1e} (nothing was written)")


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def log_of(directory, step):
    """The (start, train, eval) records in a run's log that belong to its checkpoint of `step`; {} for those it lacks."""
    path, found = os.path.join(directory, "log.jsonl"), {}
    if os.path.exists(path):
        with open(path, "rb") as file:
            contents = file.read()
        if contents and not contents.endswith(b"\n"):
            print(f"{path}: its last line was cut; the model card uses those before")
    for _, record in read_log(directory):
        if record.get("event") == "start":
            resumed_here = f"{record.get('resumed_from')}".endswith(f"step_{step:08d}")
            found |= {} if resumed_here else {"start": record}
        elif record.get("step") == step:
            found[record.get("event")] = record
        elif record.get("step", 0) > step:
            break
    return tuple(found.get(event, {}) for event in ("start", "train", "eval"))


def model_card(cfg, config, labels):
    """README.md of an export: what the checkpoint and the log say of this step, else "not known". cfg: a ConvertConfig."""
    unknown = "not known"
    path = checkpoint.find(cfg.to_hf)
    file = os.path.join(path, "state.json")
    state = read_json(file, "") if os.path.exists(file) else {}  # a fine-tuned model has none; a converted one, step 0
    step = state.get("step") or None
    start, last, held_out = log_of(os.path.dirname(os.path.abspath(path)), step or 0)
    options = start.get("config", {})
    gpu_hours = state["gpu_seconds"] / 3600 if step and "gpu_seconds" in state else last.get("gpu_hours")
    price = options.get("price_per_gpu_hour")

    def known(value, text="{}", otherwise=unknown):
        return otherwise if value is None else text.format(value)

    scores = unknown
    if cfg.glue:
        results = read_json(cfg.glue, "expected a glue.json of finetune_glue.py")
        try:
            scores = ", ".join(f"{name} {task['score']:.1f}" for name, task in results["tasks"].items())
            scores += f"; mean {results['average']:.1f} (GLUE development sets, recipe {results['recipe']})"
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{cfg.glue}: not a glue.json of finetune_glue.py") from None
    name = os.path.basename(os.path.abspath(cfg.out))
    mosaic = config["model"] == "mosaicbert"
    task = "MaskedLM" if labels is None else "SequenceClassification"
    pipeline = "fill-mask" if labels is None else "text-classification"
    trust = ", trust_remote_code=True" if mosaic else ""
    rows = {
        "architecture": ("MosaicBERT (arXiv 2312.17482)" if mosaic else "BERT")
        + f", {config['num_layers']} layers of {config['hidden_size']}, {config['num_heads']} heads",
        "data": known(options.get("data_dir")),
        "tokens seen": known(step and state.get("tokens"), "{:,}"),
        "steps": known(step, "{:,}") + known(options.get("global_batch_size"), " of {:,} samples", ""),
        "sequence length": known(options.get("seq_length")),
        "held-out loss, 15 % masked": known(held_out.get("loss"), "{:.4f}"),
        "held-out accuracy": known(held_out.get("accuracy"), "{:.1%}"),
        "hardware": known(start.get("device")) + known(start.get("world_size"), ", {} process(es)", ""),
        "GPU-hours": known(gpu_hours, "{:.2f}"),
        "dollars": known(gpu_hours * price if gpu_hours and price else None, "{:.2f}"),
        "GLUE": scores,
        "code": known(start.get("commit")),
        "converted from": known((config.get("converted_from") or {}).get("name")),
        "tokenizer": f"{config['vocab_size']:,} entries, sha256 {config['tokenizer_sha256'] or unknown}",
        "license": cfg.license or unknown,
    }
    if labels:
        rows |= {"labels, in the order of the outputs": ", ".join(labels).replace("|", "\\|")}
    front = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}"]
    front += [f"license: {cfg.license}"] if cfg.license else []
    table = [f"| {what} | {value} |" for what, value in rows.items()]
    example = "Paris is the [MASK] of France." if labels is None else "A text."
    use = [
        "    from transformers import pipeline",
        f'    pipe = pipeline("{pipeline}", "{name}"{trust})',
        f'    pipe("{example}")',
    ]
    if cfg.format == "onnx":
        use = [
            "    import onnxruntime",
            f'    session = onnxruntime.InferenceSession("{name}/model.onnx")',
            '    session.run(["logits"], {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})',
        ]
    about = f"A {task} model for padded batches of any length." if mosaic else f"A {task} model."
    return "\n".join([*front, "---", "", f"# {name}", "", about, "", *use, "", "| | |", "|---|---|", *table, ""])
