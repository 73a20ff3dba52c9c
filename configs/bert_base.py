"""BERT-Base, the baseline, as MosaicBERT's authors trained it.

    torchrun --nproc_per_node=8 train.py configs/bert_base.py --compile=true

Data   python prepare_c4.py --source=c4 --out=data/c4 --max_doc_tokens=126
Size   109,514,298 parameters
Work   70,000 steps x 4,096 samples of at most 128 tokens: at most 36.7e9 tokens
Cost   the original's baseline took 11.03 h on eight A100-80GB, about $221 at $2.50 per GPU-hour
Score  the original's baseline reached 83.5 on GLUE (average of eight tasks)

Source: mosaicml/examples, benchmarks/bert/yamls/main/hf-bert-base-uncased.yaml. Differs from base.py in architecture,
masking rate, and dropout on attention weights.
"""

data_dir = "data/c4"
out_dir = "out/bert_base"
seed = 17

# Model: that of bert-base-uncased
model = "bert"
hidden_size = 768
num_layers = 12
num_heads = 12  # head size 64
intermediate_size = 3072
hidden_dropout = 0.1
attention_dropout = 0.1

# Data
seq_length = 128
chunk = False
mask_prob = 0.15

# Optimizer, as in base.py
global_batch_size = 4096
max_steps = 70_000
lr = 5e-4
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.02  # 1e-5 / 5e-4, see base.py
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0

eval_interval = 2000
checkpoint_interval = 1000
