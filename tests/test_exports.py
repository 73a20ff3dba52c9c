"""Exports for ONNX, llama.cpp and TEI, the model card, and --push: what is written reads back, and a fault leaves nothing."""

import base64
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from common.options import UserError
from common.vocabulary import finish, train_tokenizer, wordpiece
from finetune_glue import read_pretrained
from model import MaskedLM, ModelConfig, SequenceClassifier
from tests.toy import SPECIAL
from tools import convert_hf
from tools.hf import write, write_gguf
from tools.hf.card import glue_scores, model_card
from tools.hf.read import read_hf

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCé中國ガ:[],0123456789", "\u0301"]
WORDS = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##ing"]
SIZE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 80}  # 80: no multiple of Q8_0's blocks


def make_run(path, model="mosaicbert", cased=False, labels=None, trained=False, **options):
    """A run with a WordPiece tokenizer, and weights so large that a difference shows. options: more of its config.json.

    trained: whether the tokenizer is like one of --train_tokenizer.
    """
    torch.manual_seed(0)
    tokenizer = wordpiece(cased, {word: i for i, word in enumerate(WORDS)})
    finish(tokenizer)
    text = tokenizer.to_str()
    if trained:
        text = json.loads(train_tokenizer(lambda: iter(["a"]), 100, cased))
        text["model"]["vocab"] = tokenizer.get_vocab()
        text = json.dumps(text)
    cfg = ModelConfig(model, **SIZE, hidden_dropout=0.0)
    net = MaskedLM(cfg, len(WORDS)) if labels is None else SequenceClassifier(cfg, len(WORDS), len(labels))
    weights = checkpoint.weights_of(net).items()
    weights = {name: weight * 4 if weight.ndim == 2 else torch.randn_like(weight) * 0.1 + weight for name, weight in weights}
    config = {**vars(cfg), "vocab_size": len(WORDS), "tokenizer_sha256": "", **options}
    if labels is not None:
        config["task"] = {"labels": labels, "text_columns": ["text"], "max_length": 64}
    texts = {"config.json": json.dumps(config), "tokenizer.json": text}
    path.mkdir(exist_ok=True)
    checkpoint.save(str(path), 1, {"model.safetensors": weights}, {**texts, "state.json": json.dumps({"step": 1})})
    return str(path)


def export(run, out, *argv):
    convert_hf.main([f"--to_hf={run}", f"--out={out}", *argv])
    return Path(out)


def fails(capsys, *argv):
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        convert_hf.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


# ---------------------------------------------------------------------------------------------------------------------
# TEI and jina-bert-v2


@pytest.fixture(scope="module")
def tei(tmp_path_factory):
    """(run, export for TEI)"""
    path = tmp_path_factory.mktemp("tei")
    run = make_run(path / "run", sentence_vectors={"pooling": "cls", "normalize": True, "max_tokens": 100})
    return run, export(run, path / "exported", "--format=tei")


def test_tei_finds_what_it_asks_for(tei):
    """The names and shapes in TEI's backends/candle/src/models/jina.rs, and the settings its router wants."""
    hf, weights = json.loads((tei[1] / "config.json").read_text()), load_file(tei[1] / "model.safetensors")
    assert hf["model_type"] == "bert" and hf["_name_or_path"] == "jinaai/jina-bert-implementation"
    assert hf["position_embedding_type"] == "alibi" and hf["max_position_embeddings"] == 2048
    required = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_dropout_prob pad_token_id"
    required += " max_position_embeddings type_vocab_size initializer_range layer_norm_eps architectures hidden_act"
    assert set(required.split()) <= hf.keys() and hf["hidden_act"] == "gelu"
    C, F = hf["hidden_size"], hf["intermediate_size"]
    shapes = {f"embeddings.LayerNorm.{kind}": (C,) for kind in ("weight", "bias")}
    shapes |= {"embeddings.word_embeddings.weight": (hf["vocab_size"], C), "embeddings.token_type_embeddings.weight": (2, C)}
    for i in range(hf["num_hidden_layers"]):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= {f"encoder.layer.{i}.attention.{part}.weight": (C, C), f"encoder.layer.{i}.attention.{part}.bias": (C,)}
        for kind in ("weight", "bias"):
            shapes |= {f"encoder.layer.{i}.{norm}.{kind}": (C,) for norm in ("attention.output.LayerNorm", "mlp.layernorm")}
        shapes |= {f"encoder.layer.{i}.mlp.gated_layers.weight": (2 * F, C), f"encoder.layer.{i}.mlp.wo.bias": (C,)}
        shapes[f"encoder.layer.{i}.mlp.wo.weight"] = (C, F)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    pooling = json.loads((tei[1] / "1_Pooling/config.json").read_text())
    modes = {
        name: pooling[f"pooling_mode_{name}"] for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    }
    assert [name for name, on in modes.items() if on] == ["cls_token"]
    assert json.loads((tei[1] / "sentence_bert_config.json").read_text())["max_seq_length"] == 100
    assert (tei[1] / "vocab.txt").read_text().splitlines() == WORDS
    assert "transformers would take it for a BERT" in (tei[1] / "README.md").read_text()


def test_a_jina_bert_v2_becomes_a_run(tei, tmp_path):
    """Continuing from one: its tensors are MosaicBERT's, with query, key and value joined."""
    convert_hf.main([f"--from_hf={tei[1]}", f"--out={tmp_path / 'run'}"])
    (_, before, _), (config, after, _) = checkpoint.load(tei[0]), checkpoint.load(str(tmp_path / "run"))
    assert config["model"] == "mosaicbert" and config["sentence_vectors"]["pooling"] == "cls"
    assert after.keys() == {name for name in before if name.startswith("bert.")}
    assert all(torch.equal(tensor[: len(WORDS)], before[name][: len(WORDS)]) for name, tensor in after.items())


LAYER = "encoder.layer.0.attention.self"


def change(fields=(), tensors=()):
    def apply(path):
        hf = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**hf, **dict(fields)}))
        weights = load_file(path / "model.safetensors") | dict(tensors)
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    "spoil, says",
    [
        (change({"feed_forward_type": "reglu"}), "feed_forward_type is 'reglu'"),
        (
            change(tensors={"encoder.layer.0.attention.self.layer_norm_q.weight": torch.ones(64)}),
            "LayerNorms on queries and keys",
        ),
        (
            change(tensors={"encoder.layer.0.attention.self.key.bias": None}),
            "1 weights missing: .*layer.0.attention.self.Wqkv.bias",
        ),
        (
            change({"model_type": "xlm-roberta"}),
            "model_type is 'xlm-roberta' .*would take a SentencePiece tokenizer",
        ),
        (change({"model_type": "modernbert"}), "model_type is 'modernbert' .*would take LayerNorms before the layers"),
    ],
)
def test_relatives_are_refused_by_name(tei, tmp_path, spoil, says):
    shutil.copytree(tei[1], tmp_path / "jina")
    spoil(tmp_path / "jina")
    with pytest.raises(UserError, match=says):
        read_hf(str(tmp_path / "jina"))


# ---------------------------------------------------------------------------------------------------------------------
# GGUF and ONNX


def test_gguf_reads_back(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    out = export(make_run(tmp_path / "run", cased=True), tmp_path / "exported", "--format=gguf")
    assert sorted(os.listdir(out)) == ["README.md", "model-F16.gguf", "model-Q8_0.gguf"]
    reader = gguf.GGUFReader(out / "model-Q8_0.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "jina-bert-v2" and fields["jina-bert-v2.pooling_type"] == gguf.PoolingType.MEAN
    assert fields["tokenizer.ggml.normalizer.lowercase"] is False is fields["tokenizer.ggml.normalizer.strip_accents"]
    assert fields["tokenizer.ggml.tokens"][-2:] == ["\u2581the", "ing"] and fields["tokenizer.ggml.tokens"][:5] == SPECIAL
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.attn_k.weight"] == "Q8_0" and kinds["blk.1.attn_k.bias"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # of 80 columns
    card = (out / "README.md").read_text()
    assert "| model-Q8_0.gguf | 0." in card and "mean cosine of its hidden states 0.99" in card


@pytest.mark.parametrize(
    "options, argv, says",
    [
        ({"model": "bert"}, ["--format=gguf"], "for MosaicBERT alone (llama.cpp has its own converter"),
        ({"model": "bert"}, ["--format=tei"], "for MosaicBERT alone (for BERT, TEI reads --format=transformers"),
        ({"labels": ["no", "yes"]}, ["--format=tei"], "a classifier, and format tei is for encoders"),
        ({"labels": ["no", "yes"]}, ["--task=fill-mask"], "this model in format transformers is for text-classification"),
        ({}, ["--format=tei", "--task=fill-mask"], "this model in format tei is for feature-extraction"),
        ({}, ["--push=nowhere"], "--push=nowhere: expected owner/name"),
        ({}, ["--push=a/b/c"], "--push=a/b/c: Repo id must be"),
    ],
)
def test_what_cannot_be_exported(tmp_path, capsys, monkeypatch, options, argv, says):
    run = make_run(tmp_path / "run", **options)
    monkeypatch.setitem(convert_hf.NEEDS, "gguf", ())
    assert says in fails(capsys, f"--to_hf={run}", f"--out={tmp_path / 'out'}", *argv) and not (tmp_path / "out").exists()


def test_failed_checks_leave_nothing(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run")
    argv = [f"--to_hf={run}", f"--out={tmp_path / 'out'}"]
    cut = torch.Tensor.chunk
    with monkeypatch.context() as patch:  # the parts in another order
        patch.setattr(torch.Tensor, "chunk", lambda *args, **options: cut(*args, **options)[::-1])
        assert "self-check failed" in fails(capsys, *argv, "--format=tei") and not (tmp_path / "out").exists()
        patch.undo()
    pytest.importorskip("gguf")
    names = write_gguf.gguf_names

    def swapped(layers):
        return {ours: theirs[::-1] if "mlp" in ours else theirs for ours, theirs in names(layers).items()}

    reads = write_gguf.read_back
    monkeypatch.setattr(write_gguf, "gguf_names", swapped)
    monkeypatch.setattr(
        write_gguf, "read_back", lambda *a: (monkeypatch.setattr(write_gguf, "gguf_names", names), reads(*a))[1]
    )
    assert "self-check failed: the cosine of F16" in fails(capsys, *argv, "--format=gguf") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["transformers", "tei", "onnx", "gguf"])
def test_a_trained_tokenizer_composes_letters_in_every_export(tmp_path, kind):
    """But llama.cpp, which gets the words and settings alone; the check of an export has such letters."""
    for package in ("transformers", *convert_hf.NEEDS.get(kind, ())):
        pytest.importorskip(package)
    import transformers

    out = export(make_run(tmp_path / "run", trained=True), tmp_path / "exported", f"--format={kind}")
    if kind != "gguf":
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.tokenize("e\u0301 \u00e9") == ["\u00e9", "\u00e9"]


def test_other_tokenizers_are_no_gguf(tmp_path, capsys, monkeypatch):
    from tests.toy import make_run as with_whole_words

    run = with_whole_words(tmp_path / "run")
    monkeypatch.setitem(convert_hf.NEEDS, "gguf", ())
    assert "not BERT's WordPiece" in fails(capsys, f"--to_hf={run}", f"--out={tmp_path / 'out'}", "--format=gguf")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mosaicbert", "bert"])
@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction", "text-classification"])
def test_onnx(tmp_path, capsys, family, task):
    transformers = pytest.importorskip("transformers")
    for package in convert_hf.NEEDS["onnx"]:
        pytest.importorskip(package)
    import onnxruntime

    run = make_run(tmp_path / "run", family, labels=["no", "yes", "maybe"] if task == "text-classification" else None)
    given = [f"--task={task}"] if task == "feature-extraction" else []
    out = export(run, tmp_path / "exported", "--format=onnx", *given)
    printed = capsys.readouterr().out
    assert "onnx/model.onnx: " in printed and "onnx/model_quantized.onnx: " in printed  # 64 texts, eight a batch
    assert (out / "onnx/model_quantized.onnx").stat().st_size < (out / "onnx/model.onnx").stat().st_size
    assert "| int8 | " in (out / "README.md").read_text() and not list(out.glob("*.py")) + list(out.glob("*.safetensors"))
    config = transformers.AutoConfig.from_pretrained(out)  # which needs no code
    assert type(config) is transformers.BertConfig and config.num_hidden_layers == 2
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state" if "feature" in task else "logits"]
    assert (out / "modules.json").exists() == (task != "text-classification")


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 6])
def test_llama_cpp_gives_the_same_tokens_and_vectors(tmp_path, monkeypatch, heads):
    """Tokens of all texts but those with a Turkish İ, whose lower case it takes to be a plain i."""
    llama, _ = pytest.importorskip("xllamacpp"), pytest.importorskip("gguf")
    import urllib.request

    monkeypatch.setitem(SIZE, "num_heads", heads)
    monkeypatch.setitem(SIZE, "hidden_size", 16 * heads)
    run = make_run(tmp_path / "run")
    out = export(run, tmp_path / "exported", "--format=gguf")
    texts, ids, outputs = write.expected_outputs(*checkpoint.load(run), None, run, encoder_only=True)
    ends = np.cumsum([len(row) for row in ids])
    for name, least in (("F16", 0.99999), ("Q8_0", 0.999)):
        params = llama.CommonParams()
        params.model.path, params.embedding, params.n_ctx = str(out / f"model-{name}.gguf"), True, 2048
        params.warmup, params.n_parallel = False, 1
        server = llama.Server(params)
        for text, row, vectors in zip(texts, ids, np.split(outputs, ends[:-1])):
            body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
            tokens = json.load(urllib.request.urlopen(request))["tokens"]
            if "İ" in text or len(row) == write.CHECK_LONGEST + 2:  # such texts are cut in the check
                continue
            assert tokens == row, text
            theirs = np.ravel(server.handle_embeddings({"input": text})["data"][0]["embedding"])
            ours = vectors.mean(0)
            assert theirs @ ours / np.linalg.norm(theirs) / np.linalg.norm(ours) > least
        del server


# ---------------------------------------------------------------------------------------------------------------------
# The card and the hub


def write_log(run, shards):
    """A log in which the exported step, 1, and a later one differ."""
    config = {"price_per_gpu_hour": 2.5, "data_dir": f"{shards}:2.0", "global_batch_size": 16, "seq_length": 128}
    records = [{"event": "start", "config": config, "device": "toy", "world_size": 2, "commit": "abc", "resumed_from": None}]
    for step, loss in ((1, 3.25), (2, 0.5)):
        records += [{"event": "train", "step": step, "gpu_hours": 2.0 * step}]
        records += [{"event": "eval", "step": step, "loss": loss, "accuracy": loss / 10}]
    Path(run, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def digest_of(run):
    return read_pretrained(checkpoint.find(run)).digest


def test_the_card_is_what_the_hub_reads(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    run = make_run(tmp_path / "run", converted_from={"name": "mosaicml/mosaic-bert-base", "revision": None})
    (tmp_path / "shards").mkdir()
    sources = [["hf://datasets/allenai/c4@0123/en/c4-train.00000-of-01024.json.gz", 0, 9, "train"], ["more.txt", 0, 5, ""]]
    (tmp_path / "shards/manifest.json").write_text(json.dumps({"sources": sources}))
    write_log(run, tmp_path / "shards")
    glue = {"tasks": {"cola": {"score": 50.0, "train_examples": 4000, "metrics": {"matthews": {"mean": 0.5, "values": [0.5]}}}}}
    glue |= {"average": 50.0, "recipe": "mosaic", "checkpoint": "out/this", "checkpoint_sha256": digest_of(run)}
    (tmp_path / "glue.json").write_text(json.dumps(glue))
    argv = {"to_hf": run, "out": "exported", "license": "apache-2.0", "glue": f"{tmp_path}/glue.json"}
    text = model_card(convert_hf.ConvertConfig(**argv), checkpoint.load(run)[0], None)
    data = hub.ModelCard(text).data
    assert "cola 50.0 (47 % of the training data); mean 50.0 (GLUE development sets" in text
    assert data.language == ["en"] and data.datasets == ["allenai/c4"] and data.license == "apache-2.0"
    assert data.base_model == "mosaicml/mosaic-bert-base" and data.pipeline_tag == "fill-mask"
    assert data.metrics == ["accuracy", "loss", "matthews_correlation"]
    found = {
        (result.dataset_type, result.dataset_config, result.metric_type): result.metric_value for result in data.eval_results
    }
    assert found[("allenai/c4", None, "loss")] == 3.25 and found[("allenai/c4", None, "accuracy")] == 0.325  # of step 1
    assert found[("nyu-mll/glue", "cola", "matthews_correlation")] == 0.5
    for row in ("data | allenai/c4", "steps | 1 of 16 samples", "masked | 3.2500", "GPU-hours | 2.00", "dollars | 5.00"):
        assert f"{row} |" in text
    assert "not knownnot known" not in text
    other = model_card(convert_hf.ConvertConfig(**argv, language="de,en"), checkpoint.load(run)[0], None)
    assert hub.ModelCard(other).data.language == ["de", "en"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"checkpoint_sha256": "0" * 64}, "has the scores of out/other, which are not the weights in"),
        ({"tasks": {"own": {}}}, "has scores of 'own', which is no GLUE task"),
    ],
)
def test_scores_of_something_else_are_refused(tmp_path, change, says):
    run = make_run(tmp_path / "run")
    glue = {"tasks": {}, "average": 50.0, "recipe": "mosaic", "checkpoint": "out/other", "checkpoint_sha256": digest_of(run)}
    (tmp_path / "glue.json").write_text(json.dumps({**glue, **change}))
    with pytest.raises(UserError, match=says):
        glue_scores(str(tmp_path / "glue.json"), checkpoint.find(run))


def test_options_of_the_other_direction_are_refused(tmp_path, capsys):
    for argv in (["--to_hf=run", "--allow_pickle"], ["--from_hf=model", "--license=mit"]):
        with pytest.raises(SystemExit):
            convert_hf.main([*argv, f"--out={tmp_path}/out"])
        assert f"error: {argv[1].partition('=')[0]}: means nothing with {argv[0].partition('=')[0]}" in capsys.readouterr().err


def test_a_card_of_nothing_known(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    run = make_run(tmp_path / "run")
    text = model_card(convert_hf.ConvertConfig(to_hf=run, out="exported"), checkpoint.load(run)[0], None)
    assert hub.ModelCard(text).data.to_dict().keys() == {"library_name", "pipeline_tag", "model_name"}
    assert "| hardware | not known |" in text and "not knownnot" not in text


class Hub(ThreadingHTTPServer):
    """As much of huggingface.co as an upload of small files needs. refuses: {path: (status, message)}; files: what came."""

    daemon_threads = True

    def __init__(self, refuses):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.refuses, self.files, self.created = refuses, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class HubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path in hub.refuses:
            status, message = hub.refuses[path]
            return self.answer({"error": message}, status, {"X-Error-Message": message})
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.answer({"url": f"{hub.url}/me/model", "name": "me/model"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitUrl": f"{hub.url}/me/model/commit/1", "commitOid": "1"})
        if path == "/api/models/me/model":  # asked for after a refusal: is it there already?
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.answer({"name": "me", "type": "user", "auth": {}, "errors": [], "warnings": []})

    do_GET = do_POST

    def answer(self, contents, status=200, headers=()):
        text = json.dumps(contents).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_hub(monkeypatch):
    """fake_hub(refuses) starts one, to which huggingface_hub talks."""
    library = pytest.importorskip("huggingface_hub")
    servers = []

    def start(refuses=()):
        servers.append(Hub(dict(refuses)))
        monkeypatch.setattr(library.constants, "ENDPOINT", servers[0].url)
        init = library.HfApi.__init__
        monkeypatch.setattr(library.HfApi, "__init__", lambda self: init(self, endpoint=servers[0].url, token="hf_token"))
        return servers[0]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_push(tmp_path, capsys, fake_hub):
    hub = fake_hub()
    out = export(make_run(tmp_path / "run"), tmp_path / "exported", "--format=tei", "--push=me/model")
    assert f"exported: uploaded to {hub.url}/me/model/commit/1" in capsys.readouterr().out
    assert hub.created[0]["name"] == "model" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.files == {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert b"--model-id me/model" in hub.files["README.md"]


@pytest.mark.parametrize(
    "path, status, message, finished",
    [
        ("/api/whoami-v2", 401, "Invalid user token.", False),
        ("/api/repos/create", 403, "You don't have the rights to create a model under this namespace", True),
        ("/api/models/me/model/commit/main", 400, "Bad files", True),
    ],
)
def test_the_hubs_reasons(tmp_path, capsys, fake_hub, path, status, message, finished):
    fake_hub({path: (status, message)})
    run = make_run(tmp_path / "run")
    error = fails(capsys, f"--to_hf={run}", f"--out={tmp_path / 'out'}", "--format=tei", "--push=me/model")
    assert error.startswith("error: --push=me/model: ") and message in error
    assert (tmp_path / "out/config.json").exists() == finished == ("is finished and checked" in error)
