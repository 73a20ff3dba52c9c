"""The whole model: MosaicBERT, and the BERT it is compared with.

MosaicBERT (Portes et al. 2023, arXiv 2312.17482) is BERT with four changes that make it cheaper to train:
- no position embeddings: attention scores are penalized by distance instead (ALiBi), so sequences may have any length;
- FlashAttention: the scores never leave the chip;
- a gated linear unit (GeGLU) as the feed-forward layer;
- no sequence is padded: a micro-batch is one flat stream of tokens, and `cu_seqlens` marks where its sequences start.

Shapes
    B, T            sequences in a batch; padded length (only the BERT baseline pads)
    H, D, C         heads, head size, hidden size C = H * D
    F, V            feed-forward width; vocabulary size, padded for MosaicBERT
    total_tokens    tokens in the stream, its padding included
    num_rows        rows of the stream whose output is wanted; rows=None means all of them

A batch is a `Batch`, as common/batch.py describes it: input_ids, cu_seqlens, max_seqlen, windows of short sequences that
share an attention tile, masked_positions and labels. Names and shapes in the state dicts are those of the published weights: of
mosaicml/mosaic-bert-base for MosaicBERT, of transformers' BertForMaskedLM for the baseline. Attribute names follow them,
hence `layer.attention.output.dense`.

Read next: optim.py, or data.py
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import kernels
from common.batch import Batch, pack
from common.options import UserError, require

LAYER_NORM_EPS = 1e-12  # of all of MosaicBERT's LayerNorms; BERT's default
INIT_STD = 0.02
VOCAB_MULTIPLE = 64  # whole tiles for the matrix units: 30,522 entries become 30,528 = 477 * 64
MAX_POSITIONS = 512  # of the BERT baseline; MosaicBERT has no limit
NUM_TOKEN_TYPES = 2


@dataclass
class ModelConfig:
    # Model
    model: Literal["mosaicbert", "bert"] = "mosaicbert"  # architecture
    hidden_size: int = 768  # width of the residual stream
    num_layers: int = 12  # transformer blocks
    num_heads: int = 12  # attention heads; must divide hidden_size
    intermediate_size: int = 3072  # width of the feed-forward layer; of each half of a GeGLU
    hidden_dropout: float = 0.1  # after embeddings and attention; inside MosaicBERT's feed-forward layer, after BERT's
    attention_dropout: float = 0.0  # on attention weights; BERT only, MosaicBERT's kernel has none
    layer_norm_eps: float = LAYER_NORM_EPS  # RoBERTa has 1e-5; BERT only

    def check_model(self):
        """Raises: UserError for sizes that no model can have."""
        require(self, "hidden_size num_layers num_heads intermediate_size", lambda x: x >= 1, "must be at least 1")
        for name, most in {"hidden_size": 2**16, "num_layers": 2**12, "intermediate_size": 2**18}.items():
            require(self, name, lambda x: x <= most, f"at most {most} (no GPU could hold it)")
        require(self, "hidden_dropout attention_dropout", lambda x: 0 <= x < 1, "must be at least 0 and below 1")
        require(self, "layer_norm_eps", lambda x: 0 < x < 1, "must be above 0 and below 1")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.model == "mosaicbert" and self.attention_dropout > 0:
            raise UserError(
                f"attention_dropout={self.attention_dropout}: MosaicBERT has none (set it to 0, or use --model=bert)"
            )
        if self.model == "mosaicbert" and self.layer_norm_eps != LAYER_NORM_EPS:
            raise UserError(f"layer_norm_eps={self.layer_norm_eps}: MosaicBERT's is {LAYER_NORM_EPS} (or use --model=bert)")


def named(**modules):
    """A container whose only job is to give modules their published names."""
    return nn.ModuleDict(modules)


# ---------------------------------------------------------------------------------------------------------------------
# MosaicBERT


def alibi_slopes(num_heads):
    """How steeply each head's scores fall with distance: (H,) fp32, positive; the bias is -slope * |i - j|.

    For H a power of two: 2^(-8k/H), k = 1..H. Otherwise the slopes for the next lower power of two, followed by every
    other slope for the next higher one. Source: Press et al. 2022, arXiv 2108.12409, and its published code.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)]
    return torch.tensor(slopes + between[: num_heads - power])


def activation_dtype(x):
    """The dtype that autocast gives x, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class LayerNorm(nn.Module):
    """LayerNorm, fused with the operations before it. Under autocast: bf16 in and out, statistics in fp32.

    This is what MosaicBERT calls low precision LayerNorm; it keeps the residual stream in bf16.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        return self.add_norm(x)[0]

    def add_norm(self, x, residual=None, dropout_prob=0.0, x_bias=None):
        """LayerNorm(dropout(x + x_bias) + residual), returned twice: for the next matrix and for the next residual.

        x: (num_rows, C), residual: like x, x_bias: (C,).
        """
        x = x.to(activation_dtype(x))
        dropout_prob = dropout_prob if self.training else 0.0
        return kernels.dropout_add_layernorm(x, residual, self.weight, self.bias, dropout_prob, LAYER_NORM_EPS, x_bias)


class MosaicLayer(nn.Module):
    """Self-attention and a gated feed-forward layer, each followed by residual and LayerNorm (post-LN)."""

    def __init__(self, cfg):
        super().__init__()
        C, F_ = cfg.hidden_size, cfg.intermediate_size
        self.num_heads, self.dropout = cfg.num_heads, cfg.hidden_dropout
        self.attention = named(
            self=named(Wqkv=nn.Linear(C, 3 * C)),
            output=named(dense=nn.Linear(C, C), LayerNorm=LayerNorm(C)),
        )
        self.mlp = named(gated_layers=nn.Linear(C, 2 * F_, bias=False), wo=nn.Linear(F_, C), layernorm=LayerNorm(C))

    def forward(self, x, residual, batch, slopes, rows=None, fp8=None):
        """Hidden states of (total_tokens, C) to those of (num_rows, C).

        x and residual are the same tensor, as are the two returned: so backward has two gradients, and its kernel adds them.
        fp8: the layer's scales, of kernels.LINEAR and then of kernels.FEED_FORWARD; None except in training with FP8.
        """
        Wqkv = self.attention.self.Wqkv
        qkv = Wqkv(x) if fp8 is None else kernels.fp8_linear(x, Wqkv.weight, Wqkv.bias, fp8[:3])
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))  # (total_tokens, 3, H, D)
        attended = kernels.attention_qkvpacked(qkv, batch.cu_seqlens, batch.max_seqlen, slopes, batch.windows)
        attended = attended.flatten(-2)  # (total_tokens, C)
        if rows is not None:  # in the last layer, skip rows that nobody reads
            attended, residual = attended[rows], residual[rows]  # (num_rows, C)
        # LayerNorm adds the biases of both output matrices, so their gradients need no pass of their own.
        output, wo = self.attention.output, self.mlp.wo
        x = F.linear(attended, output.dense.weight)
        x, residual = output.LayerNorm.add_norm(x, residual, self.dropout, output.dense.bias)
        if fp8 is None:
            gated = kernels.geglu(self.mlp.gated_layers(x), self.dropout if self.training else 0.0)  # (num_rows, F)
            x = F.linear(gated, wo.weight)
        else:
            x = kernels.fp8_feed_forward(x, self.mlp.gated_layers.weight, wo.weight, self.dropout, fp8[3:])
        return self.mlp.layernorm.add_norm(x, residual, 0.0, wo.bias)  # dropout was inside the GeGLU


class MosaicEncoder(nn.Module):
    """Token ids to hidden states; only the end of the stream is padded."""

    def __init__(self, cfg, vocab_size, pad_id):
        super().__init__()
        C = cfg.hidden_size
        self.dropout = cfg.hidden_dropout
        self.embeddings = named(
            word_embeddings=nn.Embedding(vocab_size, C, padding_idx=pad_id),
            token_type_embeddings=nn.Embedding(NUM_TOKEN_TYPES, C),
            LayerNorm=LayerNorm(C),
        )
        self.encoder = named(layer=nn.ModuleList(MosaicLayer(cfg) for _ in range(cfg.num_layers)))
        self.register_buffer("slopes", alibi_slopes(cfg.num_heads), persistent=False)
        self.fp8 = None

    def use_fp8(self):
        """Train with FP8 products in every layer, but for attention's output matrix. Evaluation stays as it is."""
        self.fp8 = kernels.Scales(len(self.encoder.layer), (*kernels.LINEAR, *kernels.FEED_FORWARD))

    def forward(self, batch, rows=None):
        """(num_rows, C) hidden states of a Batch."""
        x = residual = self.embed(batch)  # (total_tokens, C)
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            fp8 = self.fp8.of_layer(i) if self.fp8 and self.training else None
            # Differs from MosaicBERT: its last layer also keeps each [CLS] row, which no pretraining loss reads.
            x, residual = layer(x, residual, batch, self.slopes, rows if i == last else None, fp8)
        return x

    def embed(self, batch):
        """dropout(LayerNorm(words + types)), (total_tokens, C): summed and normalized in fp32, then cast."""
        words, types, norm = self.embeddings.word_embeddings, self.embeddings.token_type_embeddings, self.embeddings.LayerNorm
        x = words(batch.input_ids)
        type_0 = types.weight[0]  # usually every token's: one vector, added to all rows as a bias
        if batch.token_type_ids is not None:
            x, type_0 = x + types(batch.token_type_ids), None
        x = kernels.dropout_add_layernorm(x, None, norm.weight, norm.bias, 0.0, LAYER_NORM_EPS, type_0)[0]
        return F.dropout(x.to(activation_dtype(x)), self.dropout, self.training)


# ---------------------------------------------------------------------------------------------------------------------
# The BERT baseline, as one would write it with PyTorch's own operators


class BertLayer(nn.Module):
    """Self-attention and a GELU feed-forward layer, each followed by dropout, residual and LayerNorm."""

    def __init__(self, cfg):
        super().__init__()
        C, F_ = cfg.hidden_size, cfg.intermediate_size
        self.num_heads, self.dropout, self.attention_dropout = cfg.num_heads, cfg.hidden_dropout, cfg.attention_dropout
        self.attention = named(
            self=named(query=nn.Linear(C, C), key=nn.Linear(C, C), value=nn.Linear(C, C)),
            output=named(dense=nn.Linear(C, C), LayerNorm=nn.LayerNorm(C, cfg.layer_norm_eps)),
        )
        self.intermediate = named(dense=nn.Linear(C, F_))
        self.output = named(dense=nn.Linear(F_, C), LayerNorm=nn.LayerNorm(C, cfg.layer_norm_eps))

    def forward(self, x, mask):
        """x: (B, T, C). mask: (B, 1, 1, T) bool, True where a key may be attended to."""
        weights = self.attention.self
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (weights.query, weights.key, weights.value)
        )
        attention_dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=attention_dropout)
        attended = attended.transpose(1, 2).flatten(-2)  # (B, T, C)
        output = self.attention.output
        x = output.LayerNorm(F.dropout(output.dense(attended), self.dropout, self.training) + x)
        hidden = self.output.dense(F.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(F.dropout(hidden, self.dropout, self.training) + x)


class BertEncoder(nn.Module):
    """Token ids to hidden states: pads once on entry, and returns the flat rows that are asked for."""

    fp8 = None  # only MosaicBERT's

    def __init__(self, cfg, vocab_size, pad_id):
        super().__init__()
        C = cfg.hidden_size
        self.dropout = cfg.hidden_dropout
        self.embeddings = named(
            word_embeddings=nn.Embedding(vocab_size, C, padding_idx=pad_id),
            position_embeddings=nn.Embedding(MAX_POSITIONS, C),
            token_type_embeddings=nn.Embedding(NUM_TOKEN_TYPES, C),
            LayerNorm=nn.LayerNorm(C, cfg.layer_norm_eps),
        )
        self.encoder = named(layer=nn.ModuleList(BertLayer(cfg) for _ in range(cfg.num_layers)))

    def forward(self, batch, rows=None):
        """As MosaicEncoder.forward; rows of the stream's padding return some other row's values."""
        cu_seqlens, max_seqlen = batch.cu_seqlens, batch.max_seqlen
        if max_seqlen > MAX_POSITIONS:
            raise ValueError(f"sequences of up to {max_seqlen} tokens, but BERT has {MAX_POSITIONS} positions")
        total_tokens, starts, lengths = len(batch.input_ids), cu_seqlens[:-1], cu_seqlens.diff()
        position = torch.arange(max_seqlen, device=cu_seqlens.device)  # (T,)
        keep = position < lengths[:, None]  # (B, T)
        index = (starts[:, None] + position).clamp(max=total_tokens - 1)  # (B, T): into the flat stream
        padded_ids = batch.input_ids[index] * keep

        embeddings = self.embeddings
        types = embeddings.token_type_embeddings
        x = embeddings.word_embeddings(padded_ids) + embeddings.position_embeddings(position)  # (B, T, C)
        x = x + (types.weight[0] if batch.token_type_ids is None else types(batch.token_type_ids[index]))
        x = F.dropout(embeddings.LayerNorm(x), self.dropout, self.training)
        # An empty sequence attends to its first [PAD]: a softmax over nothing would be NaN.
        mask = (keep | (position == 0))[:, None, None, :]
        for layer in self.encoder.layer:
            x = layer(x, mask)

        rows = torch.arange(total_tokens, device=x.device) if rows is None else rows
        sequence = torch.bucketize(rows, cu_seqlens[1:], right=True).clamp(max=len(lengths) - 1)
        within = (rows - starts[sequence]).clamp(max=max_seqlen - 1)
        return x[sequence, within]  # (num_rows, C)


# ---------------------------------------------------------------------------------------------------------------------
# Heads


def make_encoder(cfg, vocab_size, pad_id):
    if cfg.model == "bert":
        encoder = BertEncoder(cfg, vocab_size, pad_id)
    else:
        encoder = MosaicEncoder(cfg, -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, pad_id)
    encoder.apply(init_weights)
    with torch.no_grad():
        # Pretraining has no second texts, so this row stays zero. checkpoint.load fills it in.
        encoder.embeddings.token_type_embeddings.weight[1].zero_()
    return encoder


def init_weights(module):
    """BERT's: matrices and embeddings N(0, 0.02), biases and [PAD]'s embedding 0; LayerNorms start at (1, 0)."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


class Predictions(nn.Module):
    """Hidden states to scores over the vocabulary; the decoder's matrix is the word embedding's (tied)."""

    def __init__(self, cfg, word_embeddings):
        super().__init__()
        V, C = word_embeddings.weight.shape
        norm = LayerNorm(C) if cfg.model == "mosaicbert" else nn.LayerNorm(C, cfg.layer_norm_eps)
        self.transform = named(dense=nn.Linear(C, C), LayerNorm=norm)
        self.decoder = nn.Linear(C, V)
        self.apply(init_weights)
        self.decoder.weight = word_embeddings.weight
        self.cross_entropy = kernels.linear_cross_entropy
        if cfg.model == "bert":
            self.cross_entropy = kernels.linear_cross_entropy_reference  # PyTorch's own operators here too
            self.bias = self.decoder.bias  # transformers stores it under both names

    def transformed(self, hidden):
        """(num_rows, C): what the decoder multiplies."""
        return self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))

    def forward(self, hidden):
        return self.decoder(self.transformed(hidden))  # (num_rows, V)

    def loss(self, hidden, labels):
        """Sum of the cross-entropies of the rows whose label is not -100: () fp32."""
        return self.cross_entropy(self.transformed(hidden), self.decoder.weight, self.decoder.bias, labels)


class MaskedLM(nn.Module):
    """Either architecture with its masked-language-model head.

    vocab_size: the tokenizer's, before padding. pad_id: of [PAD], whose embedding starts at 0, and has a gradient from the
    tied decoder alone.
    """

    def __init__(self, cfg, vocab_size, pad_id=0):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.bert = make_encoder(cfg, vocab_size, pad_id)
        self.cls = named(predictions=Predictions(cfg, self.bert.embeddings.word_embeddings))

    def forward(self, batch):
        """Sum (not mean) of the cross-entropies of batch.masked_positions in nats, () fp32; labels of -100 don't count."""
        hidden = self.bert(batch, batch.masked_positions)  # (num_rows, C)
        return self.cls.predictions.loss(hidden, batch.labels)

    def masked_logits(self, batch):
        """Scores (num_rows, V) over the padded vocabulary for the rows in batch.masked_positions."""
        return self.cls.predictions(self.bert(batch, batch.masked_positions))

    @torch.no_grad()
    def logits(self, input_ids, attention_mask):
        """Scores for every token of a padded batch: (B, T) int64 and (B, T) 0/1 in, (B, T, vocab_size) fp32 out.

        Scores of padding are 0. For the BERT baseline, pad on the right.
        """
        if not input_ids.numel():
            raise ValueError(f"logits: input_ids has shape {tuple(input_ids.shape)}; expected (B, T), not empty")
        keep = attention_mask.bool()
        lengths = keep.sum(1).cpu().numpy()
        cu_seqlens, _ = pack(lengths, int(lengths.max()))
        cu_seqlens = torch.from_numpy(cu_seqlens).to(keep.device)
        scores = self.cls.predictions(self.bert(Batch(input_ids[keep], cu_seqlens, int(lengths.max()), windows=None)))
        padded = scores.new_zeros(*input_ids.shape, self.vocab_size, dtype=torch.float32)
        padded[keep] = scores[:, : self.vocab_size].float()
        return padded


class SequenceClassifier(nn.Module):
    """Either architecture with a head on [CLS]: pooler, dropout, classifier. num_labels=1 for regression."""

    def __init__(self, cfg, vocab_size, num_labels, pad_id=0):
        super().__init__()
        self.cfg, self.vocab_size, self.dropout = cfg, vocab_size, cfg.hidden_dropout
        self.bert = make_encoder(cfg, vocab_size, pad_id)
        self.bert.pooler = named(dense=nn.Linear(cfg.hidden_size, cfg.hidden_size)).apply(init_weights)
        self.classifier = nn.Linear(cfg.hidden_size, num_labels).apply(init_weights)

    def forward(self, batch):
        """(B, num_labels) scores, one row a sequence; those of empty sequences mean nothing."""
        first = batch.cu_seqlens[:-1].long().clamp(max=len(batch.input_ids) - 1)  # [CLS] of each sequence
        hidden = self.bert(batch, first)  # (B, C)
        pooled = torch.tanh(self.bert.pooler.dense(hidden))
        return self.classifier(F.dropout(pooled, self.dropout, self.training))


# ---------------------------------------------------------------------------------------------------------------------
# How a model runs, and the work it does


def checkpoint_layers(model):
    """Activation checkpointing: save only each layer's input for backward, which runs the layer again, bit for bit."""
    for layer in model.bert.encoder.layer:
        # PyTorch restores the random state as well, from which the kernels draw their dropout seeds.
        layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)


def choose_kernels(choice, cfg, device, dtype=torch.float32):
    """Select the kernels' backend for this process; returns its name. choice: "auto", "triton" or "torch". dtype: of autocast.

    Raises: UserError if the backend is unavailable, or does not support this head size.
    """
    try:
        kernels.set_backend(choice)
    except ValueError as error:
        raise UserError(error) from None
    head_size = cfg.hidden_size // cfg.num_heads
    if not kernels.uses_triton(device):
        return "torch"
    if cfg.model == "mosaicbert" and head_size not in kernels.HEAD_SIZES:
        sizes = ", ".join(map(str, kernels.HEAD_SIZES))
        raise UserError(f"head size {head_size}: the Triton kernels take {sizes} (use --kernels=torch)")
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        raise UserError("kernels=triton: Triton's interpreter multiplies bfloat16 wrongly (use --dtype=float32)")
    return "triton"


def check_fp8(cfg, backend, device):
    """Raises: UserError where FP8 products cannot run. backend: what choose_kernels returned; "": of another machine."""
    if cfg.model != "mosaicbert":
        raise UserError(f"--fp8: not for --model={cfg.model} (only MosaicBERT's kernels write FP8)")
    if cfg.compile:
        raise UserError("--fp8 and --compile: not both (--fp8=false, or no --compile)")
    for name in ("hidden_size", "intermediate_size"):
        if getattr(cfg, name) % 16:
            raise UserError(f"--fp8: {name}={getattr(cfg, name)} is not a multiple of 16")
    if backend == "torch":
        raise UserError("--fp8: needs the Triton kernels, on a GPU of compute capability 8.9 or higher (use --fp8=false)")
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"this GPU, of compute capability {major}.{minor}, has no FP8; 8.9 is the first"
        raise UserError(f"--fp8: {reason} (use --fp8=false)")


def matrix_flops(cfg, vocab_size, num_tokens, sum_squared_lengths, num_masked):
    """Floating-point operations of the matrix products in one forward and backward pass: exact, without padding.

    A product with an (m, n) matrix takes 2mn per token forward and twice that backward. num_tokens: in sequences;
    sum_squared_lengths: over sequences, since attention takes 4C per pair of tokens; num_masked: rows through the head.
    """
    C, F_, is_bert = cfg.hidden_size, cfg.intermediate_size, cfg.model == "bert"
    attention = 4 * C * sum_squared_lengths
    qkv = 2 * 3 * C * C
    rest = 2 * C * C + 2 * (2 if is_bert else 3) * C * F_  # attention's output matrix, and the feed-forward layer
    head = 2 * C * C + 2 * C * vocab_size
    # MosaicBERT's last layer computes only the rows to predict.
    rest_rows = (cfg.num_layers - 1) * num_tokens + (num_tokens if is_bert else num_masked)
    return 3 * (cfg.num_layers * (attention + num_tokens * qkv) + rest_rows * rest + num_masked * head)
