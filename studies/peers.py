"""What the kernels are measured against: the same operators and the same model in plain PyTorch, written to win.

Nothing here is used for training. Wherever a peer has a choice, it gets what is fastest for it: bf16 weights beside fp32
masters instead of autocast, no padding, only the masked rows through the last layer and the head, inputs already on the
GPU, attention masks built outside the timing, one shape for all micro-batches.

Three settings of torch.compile, each including the one before:

    default   as it comes
    t1        fixes two of Inductor's kernels that are slow at 131,072 rows: sums over rows and over columns share a
              kernel in chunks of 32 rows (LayerNorm backward), and a cat of two tensors is written half by half, where
              Inductor computes both halves for each element and drops one (GeGLU backward)
    t2        dropout from one random byte per element, drawn by PyTorch's generator in a separate operator, where
              Inductor calls Philox once per element; so p is 26/256

Read next: studies/bench.py
"""

import contextlib
import copy
import dataclasses
import importlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.varlen import varlen_attn

from common.batch import IGNORED, Batch, round_up
from data import MASKED_MULTIPLE
from model import LAYER_NORM_EPS, MaskedLM, alibi_slopes

BACKEND = "inductor"  # of torch.compile; bench.py --toy uses one that every machine has
LEARNING_RATE = 1e-3  # of all steps, ours too
BYTE_LEVELS = 256
FP8_ERROR_FACTOR = 16  # e4m3 has 4 bits of mantissa less than bf16


class NotMeasured(Exception):
    """Why an entry has no result."""


class WrongNumbers(Exception):
    """An entry doesn't compute what it should."""


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile and its settings


@contextlib.contextmanager
def tuned():
    """Setting t1, for everything compiled inside."""
    from torch._inductor import config, ir, lowering

    pointwise_cat = lowering.pointwise_cat

    def cat(inputs, dim=0):
        return ir.TensorBox(ir.ConcatKernel.create(inputs, dim)) if len(inputs) == 2 else pointwise_cat(inputs, dim)

    with config.patch({"triton.mix_order_reduction_split_size": 32}), mock.patch.object(lowering, "pointwise_cat", cat):
        yield


def compiling(setting):
    """The context for the first run of anything compiled with `setting`."""
    return tuned() if setting in ("t1", "t2") and BACKEND == "inductor" else contextlib.nullcontext()


def compiled(function):
    """`function`, compiled for one shape in its first call and that call's backward."""
    torch._dynamo.config.recompile_limit = 64  # some rows compile one function with many settings
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)


# ---------------------------------------------------------------------------------------------------------------------
# Operators. Those with dropout take the setting as an argument: it chooses the dropout, and keys the compiled code.


def plain_dropout(x, dropout_prob, source):
    return F.dropout(x, dropout_prob)


@torch.library.custom_op("mosaicbert_peers::random_bytes", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bytes(source: Tensor, columns: int) -> Tensor:
    """(len(source), columns) uint8. Each call needs another `source`, or compilers merge the calls."""
    words = torch.empty(-(-len(source) * columns // 8), dtype=torch.int64, device=source.device)
    words.random_(-(2**63), None)  # all 64 bits, two words per call of the generator
    return words.view(torch.uint8)[: len(source) * columns].view(len(source), columns)


@random_bytes.register_fake
def _(source, columns):
    return source.new_empty(len(source), columns, dtype=torch.uint8)


def byte_dropout(x, dropout_prob, source):
    """Dropout in steps of 1/256. source: a tensor with x's rows that is in memory, which a fused x may not be."""
    dropped = round(dropout_prob * BYTE_LEVELS)
    if dropped == 0:
        return x
    keep = random_bytes(source, x.shape[-1]) >= dropped
    return torch.where(keep, x * (BYTE_LEVELS / (BYTE_LEVELS - dropped)), 0.0)


DROPOUTS = {"eager": plain_dropout, "default": plain_dropout, "t1": plain_dropout, "t2": byte_dropout}


def dropped_share(setting, dropout_prob):
    """The dropout probability that a setting really has."""
    return round(dropout_prob * BYTE_LEVELS) / BYTE_LEVELS if setting == "t2" else dropout_prob


def dropout_add_layernorm(x, residual, weight, bias, dropout_prob, setting="default"):
    z = DROPOUTS[setting](x, dropout_prob, x) + residual
    return F.layer_norm(z, weight.shape, weight, bias, LAYER_NORM_EPS)


def geglu(x, dropout_prob, setting="default"):
    gate, value = x.chunk(2, dim=-1)
    return DROPOUTS[setting](F.gelu(gate) * value, dropout_prob, x)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def linear_cross_entropy(hidden, weight, bias, labels):
    return cross_entropy(F.linear(hidden, weight, bias), labels)


def liger(name):
    """A function of Liger-Kernel's public API. Raises: NotMeasured."""
    try:
        return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
    except ImportError:
        raise NotMeasured("needs the package liger-kernel") from None
    except AttributeError:
        raise NotMeasured(f"this version of liger-kernel has no {name}") from None


# Attention of qkv (total_tokens, 3, H, D). layout: how the implementation represents lengths.


def varlen_attention(qkv, layout, slopes):
    """FlashAttention as PyTorch ships it. It takes no bias, so it does less work than ours: an unfair advantage."""
    cu_seqlens, max_seqlen = layout
    return varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def varlen_layout(batch):
    return batch.cu_seqlens, batch.max_seqlen


def flex_attention(qkv, block_mask, slopes):
    """FlexAttention with ALiBi as its score function and a mask that separates sequences."""

    def alibi(score, b, h, i, j):
        return score - slopes[h] * (i - j).abs()

    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))  # (1, H, total_tokens, D)
    return flex.flex_attention(q, k, v, score_mod=alibi, block_mask=block_mask)[0].transpose(0, 1)


def flex_layout(batch, block=128):
    """A BlockMask from the sequence bounds: create_block_mask would evaluate total_tokens^2 pairs."""
    lengths = batch.cu_seqlens.diff()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths.long())
    document = document.to(torch.int32)
    first, last = document.view(-1, block)[:, 0], document.view(-1, block)[:, -1]  # in each block of tokens
    overlap = (first[:, None] <= last) & (first <= last[:, None])  # (query blocks, key blocks)
    whole = (first == last)[:, None] & (first == last) & (first[:, None] == first)  # one sequence: no mask needed

    def blocks(which):
        order = which.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return which.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]

    def same_sequence(b, h, i, j):
        return document[i] == document[j]

    return flex.BlockMask.from_kv_blocks(
        *blocks(overlap & ~whole), *blocks(whole), BLOCK_SIZE=block, mask_mod=same_sequence
    )


def padded_attention(qkv, bias, slopes):
    """scaled_dot_product_attention with ALiBi as a dense bias, on B sequences of equal length."""
    q, k, v = (x.unflatten(0, (-1, bias.shape[-1])).transpose(1, 2) for x in qkv.unbind(1))  # (B, H, S, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(0, 1)


def alibi_bias(lengths, size, slopes, dtype):
    """(1 or B, H, size, size): ALiBi, and -inf for keys past the end of sequences shorter than `size`."""
    position = torch.arange(size, device=slopes.device)
    bias = (-slopes[:, None, None] * (position[:, None] - position).abs()).to(dtype)[None]
    if bool((lengths == size).all()):
        return bias
    hidden = position >= lengths.clamp(min=1)[:, None]  # (B, size)
    return bias.masked_fill(hidden[:, None, None, :], float("-inf"))


# ---------------------------------------------------------------------------------------------------------------------
# The model


class PlainMosaicBert(nn.Module):
    """model.MaskedLM's parameters and computation in PyTorch's own operators, compiled as one graph."""

    def __init__(self, model, attention, setting, slopes):
        super().__init__()
        self.model, self.attention, self.setting, self.slopes = model, attention, setting, slopes
        self.dropout_prob = model.cfg.hidden_dropout

    def forward(self, input_ids, layout, positions, labels):
        """model.MaskedLM's loss. layout: see self.attention."""
        bert, p, dropout = self.model.bert, self.dropout_prob, DROPOUTS[self.setting]
        embeddings = bert.embeddings
        x = F.embedding(input_ids, embeddings.word_embeddings.weight, padding_idx=0)
        x = norm(x + embeddings.token_type_embeddings.weight[0], embeddings.LayerNorm)
        x = dropout(x, p, input_ids)
        layers = bert.encoder.layer
        for i, layer in enumerate(layers):
            qkv = layer.attention.self.Wqkv(x).unflatten(-1, (3, layer.num_heads, -1))
            attended = self.attention(qkv, layout, self.slopes).flatten(-2)
            if i == len(layers) - 1:
                attended, x = attended[positions], x[positions]
            projected = layer.attention.output.dense(attended)
            x = norm(dropout(projected, p, projected) + x, layer.attention.output.LayerNorm)
            gated = geglu(layer.mlp.gated_layers(x), p, self.setting)
            x = norm(layer.mlp.wo(gated) + x, layer.mlp.layernorm)
        head = self.model.cls.predictions
        x = norm(F.gelu(head.transform.dense(x)), head.transform.LayerNorm)
        return cross_entropy(head.decoder(x), labels)


def norm(x, module):
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, LAYER_NORM_EPS)


def unpadded(batches, device):
    """MicroBatches as Batches of one shape. Padding becomes extra sequences, since peers skip no rows."""
    total = max(len(batch.input_ids) for batch in batches)
    rows = max(len(batch.labels) for batch in batches)
    size = batches[0].max_seqlen
    bounds = []
    for batch in batches:
        ends = batch.cu_seqlens[: batch.num_samples + 1].tolist()
        while ends[-1] < total:
            ends.append(min(ends[-1] + size, total))
        bounds.append(ends)
    most = max(map(len, bounds))
    made = []
    for batch, ends in zip(batches, bounds):
        cu_seqlens = torch.tensor(ends + [total] * (most - len(ends)), dtype=torch.int32)
        ids = F.pad(batch.input_ids, (0, total - len(batch.input_ids)))
        positions, labels = filled_rows(batch, rows)
        made.append(Batch(ids, cu_seqlens, size, None, masked_positions=positions, labels=labels).to(device))
    return made


def padded(batches, device):
    """MicroBatches as Batches of one shape, each sequence padded to max_seqlen; cu_seqlens has the true lengths."""
    rows = max(len(batch.labels) for batch in batches)
    count = max(batch.num_samples for batch in batches)
    size = batches[0].max_seqlen
    made = []
    for batch in batches:
        lengths = F.pad(batch.cu_seqlens[: batch.num_samples + 1].diff(), (0, count - batch.num_samples))
        slots = (torch.arange(size) < lengths[:, None]).flatten().nonzero()[:, 0]  # where each token goes
        ids = batch.input_ids.new_zeros(count * size)
        ids[slots] = batch.input_ids[: len(slots)]
        positions, labels = filled_rows(batch, rows)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        made.append(Batch(ids, cu_seqlens, size, None, masked_positions=slots[positions], labels=labels).to(device))
    return made


def filled_rows(batch, rows):
    more = round_up(rows, MASKED_MULTIPLE) - len(batch.labels)
    return F.pad(batch.masked_positions, (0, more)), F.pad(batch.labels, (0, more), value=IGNORED)


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps


def move(parameters, optimizer, device):
    """Move parameters, gradients and optimizer state to a device."""

    def moved(value):
        if value is None or not value.is_cuda or torch.device(device).type == "cuda":
            return value if value is None else value.to(device)
        # Copies to pinned memory are ten times faster, and PyTorch reuses it for the next entry.
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)

    for parameter in parameters:
        grad, parameter.grad = parameter.grad, None
        parameter.data = moved(parameter.data)
        parameter.grad = moved(grad)
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = moved(value)


class PlainStep:
    """PlainMosaicBert with weights in the compute dtype and fp32 masters; gradients accumulate in fp32.

    work: bench_steps.Work. kind: "varlen", "flex" or "padded". setting: of torch.compile, or "eager" for none.
    """

    error_factor, largest_error = 2, 0.0  # see bench_steps.check_gradients

    def __init__(self, work, kind, setting):
        self.work, self.kind, self.setting = work, kind, setting
        self.slopes = alibi_slopes(work.cfg.num_heads).to(work.device)
        master = self.make_masters()
        self.masters = list(master.parameters())
        self.model = self.low_precision(master)
        self.weights = list(self.model.parameters())
        for parameter in self.masters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)
        self.run = self.module(self.model) if setting == "eager" else compiled(self.module(self.model))
        batches = work.batches()
        self.inputs, self.num_masked = self.make_inputs(batches), sum(batch.num_masked for batch in batches)

    def make_masters(self):
        return self.work.make_model()

    def low_precision(self, master):
        return copy.deepcopy(master).to(self.work.dtype)

    def module(self, model):
        attentions = {"varlen": varlen_attention, "flex": flex_attention, "padded": padded_attention}
        return PlainMosaicBert(model, attentions[self.kind], self.setting, self.slopes)

    def make_inputs(self, batches):
        """PlainMosaicBert's arguments for each MicroBatch."""

        def bias(batch):
            return alibi_bias(batch.cu_seqlens.diff(), batch.max_seqlen, self.slopes, self.work.dtype)

        layout = {"varlen": varlen_layout, "flex": flex_layout, "padded": bias}[self.kind]
        flat = (padded if self.kind == "padded" else unpadded)(batches, self.work.device)
        return [(batch.input_ids, layout(batch), batch.masked_positions, batch.labels) for batch in flat]

    def step(self, number):
        """(loss, gradient norm of step 0), on the device."""
        torch.manual_seed(number)
        total = torch.zeros((), device=self.work.device)
        grads = [master.grad for master in self.masters]
        for inputs in self.inputs:
            loss = self.run(*inputs) / self.num_masked
            loss.backward()
            torch._foreach_add_(grads, [weight.grad for weight in self.weights])
            for weight in self.weights:
                weight.grad = None
            total += loss.detach()
        grad_norm = torch.nn.utils.get_total_norm(grads) if number == 0 else None  # for the check alone
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_zero_(grads)
            torch._foreach_copy_(self.weights, self.masters)
        return total, grad_norm

    def for_check(self):
        """(reference in fp32, the model under test, its loss as a function of a MicroBatch), dropout off."""
        reference = self.work.make_model(dropout=False)
        model = self.low_precision(reference)
        return reference, model, lambda batch: self.module(model)(*self.make_inputs([batch])[0])

    def move(self, device):
        move([*self.masters, *self.weights], self.optimizer, device)


class TorchaoStep(PlainStep):
    """PlainStep with torchao's FP8 training in the matrices that ours has in FP8. recipe: "tensorwise" or "rowwise"."""

    error_factor = FP8_ERROR_FACTOR
    largest_error = 0.2  # in fp32 on a CPU, where PyTorch's own error is 0

    def __init__(self, work, kind, setting, recipe):
        self.recipe = recipe
        super().__init__(work, kind, setting)

    def low_precision(self, master):
        from torchao import float8

        model = super().low_precision(master)
        on_cpu = self.work.device.type == "cpu"
        config = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(self.recipe), emulate=on_cpu)

        def chosen(module, name):
            return name.endswith(("Wqkv", "gated_layers", "wo"))

        return float8.convert_to_float8_training(model, module_filter_fn=chosen, config=config)


class TransformersStep(PlainStep):
    """transformers' BertForMaskedLM of the same size: padded, SDPA, the head on every token."""

    # In bf16 the gradients of the token types, sums over all tokens, are off by 10 %.
    largest_error = 0.1

    def __init__(self, work, setting):
        super().__init__(work, "transformers", setting)

    def make_masters(self, dropout=True):
        import transformers

        torch.manual_seed(0)
        cfg = self.work.cfg
        config = transformers.BertConfig(
            vocab_size=self.work.vocab_size(),
            hidden_size=cfg.hidden_size,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            intermediate_size=cfg.intermediate_size,
            hidden_dropout_prob=cfg.hidden_dropout if dropout else 0.0,
            attention_probs_dropout_prob=0.0,  # like ours; otherwise SDPA has no fast backend
            attn_implementation="sdpa",
        )
        return transformers.BertForMaskedLM(config).to(self.work.device).train()

    def module(self, model):
        vocab_size = self.work.vocab_size()

        def loss_sum(input_ids, attention_mask, labels):
            scores = model(input_ids=input_ids, attention_mask=attention_mask).logits
            return F.cross_entropy(scores.view(-1, vocab_size).float(), labels, ignore_index=IGNORED, reduction="sum")

        return loss_sum

    def make_inputs(self, batches):
        """(B, T) ids, a mask if any sequence is shorter, and a label per position, flat."""
        size, made = batches[0].max_seqlen, []
        for batch in padded(batches, self.work.device):
            labels = torch.full_like(batch.input_ids, IGNORED, dtype=torch.int64)
            real = batch.labels != IGNORED
            labels[batch.masked_positions[real]] = batch.labels[real]
            lengths = batch.cu_seqlens.diff()
            mask = (torch.arange(size, device=lengths.device) < lengths[:, None]).long()
            ids = batch.input_ids.view(-1, size).long()
            made.append((ids, None if bool(mask.all()) else mask, labels))
        return made

    def for_check(self):
        """As above; the reference is model.py's BERT, whose weights have the same names."""
        theirs = self.make_masters(dropout=False)
        cfg = dataclasses.replace(self.work.cfg, model="bert", hidden_dropout=0.0)
        reference = MaskedLM(cfg, self.work.vocab_size()).to(self.work.device).train()
        reference.load_state_dict(theirs.state_dict())
        model = theirs.to(self.work.dtype)
        return reference, model, lambda batch: self.module(model)(*self.make_inputs([batch])[0])
