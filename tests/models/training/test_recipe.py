"""The recipe: schedule, decay, one step, and the statistics at the end."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from models import build
from models.training.recipe import (
    WARM_UP_DEPTH,
    WARM_UP_ERROR,
    Recipe,
    compiled_blocks,
    new_network,
    new_optimizer,
    new_step,
    recompute_statistics,
)

SMALL = Recipe("residual", 8, iterations=12, batch=32)


@pytest.mark.parametrize(
    ("iteration", "lr"),
    [(0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001), (63_999, 0.001)],
)
def test_learning_rate_drops_at_a_half_and_three_quarters(iteration, lr):
    recipe = Recipe("residual", 20)
    assert recipe.learning_rate(iteration, warming_up=False) == pytest.approx(lr)
    assert recipe.learning_rate(iteration, warming_up=True) == pytest.approx(min(lr, 0.01))


def test_recipe_is_the_paper_s():
    recipe = Recipe("plain", 56)
    assert (recipe.iterations, recipe.batch, recipe.lr, recipe.momentum) == (64_000, 128, 0.1, 0.9)
    assert (recipe.weight_decay, recipe.decay, WARM_UP_DEPTH, WARM_UP_ERROR) == (
        1e-4,
        "weights",
        110,
        80,
    )


@pytest.mark.parametrize(
    ("decay", "spared"),
    [("weights", {"weight", "bias"}), ("weights+gamma", {"bias"}), ("all", set())],
)
def test_decay_says_which_parameters_decay(decay, spared):
    recipe = replace(SMALL, decay=decay)
    network = new_network(recipe)
    groups = new_optimizer(network, recipe).param_groups
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        module, leaf = name.rsplit(".", 1)
        expected = 0.0 if ".bn" in f".{module}" and leaf in spared else 1e-4
        assert found.pop(id(parameter)) == expected, name
    assert not found


def test_step_is_sgd_with_momentum_and_decay():
    recipe = replace(SMALL, momentum=0.9, weight_decay=0.5, lr=0.1)
    network = new_network(recipe)
    reference = copy.deepcopy(network)
    step = new_step(network, new_optimizer(network, recipe), recipe)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    momentum = {name: 0 for name, _ in reference.named_parameters()}
    for _ in range(3):
        loss, wrong = step(x, y)
        logits = reference(x)
        expected = torch.nn.functional.cross_entropy(logits, y)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert wrong.item() == (logits.argmax(1) != y).sum().item()
        reference.zero_grad()
        expected.backward()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                decay = 0.0 if "bn" in name else 0.5
                momentum[name] = 0.9 * momentum[name] + parameter.grad + decay * parameter
                parameter -= 0.1 * momentum[name]
    for (name, ours), theirs in zip(
        network.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_initial_network_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = new_network(replace(SMALL, seed=3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    reference = build("resnet-8")
    assert all(
        torch.equal(a, b) for a, b in zip(network.parameters(), reference.parameters(), strict=True)
    )


def test_bn_statistics_are_those_of_the_batch():
    network = new_network(SMALL)
    for name, buffer in network.named_buffers():
        if "num" not in name:
            buffer.fill_(7.0)  # what was there before must not matter
    x = torch.randn(600, 3, 32, 32) + 1
    reference, expected = copy.deepcopy(network).double().train(), {}

    def keep(name):
        def hook(module, inputs):
            values = inputs[0].transpose(0, 1).flatten(1)  # (C, N H W)
            expected[f"{name}.running_mean"] = values.mean(1)
            expected[f"{name}.running_var"] = values.var(1)

        return hook

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        reference(x.double())
    layers = []
    x = x.contiguous(memory_format=torch.channels_last)
    recompute_statistics(network, x, lambda: layers.append("done"))
    assert len(layers) == 7
    assert not any(module._forward_hooks for module in network.modules())
    found = {name: buffer for name, buffer in network.named_buffers() if "num" not in name}
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert {
        module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)
    } == {0.1}


@pytest.mark.parametrize(
    ("count", "iterations"),
    [(0, set()), (1, {64_000}), (2, {0, 64_000}), (5, {0, 16_000, 32_000, 48_000, 64_000})],
)
def test_snapshots_are_evenly_spaced_from_first_to_last(count, iterations):
    assert Recipe("residual", 20, snapshots=count).snapshot_iterations() == iterations


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_convolutions(precision):
    recipe, seen = replace(SMALL, precision=precision), []
    network = new_network(recipe)
    network.layer3[0].conv2.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    loss, _ = new_step(network, new_optimizer(network, recipe), recipe)(
        torch.randn(4, 3, 32, 32), torch.arange(4)
    )
    assert seen == [getattr(torch, precision)]
    assert loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler looks
def test_compiled_blocks_compute_the_same_and_share_their_compilations(monkeypatch):
    """A stand-in replaces torch's backend, which needs a compiler and half a minute."""
    graphs = []

    def backend(graph, inputs):
        assert all(isinstance(value, torch.Tensor) for value in inputs)  # no size is a variable
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for kind in ("residual", "plain"):  # one after the other, as the command trains them
        one, other = (new_network(Recipe(kind, 20)) for _ in range(2))
        graphs.clear()
        with compiled_blocks(other):
            logits = other(x)
        assert torch.equal(logits, one(x))
        assert len(graphs) == 5  # 1 for the first stage, 2 for each of the others
        assert other.state_dict().keys() == one.state_dict().keys()
        other(x[:2])
        assert len(graphs) == 5  # not compiled: this shape would need other graphs
        assert not any("forward" in vars(module) for module in other.modules())
