"""Muon: momentum with orthogonalized updates, for the matrices of the layers. AdamW keeps everything else.

For the gradient G of a matrix W, in each step

    M <- 0.95 M + 0.05 G                                momentum
    N  = 0.95 M + 0.05 G                                Nesterov: what M is about to be
    U  = N's orthogonal factor                          N = U S with S symmetric: all singular values become 1
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(rows, columns)) U

AdamW scales every entry of an update to about 1; this scales every singular direction to 1, so that directions which
few tokens ask for move as far as the common ones. The factor 0.2 sqrt(max(rows, columns)) gives U's entries the size
that AdamW's updates usually have, so one learning rate serves both.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv 2502.16982) for the factor and the
weight decay; Amsel et al. 2025 (arXiv 2505.16932) for the coefficients; Boissin et al. 2025 (arXiv 2512.04632) for the
scaling of rows that saves an iteration.

Read next: data.py
"""

import torch

import kernels

MOMENTUM = 0.95
# Fused matrices, and the number of equal parts of each that Muon orthogonalizes separately.
PARTS = {"Wqkv": 3, "gated_layers": 2}
# Odd polynomials a x + b x^3 + c x^5 that, one after the other, take all singular values in (0, 1] near 1: Polar Express
# for five steps, without its second. The scaling in `orthogonalize` makes up for that one.
POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x):
    """The orthogonal factor of each matrix of x, (n, rows, columns), by Newton-Schulz iterations in x's dtype.

    Singular values end between about 0.8 and 1.15, which is near enough for an update; those below some 1/200 of the
    largest end smaller. A matrix of zeros stays one.
    """
    wide = x.shape[1] <= x.shape[2]  # multiply on the shorter side
    for i, (a, b, c) in enumerate(POLYNOMIALS):
        gram = x @ x.mT if wide else x.mT @ x
        if i == 0:
            # Dividing each row of x (a tall one's columns) by the root of its Gram row's absolute sum bounds singular values by
            # 1 (Prach and Lampert 2022, arXiv 2208.03160), and leaves small ones much larger than the Frobenius norm would.
            scale = gram.abs().sum(2, keepdim=True, dtype=torch.float32).clamp(min=1e-30).rsqrt().to(x.dtype)
            gram = gram * scale * scale.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        if i == 0:
            polynomial *= scale.mT if wide else scale  # cheaper than dividing x itself
        x = polynomial @ x if wide else x @ polynomial
    return x


class Muon(torch.optim.Optimizer):
    """Muon for {name: parameter} `matrices`. Matrices of one shape are stacked, so that each product is one launch.

    Every process computes all updates from the same gradients. A `found_inf` of 1, a tensor on the device, skips a
    step, as in PyTorch's fused AdamW.
    """

    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices.values(), {"lr": lr, "weight_decay": weight_decay})
        self.found_inf = None  # set before each step, by update in train.py
        by_shape, self.stacks = {}, {}  # stacks: {(rows, columns): (parameters, their momentum end to end)}
        for name, parameter in matrices.items():
            rows, columns = parameter.shape
            parts = PARTS.get(name.split(".")[-2], 1)  # by the module's name: "Wqkv.weight"
            by_shape.setdefault((rows // parts, columns), []).append(parameter)
        for shape, parameters in by_shape.items():
            sizes = [len(parameter) for parameter in parameters]
            momentum = torch.zeros(sum(sizes), shape[1], device=parameters[0].device)
            for parameter, part in zip(parameters, momentum.split(sizes)):
                self.state[parameter] = {"momentum": part}
            self.stacks[shape] = parameters, momentum

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        shrink = 1 - group["lr"] * group["weight_decay"]
        for (rows, columns), (parameters, momentum) in self.stacks.items():
            sizes = [len(parameter) for parameter in parameters]
            ahead = torch.empty_like(momentum, dtype=torch.bfloat16)
            for parameter, *parts in zip(parameters, momentum.split(sizes), ahead.split(sizes)):
                kernels.look_ahead(parameter.grad, *parts, self.found_inf, MOMENTUM)
            update = orthogonalize(ahead.view(-1, rows, columns)).view_as(ahead)
            scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for parameter, part in zip(parameters, update.split(sizes)):
                kernels.move(parameter, part, self.found_inf, shrink, scale)


def make_optimizers(model, cfg):
    """[AdamW], or [AdamW, Muon]. All their state exists from the start, for a checkpoint to be loaded into.

    Vectors, embeddings and the head belong to AdamW: Muon is made for matrices that multiply hidden states.
    """
    parameters = dict(model.named_parameters())
    matrices = {}
    if cfg.optimizer == "muon":
        matrices = {name: p for name, p in parameters.items() if ".layer." in name and p.ndim == 2}
    adamw = torch.optim.AdamW(
        [p for name, p in parameters.items() if name not in matrices],  # all decay, biases too, as in the original
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    for parameter in adamw.param_groups[0]["params"]:
        zeros = [torch.zeros_like(parameter) for _ in range(2)]
        step = torch.zeros((), device=parameter.device)
        adamw.state[parameter] = {"step": step, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}
    return [adamw, Muon(matrices, cfg.lr, cfg.weight_decay)] if matrices else [adamw]
