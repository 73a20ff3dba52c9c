"""MosaicBERT-Base: the original's recipe.

    torchrun --nproc_per_node=8 train.py configs/base.py

Data   python prepare_c4.py --source=c4 --out=data/c4 --max_doc_tokens=126
Size   137,400,384 parameters
Work   70,000 steps x 4,096 samples = 286,720,000 samples (79 % of C4's documents), of at most 128 tokens: at most 36.7e9
Cost   the original took 9.65 h on eight A100-80GB, about $193 at $2.50 per GPU-hour
Score  the original reached 84.3 on GLUE (average of eight tasks, five pretraining seeds)

Sources: mosaicml/examples, benchmarks/bert/yamls/main/mosaic-bert-base-uncased.yaml, and its blog post where noted.

Read next: fast.py, or ../train.py
"""

data_dir = "data/c4"
out_dir = "out/base"
seed = 17

# Model
model = "mosaicbert"
hidden_size = 768
num_layers = 12
num_heads = 12  # head size 64
intermediate_size = 3072  # of each half of the GeGLU
hidden_dropout = 0.1
attention_dropout = 0.0

# Data: one sample per document, its first 128 tokens
seq_length = 128
chunk = False
mask_prob = 0.3  # evaluation always masks 15 %
final_mask_prob = 0.0  # constant; 0.15 would follow the authors' later study (Ankner et al. 2024)

# Optimizer. The original's decoupled weight decay multiplies every parameter by 1 - 1e-5 * lr / peak lr. PyTorch's AdamW
# multiplies by 1 - weight_decay * lr, so 1e-5 / 5e-4 = 0.02 does the same.
global_batch_size = 4096  # at most 524,288 tokens
max_steps = 70_000
lr = 5e-4
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.02
schedule = "linear"
warmup_fraction = 0.06  # 4,200 steps
final_lr_fraction = 0.0  # as in the blog post; the YAML has 0.02

# Differs from MosaicBERT: the loss is the mean over all masked tokens of the global batch. The original averages each
# micro-batch and weights the averages by samples, so its loss depends a little on how the batch is split.

eval_interval = 2000
checkpoint_interval = 1000
