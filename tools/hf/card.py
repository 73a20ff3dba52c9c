"""The model card of an export: what its checkpoint, its log and its data's manifest say."""

import os
import re

import checkpoint
from common.files import read_json
from common.glue import GLUE_TASKS, part_of
from common.options import UserError
from common.run_directory import hours_of, read_log
from finetune_glue import read_pretrained

# finetune_glue.py's metrics as the hub names them, and the split where it is not "validation"
METRICS = {
    "accuracy": ("accuracy",), "accuracy_matched": ("accuracy", "validation_matched"),
    "accuracy_mismatched": ("accuracy", "validation_mismatched"), "f1": ("f1",), "matthews": ("matthews_correlation",),
    "pearson": ("pearsonr",), "spearman": ("spearmanr",),
}  # fmt: skip
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


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


def sources_of(data_dir):
    """(hub ids of the data sets, languages of C4) by the manifests of a run's shards, as far as they are still there."""
    ids, languages = [], []
    for part in data_dir.split(","):
        manifest = os.path.join(re.sub(r":[\d.eE+-]+$", "", part), "manifest.json")  # without a mixture's weight
        if os.path.exists(manifest):
            for path, *_ in read_json(manifest, "").get("sources", []):
                if found := re.match(rf"hf://datasets/({HUB_ID})@[^/]+/(.*)", path):
                    ids.append(found[1])
                    languages += re.findall(r"^([a-z]{2})/", found[2]) if found[1] == "allenai/c4" else []
    return list(dict.fromkeys(ids)), list(dict.fromkeys(languages))


def base_model(config, options):
    """The hub id that this model was converted from, or that its run started from; None if it is not known."""
    start = options.get("init_from")
    if not config.get("converted_from") and start and os.path.exists(os.path.join(start, "config.json")):
        config = checkpoint.read_config(start)
    name = (config.get("converted_from") or {}).get("name") or ""
    return name if re.fullmatch(HUB_ID, name) and not os.path.exists(name) else None


def glue_scores(file, path):
    """(one line, [EvalResult]) of a glue.json, which must be that of the checkpoint at `path`. Raises: UserError."""
    from huggingface_hub import EvalResult

    results, found = read_json(file, "expected a glue.json of finetune_glue.py"), []
    try:
        if own := [name for name in results["tasks"] if name not in GLUE_TASKS]:
            raise UserError(f"{file}: has scores of {own[0]!r}, which is no GLUE task (leave out --glue)")
        if results["checkpoint_sha256"] != read_pretrained(path).digest:
            raise UserError(f"{file}: has the scores of {results['checkpoint']}, which are not the weights in {path}")
        parts = {name: f" ({part})" if (part := part_of(name, task)) else "" for name, task in results["tasks"].items()}
        line = ", ".join(f"{name} {task['score']:.1f}{parts[name]}" for name, task in results["tasks"].items())
        line += f"; mean {results['average']:.1f} (GLUE development sets, recipe {results['recipe']})"
        for name, task in results["tasks"].items():
            for metric, values in task["metrics"].items():
                kind, split = (*METRICS[metric], "validation")[:2]
                where = {"dataset_type": "nyu-mll/glue", "dataset_name": f"GLUE {name}", "dataset_config": name}
                value = {"metric_type": kind, "metric_name": metric, "metric_value": round(values["mean"], 4)}
                found.append(EvalResult(task_type="text-classification", dataset_split=split, **where, **value))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{file}: not a glue.json of finetune_glue.py") from None
    return line, found


def model_card(cfg, config, labels, task="fill-mask", notes=()):
    """README.md of an export: what the checkpoint and the log say of this step, else "not known".

    cfg: a ConvertConfig. notes: {row: value} that the format adds. Raises: UserError.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # comes with datasets

    unknown = "not known"
    path = checkpoint.find(cfg.to_hf)
    file = os.path.join(path, "state.json")
    state = read_json(file, "") if os.path.exists(file) else {}  # a fine-tuned model has none; a converted one, step 0
    step = state.get("step") or None
    start, last, held_out = log_of(os.path.dirname(os.path.abspath(path)), step or 0)
    options = start.get("config", {})
    gpu_hours = state["gpu_seconds"] / 3600 if step and state.get("gpu_seconds") else last.get("gpu_hours")
    price = options.get("price_per_gpu_hour")
    datasets, languages = sources_of(options.get("data_dir") or "")
    languages = cfg.language.split(",") if cfg.language else languages
    start_model = base_model(config, options)

    def known(value, text="{}", otherwise=unknown):
        return otherwise if value is None else text.format(value)

    scores, results = glue_scores(cfg.glue, path) if cfg.glue else (unknown, [])
    where = {"dataset_type": datasets[0] if len(datasets) == 1 else "own", "dataset_name": "held-out documents"}
    for metric in ("accuracy", "loss"):
        if labels is None and held_out.get(metric) is not None:
            value = {"metric_type": metric, "metric_name": f"{metric} at masked tokens", "metric_value": held_out[metric]}
            results.insert(0, EvalResult(task_type="fill-mask", task_name="15 % masked", **where, **value))
    name = os.path.basename(os.path.abspath(cfg.out))
    mosaic = config["model"] == "mosaicbert"
    rows = {
        "architecture": ("MosaicBERT (arXiv 2312.17482)" if mosaic else "BERT")
        + f", {config['num_layers']} layers of {config['hidden_size']}, {config['num_heads']} heads",
        "data": ", ".join(datasets) or known(options.get("data_dir")),
        "tokens seen": known(step and state.get("tokens"), "{:,}"),
        "steps": known(step, "{:,}") + known(options.get("global_batch_size"), " of {:,} samples", ""),
        "sequence length": known(options.get("seq_length")),
        "held-out loss, 15 % masked": known(held_out.get("loss"), "{:.4f}"),
        "held-out accuracy": known(held_out.get("accuracy"), "{:.1%}"),
        "hardware": known(start.get("device")) + known(start.get("world_size"), ", {} process(es)", ""),
        hours_of(start.get("device")): known(gpu_hours, "{:.2f}"),
        "dollars": known(gpu_hours * price if gpu_hours and price else None, "{:.2f}"),
        "GLUE": scores,
        "code": known(start.get("commit")),
        "converted from": known((config.get("converted_from") or {}).get("name")),
        "tokenizer": f"{config['vocab_size']:,} entries, sha256 {config['tokenizer_sha256'] or unknown}",
        "license": cfg.license or unknown,
        **dict(notes),
    }
    if options.get("init_from"):
        rows["continued from"] = f"{options['init_from']}, whose data and steps are not counted here"
    if "task" in config:
        rows["fine-tuned from"] = known(config.get("fine_tuned_from", unknown), otherwise="random weights")
        rows["longest text"] = f"{config['task']['max_length']} tokens (give a pipeline truncation=True)"
    if labels:
        rows |= {"labels, in the order of the outputs": ", ".join(labels).replace("|", "\\|")}
    data = ModelCardData(
        model_name=name,
        pipeline_tag=task,
        library_name={"transformers": "transformers", "onnx": "transformers.js", "gguf": "gguf"}.get(cfg.format),
        tags=["onnx"] if cfg.format == "onnx" else ["text-embeddings-inference"] if cfg.format == "tei" else None,
        language=languages or None,
        license=cfg.license or None,
        base_model=start_model,
        datasets=datasets or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )
    table = [f"| {what} | {value} |" for what, value in rows.items()]
    about = f"A {'MosaicBERT' if mosaic else 'BERT'} for {task}, {USE[cfg.format][0]}."
    text = 'f"A text with a {pipe.tokenizer.mask_token}."' if task == "fill-mask" else '"A text."'
    names = {"name": cfg.push or name, "task": task, "text": text, "trust": ", trust_remote_code=True" if mosaic else ""}
    use = [line.format(**names) for line in USE[cfg.format][1:]]
    body = [f"# {name}", "", about, "", *use, "", "| | |", "|---|---|", *table, ""]
    text = "\n".join(["---", data.to_yaml(), "---", "", *body])
    ModelCard(text)  # reads it as the hub's library does
    return text


USE = {  # what the format is for, and how it is used
    "transformers": (
        "in transformers' format",
        "    from transformers import pipeline",
        '    pipe = pipeline("{task}", "{name}"{trust})',
        "    pipe({text})",
    ),
    "onnx": (
        "as ONNX, for batches of any length: `onnx/model.onnx` and, in int8, `onnx/model_quantized.onnx`",
        "    from transformers import AutoTokenizer",
        "    import onnxruntime",
        '    tokenizer = AutoTokenizer.from_pretrained("{name}")',
        '    session = onnxruntime.InferenceSession("{name}/onnx/model.onnx")',
        '    session.run(None, dict(tokenizer(["A text."], return_tensors="np")))',
    ),
    "gguf": (
        "in GGUF, for llama.cpp. It computes GELU by its tanh approximation, so vectors differ in the fourth digit",
        '    llama-embedding -m {name}/model-F16.gguf -p "A text."',
    ),
    "tei": (
        "in the layout of jina-bert-v2, for text-embeddings-inference alone: transformers would take it for a BERT",
        "    text-embeddings-router --model-id {name}",
    ),
}
