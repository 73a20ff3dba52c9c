"""A batch without padding: sequences of any lengths, end to end in one flat stream of tokens.

    tokens      [CLS] a b c [SEP] [CLS] d [SEP] [CLS] e f [SEP] [PAD] [PAD] ...
    cu_seqlens  0                 5             8               12  12 12 ...

cu_seqlens[b] is where sequence b starts and cu_seqlens[b + 1] where it ends. Rows after the last sequence pad the
stream, so that the GPU sees few shapes. `pack` computes the offsets on the CPU, where the lengths are known.
"""

from dataclasses import dataclass

import numpy as np

WINDOW = 128  # tokens of a window of short sequences that kernels/attention_window.py takes together: its tile
WINDOW_MULTIPLE = 32  # the number of windows is rounded up to this, by empty ones
IGNORED = -100  # the label that F.cross_entropy skips


@dataclass
class Batch:
    """What both models take; B sequences in total_tokens rows."""

    input_ids: "torch.Tensor"  # (total_tokens,) int32
    cu_seqlens: "torch.Tensor"  # (B + 1,) int32: see above; empty sequences may stand at the end
    max_seqlen: int  # no sequence is longer
    windows: "torch.Tensor | None"  # (W + 1,) int32: see `pack`; None where sequences may be longer than WINDOW
    token_type_ids: "torch.Tensor | None" = None  # (total_tokens,) int32: 1 in the second text of a pair; None: all 0
    masked_positions: "torch.Tensor | None" = None  # (num_rows,) int64: rows of the stream to predict, then padding
    labels: "torch.Tensor | None" = None  # of masked_positions (num_rows,) int64, IGNORED for the padding; or of sequences

    def pinned_for(self, device):
        """The same batch; for a GPU in pinned memory, from which a copy to the GPU is asynchronous."""
        return self if device.type == "cpu" else self.map(lambda tensor: tensor.pin_memory())

    def to(self, device):
        """The same batch on a device."""
        return self if device.type == "cpu" else self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function):
        """The same batch with function(tensor) in the place of each tensor."""
        return type(self)(**{k: function(v) if hasattr(v, "pin_memory") else v for k, v in vars(self).items()})


def pack(lengths, max_seqlen, sequence_multiple=1):
    """(cu_seqlens, windows) of sequences with these lengths, a 1-D int array; empty ones follow up to sequence_multiple.

    Both are int32 arrays, for torch.from_numpy: this file does without torch, as do the processes that prepare data.

    A sequence of 20 tokens would fill a sixth of an attention tile, so short neighbours share one: window w is the
    sequences windows[w] to windows[w + 1], chosen greedily, at most WINDOW tokens together.
    """
    count = round_up(len(lengths), sequence_multiple)
    ends = np.cumsum(lengths)
    cu_seqlens = pad_to(np.concatenate([[0], ends]).astype(np.int32), count + 1, ends[-1] if len(ends) else 0)
    windows = None
    if max_seqlen <= WINDOW:
        bounds, num_tokens = [0], 0
        for b, length in enumerate(lengths.tolist()):
            if num_tokens + length > WINDOW:
                bounds.append(b)
                num_tokens = 0
            num_tokens += length
        windows = np.array(bounds + [len(lengths)], np.int32)
        windows = pad_to(windows, round_up(len(bounds), WINDOW_MULTIPLE) + 1, len(lengths))
    return cu_seqlens, windows


def round_up(n, multiple):
    """The next multiple, at least one."""
    return max(1, -(-n // multiple)) * multiple


def pad_to(array, length, value):
    return np.concatenate([array, np.full(length - len(array), value, array.dtype)])
