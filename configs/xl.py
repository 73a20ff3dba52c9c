"""MosaicBERT-XL: 1.3 billion parameters. Only 200 steps in FP8 and 10 in bf16 have been run (results/README.md, xl_h200).

    torchrun --nproc_per_node=8 train.py configs/xl.py

Data   python prepare_c4.py --source=c4 --out=data/c4 --max_doc_tokens=126
Size   1,300,328,256 parameters
Work   70,000 steps x 4,096 samples of at most 128 tokens: at most 36.7e9 tokens, 10.5 times the FLOPs of base.py
Memory by --dry_run's estimate. 30 bytes a parameter, 39 GB: weight, gradient and AdamW's two moments in float32
       (16), the weight in bf16 (2), and a copy of weight and moments while a checkpoint is written (12). The rest is for a
       micro-batch: 1.62 MB a token, 1.38 with --fp8, 0.25 with --activation_checkpointing and 0.23 with both. So the tokens of
       the largest one, on a GPU of
                    alone    --fp8   --activation_checkpointing
           80 GB   19,456   22,528   128,000
          141 GB   53,248   62,464   131,072 (takes 72 GB)
       Measured: 53,248 tokens with --fp8 took 90.3 GB, and with the 16 of a checkpoint 106, where the estimate says 112;
       58,368 tokens in bf16 took 108.8.
Speed  on an H200: 617 samples/s, 58 % of its bf16 peak; with --fp8 879, 83 %
Score  not measured

Width, depth and heads are those of Megatron's BERT of 1.3 billion parameters (Shoeybi et al. 2019, arXiv 1909.08053, table
4): 24 layers as in BERT-Large, twice as wide. DeBERTa-v2-XXLarge (1.5 billion) has 48 layers of 1,536 instead; wide layers
make better use of a GPU, and of FP8. Heads stay at 64 values, as in both, in BERT and in MosaicBERT: the kernels are fastest
there, and those for short sequences take no more. --num_heads=16 would try 128.

The feed-forward layer is 2.75 times as wide as the model, not 4 times as in MosaicBERT-Base: a GeGLU has three matrices, and
8/3 gives it the parameters of an ordinary layer with 4 (Shazeer 2020, arXiv 2002.05202). The original's blog says that a
larger one did not always pay in BERT-Large. 5,632 is the next multiple of 256.

A risk: Megatron found that BERT got worse above 336 million parameters with post-LN, which MosaicBERT has too, and moved the
LayerNorms. DeBERTa trained 1.5 billion parameters with post-LN.
"""

data_dir = "data/c4"
out_dir = "out/xl"
seed = 17

# Model: see above
model = "mosaicbert"
hidden_size = 2048
num_layers = 24
num_heads = 32  # head size 64
intermediate_size = 5632
hidden_dropout = 0.1
attention_dropout = 0.0

# Data, as in base.py
seq_length = 128
chunk = False
mask_prob = 0.3

# Optimizer. lr and max_grad_norm are those of Megatron's BERT (examples/pretrain_bert.sh); weight_decay is MosaicBERT's 1e-5
# divided by the peak learning rate: see base.py.
global_batch_size = 4096
max_steps = 70_000
lr = 1e-4
max_grad_norm = 1.0
beta1 = 0.9
beta2 = 0.98
adam_eps = 1e-6
weight_decay = 0.1  # 1e-5 / 1e-4
schedule = "linear"
warmup_fraction = 0.06
final_lr_fraction = 0.0

eval_interval = 2000
checkpoint_interval = 1000
