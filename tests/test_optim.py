"""Muon: what an update is, that a skipped one changes nothing, and what it leaves to AdamW."""

import pytest
import torch

import kernels
import train
from model import MaskedLM, ModelConfig
from optim import Muon, make_optimizers, orthogonalize
from tests.ranks import run_ranks
from tests.toy import make_shards, read_log, toy_argv


def muon_step(name, gradients, weight=None, lr=0.1, weight_decay=0.0, skip=False):
    """(the parameter, the Muon) after a step for each of `gradients`, from `weight` or zeros."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]) if weight is None else weight.clone())
    optimizer = Muon({name: parameter}, lr, weight_decay)
    for gradient in gradients:
        parameter.grad, optimizer.found_inf = gradient, torch.tensor(float(skip))
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 128), (2, 128, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    wanted = torch.linspace(1, 0.05, left.shape[2])  # condition number 20, as far as the bounds below are promised
    u = orthogonalize((left * wanted @ right).to(dtype)).float()
    values = torch.linalg.svdvals(u)
    assert 0.75 < values.min() and values.max() < 1.2
    assert ((left @ right * u).sum() / (left @ right).norm() / u.norm()) > 0.99


def test_a_zero_gradient_moves_nothing():
    assert orthogonalize(torch.zeros(2, 4, 8)).eq(0).all()
    assert muon_step("layer.0.mlp.wo.weight", [torch.zeros(4, 8)])[0].eq(0).all()


def test_a_step_computed_by_hand():
    """N = 0.05 G of G = [[0, 3], [1, 0]]: its orthogonal factor is [[0, 1], [1, 0]], so W moves by lr 0.2 sqrt(2) of that.

    Both start with another norm and end within the iterations' 0.8 to 1.15.
    """
    gradient, start = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight, optimizer = muon_step("layer.0.mlp.wo.weight", [gradient], start, lr=0.1, weight_decay=0.5)
    moved = (start * (1 - 0.1 * 0.5) - weight) / (0.1 * 0.2 * 2**0.5)
    assert moved[0, 0] == moved[1, 1] == pytest.approx(0, abs=1e-5)
    assert 0.75 < moved[0, 1] < 1.2 and 0.75 < moved[1, 0] < 1.2
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["momentum"], 0.05 * gradient)
    # Then the opposite gradient: momentum 0.95 * 0.05 G - 0.05 G, and looking ahead it has turned around already.
    weight_2, optimizer = muon_step("layer.0.mlp.wo.weight", [gradient, -gradient])
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["momentum"], (0.95 - 1) * 0.05 * gradient)
    weight_1, _ = muon_step("layer.0.mlp.wo.weight", [gradient])
    assert (weight_2 - weight_1)[0, 1] > 0 > weight_1[0, 1]


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_entries_of_an_update_are_a_fifth_of_the_learning_rate(shape):
    torch.manual_seed(0)
    weight, _ = muon_step("layer.0.mlp.wo.weight", [torch.randn(shape)], lr=0.1)
    assert weight.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.1)


def test_matrices_in_one_parameter_are_orthogonalized_apart():
    """A gradient of the queries alone moves the queries as it would alone, and neither keys nor values."""
    torch.manual_seed(0)
    queries, rest = torch.randn(16, 16), torch.zeros(32, 16)
    together, _ = muon_step("layer.0.attention.self.Wqkv.weight", [torch.cat([queries, rest])])
    alone, _ = muon_step("layer.0.mlp.wo.weight", [queries])
    torch.testing.assert_close(together[:16], alone, rtol=0.01, atol=1e-4)  # a batched product may round otherwise
    assert together[16:].eq(0).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_changes_no_bit(wrong):
    torch.manual_seed(0)
    gradient, weight = torch.randn(8, 8), torch.randn(8, 8)
    _, optimizer = muon_step("layer.0.mlp.wo.weight", [gradient], weight, weight_decay=0.1)
    (parameter,) = optimizer.param_groups[0]["params"]
    momentum = optimizer.state[parameter]["momentum"]
    before = parameter.detach().clone(), momentum.clone()
    parameter.grad, optimizer.found_inf = gradient.clone(), torch.tensor(1.0)
    parameter.grad[0, 0] = wrong
    optimizer.step()
    assert torch.equal(parameter, before[0]) and torch.equal(momentum, before[1])


@pytest.mark.parametrize("shape", [(3, 7), (40, 64)])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_the_kernels_do_what_the_reference_does(shape, found_inf, device, triton_backend):
    torch.manual_seed(0)
    gradient, momentum, weight = (torch.randn(shape, device=device) for _ in range(3))
    found_inf = torch.tensor(found_inf, device=device)
    if found_inf:
        gradient[0, 0], gradient[1, 1] = float("nan"), float("inf")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter truncates to bf16
    results = []
    for look_ahead, move in ((kernels.look_ahead, kernels.move), (kernels.look_ahead_reference, kernels.move_reference)):
        m, w, ahead = momentum.clone(), weight.clone(), torch.full(shape, 7.0, dtype=dtype, device=device)
        look_ahead(gradient, m, ahead, found_inf, 0.95)
        move(w, ahead, found_inf, 0.9, 0.3)
        results.append((m, w, ahead))
    for ours, reference in zip(*results):
        assert torch.equal(ours, reference) if found_inf else torch.allclose(ours, reference, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-6)
    if found_inf:
        assert torch.equal(results[0][0], momentum) and torch.equal(results[0][1], weight) and results[0][2].eq(0).all()


@pytest.mark.parametrize("kind, matrices", [("mosaicbert", 4), ("bert", 6)])
def test_muon_takes_the_layers_matrices_and_adamw_the_rest(kind, matrices):
    cfg = train.TrainConfig(kind, 32, 3, 2, 48, optimizer="muon")
    model = MaskedLM(cfg, 100)
    names = {parameter: name for name, parameter in model.named_parameters()}
    adamw, muon = make_optimizers(model, cfg)
    taken = [names[parameter] for parameter in muon.param_groups[0]["params"]]
    assert len(taken) == 3 * matrices and all(".encoder.layer." in name for name in taken)
    assert len(taken) + len(adamw.param_groups[0]["params"]) == len(names)
    assert [type(optimizer).__name__ for optimizer in make_optimizers(model, train.TrainConfig(kind))] == ["AdamW"]


def test_the_state_made_at_the_start_is_adamws_own():
    """AdamW fills its state at its first step; ours exists before it, for checkpoints. The steps must be the same."""
    models = []
    for given in (True, False):
        torch.manual_seed(0)
        models.append(MaskedLM(ModelConfig("mosaicbert", 32, 1, 2, 48), 100))
        (adamw,) = make_optimizers(models[-1], train.TrainConfig())
        if not given:
            adamw.state.clear()
        for step in range(3):
            for i, parameter in enumerate(models[-1].parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * (i - 3) + step)
            adamw.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_two_processes_train_like_one(tmp_path):
    """Gradients differ by their order of summation, which bf16 makes a difference of up to 2^-9 in some entries of an update."""
    data_dir = make_shards(tmp_path / "shards")
    for name, processes in (("one", 1), ("two", 2)):
        argv = toy_argv(data_dir, tmp_path / name, optimizer="muon", hidden_dropout=0, max_steps=20)
        statuses, output = run_ranks(argv, processes, tmp_path)
        assert statuses == [0] * processes, output
    one, two = ([record["loss"] for record in read_log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3) and one[-1] < one[0] - 0.1
