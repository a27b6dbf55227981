"""Latent diffusion: schedule, loss and sampler against formulas; latent space; what DP-LDM and DP-LoRA train."""

import copy
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.spec import Samples
from models.diffusion.ddpm import DDIMConfig, NoiseLoss, NoiseLossConfig, ScheduleConfig, sample_ddim
from models.nn.lora import adapters
from opacus_ext.accounting import Release
from pipeline.checkpoints import Checkpoints
from utils.checkpoint_files import read
from utils.draws import Draws
from utils.errors import UserError
from utils.images import to_float
from utils.runtime import Runtime

METHODS = ["DP-LDM", "DP-LoRA"]
SIGMAS = ScheduleConfig(1000, 0.0015, 0.0155, "scaled_linear").sigmas()


# ------------------------------------------------------------------------------------------ schedule


def test_schedule():
    kept, sigmas = 1.0, []
    for t in range(1000):
        root = math.sqrt(0.0015) + t / 999 * (math.sqrt(0.0155) - math.sqrt(0.0015))
        kept *= 1 - root**2
        sigmas.append(math.sqrt(1 / kept - 1))
    assert sigmas[-1] > 20  # almost nothing is left of the image
    torch.testing.assert_close(SIGMAS, torch.tensor(sigmas), rtol=1e-5, atol=0)


def test_the_schedule_of_the_first_diffusion_models():
    betas = np.linspace(1e-4, 0.02, 1000)
    kept = np.cumprod(1 - betas)
    found = ScheduleConfig(1000, 1e-4, 0.02, "linear").sigmas().numpy()
    np.testing.assert_allclose(found, np.sqrt((1 - kept) / kept), rtol=1e-5)


@pytest.mark.parametrize("values", [(1, 0.1, 0.2), (10, 0.0, 0.2), (10, 0.3, 0.2), (10, 0.1, 1.0)])
def test_impossible_schedules_are_refused(values):
    with pytest.raises(UserError):
        ScheduleConfig(*values, "linear")
    with pytest.raises(UserError, match="type: cosine"):
        ScheduleConfig(10, 0.1, 0.2, "cosine")


# ------------------------------------------------------------------------------------------ loss


class Spy:
    """A network that says zero, and remembers what it was asked."""

    null_label = 9

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timesteps, labels):
        self.calls.append((latents, timesteps, labels))
        return torch.zeros_like(latents)


def dealt(num_examples: int) -> Draws:
    return Draws(bytes(32), 0, num_examples)


def loss_of(draws=1, dropout=0.0, **options) -> NoiseLoss:
    return NoiseLoss(NoiseLossConfig(draws, dropout), SIGMAS, **options)


def test_a_network_that_knows_the_noise_has_no_loss():
    """Of a latent that is zero everywhere, what the network sees is the noise, scaled by a known factor."""

    class Knowing(Spy):
        def __call__(self, latents, timesteps, labels):
            sigma = SIGMAS[timesteps.long()][:, None, None, None]
            return latents * (1 + sigma**2).sqrt() / sigma

    found = loss_of(draws=3)(Knowing(), torch.zeros(4, 3, 2, 2), torch.zeros(4).long(), dealt(4))
    torch.testing.assert_close(found, torch.zeros(4), rtol=0, atol=1e-6)


def test_a_network_that_predicts_zero_has_the_noise_variance_as_its_loss():
    found = loss_of(draws=4)(Spy(), torch.full((5, 3, 20, 20), 0.7), torch.zeros(5).long(), dealt(5))
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.ones(5), rtol=0.1, atol=0)


def test_the_network_sees_latents_of_constant_variance_at_uniform_timesteps():
    network = Spy()
    loss_of(draws=4)(network, torch.randn(5000, 1, 2, 2), torch.zeros(5000).long(), dealt(5000))
    seen, timesteps, _ = network.calls[0]
    assert timesteps.min() < 5 and timesteps.max() > 994 and timesteps.max() <= 999
    assert timesteps.mean().item() == pytest.approx(499.5, abs=8)
    assert timesteps.std().item() == pytest.approx(1000 / math.sqrt(12), abs=8)
    for part in seen[timesteps < 100], seen[timesteps > 900]:
        assert part.std().item() == pytest.approx(1.0, abs=0.04)


def test_draws_are_averaged_per_example_and_lie_side_by_side():
    network = Spy()
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 1, 200, 200) * 1000
    found = loss_of(draws=5)(network, latents, torch.tensor([4, 5, 6]), dealt(3))
    assert found.shape == (3,) and len(network.calls) == 1
    seen, timesteps, labels = network.calls[0]
    assert labels.tolist() == [4] * 5 + [5] * 5 + [6] * 5
    assert len(timesteps.unique()) == 15  # each draw has its own
    kept = (1 + SIGMAS[timesteps.long()] ** 2).rsqrt()
    torch.testing.assert_close(
        seen.mean((1, 2, 3)) / kept, torch.arange(3.0).repeat_interleave(5) * 1000, rtol=1e-2, atol=1.0
    )


def test_label_dropout_is_drawn_once_per_example():
    network, labels = Spy(), torch.arange(4000) % 3
    loss_of(draws=2, dropout=0.25)(network, torch.zeros(4000, 1, 1, 1), labels, dealt(4000))
    seen = network.calls[0][2].view(4000, 2)
    assert torch.equal(seen[:, 0], seen[:, 1])
    dropped = seen[:, 0] == network.null_label
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[~dropped, 0], labels[~dropped])


def test_unconditional_training_shows_the_null_label_alone():
    network = Spy()
    loss_of(unconditional=True)(network, torch.zeros(50, 1, 1, 1), torch.zeros(50).long(), dealt(50))
    assert (network.calls[0][2] == network.null_label).all()


# ------------------------------------------------------------------------------------------ sampler

MEAN, STD = 0.6, 0.4


class Gaussian:
    """The network that knows the noise of latents N(label + MEAN, STD^2); of no label, N(-1, STD^2)."""

    null_label = 9

    def __init__(self):
        self.timesteps = []

    def __call__(self, latents, timesteps, labels):
        self.timesteps.append(int(timesteps[0]))
        sigma = SIGMAS[timesteps.long()][:, None, None, None]
        mean = torch.where(labels == self.null_label, -1.0, labels + MEAN)[:, None, None, None]
        return sigma * (latents * (1 + sigma**2).sqrt() - mean) / (sigma**2 + STD**2)


def drawn(network, labels, seed=0, **changes):
    values = {"type": "ddim", "num_steps": 200, "eta": 1.0, "guid_scale": 0.0, **changes}
    rng = torch.Generator().manual_seed(seed)
    return sample_ddim(network, SIGMAS, DDIMConfig(**values), (1, 2, 2), labels, rng)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_sampler_recovers_a_known_distribution(eta):
    """Up to what the start, noise without any trace of the mean, takes from it: 1/40 of STD times the mean."""
    labels = torch.arange(2).repeat(2000)
    found = drawn(Gaussian(), labels, eta=eta, num_steps=1000)
    for label in range(2):
        part = found[labels == label]
        assert part.mean().item() == pytest.approx(label + MEAN, abs=0.04)
        assert part.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("num_steps", [1, 7, 200, 1000])
def test_the_sampler_visits_the_timesteps_it_should(num_steps):
    network = Gaussian()
    drawn(network, torch.zeros(2).long(), num_steps=num_steps)
    visited = network.timesteps
    assert len(visited) == len(set(visited)) == num_steps
    assert visited[0] == 999 and visited == sorted(visited, reverse=True)
    gaps = [earlier - later for earlier, later in pairwise(visited)]
    assert all(gap <= 1000 / num_steps + 1 for gap in gaps)


def test_only_eta_adds_noise_on_the_way():
    labels = torch.zeros(500).long()
    start_alone = [drawn(Gaussian(), labels, seed, eta=0.0) for seed in (0, 0, 1)]
    assert torch.equal(start_alone[0], start_alone[1]) and not torch.equal(start_alone[0], start_alone[2])
    noisy = drawn(Gaussian(), labels, 0, eta=1.0)
    correlation = torch.corrcoef(torch.stack([noisy.flatten(), start_alone[0].flatten()]))[0, 1]
    assert correlation.abs() < 0.3  # a start that is forgotten on the way


def test_guidance_moves_away_from_the_unlabelled_estimate():
    labels = torch.zeros(2000).long()
    plain, pushed = (drawn(Gaussian(), labels, guid_scale=scale).mean() for scale in (0.0, 0.5))
    assert pushed - plain == pytest.approx(0.5 * (MEAN + 1), abs=0.1)


@pytest.mark.parametrize("changes", [{"type": "edm"}, {"num_steps": 0}, {"eta": 1.5}])
def test_impossible_samplers_are_refused(changes):
    with pytest.raises(UserError):
        drawn(Gaussian(), torch.zeros(1).long(), **changes)


# ------------------------------------------------------------------------------------------ latent space


def ramps(count: int) -> Samples:
    """8x8 images that brighten evenly in a direction of their own."""
    x, y = np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-1, 1, 8))
    angles = 2 * np.pi * np.arange(count) / count
    slopes = np.cos(angles)[:, None, None] * x + np.sin(angles)[:, None, None] * y
    return Samples((127.5 + 90 * slopes).astype(np.uint8)[:, None], np.zeros(count, np.int64))


def unchanged(images, rng):
    return images


def test_the_autoencoder_learns_and_its_latents_have_deviation_one(make_method):
    method = make_method("DP-LDM", "pretrain.autoencoder.n_epochs=10", "pretrain.autoencoder.lr=1e-2")
    latents, samples = method.latents, ramps(64)
    images = to_float(samples.images)

    def error():
        return (latents.decode(latents.encode(images)) - images).abs().mean().item()

    constant = (images - images.median()).abs().mean().item()
    assert error() > 0.8 * constant
    latents.fit(samples, unchanged)
    assert error() < 0.5 * constant
    encoded = latents.encode(images)
    assert encoded.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(encoded, latents.encode(images))
    assert not any(p.requires_grad for p in latents.autoencoder.parameters())
    before = latents.state_dict()["weights"]["from_latent.weight"].clone()
    latents.fit(samples, unchanged)  # once is enough
    assert torch.equal(before, latents.state_dict()["weights"]["from_latent.weight"])


def test_encoding_in_parts_changes_nothing(make_method):
    latents = make_method("DP-LDM").latents
    images = torch.randn(10, 1, 8, 8)
    whole = latents.encode(images)
    latents.rows = 3
    torch.testing.assert_close(latents.encode(images), whole, rtol=1e-4, atol=1e-5)
    assert latents.encode(images[:0]).shape == (0, *latents.shape)
    assert latents.decode(whole[:0]).shape == (0, 1, 8, 8)


def test_an_interrupted_autoencoder_resumes(make_method):
    def fitted(kept_at=None):
        states = []
        runtime = Runtime()
        method = make_method("DP-LDM", "pretrain.autoencoder.snapshot_freq=3", runtime=runtime)
        runtime.snapshot = lambda stage: states.append(method.latents.state_dict())
        if kept_at is not None:
            method.latents.load_state_dict(kept_at)
        method.latents.fit(ramps(64), unchanged)
        return method.latents.state_dict(), states

    whole, states = fitted()
    assert [state["step"] for state in states] == [3, 4] and [s["done"] for s in states] == [False, True]

    def at_step_three():
        runtime, kept = Runtime(), []
        method = make_method("DP-LDM", "pretrain.autoencoder.snapshot_freq=3", runtime=runtime)

        def stop(stage):
            kept.append(copy.deepcopy(method.latents.state_dict()))
            raise KeyboardInterrupt

        runtime.snapshot = stop
        with pytest.raises(KeyboardInterrupt):
            method.latents.fit(ramps(64), unchanged)
        return kept[0]

    resumed, _ = fitted(at_step_three())
    assert resumed["scale"] == whole["scale"]
    assert all(torch.equal(resumed["weights"][name], whole["weights"][name]) for name in whole["weights"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("public", ["null", "central_mean"])
def test_without_public_images_there_is_no_autoencoder(name, public, make_method):
    with pytest.raises(UserError, match=r"public_data\.name: .*autoencoder"):
        make_method(name, f"public_data.name={public}")


def test_the_autoencoder_never_meets_private_images(make_trial, monkeypatch):
    """Private training leaves it as it was, and works on its latents."""
    trial = make_trial("DP-LDM", epsilon=math.inf)
    trial.synthesizer.pretrain(trial.public, trial.private)
    before = {name: w.clone() for name, w in trial.synthesizer.latents.state_dict()["weights"].items()}
    seen = []
    evaluate = NoiseLoss.__call__

    def watched(self, network, latents, labels, rng):
        seen.append(tuple(latents.shape[1:]))
        return evaluate(self, network, latents, labels, rng)

    monkeypatch.setattr(NoiseLoss, "__call__", watched)
    trial.synthesizer.train(trial.private)
    assert set(seen) == {(3, 4, 4)}
    after = trial.synthesizer.latents.state_dict()["weights"]
    assert all(torch.equal(after[name], weights) for name, weights in before.items())


# ------------------------------------------------------------------------------------------ what is trained


def trained(trial) -> tuple[dict, dict]:
    """The network's weights before and after the private stage."""
    trial.synthesizer.pretrain(trial.public, trial.private)
    trial.synthesizer.ema.copy_to(trial.synthesizer.network)
    before = {name: w.clone() for name, w in trial.synthesizer.network.state_dict().items()}
    trial.synthesizer.train(trial.private)
    return before, trial.synthesizer.network.state_dict()


def test_dpldm_trains_the_chosen_transformers_and_the_class_embedder(make_trial):
    trial = make_trial("DP-LDM", "train.first_transformer=2", epsilon=math.inf)
    before, after = trained(trial)
    chosen = trial.synthesizer.network.transformers()
    held = {id(p) for module in chosen[2:] for p in module.parameters()}
    expected = {name for name, p in trial.synthesizer.network.named_parameters() if id(p) in held}
    expected.add("label_embedding.weight")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == expected
    assert len(chosen) == 4 and 0 < len(expected) < len(before)


def test_dplora_trains_adapters_and_the_class_embedder(make_trial, tmp_path):
    trial = make_trial("DP-LoRA", epsilon=math.inf, runtime=Runtime(folder=tmp_path))
    before, after = trained(trial)
    assert before.keys() == after.keys() and not adapters(trial.synthesizer.network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {
        name
        for name in before
        if name.endswith(tuple(f"attention.{part}.weight" for part in ("query", "key", "value", "output")))
    }
    assert len(attention) == 8 * len(trial.synthesizer.network.transformers())
    assert changed == {*attention, "label_embedding.weight"}
    saved = read(str(tmp_path / "train" / "checkpoints" / "adapters.pt"))["state"]
    for name in attention:
        layer = name.removesuffix(".weight")
        up, down = (saved["adapters"][f"{layer}.{part}.weight"] for part in ("up", "down"))
        assert down.shape[0] == up.shape[1] == 2
        torch.testing.assert_close(after[name], before[name] + up @ down, rtol=1e-5, atol=1e-6)
    assert torch.equal(saved["label_embedding"], after["label_embedding.weight"])


def test_the_published_number_of_adapter_weights(make_method):
    """177,152 of them on q, k and v of the 28 px network; the output layers, which the published code misses, add
    2 r D for each of the attentions."""
    from models.dp_lora import _add_adapters
    from models.nn.latent_unet import LatentUNet

    with torch.device("meta"):
        network = LatentUNet(
            latent_size=14,
            channels=3,
            label_dim=1000,
            nf=64,
            ch_mult=[1, 2],
            attn_resolutions=[14, 7],
            num_res_blocks=2,
            head_width=8,
            context_dim=512,
        )
        _add_adapters(network, 8)
    sizes = {"output": 0, "others": 0}
    for name, adapter in adapters(network).items():
        kind = "output" if name.endswith(".output") else "others"
        sizes[kind] += sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    widths = [transformer.norm_self.weight.numel() for transformer in network.transformers()]
    assert sizes == {"others": 177_152, "output": sum(2 * 2 * 8 * width for width in widths)}


@pytest.mark.parametrize("name", METHODS)
def test_the_learning_rate_rises_over_the_first_steps(name, make_trial, monkeypatch):
    trial = make_trial(
        name, "train.lr_warmup_steps=3", "train.optim.params.lr=0.3", "train.n_epochs=5", epsilon=math.inf
    )
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    trial.synthesizer.pretrain(trial.public, trial.private)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trial.synthesizer.train(trial.private)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])


def test_more_transformers_than_there_are(make_method):
    with pytest.raises(UserError, match=r"train\.first_transformer: 9 .* 0 to 3"):
        make_method("DP-LDM", "train.first_transformer=9")


@pytest.mark.parametrize(
    "setting, words",
    [
        ("model.network.ch_mult=[1,2,2,2]", "model.network.ch_mult.*latents of 4 px"),
        ("model.network.attn_resolutions=[16]", "model.network.attn_resolutions.*4, 2"),
        ("model.network.nf=10", "model.network.nf: 10"),
        ("train.loss.n_noise_samples=0", "train.loss.n_noise_samples: 0"),
        ("model.sampler_acc.num_steps=1001", "model.sampler_acc.num_steps: 1001"),
        ("model.sampler.type=edm", "model.sampler.type: edm"),
    ],
)
def test_impossible_settings_are_refused(setting, words, make_method):
    with pytest.raises(UserError, match=words):
        make_method("DP-LDM", setting)


# ------------------------------------------------------------------------------------------ checkpoints


def saved(trial, folder, stage) -> str:
    Checkpoints(folder, trial.name, trial.synthesizer, trial.private.ledger).save(stage, "final")
    return str(folder / stage / "checkpoints" / "final_checkpoint.pth")


def same_network(one, other) -> bool:
    states = [method.network.state_dict() for method in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


FROM_CHECKPOINT = ["pretrain.n_epochs=0", "public_data.name=null"]


@pytest.mark.parametrize("first, second", [METHODS, METHODS[::-1]])
def test_public_checkpoints_are_interchangeable(first, second, make_trial, make_method, tmp_path):
    """What the second makes of the first's public checkpoint is what it makes of its own public stage."""
    trials = [make_trial(name, epsilon=math.inf) for name in (first, second)]
    for trial in trials:
        trial.synthesizer.pretrain(trial.public, trial.private)
    path = saved(trials[0], tmp_path, "pretrain")
    continued = make_method(second, *FROM_CHECKPOINT, f"model.ckpt={path}")
    trials[1].synthesizer.ema.copy_to(trials[1].synthesizer.network)
    assert same_network(continued, trials[1].synthesizer)
    images = to_float(trials[0].public.samples.images)
    assert torch.equal(continued.latents.encode(images), trials[1].synthesizer.latents.encode(images))


@pytest.mark.parametrize("name", METHODS)
def test_resumed_pretraining_equals_one_long_pretraining(name, make_trial, tmp_path):
    """The autoencoder is the checkpoint's, and is not trained again."""
    fewer, more = (["pretrain.batch_size=8", f"pretrain.n_epochs={epochs}"] for epochs in (1, 2))
    whole, first = (make_trial(name, *settings) for settings in (more, fewer))
    for trial in (whole, first):
        trial.synthesizer.pretrain(trial.public, trial.private)
    again = make_trial(name, *fewer, f"model.ckpt={saved(first, tmp_path, 'pretrain')}")
    again.synthesizer.pretrain(again.public, again.private)
    assert again.synthesizer.step == whole.synthesizer.step > first.synthesizer.step
    assert same_network(again.synthesizer, whole.synthesizer)
    kept, trained = (trial.synthesizer.latents.state_dict() for trial in (again, first))
    assert kept["scale"] == trained["scale"] and kept["step"] == trained["step"]
    assert all(torch.equal(kept["weights"][name], trained["weights"][name]) for name in kept["weights"])


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_checkpoint_gives_the_same_samples_and_costs_what_it_did(
    name, make_trial, make_method, tmp_path
):
    trial = make_trial(name)
    trial.run()
    path = saved(trial, tmp_path, "train")
    later = make_method("DP-LDM", *FROM_CHECKPOINT, "train.n_epochs=0", f"model.ckpt={path}")
    assert np.array_equal(later.generate(5).images, trial.synthesizer.generate(5).images)
    spent = trial.private.ledger.planned("dp-sgd")
    assert later.privacy_plan()[0] == Release(
        "checkpoint: dp-sgd", spent.noise_multiplier, 1.0, 4, inherited=True
    )


def test_adapters_are_merged_on_demand_and_cost_what_they_did(make_trial, make_method, tmp_path):
    trial = make_trial("DP-LoRA", runtime=Runtime(folder=tmp_path))
    trial.synthesizer.pretrain(trial.public, trial.private)
    path = saved(trial, tmp_path, "pretrain")
    trial.synthesizer.train(trial.private)
    file = tmp_path / "train" / "checkpoints" / "adapters.pt"
    settings = [*FROM_CHECKPOINT, "train.n_epochs=0", f"model.ckpt={path}", f"model.adapters={file}"]
    merged = make_method("DP-LoRA", *settings)
    assert same_network(merged, trial.synthesizer)
    assert np.array_equal(merged.generate(5).images, trial.synthesizer.generate(5).images)
    spent = trial.private.ledger.planned("dp-sgd")
    taken = Release("adapters: dp-sgd", spent.noise_multiplier, 1.0, 4, inherited=True)
    assert merged.privacy_plan()[0] == taken


def test_no_snapshot_holds_weights_whose_cost_is_not_booked(make_trial, tmp_path):
    """The first snapshots are those of the autoencoder; what starts from one must pay for the network in it."""
    trial = make_trial("DP-LDM", "pretrain.autoencoder.n_epochs=0")
    trial.run()
    path = saved(trial, tmp_path, "train")
    booked = []
    runtime = Runtime(
        snapshot=lambda stage: booked.append(later.private.ledger.executed("checkpoint: dp-sgd"))
    )
    later = make_trial("DP-LDM", f"model.ckpt={path}", "train.n_epochs=0", runtime=runtime)
    later.run()
    assert len(booked) > 1 and set(booked) == {4}


def test_adapters_are_written_when_their_steps_are_in_a_checkpoint(make_trial, tmp_path):
    """Else a run that is killed in between takes steps again that adapters.pt has told about."""
    file = tmp_path / "train" / "checkpoints" / "adapters.pt"
    taken = []

    def snapshot(stage: str) -> None:
        taken.append((trial.private.ledger.executed("dp-sgd"), file.exists()))

    runtime = Runtime(folder=tmp_path, snapshot=snapshot)
    trial = make_trial("DP-LoRA", "train.snapshot_freq=100", runtime=runtime)
    trial.run()
    assert taken[-1] == (4, False) and file.exists()


def test_adapters_are_refused_on_weights_that_they_were_not_trained_on(make_trial, make_method, tmp_path):
    trial = make_trial("DP-LoRA", runtime=Runtime(folder=tmp_path))
    trial.synthesizer.pretrain(trial.public, trial.private)
    path = saved(trial, tmp_path, "pretrain")
    trial.synthesizer.train(trial.private)
    merged = saved(trial, tmp_path, "train")
    adapters_file = f"model.adapters={tmp_path / 'train' / 'checkpoints' / 'adapters.pt'}"
    for others in (f"model.ckpt={merged}", f"model.ckpt={path} model.ckpt_weights=raw"):
        with pytest.raises(UserError, match=r"model\.adapters: .*other weights.*model\.ckpt"):
            make_method("DP-LoRA", *FROM_CHECKPOINT, *others.split(), adapters_file)


def test_a_checkpoint_is_no_adapter_file(make_trial, make_method, tmp_path):
    trial = make_trial("DP-LoRA", epsilon=math.inf)
    path = saved(trial, tmp_path, "pretrain")
    with pytest.raises(UserError, match=r"model\.adapters: .*no adapters"):
        make_method("DP-LoRA", *FROM_CHECKPOINT, f"model.ckpt={path}", f"model.adapters={path}")


def test_a_pixel_checkpoint_is_refused(make_trial, make_method, tmp_path):
    trial = make_trial("PDP-Diffusion", epsilon=math.inf)
    path = saved(trial, tmp_path, "pretrain")
    with pytest.raises(UserError, match=r"model\.ckpt"):
        make_method("DP-LDM", *FROM_CHECKPOINT, f"model.ckpt={path}")


# ------------------------------------------------------------------------------------------ diffusers


def test_a_missing_diffusers_is_reported_with_the_fix(make_method, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"model\.autoencoder: .* pip install diffusers"):
        make_method("DP-LDM", "model.autoencoder=diffusers:some/where")


def test_a_source_without_its_library_is_refused(make_method):
    with pytest.raises(UserError, match=r"model\.autoencoder: some/where .*diffusers:<name"):
        make_method("DP-LDM", "model.autoencoder=some/where")


@pytest.fixture
def pipeline(tmp_path):
    """A folder with a tiny pretrained autoencoder and backbone, as diffusers saves them."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    vae.save_pretrained(tmp_path / "vae")
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        layers_per_block=1,
    )
    unet.save_pretrained(tmp_path / "unet")
    return f"diffusers:{tmp_path}"


def test_a_published_autoencoder_is_used_as_it_is(pipeline, make_trial, make_method, tmp_path):
    import diffusers

    setting = f"model.autoencoder={pipeline}"
    trial = make_trial("DP-LDM", setting, epsilon=math.inf)
    trial.run()
    assert trial.synthesizer.network_shape == (4, 4, 4)
    assert trial.synthesizer.generate(4).images.shape == (4, 1, 8, 8)
    published = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        expected = published.encode(images.expand(-1, 3, -1, -1)).latent_dist.mean
        decoded = published.decode(expected).sample.mean(1, keepdim=True)
    found = trial.synthesizer.latents.encode(images)
    torch.testing.assert_close(found, expected * 0.5)
    torch.testing.assert_close(trial.synthesizer.latents.decode(found), decoded, rtol=1e-4, atol=1e-4)
    path = saved(trial, tmp_path, "train")
    assert read(path)["state"]["autoencoder"]["weights"] is None  # named, not copied
    with pytest.raises(UserError, match=r"model\.autoencoder: None\b"):
        make_method("DP-LDM", f"model.ckpt={path}", "pretrain.autoencoder.latent_channels=4")


def unconditional_unet(folder, **changes) -> str:
    """A folder with a tiny pretrained UNet2DModel for latents of 4 channels."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    settings = {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "layers_per_block": 1,
    }
    diffusers.UNet2DModel(**{**settings, **changes}).save_pretrained(folder)
    return f"diffusers:{folder}"


@pytest.mark.parametrize("kind", ["text-conditional", "unconditional", "class-conditional"])
def test_adapters_on_a_published_backbone(kind, pipeline, make_trial, tmp_path):
    """The engine differentiates its layers, and what is not adapted stays as published."""
    backbone = {
        "text-conditional": lambda: pipeline,
        "unconditional": lambda: unconditional_unet(tmp_path / "other"),
        "class-conditional": lambda: unconditional_unet(tmp_path / "other", num_class_embeds=5),
    }[kind]()
    settings = [f"model.autoencoder={pipeline}", f"model.backbone={backbone}"]
    trial = make_trial("DP-LoRA", *settings, epsilon=math.inf)
    before = {name: w.clone() for name, w in trial.synthesizer.network.state_dict().items()}
    trial.synthesizer.train(trial.private)
    after = trial.synthesizer.network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {
        name
        for name in before
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    assert attention and changed == {*attention, "label_embedding.weight"}
    assert trial.synthesizer.generate(3).images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("name", METHODS)
def test_pixels_can_take_the_place_of_latents(name, make_trial):
    trial = make_trial(
        name, "model.autoencoder=pixels", "model.network.attn_resolutions=[4]", epsilon=math.inf
    )
    trial.run()
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    assert torch.equal(trial.synthesizer.latents.encode(images), images)
    assert trial.synthesizer.network_shape == (1, 8, 8)
    assert trial.synthesizer.generate(4).images.shape == (4, 1, 8, 8)


def scheduler(folder, **changes) -> None:
    settings = {"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0155}
    kind = sys.modules["diffusers"].DDPMScheduler
    kind(**{**settings, "beta_schedule": "scaled_linear", **changes}).save_pretrained(folder / "scheduler")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_schedule": "linear"}, r"model\.schedule\.type: scaled_linear .* linear$"),
        ({"num_train_timesteps": 500}, r"model\.schedule\.num_timesteps: 1000 .* 500$"),
        ({"beta_end": 0.02}, r"model\.schedule\.beta_end: 0\.0155 .* 0\.02$"),
        (
            {"prediction_type": "v_prediction"},
            r"model\.backbone: .* 'v_prediction'; it must predict the noise",
        ),
    ],
)
def test_the_noise_of_a_backbone_must_be_its_own(changes, words, pipeline, make_method, tmp_path):
    settings = [f"model.autoencoder={pipeline}", f"model.backbone={pipeline}"]
    scheduler(tmp_path)
    make_method("DP-LoRA", *settings)
    scheduler(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        make_method("DP-LoRA", *settings)


@pytest.mark.parametrize("num_classes", [None, 2, 5])
def test_a_published_backbone_starts_as_published(num_classes, tmp_path):
    """Class 1 of three is class 1 of the published network, if it has one; else it adds nothing to the timestep."""
    from models.nn.pretrained import load_unet

    source = unconditional_unet(tmp_path, num_class_embeds=num_classes)
    network = load_unet(source, (4, 4, 4), label_dim=3)
    published = sys.modules["diffusers"].UNet2DModel.from_pretrained(tmp_path).eval()
    latents, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 700.0])
    ones = torch.ones(2, dtype=torch.int64)
    with torch.no_grad():
        if num_classes is None:
            expected = published(latents, timesteps).sample
        else:
            expected = published(latents, timesteps, class_labels=ones).sample
        torch.testing.assert_close(network(latents, timesteps, ones), expected)
    kept = min(num_classes or 0, 3)
    table = network.label_embedding.weight
    assert table.shape[0] == network.null_label + 1 == 4
    assert table[:kept].abs().sum(1).gt(0).all() and not table[kept:].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 3}, "in_channels 3, .* 4 channels"),
        ({"out_channels": 8}, "out_channels 8, .* 4 channels"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(changes, words, tmp_path):
    from models.nn.pretrained import load_unet

    source = unconditional_unet(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"model\.backbone: .*{words}"):
        load_unet(source, (4, 4, 4), label_dim=3)


def test_a_backbone_that_halves_more_often_than_the_latents_allow(tmp_path):
    from models.nn.pretrained import load_unet

    with pytest.raises(UserError, match=r"model\.backbone: .*\b2\b.*\b7\b"):
        load_unet(unconditional_unet(tmp_path), (4, 7, 7), label_dim=3)


def test_a_network_of_another_kind_is_named(pipeline, make_method, tmp_path):
    backbone = f"model.backbone=diffusers:{tmp_path / 'vae'}"
    with pytest.raises(UserError, match=r"model\.backbone: .* AutoencoderKL.*UNet2DC.*UNet2DM"):
        make_method("DP-LoRA", f"model.autoencoder={pipeline}", backbone)


def test_a_folder_without_the_network_is_named(make_method, tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=r"model\.autoencoder: .* AutoencoderKL"):
        make_method("DP-LDM", f"model.autoencoder=diffusers:{tmp_path}")
