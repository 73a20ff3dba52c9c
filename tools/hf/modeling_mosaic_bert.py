"""MosaicBERT for Hugging Face transformers: BERT with ALiBi instead of position embeddings, and a gated feed-forward.

Plain PyTorch on padded batches. Source: Portes et al. 2023, arXiv 2312.17482; ALiBi: Press et al. 2022, arXiv
2108.12409.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_mosaic_bert import MosaicBertConfig


def alibi_slopes(num_heads):
    """ALiBi's slope of each head, a list; the bias is -slope * |i - j|."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * k / power) for k in range(1, power + 1)]
    between = [2 ** (-8 * k / (2 * power)) for k in range(1, 2 * power + 1, 2)]
    return slopes + between[: num_heads - power]


def attention_bias(num_heads, attention_mask, x):
    """(B or 1, H, T, T), added to the scores: ALiBi, and the dtype's lowest number where a key is padding.

    Computed in every forward pass: a non-persistent buffer would be lost when a model is created on the meta device.
    """
    position = torch.arange(x.shape[1], device=x.device)
    distance = (position[:, None] - position).abs().to(x.dtype)
    bias = distance * -torch.tensor(alibi_slopes(num_heads), dtype=x.dtype, device=x.device)[:, None, None]
    if attention_mask is None:
        return bias[None]
    return bias[None].masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(x.dtype).min)


def finish(output, return_dict, config):
    """A ModelOutput or a tuple, as return_dict says."""
    return_dict = config.return_dict if return_dict is None else return_dict
    return output if return_dict else output.to_tuple()


def named(**modules):
    """A container whose only job is to give modules their published names."""
    return nn.ModuleDict(modules)


class MosaicBertLayer(nn.Module):
    """Self-attention and a gated feed-forward layer, each followed by residual and LayerNorm."""

    def __init__(self, config):
        super().__init__()
        C, width, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention = named(
            self=named(Wqkv=nn.Linear(C, 3 * C)), output=named(dense=nn.Linear(C, C), LayerNorm=nn.LayerNorm(C, eps))
        )
        self.mlp = named(
            gated_layers=nn.Linear(C, 2 * width, bias=False), wo=nn.Linear(width, C), layernorm=nn.LayerNorm(C, eps)
        )

    def forward(self, x, bias, output_attentions=False):
        qkv = self.attention["self"]["Wqkv"](x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        probabilities = None
        if output_attentions:
            probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
            attended = probabilities @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        output = self.attention["output"]
        x = output["LayerNorm"](self.dropout(output["dense"](attended.transpose(1, 2).flatten(-2))) + x)
        gate, value = self.mlp["gated_layers"](x).chunk(2, dim=-1)
        return self.mlp["layernorm"](self.mlp["wo"](self.dropout(F.gelu(gate) * value)) + x), probabilities


class MosaicBertPreTrainedModel(PreTrainedModel):
    config_class = MosaicBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["MosaicBertLayer"]
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MosaicBertModel(MosaicBertPreTrainedModel):
    """Token ids to hidden states. Sequences may be longer than in training, and padded on either side."""

    def __init__(self, config, add_pooling_layer=False):
        super().__init__(config)
        C = config.hidden_size
        self.embeddings = named(
            word_embeddings=nn.Embedding(config.vocab_size, C, padding_idx=config.pad_token_id),
            token_type_embeddings=nn.Embedding(config.type_vocab_size, C),
            LayerNorm=nn.LayerNorm(C, config.layer_norm_eps),
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        layers = [MosaicBertLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = named(layer=nn.ModuleList(layers))
        self.pooler = named(dense=nn.Linear(C, C)) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings["word_embeddings"]

    def set_input_embeddings(self, value):
        self.embeddings["word_embeddings"] = value

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, output_hidden_states=None,
        output_attentions=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        x = self.embeddings["word_embeddings"](input_ids) if inputs_embeds is None else inputs_embeds
        types = self.embeddings["token_type_embeddings"]
        x = x + (types.weight[0] if token_type_ids is None else types(token_type_ids))
        x = self.dropout(self.embeddings["LayerNorm"](x))
        bias = attention_bias(config.num_attention_heads, attention_mask, x)
        hidden_states, attentions = (x,), ()
        for layer in self.encoder["layer"]:
            x, probabilities = layer(x, bias, output_attentions)
            hidden_states += (x,)
            attentions += (probabilities,)
        pooled = None
        if self.pooler is not None:
            first = x[:, 0]  # [CLS]
            if attention_mask is not None:  # the padding may be on the left
                first = x[torch.arange(x.shape[0], device=x.device), attention_mask.bool().int().argmax(1)]
            pooled = torch.tanh(self.pooler["dense"](first))
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return finish(output, return_dict, config)


class Predictions(nn.Module):
    """Hidden states to scores over the vocabulary; the last matrix is the word embedding."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.transform = named(dense=nn.Linear(C, C), LayerNorm=nn.LayerNorm(C, config.layer_norm_eps))
        self.decoder = nn.Linear(C, config.vocab_size)

    def forward(self, x):
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))))


class MosaicBertForMaskedLM(MosaicBertPreTrainedModel):
    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.cls = named(predictions=Predictions(config))
        self.post_init()

    def get_output_embeddings(self):
        return self.cls["predictions"].decoder

    def set_output_embeddings(self, value):
        self.cls["predictions"].decoder = value

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs):
        """labels: (B, T), -100 where no token is predicted."""
        output = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.cls["predictions"](output.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return finish(MaskedLMOutput(loss=loss, logits=logits, **states), return_dict, self.config)


class MosaicBertClassifier(MosaicBertPreTrainedModel):
    """Base of the classifiers: encoder, dropout, and a linear layer."""

    add_pooling_layer = False
    num_outputs = None  # None: config.num_labels

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MosaicBertModel(config, self.add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_outputs or config.num_labels)
        self.post_init()


class MosaicBertForSequenceClassification(MosaicBertClassifier):
    add_pooling_layer = True

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs):
        """labels: (B,) classes or numbers, or (B, num_labels) of 0 and 1, by config.problem_type as in BERT."""
        output = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None
        if labels is not None:
            kind = self.config.problem_type
            if kind is None:
                whole = labels.dtype in (torch.long, torch.int)
                one = "single_label_classification" if whole else "multi_label_classification"
                kind = "regression" if self.num_labels == 1 else one
            if kind == "regression":
                loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view_as(logits.squeeze(-1)))
            elif kind == "single_label_classification":
                loss = F.cross_entropy(logits, labels.view(-1))
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels)
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return finish(SequenceClassifierOutput(loss=loss, logits=logits, **states), return_dict, self.config)


class MosaicBertForTokenClassification(MosaicBertClassifier):
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs):
        """labels: (B, T) classes, -100 for tokens to ignore."""
        output = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(output.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return finish(TokenClassifierOutput(loss=loss, logits=logits, **states), return_dict, self.config)


class MosaicBertForMultipleChoice(MosaicBertClassifier):
    """Scores each choice alone, with one number."""

    add_pooling_layer = True
    num_outputs = 1

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs):
        """input_ids: (B, choices, T), as the mask and the types. labels: (B,), the right choices. Logits: (B, choices)."""
        inputs = [x if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids)]
        output = self.bert(*inputs, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(output.pooler_output)).view(-1, input_ids.shape[1])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return finish(MultipleChoiceModelOutput(loss=loss, logits=logits, **states), return_dict, self.config)


class MosaicBertForQuestionAnswering(MosaicBertPreTrainedModel):
    """Scores of each token as the answer's first and as its last."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, start_positions=None, end_positions=None,
        return_dict=None, **kwargs,
    ):  # fmt: skip
        """start_positions, end_positions: (B,); answers outside the T tokens are left out of the loss, as in BERT."""
        output = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        start, end = self.qa_outputs(output.last_hidden_state).unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            outside, sides = start.shape[1], ((start, start_positions), (end, end_positions))
            losses = [F.cross_entropy(x, at.view(-1).clamp(0, outside), ignore_index=outside) for x, at in sides]
            loss = sum(losses) / 2
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        output = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **states)
        return finish(output, return_dict, self.config)
