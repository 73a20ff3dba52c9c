"""MosaicBERT-Base at 2,048 tokens: after mosaicml/mosaic-bert-base-seqlen-2048.

    torchrun --nproc_per_node=8 train.py configs/base_2048.py

Data   python prepare_c4.py --source=c4 --out=data/c4_2048 --max_doc_tokens=2046
Size   137,400,384 parameters: ALiBi has none, so they are the same for every length
Work   70,000 steps x 4,096 samples of at most 2,048 tokens
Cost   not published; not measured here
Score  Nomic measured 85 on GLUE with the published weights (arXiv 2402.01613, table 2); not measured here

The original published weights, but no settings: its model card names the length, and Nomic the 70,000 steps. We assume that
everything else is as at 512 tokens, where the authors named the batch: see base_512.py.
"""

data_dir = "data/c4_2048"
out_dir = "out/base_2048"
seed = 17

# Model, as in base.py
model = "mosaicbert"
hidden_size = 768
num_layers = 12
num_heads = 12  # head size 64
intermediate_size = 3072
hidden_dropout = 0.1
attention_dropout = 0.0

# Data: one sample per document, its first 2,048 tokens. C4's documents have 427 on average, so most samples are
# shorter, and without padding they cost no more than their length.
seq_length = 2048
chunk = False
mask_prob = 0.3

# Optimizer, as in base.py
global_batch_size = 4096  # assumed; at most 8,388,608 tokens
max_steps = 70_000  # arXiv 2402.01613, table 2
lr = 5e-4
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.02  # 1e-5 / 5e-4, see base.py
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0  # Differs from MosaicBERT: its YAML has 2 %, its blog post 0, see base.py

eval_interval = 2000
checkpoint_interval = 1000
