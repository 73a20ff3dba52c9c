"""Both architectures: parameter counts and names, and agreement with independent references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import kernels
import train
from checkpoint import load_model
from common.batch import Batch
from common.options import UserError
from model import LAYER_NORM_EPS, MaskedLM, ModelConfig, SequenceClassifier, alibi_slopes, checkpoint_layers, matrix_flops
from tests.toy import make_shards, toy_argv

LARGE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096}
XL = {"hidden_size": 2048, "num_layers": 24, "num_heads": 32, "intermediate_size": 5632}
TINY = {"hidden_size": 48, "num_layers": 2, "num_heads": 6, "intermediate_size": 40, "hidden_dropout": 0.0}


def tiny(model="mosaicbert", vocab_size=70, **options):
    """A small model with weights far larger than usual, so that no term is too small to matter."""
    network = MaskedLM(ModelConfig(model=model, **{**TINY, **options}), vocab_size)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def flat(sequences, **fields):
    """These lists of ids as a Batch."""
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    return Batch(ids, cu_seqlens, max(lengths), None, **fields)


def some_sequences(*lengths, vocab_size=70):
    return [torch.randint(5, vocab_size, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize(
    "options, count",
    [
        ({}, 137_400_384),
        (LARGE, 435_221_312),
        (XL, 1_300_328_256),
        ({"model": "bert"}, 109_514_298),
        ({"model": "bert", **LARGE}, 335_174_458),
    ],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        network = MaskedLM(ModelConfig(**options), 30_522)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_state_dict_has_the_names_and_shapes_of_the_published_weights():
    with torch.device("meta"):
        network = MaskedLM(ModelConfig(), 30_522)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    expected = {
        "bert.embeddings.word_embeddings.weight": [30528, 768],
        "bert.embeddings.token_type_embeddings.weight": [2, 768],
        "bert.embeddings.LayerNorm.weight": [768],
        "bert.embeddings.LayerNorm.bias": [768],
        "cls.predictions.transform.dense.weight": [768, 768],
        "cls.predictions.transform.dense.bias": [768],
        "cls.predictions.transform.LayerNorm.weight": [768],
        "cls.predictions.transform.LayerNorm.bias": [768],
        "cls.predictions.decoder.weight": [30528, 768],
        "cls.predictions.decoder.bias": [30528],
    }
    for i in range(12):
        layer = f"bert.encoder.layer.{i}"
        expected |= {
            f"{layer}.attention.self.Wqkv.weight": [2304, 768],
            f"{layer}.attention.self.Wqkv.bias": [2304],
            f"{layer}.attention.output.dense.weight": [768, 768],
            f"{layer}.attention.output.dense.bias": [768],
            f"{layer}.attention.output.LayerNorm.weight": [768],
            f"{layer}.attention.output.LayerNorm.bias": [768],
            f"{layer}.mlp.gated_layers.weight": [6144, 768],
            f"{layer}.mlp.wo.weight": [768, 3072],
            f"{layer}.mlp.wo.bias": [768],
            f"{layer}.mlp.layernorm.weight": [768],
            f"{layer}.mlp.layernorm.bias": [768],
        }
    assert shapes == expected


def test_slopes():
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-k for k in range(1, 9)] + [0.707107, 0.353553, 0.176777, 0.088388], rel=1e-5
    )
    assert alibi_slopes(16).tolist() == pytest.approx([2 ** (-k / 2) for k in range(1, 17)])
    assert [len(alibi_slopes(n)) for n in (1, 2, 3, 6, 24)] == [1, 2, 3, 6, 24]


def mosaicbert_by_hand(weights, sequence, num_heads, intermediate_size):
    """Logits (n, V) of one sequence in float64, written from the description of the model."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], LAYER_NORM_EPS)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    n = len(sequence)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    x = w["bert.embeddings.word_embeddings.weight"][sequence] + w["bert.embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "bert.embeddings.LayerNorm")
    for i in range(2):
        layer = f"bert.encoder.layer.{i}"
        q, k, v = linear(x, f"{layer}.attention.self.Wqkv").chunk(3, -1)
        heads = []
        for h, slope in enumerate(alibi_slopes(num_heads).double()):
            d = q.shape[-1] // num_heads
            part = slice(h * d, (h + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d) - slope * distance
            heads.append(scores.softmax(-1) @ v[:, part])
        x = norm(linear(torch.cat(heads, -1), f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        u = x @ w[f"{layer}.mlp.gated_layers.weight"].T
        hidden = gelu(u[:, :intermediate_size]) * u[:, intermediate_size:]
        x = norm(linear(hidden, f"{layer}.mlp.wo") + x, f"{layer}.mlp.layernorm")
    x = norm(gelu(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
    return x @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.decoder.bias"]


def test_mosaicbert_equals_its_description():
    network = tiny().eval()
    sequences = some_sequences(9, 1, 33)
    ids = torch.zeros(3, 33, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
    logits = network.logits(ids, mask)
    assert logits.shape == (3, 33, 70) and logits.dtype == torch.float32
    for row, sequence in enumerate(sequences):
        expected = mosaicbert_by_hand(network.state_dict(), sequence, 6, 40)[:, :70]
        torch.testing.assert_close(logits[row, : len(sequence)].double(), expected, rtol=1e-4, atol=2e-5)
    other_padding = torch.where(mask.bool(), ids, 7)
    assert (network.logits(other_padding, mask) == logits).all()


def test_bert_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=70, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40
    )
    theirs = transformers.BertForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ours = tiny("bert").eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    checkpoint.load_weights(ours, theirs.state_dict(), "theirs")
    ids = torch.randint(0, 70, (5, 40))
    mask = (torch.arange(40) < torch.tensor([40, 1, 2, 17, 39])[:, None]).long()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
    difference = (ours.logits(ids, mask) - expected)[mask.bool()].abs().max().item()
    print(f"largest difference {difference:.1e} at logits of up to {expected.abs().max():.1f}")
    assert difference <= 1e-5


def test_bert_trains_like_that_of_transformers():
    """Same weights, no dropout, AdamW, padded batches: the losses of 40 steps and the last gradients."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40}
    config = transformers.BertConfig(
        vocab_size=70, hidden_dropout_prob=0, attention_probs_dropout_prob=0, hidden_act="gelu", **sizes
    )
    theirs = transformers.BertForMaskedLM(config).train()
    ours = tiny("bert", hidden_dropout=0.0, attention_dropout=0.0).train()
    checkpoint.load_weights(ours, theirs.state_dict(), "theirs")
    optimizers = [torch.optim.AdamW(network.parameters(), 5e-3) for network in (ours, theirs)]
    keep = torch.arange(40) < torch.tensor([40, 3, 17, 39])[:, None]  # (B, T)
    longest, cu_seqlens = 40, torch.tensor([0, 40, 43, 60, 99], dtype=torch.int32)
    for step in range(40):
        ids = (torch.randint(1, 5, (4, 1)) + torch.arange(40)) * keep  # each token determines the next
        masked = (torch.rand(4, 40) < 0.3) & keep
        masked[0, 0] = True
        labels = torch.where(masked, ids, -100)
        inputs = torch.where(masked, 5, ids)
        positions = masked[keep].nonzero()[:, 0]  # in the flat stream of tokens
        batch = Batch(inputs[keep], cu_seqlens, longest, None, masked_positions=positions, labels=ids[masked])
        loss = ours(batch) / len(positions)
        expected = theirs(inputs, attention_mask=keep.long(), labels=labels).loss
        print(f"step {step}: {loss.item():.6f}, {expected.item():.6f}")
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        for optimizer, value in zip(optimizers, (loss, expected)):
            optimizer.zero_grad()
            value.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert expected < 2.5  # guessing among 43 would give 3.8
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():  # AdamW would not notice if they were off by a factor
        scale = gradients[name].abs().max().item()
        assert scale > 1e-5 or name.endswith("key.bias"), name  # softmax ignores it: 0 up to rounding
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=max(1e-3 * scale, 1e-7), msg=name)


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_selected_rows_equal_those_of_the_full_output(model):
    """Computing only some rows in the last layer, padding the stream and adding empty sequences change nothing."""
    network = tiny(model).eval()
    batch = flat(some_sequences(20, 3, 31))
    whole = network.bert(batch)
    rows = torch.tensor([0, 5, 19, 20, 22, 23, 53])
    torch.testing.assert_close(network.bert(batch, rows), whole[rows], rtol=1e-5, atol=1e-6)
    padded = torch.cat([batch.input_ids, torch.zeros(10, dtype=torch.long)])
    with_empty = torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:], batch.cu_seqlens[-1:]])
    again = network.bert(Batch(padded, with_empty, 40, None), rows)
    torch.testing.assert_close(again, whole[rows], rtol=1e-5, atol=1e-6)
    again.sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


def test_kernels_match_pytorch_in_loss_and_gradients(device, triton_backend):
    """The whole model in fp32, with the Triton kernels and in plain PyTorch: the loss and every gradient."""
    network = tiny(hidden_size=64, num_heads=4, intermediate_size=72).to(device)
    positions, labels = torch.tensor([3, 22, 21, 50, 0]), torch.tensor([8, 66, 5, 9, -100])
    batch = flat(some_sequences(20, 3, 31), masked_positions=positions, labels=labels).to(torch.device(device))
    results = []
    for backend in ("triton", "torch"):
        kernels.set_backend(backend)
        loss = network(batch)
        results.append([loss, *torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)])
    for (name, _), got, expected in zip([("loss", None), *network.named_parameters()], *results):
        if expected is not None:
            error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
            print(f"{name:60s} error {error:.1e} at {scale:.1e}")
            assert error <= 1e-4 * scale, name


def loss_and_gradients(network, batch):
    torch.manual_seed(1)
    loss = network(batch)
    return [loss, *torch.autograd.grad(loss, list(network.parameters()), allow_unused=True), torch.rand(1)]


@pytest.mark.parametrize("model, backend", [("mosaicbert", "torch"), ("mosaicbert", "triton"), ("bert", "torch")])
def test_activation_checkpointing_changes_no_bit(device, triton_backend, monkeypatch, model, backend):
    """With dropout: the layers run again draw what they drew before, and what comes after is drawn as ever."""
    kernels.set_backend(backend)
    network = tiny(model, hidden_size=32, num_heads=2, intermediate_size=48, hidden_dropout=0.1).to(device)
    positions, labels = torch.tensor([3, 22, 21, 50, 0]), torch.tensor([8, 66, 5, 9, -100])
    batch = flat(some_sequences(20, 3, 31), masked_positions=positions, labels=labels).to(torch.device(device))
    expected, calls = loss_and_gradients(network, batch), []
    for layer in network.bert.encoder.layer:
        layer.forward = lambda *args, forward=layer.forward: calls.append(1) or forward(*args)
    checkpoint_layers(network)
    got = loss_and_gradients(network, batch)
    assert len(calls) == 2 * len(network.bert.encoder.layer)
    for ours, exact in zip(got, expected, strict=True):
        assert ours is exact is None or torch.equal(ours, exact)


def test_training_calls_kernels_without_the_dispatcher(device, triton_backend):
    """No custom operator in the training step; second derivatives, which the kernels lack, raise."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    network = tiny(hidden_size=64, num_heads=4, intermediate_size=72).to(device)
    positions, labels = torch.tensor([3, 22]), torch.tensor([8, 66])
    batch = flat(some_sequences(20, 3), masked_positions=positions, labels=labels).to(torch.device(device))
    seen = []
    with Seen():
        network(batch).backward()
    assert len(seen) > 100 and not [name for name in seen if "mosaicbert" in name]
    for function in (
        lambda x: network.bert.encoder.layer[0](x, x, batch, network.bert.slopes)[0],
        lambda x: kernels.geglu(x),
        lambda x: network.bert.embeddings.LayerNorm(x),
        lambda x: network.cls.predictions.loss(x[:2], batch.labels),
    ):
        x = torch.randn(23, 64, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="backward through mosaicbert"):
            gradient.sum().backward()


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_loss_is_a_sum_over_masked_tokens(model):
    network = tiny(model).eval()
    positions, labels = torch.tensor([3, 25, 0, 0]), torch.tensor([8, 66, -100, -100])
    batch = flat(some_sequences(20, 12), masked_positions=positions, labels=labels)
    loss = network(batch)
    logits = network.masked_logits(batch)[:2]
    expected = -logits.log_softmax(-1)[[0, 1], [8, 66]].sum()
    torch.testing.assert_close(loss, expected)


def test_mosaicbert_takes_any_length_and_bert_512():
    batch = flat(some_sequences(700))
    assert tiny().eval().bert(batch).isfinite().all()
    with pytest.raises(ValueError, match="512 positions"):
        tiny("bert").bert(batch)


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_classifier_reads_the_first_token(model):
    options = {**TINY, "model": model}
    network = SequenceClassifier(ModelConfig(**options), 70, num_labels=3).eval()
    sequences = some_sequences(9, 20, 4)
    batch = flat(sequences, token_type_ids=torch.randint(0, 2, (33,)))
    scores = network(batch)
    assert scores.shape == (3, 3)
    hidden = network.bert(batch)[batch.cu_seqlens[:-1].long()]
    dense = network.bert.pooler.dense
    torch.testing.assert_close(scores, network.classifier(torch.tanh(dense(hidden))), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(scores, network(flat(sequences)))  # token types matter
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= network.state_dict().keys()
    scores.sum().backward()
    assert network.bert.encoder.layer[0].attention.output.dense.weight.grad.abs().sum() > 0


def test_initial_weights():
    torch.manual_seed(1)
    network = MaskedLM(ModelConfig(hidden_size=96, num_layers=1, num_heads=2, intermediate_size=64), 700)
    embedding = network.bert.embeddings.word_embeddings.weight
    assert network.cls.predictions.decoder.weight is embedding
    assert (embedding[0] == 0).all() and embedding[1:].std().item() == pytest.approx(0.02, rel=0.02)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "orm.weight" in name:
            assert (parameter == 1).all(), name
        else:
            if "token_type" in name:
                parameter, second = parameter
                assert not second.any()
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_dropout_is_where_it_should_be(monkeypatch):
    """Inside the feed-forward layer and after attention; not after the feed-forward layer, and not in evaluation."""
    norm, geglu = kernels.dropout_add_layernorm, kernels.geglu
    seen = []

    def watch_norm(x, residual, weight, bias, dropout_prob, *rest):
        seen.append(("norm", dropout_prob))
        return norm(x, residual, weight, bias, dropout_prob, *rest)

    def watch_geglu(x, dropout_prob):
        out = geglu(x, dropout_prob)
        seen.append(("geglu", round((out == 0).float().mean().item(), 1)))
        return out

    monkeypatch.setattr(kernels, "dropout_add_layernorm", watch_norm)
    monkeypatch.setattr(kernels, "geglu", watch_geglu)
    cfg = ModelConfig(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=4000, hidden_dropout=0.5)
    layer = MaskedLM(cfg, 70).bert.encoder.layer[0]
    x = torch.randn(4, 64)
    for training in (True, False):
        layer.train(training)(x, x, flat(some_sequences(4)), alibi_slopes(2))
    assert seen == [("norm", 0.5), ("geglu", 0.5), ("norm", 0.0), ("norm", 0.0), ("geglu", 0.0), ("norm", 0.0)]


@pytest.mark.parametrize("model", ["mosaicbert", "bert"])
def test_flops_equal_those_pytorch_counts(model):
    """matrix_flops against torch's FlopCounterMode; attention separately, since the counter sees another algorithm."""
    from torch.utils.flop_counter import FlopCounterMode

    network = tiny(model)
    length, count, masked = 32, 4, 8
    positions = torch.arange(0, length * count, length * count // masked)
    batch = flat(some_sequences(*[length] * count), masked_positions=positions, labels=positions % 70)
    with FlopCounterMode(display=False) as counter:
        network(batch).backward()
    by_operator = counter.get_flop_counts()["Global"]
    linear = sum(flops for operator, flops in by_operator.items() if str(operator) in ("aten.mm", "aten.addmm"))
    vocab_size = network.bert.embeddings.word_embeddings.num_embeddings
    without_attention = matrix_flops(network.cfg, vocab_size, length * count, 0, masked)
    assert linear == without_attention
    attention = matrix_flops(network.cfg, vocab_size, length * count, count * length**2, masked) - without_attention
    assert attention == 3 * 2 * (4 * 48 * length * length * count)


def test_flops_of_the_base_model():
    per_token = matrix_flops(ModelConfig(), 30_528, 128, 128**2, 0.3 * 128) / 128
    assert per_token == pytest.approx(704.7e6, rel=1e-3)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"attention_dropout": 0.1}, "MosaicBERT has none"),
        ({"num_heads": 5}, "not a multiple of num_heads=5"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
    ],
)
def test_impossible_models_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        ModelConfig(**options).check_model()


def test_load_model_from_run_and_checkpoint(tmp_path):
    out = tmp_path / "run"
    train.main(toy_argv(make_shards(tmp_path / "shards"), out, max_steps=4, checkpoint_interval=2))
    network = load_model(str(out))
    assert not network.training and network.vocab_size == 100
    ids = torch.randint(5, 100, (2, 9))
    logits = network.logits(ids, torch.ones_like(ids))
    assert logits.shape == (2, 9, 100)
    assert (load_model(out / "step_00000004").logits(ids, torch.ones_like(ids)) == logits).all()
    assert not torch.equal(load_model(out / "step_00000002").logits(ids, torch.ones_like(ids)), logits)
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "nothing")


def test_load_weights_refuses_weights_that_do_not_fit():
    network = tiny()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    checkpoint.load_weights(network, tensors, "file")
    for change, says in (
        (lambda t: t.pop("bert.embeddings.LayerNorm.bias"), "1 weights missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.zeros(3)}), r"has shape \[3\], expected \[48\]"),
    ):
        wrong = dict(tensors)
        change(wrong)
        with pytest.raises(UserError, match=says):
            checkpoint.load_weights(network, wrong, "file")
