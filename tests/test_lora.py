"""Low-rank adapters: they start as nothing, they alone train, and they merge into the weights."""

import copy

import pytest
import torch
from torch import nn

from models.nn.lora import (
    LoRALinear,
    adapter_state,
    adapters,
    add_adapters,
    base_fingerprint,
    load_adapter_state,
    merge_adapters,
)
from models.nn.unet import UNet
from utils.errors import UserError

PROJECTIONS = ("query", "key", "value", "output")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 7), nn.SiLU(), nn.Sequential(nn.Linear(7, 6, bias=False), nn.Linear(6, 3))
    )


def trainable_names(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def on_two(name: str) -> bool:
    return name in ("0", "2.1")


def adapted() -> nn.Sequential:
    """Adapters that do something, on two of three layers."""
    torch.manual_seed(0)
    net = network()
    add_adapters(net, on_two, rank=2)
    for name in trainable_names(net):
        nn.init.normal_(net.get_parameter(name))
    return net


def on_projections(name: str) -> bool:
    return name.rpartition(".")[2] in PROJECTIONS


def test_an_adapter_starts_as_nothing_but_can_learn():
    net, x = network(), torch.randn(4, 2, 5)
    before = net(x)
    add_adapters(net, lambda name: name == "2.0", rank=2)
    assert list(adapters(net)) == ["2.0"]
    assert torch.equal(net(x), before)
    net(x).square().sum().backward()
    assert net[2][0].up.weight.grad.abs().max() > 0  # down learns from the second step on


def test_down_starts_gaussian_with_std_one_over_rank():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(4000, 2), rank=8)
    assert layer.down.weight.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert layer.down.weight.mean().item() == pytest.approx(0, abs=0.005)


def test_the_adapter_is_added():
    base = nn.Linear(5, 3)
    layer, x = LoRALinear(base, rank=2), torch.randn(4, 5)
    nn.init.normal_(layer.up.weight)
    expected = base(x) + x @ layer.down.weight.T @ layer.up.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_merged_equals_unmerged():
    net, x = adapted(), torch.randn(4, 5)
    unmerged, names = net(x), [name for name, _ in network().named_parameters()]
    merge_adapters(net)
    assert [name for name, _ in net.named_parameters()] == names
    torch.testing.assert_close(net(x), unmerged)


def test_only_adapters_train():
    net = adapted()
    assert trainable_names(net) == ["0.down.weight", "0.up.weight", "2.1.down.weight", "2.1.up.weight"]
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    changed = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == trainable_names(net)


def test_the_number_of_trained_parameters():
    net = UNet(image_size=32, channels=3, label_dim=10, nf=32, ch_mult=[2, 4], attn_resolutions=[16])
    total = sum(p.numel() for p in net.parameters())
    add_adapters(net, on_projections, rank=8)
    widths = [adapter.base.in_features for adapter in adapters(net).values()]
    assert widths == 16 * [128]  # q, k, v, o of four attention blocks: two down, the middle, one up
    trained = sum(net.get_parameter(name).numel() for name in trainable_names(net))
    assert trained == 16 * 8 * (128 + 128)
    assert sum(p.numel() for p in net.parameters()) == total + trained


def test_the_state_holds_the_adapters_alone_and_comes_back():
    net = adapted()
    state = adapter_state(net)
    assert sorted(state) == sorted(trainable_names(net))
    other = network()
    add_adapters(other, on_two, rank=2)
    other.load_state_dict({**net.state_dict(), **adapter_state(other)})
    x = torch.randn(4, 5)
    assert not torch.allclose(other(x), net(x))
    load_adapter_state(other, state)
    assert torch.equal(other(x), net(x))


def test_the_state_is_a_copy():
    net = adapted()
    state = adapter_state(net)
    kept = state["0.up.weight"].clone()
    nn.init.zeros_(net[0].up.weight)
    assert torch.equal(state["0.up.weight"], kept) and not state["0.up.weight"].requires_grad


def test_adapters_take_the_dtype_of_their_layer():
    assert LoRALinear(nn.Linear(3, 2, dtype=torch.float64), rank=1).up.weight.dtype == torch.float64


def test_a_selection_without_linear_layers_is_refused_before_anything_changes():
    net = network()
    with pytest.raises(UserError, match=r"LoRA layer.*known: 0, 2.0, 2.1"):
        add_adapters(net, lambda name: name == "1", rank=2)
    assert all(p.requires_grad for p in net.parameters())


def test_a_state_that_does_not_fit_is_refused():
    net = adapted()
    wide = network()
    add_adapters(wide, on_two, rank=3)
    with pytest.raises(UserError, match=r"0.down.weight.*\(3, 5\).*\(2, 5\)"):
        load_adapter_state(net, adapter_state(wide))
    with pytest.raises(UserError, match=r"2\.1\.up.weight"):
        load_adapter_state(net, {k: v for k, v in adapter_state(net).items() if k != "2.1.up.weight"})


def test_the_fingerprint_is_that_of_the_base():
    torch.manual_seed(0)
    net = network()
    before = base_fingerprint(net)
    add_adapters(net, on_two, rank=2)
    for name in trainable_names(net):
        nn.init.normal_(net.get_parameter(name))
    assert base_fingerprint(net) == before
    merge_adapters(net)
    assert base_fingerprint(net) != before
    other = copy.deepcopy(net)
    assert base_fingerprint(other) == base_fingerprint(net)
    with torch.no_grad():
        other[2][0].weight[0, 0] += 1e-3
    assert base_fingerprint(other) != base_fingerprint(net)
    assert base_fingerprint(other, ["2.0.weight"]) == base_fingerprint(net, ["2.0.weight"])
