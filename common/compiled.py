"""torch.compile for a model that takes a Batch, around what this version of it gets wrong."""

import torch

# PyTorch 2.11 fuses sums along rows with sums along columns (LayerNorm's backward pass). Where the number of rows varies
# it joins their results from slices without the parentheses they need: BERT on two GPUs ended with "shape '[1408, 768]'
# is invalid for input of size 0". Fixed in 2.12.
WITHOUT_FUSED_SUMS = {"triton.mix_order_reduction": False}


def mark_sizes(_, inputs):
    """Tell torch.compile that a batch's sizes vary. Left to find out, it would compile BERT three times."""
    for tensor in vars(inputs[0]).values():
        if isinstance(tensor, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compiled(model):
    """torch.compile(model), which compiles once for all sizes of batches."""
    model = torch.compile(model, options=WITHOUT_FUSED_SUMS if torch.__version__ < "2.12" else {})
    model.register_forward_pre_hook(mark_sizes)
    return model
