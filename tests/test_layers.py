"""Every layer of PyTorch with trained parameters, option by option: its per-example gradients equal those of a slow
loop in float64, or the layer is refused by name. docs/layers.md lists them."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from slow_loop import loop_clipped_sum, loop_gradients, norms_of, relative_error, squared_loss
from tiny_runs import ROOT
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from opacus_ext.gradients.per_example import clipped_sum, per_example_gradients
from opacus_ext.gradients.rules import ROW_FORWARDS, RULES
from opacus_ext.validate import validate_independence
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Using padding='same'")


class Calls(nn.Module):
    """A layer called in some way; the first of several results counts."""

    def __init__(self, layer, call=lambda layer, x: layer(x)):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x, labels):
        result = self.call(self.layer, x)
        return torch.tanh(result[0] if isinstance(result, tuple) else result)


def attend(layer, x):
    return layer(x, x.roll(1, 1), x.square())


def look_up(layer, x):
    return layer((x.abs() * 10).long() % 4)


def with_itself(layer, x):
    return layer(x, x.tanh())


def sized(layer, x):
    return layer(x, output_size=(11, 13))


def attend_narrow(layer, x):
    return layer(x, x[..., :4], x, need_weights=False)


def attention(**options):
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def decoder():
    return nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True)


def options(kind, *args, **common):
    """The layer with every padding mode."""
    return {
        f"{kind.__name__}, {mode}": partial(kind, *args, padding_mode=mode, **common) for mode in PADDINGS
    }


PADDINGS = ["zeros", "reflect", "replicate", "circular"]
LAYERS = {
    "Linear": ((3,), lambda: nn.Linear(3, 4)),
    "Linear, no bias": ((3,), lambda: nn.Linear(3, 4, bias=False)),
    "Linear, frozen bias": ((3,), lambda: frozen(nn.Linear(3, 4), "bias")),
    **{name: ((4, 9), make) for name, make in options(nn.Conv1d, 4, 6, 3, 2, 2, 2, 2).items()},
    **{name: ((4, 5, 6), make) for name, make in options(nn.Conv2d, 4, 6, (3, 2), 2, 2, (1, 2), 2).items()},
    **{name: ((4, 3, 4, 5), make) for name, make in options(nn.Conv3d, 4, 6, (2, 3, 2), 2, 1, (1, 1, 2), 2).items()},
    **{
        f"{name}, same": ((2, *[5] * dims), make)
        for dims, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)
        for name, make in options(kind, 2, 3, 2, padding="same", bias=False).items()
    },
    "Conv1d, valid": ((2, 9), lambda: nn.Conv1d(2, 3, 3, padding="valid", dilation=3)),
    "ConvTranspose1d": ((4, 5), lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2)),
    "ConvTranspose1d, dilation": ((2, 5), lambda: nn.ConvTranspose1d(2, 3, 3, dilation=3, padding=1, output_padding=2)),
    "ConvTranspose2d": ((3, 4, 5), lambda: nn.ConvTranspose2d(3, 4, (3, 4), (2, 1), (1, 2), (1, 0), bias=False)),
    "ConvTranspose2d, output size": ((3, 3, 4), lambda: nn.ConvTranspose2d(3, 4, 3, 3), sized),
    "ConvTranspose2d, groups": ((4, 3, 3), lambda: nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=2)),
    "ConvTranspose3d": ((2, 3, 3, 3), lambda: nn.ConvTranspose3d(2, 3, 2, 2, 1, output_padding=1)),
    "Embedding, padding": ((5,), lambda: nn.Embedding(4, 3, padding_idx=-1), look_up),
    "Embedding, sparse": ((5,), lambda: nn.Embedding(4, 3, sparse=True), look_up),
    **{
        f"EmbeddingBag, {mode}": ((5,), partial(nn.EmbeddingBag, 4, 3, mode=mode, padding_idx=1), look_up)
        for mode in ("sum", "mean", "max")
    },
    "GroupNorm": ((4, 5), lambda: nn.GroupNorm(2, 4, eps=0.1)),
    "LayerNorm": ((4, 5), lambda: nn.LayerNorm((4, 5), eps=0.1)),
    "LayerNorm, no bias": ((4, 5), lambda: nn.LayerNorm(5, bias=False)),
    "RMSNorm": ((4, 5), lambda: nn.RMSNorm(5, eps=0.1)),
    "InstanceNorm1d": ((4, 6), lambda: nn.InstanceNorm1d(4, affine=True, eps=0.1)),
    "InstanceNorm2d": ((4, 3, 3), lambda: nn.InstanceNorm2d(4, affine=True)),
    "InstanceNorm3d": ((4, 2, 2, 3), lambda: nn.InstanceNorm3d(4, affine=True)),
    "PReLU": ((4, 3), lambda: nn.PReLU()),
    "PReLU, channels": ((4, 3, 3), lambda: nn.PReLU(4)),
    "PReLU, vectors": ((4,), lambda: nn.PReLU(4)),
    "Bilinear": ((4,), lambda: nn.Bilinear(4, 4, 3), with_itself),
    "MultiheadAttention": ((5, 8), attention, attend),
    "MultiheadAttention, add_bias_kv": ((5, 8), lambda: attention(add_bias_kv=True, add_zero_attn=True), attend),
    "MultiheadAttention, kdim": ((5, 8), lambda: attention(kdim=4, bias=False), attend_narrow),
    "TransformerEncoderLayer": ((5, 8), lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)),
    "TransformerDecoderLayer": ((5, 8), decoder, with_itself),
    "GRUCell": ((3,), lambda: nn.GRUCell(3, 4)),
    "RNNCell": ((3,), lambda: nn.RNNCell(3, 4)),
    "weight_norm": ((3, 5, 5), lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "orthogonal": ((3,), lambda: parametrizations.orthogonal(nn.Linear(3, 3))),
    "spectral_norm, eval mode": ((3,), lambda: parametrizations.spectral_norm(nn.Linear(3, 4)).eval()),
    "a parametrization with a parameter": ((3,), lambda: scaled(nn.Linear(3, 4))),
}  # fmt: skip


def frozen(layer, *names):
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


class Scaled(nn.Module):
    """Computes a weight from another one and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(4, 1))

    def forward(self, weight):
        return weight * self.log_scale.exp()


def scaled(layer):
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def check(network, images, labels) -> None:
    """Against the loop in float64, with one row per example and with three."""
    network, images = network.double(), images.double()
    for draws in (1, 3):
        loss = squared_loss(draws)
        exact = loop_gradients(network, loss, images, labels)
        found = per_example_gradients(network, loss, images, labels, None)
        assert {name: rows.shape for name, rows in found.items()} == {
            name: rows.shape for name, rows in exact.items()
        }
        assert relative_error(found, exact) < 1e-12
        bound = norms_of(exact).median().item()
        found, norms = clipped_sum(network, loss, images, labels, bound, None)
        assert relative_error(found, loop_clipped_sum(exact, bound)) < 1e-12
        torch.testing.assert_close(norms, norms_of(exact), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_every_option_of_every_layer_equals_the_slow_loop(name):
    shape, make, *call = LAYERS[name]
    torch.manual_seed(0)
    network = Calls(make(), *call)
    before = {name: p.clone() for name, p in network.named_parameters()}
    images, labels = torch.randn(4, *shape), torch.arange(4) % 2
    check(network, images, labels)
    validate_independence(network, squared_loss(2), images[:3].double(), labels[:3])
    assert all(torch.equal(p.float(), before[name]) for name, p in network.named_parameters())
    assert "forward" not in vars(network.layer)


def rows_second(layer, x):
    return layer(*[x.transpose(0, 1)] * 3)


def complex_numbers(layer, x):
    return layer(x.to(torch.cfloat)).abs()


def by_offsets(layer, x):
    return layer(((x.abs() * 10).long() % 4).flatten(), torch.arange(len(x)) * x.shape[1])


def one_by_one(layer, x):
    return torch.stack([layer(image) for image in x])


def in_eval_mode():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


BY_FREQ = "scale_grad_by_freq"
# The shape of one example, the layer, what the error names, and how the layer is called.
REFUSED = {
    "EmbeddingBag, offsets": ((5,), lambda: nn.EmbeddingBag(4, 3), "EmbeddingBag", by_offsets),
    "EmbeddingBag, scale_grad_by_freq": ((5,), lambda: nn.EmbeddingBag(4, 3, None, 2.0, True), BY_FREQ, look_up),
    "Embedding, scale_grad_by_freq": ((5,), lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), BY_FREQ, look_up),
    "Embedding, max_norm": ((5,), lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm", look_up),
    "MultiheadAttention, rows second": ((5, 8), lambda: nn.MultiheadAttention(8, 2), "'layer'", rows_second),
    "TransformerEncoderLayer, eval": ((5, 8), in_eval_mode, "eval mode"),
    "GRU": ((5, 3), lambda: nn.GRU(3, 4, batch_first=True), "GRU at 'layer'"),
    "LSTM": ((5, 3), lambda: nn.LSTM(3, 4, batch_first=True), "LSTM at 'layer'"),
    "RNN": ((5, 3), lambda: nn.RNN(3, 4, batch_first=True), "RNN at 'layer'"),
    "LSTMCell": ((3,), lambda: nn.LSTMCell(3, 4), "LSTMCell at 'layer'"),
    "spectral_norm": ((3,), lambda: parametrizations.spectral_norm(nn.Linear(3, 4)), "Linear at 'layer'"),
    "weight_norm by a hook": ((3,), lambda: nn.utils.weight_norm(nn.Linear(3, 4)), "WeightNorm"),
    "spectral_norm by a hook": ((3,), lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), "SpectralNorm"),
    "pruning": ((3,), lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", amount=1), "L1Unstructured"),
    "a complex weight": ((3,), lambda: nn.Linear(3, 4, dtype=torch.cfloat), "complex", complex_numbers),
    "a lazy layer": ((3,), lambda: nn.LazyLinear(4), "LazyLinear"),
    "a script": ((3,), lambda: torch.jit.script(nn.Linear(3, 4)), "torch.jit"),
    "Conv2d, image by image": ((3, 5, 5), lambda: nn.Conv2d(3, 4, 3), "Conv2d", one_by_one),
    "BatchNorm1d": ((3,), lambda: nn.BatchNorm1d(3), "BatchNorm1d"),
    "BatchNorm2d": ((3, 2, 2), lambda: nn.BatchNorm2d(3).eval(), "BatchNorm2d"),
    "BatchNorm3d": ((3, 2, 2, 2), lambda: nn.BatchNorm3d(3), "BatchNorm3d"),
    "SyncBatchNorm": ((3, 2, 2), lambda: nn.SyncBatchNorm(3), "SyncBatchNorm"),
    "InstanceNorm2d, statistics": ((3, 2, 2), lambda: nn.InstanceNorm2d(3, 1e-5, 0.1, True, True), "InstanceNorm2d"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(weight_norm|Lazy|torch.jit):")
@pytest.mark.parametrize("name", REFUSED)
def test_other_layers_are_refused_in_one_line(name):
    shape, make, named, *call = REFUSED[name]
    torch.manual_seed(0)
    network = Calls(make(), *call)
    images, labels = torch.randn(3, *shape), torch.arange(3) % 2
    for attempt in (
        lambda: per_example_gradients(network, squared_loss(), images, labels, None),
        lambda: validate_independence(network, squared_loss(), images, labels),
    ):
        with pytest.raises(UserError, match=named) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)


def trained_layers() -> set[str]:
    """The classes of torch.nn that make parameters, or whose bases do."""
    makers = set()
    for path in Path(nn.modules.__file__).parent.glob("*.py"):
        _, *parts = re.split(r"^class (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        names, bodies = parts[::2], parts[1::2]
        makers |= {
            name for name, body in zip(names, bodies, strict=True) if re.search(r"\bParameter\(", body)
        }
    kinds = {
        name: kind
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    return {name for name, kind in kinds.items() if makers & {base.__name__ for base in kind.__mro__[:-2]}}


# Bases, containers, and a layer that picks its rows by the labels.
NOT_TRIED = {
    "RNNBase", "RNNCellBase", "ParameterList", "ParameterDict", "DataParallel", "AdaptiveLogSoftmaxWithLoss",
}  # fmt: skip


def test_no_layer_of_pytorch_is_forgotten():
    tried = {name.split(",")[0] for name in [*LAYERS, *REFUSED]}
    layers = {name for name in trained_layers() if not name.startswith("Lazy")}
    assert {"Linear", "PReLU", "LSTMCell", "Conv3d", "InstanceNorm1d"} <= layers
    assert layers - tried <= NOT_TRIED


def row_of_the_table(way: str) -> set[str]:
    text = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    row = next(line.split("|") for line in text.splitlines() if line.startswith(f"| {way} |"))
    return {layer.strip() for layer in row[2].split(",")}


def test_the_documented_layers_are_those_of_the_engine():
    of_pytorch = [
        {kind.__name__ for kind in table if kind.__module__.startswith("torch.")}
        for table in (RULES, ROW_FORWARDS)
    ]
    assert row_of_the_table("gradient rule") == of_pytorch[0]
    assert row_of_the_table("one copy of the parameters per row") == of_pytorch[1]
    refused = {name for name in REFUSED if hasattr(nn, name)}
    assert row_of_the_table("refused") == refused
    exact = {name.split(",")[0] for name in LAYERS}
    assert of_pytorch[0] | of_pytorch[1] <= exact
    assert "(docs/layers.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8").partition("**Example by example.**")[2]
    covered = set(
        re.findall(r"\b[A-Z]\w+(?:Cell|Bag|Attention)\b|\bBilinear\b", text.partition("**Refused")[0])
    )
    assert covered == {"MultiheadAttention", "Bilinear", "EmbeddingBag", "GRUCell", "RNNCell"} <= exact


# ------------------------------------------------------------------------------------------ bare parameters


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.scale, self.mlp = (
            LayerScale(width),
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)),
        )

    def forward(self, x):
        h = self.norm(x)
        x = x + self.scale(self.attention(h, h, h, need_weights=False)[0])
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """Class token, table of positions and layer scale, with layers that have rules below and around them."""

    def __init__(self, width: int = 4, checkpointed: bool = False):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 5, width))
        self.labels = nn.Embedding(3, width)
        self.biases = nn.ParameterList([torch.zeros(width), torch.zeros(width)])
        self.by_name = nn.ParameterDict({"out": torch.ones(())})
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x, labels):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.class_token.expand(len(x), -1, -1), h], 1) + self.positions
        h = h + self.labels(labels)[:, None]
        for block, bias in zip(self.blocks, self.biases, strict=True):
            h = F.relu(block(h) + bias, inplace=True)
        return self.head(h[:, 0]) * self.by_name["out"]


class Frozen(VisionTransformer):
    def __init__(self):
        super().__init__()
        frozen(self, "positions", "head.weight", "blocks.0.scale.gamma", "biases.1")


class SharedTable(nn.Module):
    """A table that all examples look up alike, in a module that runs by example; and a parameter used twice."""

    def __init__(self):
        super().__init__()
        self.table, self.offset, self.layer = (
            nn.Embedding(6, 4),
            nn.Parameter(torch.zeros(4)),
            nn.Linear(4, 4),
        )
        self.again = LayerScale(4)
        self.again.gamma = self.offset

    def forward(self, x, labels):
        h = self.layer(x) + self.table(torch.arange(6)) + self.offset
        return self.again(self.layer(torch.tanh(h)))


class Borrows(nn.Module):
    """Uses its parameter for the weight of a convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1, 3, 3))

    def forward(self, x, labels):
        return torch.tanh(F.conv2d(x, self.weight, padding=1))


class OddLinear(nn.Linear):
    """A subclass of a layer that has a rule, with a forward of its own."""

    def forward(self, x, labels=None):
        return torch.tanh(x) @ self.weight.T.square() + self.bias


def replaced_forward():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x, labels: F.linear(x.square(), layer.weight)
    return layer


BARE = {
    "vision transformer": ((1, 4, 4), VisionTransformer),
    "partly frozen": ((1, 4, 4), Frozen),
    "shared table": ((6, 4), SharedTable),
    "a weight of its own": ((1, 4, 4), Borrows),
    "subclass": ((4,), lambda: OddLinear(4, 3)),
    "replaced forward": ((4,), replaced_forward),
}


def build(name):
    shape, make = BARE[name]
    torch.manual_seed(0)
    network = make()
    for parameter in network.parameters():
        nn.init.normal_(parameter.data, std=0.5)
    return network, torch.randn(4, *shape), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("name", BARE)
def test_bare_parameters_equal_the_slow_loop(name):
    network, images, labels = build(name)
    check(network, images, labels)
    validate_independence(network, squared_loss(3), images[:3].double(), labels[:3])


class Gated(nn.Module):
    """A layer around another one, with a row forward."""

    def __init__(self):
        super().__init__()
        self.gate, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) * self.gate


def test_a_row_forward_calls_a_layer_inside_a_module_that_runs_by_example(monkeypatch):
    monkeypatch.setitem(ROW_FORWARDS, Gated, lambda module, x, own: module.layer(x) * own["gate"])
    torch.manual_seed(0)
    network = Centred()
    network.layer = Gated()
    network.forward = lambda x, labels: network.layer(torch.tanh(x * network.scale))
    check(network, torch.randn(3, 3), torch.tensor([0, 1, 0]))


def test_a_replaced_forward_stays_in_place():
    network = replaced_forward()
    kept = network.forward
    per_example_gradients(network, squared_loss(), torch.randn(2, 4), torch.zeros(2).long(), None)
    assert network.forward is kept


def test_bare_parameters_in_low_precision_keep_the_bound():
    network, images, labels = build("vision transformer")

    def loss(network, images, labels, rng):
        with torch.autocast("cpu", torch.bfloat16):
            return squared_loss(2)(network, images, labels, rng).float()

    exact = loop_gradients(network, squared_loss(2), images, labels)
    bound = norms_of(exact).min().item() / 2
    found, norms = clipped_sum(network, loss, images, labels, bound, None)
    torch.testing.assert_close(norms.float(), norms_of(exact), rtol=0.05, atol=0)
    assert relative_error(found, loop_clipped_sum(exact, bound)) < 0.05
    one, _ = clipped_sum(network, loss, images[:1], labels[:1], bound, None)
    norm = torch.cat([g.flatten() for g in one.values()]).norm().item()
    assert norm == pytest.approx(bound, rel=1e-4)
    validate_independence(network, loss, images[:3], labels[:3])


class Centred(nn.Module):
    """Mixes the examples next to a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x, labels):
        return torch.tanh(self.layer((x - x.mean(0)) * self.scale))


class ReadsNumbers(Centred):
    def forward(self, x, labels):
        return self.layer(x * self.scale) if x.sum().item() > 0 else self.layer(x)


class NoRows(Centred):
    def forward(self, x, labels):
        return self.layer(x * self.scale).sum()


class OutsideItsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LayerScale(3)
        self.layer = nn.Linear(3, 2)

    def forward(self, x, labels):
        return torch.tanh(self.layer(x * self.inner.gamma))


class SharedArgument(nn.Module):
    """Its part is called with a tensor that has no row per image."""

    def __init__(self):
        super().__init__()
        self.inner, self.layer = Adds(), nn.Linear(3, 2)

    def forward(self, x, labels):
        return torch.tanh(self.layer(self.inner(x, torch.ones(6, 3))))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        return x * self.gamma + y.sum(0)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Centred, "scale"),
        (ReadsNumbers, "ReadsNumbers at ''.*register_rule"),
        (NoRows, "NoRows at ''.*instead of rows"),
        (OutsideItsForward, "inner.gamma"),
        (SharedArgument, "Adds at 'inner'.*one row per image"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_modules_that_cannot_run_by_example_are_refused(kind, named):
    torch.manual_seed(0)
    with pytest.raises(UserError, match=named) as refusal:
        validate_independence(kind(), squared_loss(), torch.randn(3, 3), torch.tensor([0, 1, 0]))
    assert "\n" not in str(refusal.value)


class Checkpointed(nn.Module):
    """Recomputes a part that runs by example, or, `inside` a module that does, an ordinary one."""

    def __init__(self, inside: bool, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.middle = nn.Sequential(nn.Linear(3, 3), LayerScale(3), nn.Tanh())
        self.offset = nn.Parameter(torch.ones(3)) if inside else 0.0

    def forward(self, x, labels):
        return self.last(checkpoint(self.middle, self.first(x) + self.offset, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_a_module_that_runs_by_example(reentrant):
    torch.manual_seed(0)
    network, images, labels = Checkpointed(False, reentrant), torch.randn(3, 3), torch.tensor([0, 1, 0])
    check(network, images, labels)
    validate_independence(network, squared_loss(), images.double(), labels)
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(UserError, match=r"checkpoint|register_rule"):
        per_example_gradients(Checkpointed(True, reentrant), squared_loss(), images, labels, None)


def test_a_gradient_penalty_of_modules_that_run_by_example_is_exact():
    """Autograd computes it all."""
    torch.manual_seed(0)

    def penalised(network, images, labels, rng):
        images = images.requires_grad_()
        losses = torch.tanh(network(images)).square().mean(1)
        (slopes,) = torch.autograd.grad(losses.sum(), images, create_graph=True)
        return losses + slopes.square().sum(1)

    network, images, labels = LayerScale(3).double(), torch.randn(3, 3).double(), torch.tensor([0, 1, 0])
    exact = loop_gradients(network, penalised, images, labels)
    assert relative_error(per_example_gradients(network, penalised, images, labels, None), exact) < 1e-12
    validate_independence(network, penalised, images, labels)


def test_out_of_memory_passes_through_a_map():
    class Hungry(LayerScale):
        def forward(self, x, labels):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        per_example_gradients(Hungry(3), squared_loss(), torch.randn(2, 3), torch.zeros(2).long(), None)
