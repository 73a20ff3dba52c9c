"""MosaicBERT-Base at 512 tokens: the original's recipe for mosaicml/mosaic-bert-base-seqlen-512.

    torchrun --nproc_per_node=8 train.py configs/base_512.py

Data   python prepare_c4.py --source=c4 --out=data/c4_512 --max_doc_tokens=510
Size   137,400,384 parameters: ALiBi has none, so they are the same for every length
Work   70,000 steps x 4,096 samples of at most 512 tokens: at most 146.8e9 tokens
Cost   the original took about 30 h on eight A100-80GB, about $600 at $2.50 per GPU-hour
Score  not published; not measured here

The original published weights, but no settings file, for this length. Its authors say that they trained at 512 from the
start, not first at 128, with 70,000 steps of 4,096 samples (mosaicml/examples, issue 442), and that only the length has to
change (issue 407). So everything else is as in base.py, which has the sources. To continue at 512 from a model trained at
128 instead, see docs/training.md, "Longer sequences".
"""

data_dir = "data/c4_512"
out_dir = "out/base_512"
seed = 17

# Model, as in base.py
model = "mosaicbert"
hidden_size = 768
num_layers = 12
num_heads = 12  # head size 64
intermediate_size = 3072
hidden_dropout = 0.1
attention_dropout = 0.0

# Data: one sample per document, its first 512 tokens. C4's documents have 427 on average (156e9 tokens, 365e6 documents).
seq_length = 512
chunk = False
mask_prob = 0.3

# Optimizer, as in base.py
global_batch_size = 4096  # issue 442; at most 2,097,152 tokens
max_steps = 70_000  # issue 442
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
