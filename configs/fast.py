"""MosaicBERT-Base in minutes: base.py's model, trained with less of everything. For a GPU of Ada, Hopper or newer.

    python train.py configs/fast.py --data_dir=data/mine --budget_minutes=8

Data   python prepare_c4.py --source=my_texts/ --train_tokenizer=32768 --out=data/mine
Size   137,400,384 parameters with BERT's vocabulary; checkpoints and exports are like base.py's
Work   512 samples of at most 128 tokens per step; 2,872 steps in four minutes on an H200
Cost   $0.17 for these four minutes, at $2.50 per GPU-hour
Score  held-out loss 2.447 after them; on GLUE four minutes are near eight of base.py: docs/results.md, "fast.py against base.py"

What differs from base.py, and why. All figures are from one H200, one pretraining seed each (results/README.md, recipe_h200):

optimizer   Muon. In 2.4 minutes, with dropout and steps of 256: loss 2.93 where AdamW has 3.01, STS-B 61.5 where it has 45.0.
lr          1e-3. Without dropout, steps of 256: 2.82 after 2.4 minutes (5e-4: 3.04), 3.36 after 70 s (2e-3: 3.40, 4e-3: 5.72).
dropout     0. Four minutes, as here: 2.447 instead of 2.543, CoLA 31.6 instead of 28.0, STS-B 75.1 instead of 76.6. Fine-tuning
            then has none either: dropout that the weights have never seen cost CoLA half of its score at a high learning rate.
            MRPC and STS-B are from before the second token type was a copy of the first: results/README.md, token_types_h200.
fp8         A step is 1.3 times as fast, and the loss after equal steps 0.01 higher, less than seeds differ. Older GPUs need
            --fp8=false.
batch       512 samples instead of 4,096, of which minutes have too few. With 256, launching kernels from Python would take
            longer than they do, as steps in FP8 are not captured as CUDA graphs.
warm-up     300 steps instead of 4,200: post-LN needs hundreds of them, however short the run.
chunk       True: whole documents, cut into samples. base.py reads the first 126 tokens of each, which takes a corpus like C4.

Read next: ../train.py
"""

data_dir = "data/mine"
out_dir = "out/fast"
seed = 17

# Model: base.py's, without dropout
model = "mosaicbert"
hidden_size = 768
num_layers = 12
num_heads = 12
intermediate_size = 3072
hidden_dropout = 0.0
attention_dropout = 0.0

# Data
seq_length = 128
chunk = True
mask_prob = 0.3

# Optimizer
global_batch_size = 512
max_steps = 2872  # unless there is a budget
optimizer = "muon"
lr = 1e-3
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.02
schedule = "linear"
warmup_steps = 300
final_lr_fraction = 0.0
fp8 = True

eval_interval = 1000
checkpoint_interval = 1000
