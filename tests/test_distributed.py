"""Several gloo processes on the CPU against one: the same weights, the same ledger, noise once, and an orderly end.

The scenarios of the first part run one after the other in two (slow: three) processes that are started once; each is a
function that returns what the process saw. Run outside of them, the same function is the run in one process.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PUBLIC_CLASSES, random_samples, small_config
from scipy import stats
from tiny_runs import ROOT, Outcome, arguments, call, execute, kill_when, strict_json
from torch import nn

import run as run_program
from data.locations import has_public_images
from data.samples_file import read_samples
from data.spec import DataSpec, PublicData
from models import METHODS
from models.diffusion.loss import EDMLoss, LossConfig
from models.nn.unet import UNet
from opacus_ext.accounting import Release
from opacus_ext.dpsgd import DPSGDConfig, dpsgd_steps
from opacus_ext.ledger import Budget, Ledger
from opacus_ext.noise import NoiseSource
from opacus_ext.private_data import PrivateData
from utils import distributed
from utils.device import prepare_device
from utils.distributed import Place
from utils.errors import UserError
from utils.runtime import Runtime
from utils.sections import SetupConfig

ALPHA = 1e-6  # chance of a false alarm of each statistical test
NAME = "query"
DIFFUSION_METHODS = ("PDP-Diffusion", "DP-FETA-Pro", "DP-LoRA")
ADVERSARIAL = ("pretrain.autoencoder.adversarial_weight=0.5", "pretrain.autoencoder.adversarial_start=1")
OTHER_DIFFUSION_METHODS = ("DPDM", "DP-LDM-SD", "PrivImage", "DP-FETA", "DP-LDM")
SPEC = DataSpec("toy", 8, 1, 3, 60, ("a", "b", "c"))
DP = DPSGDConfig(
    max_grad_norm=0.1, sampling="poisson", max_batch_size=None, n_split=None, max_physical_batch_size=7
)


def private_data(*plan: Release, num_records=60, epsilon=float("inf"), noise=None) -> PrivateData:
    ledger = Ledger(Budget(epsilon, 1e-5))
    ledger.adopt(list(plan))
    records = random_samples(0, num_records, 3)
    return PrivateData(records, SPEC, ledger, noise or NoiseSource(1), batch_size=8)


def small_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 2), nn.SiLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)
        )


def small_unet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(
            image_size=8,
            channels=1,
            label_dim=3,
            nf=8,
            ch_mult=[1, 2],
            attn_resolutions=[4],
            num_res_blocks=1,
        )
        for parameter in unet.parameters():  # the last layers start from zero, and with them most gradients
            nn.init.normal_(parameter, std=0.1)
        return unet


def cross_entropy(network, images, labels, rng):
    return F.cross_entropy(network(images), labels, reduction="none")


def no_gradient(network, images, labels, rng):
    return network(images).sum(1) * 0


def flat(network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).clone()


def trained(private, network, loss, dp=DP) -> dict:
    """Where DP-SGD leads, what it booked, and which records this process read, step by step."""
    read, take = [], private._records.take
    private._records.take = lambda which: (read[-1].extend(which.tolist()), take(which))[1]
    steps = dpsgd_steps(NAME, private, network, torch.optim.Adam(network.parameters(), 1e-2), loss, dp)
    before = flat(network)
    read.append([])
    for _ in steps:
        read.append([])
    moved = (flat(network) - before).abs().max().item()
    return {"weights": flat(network), "moved": moved, "ledger": private.ledger.state_dict(), "read": read}


# ------------------------------------------------------------------------------------------------ scenarios


def dpsgd() -> dict:
    return trained(private_data(Release(NAME, None, 0.5, 20)), small_network(), cross_entropy)


def dpsgd_diffusion() -> dict:
    loss = EDMLoss(LossConfig(p_mean=-1.2, p_std=1.2, n_noise_samples=2, label_dropout=0.1))
    return trained(private_data(Release(NAME, None, 0.5, 20)), small_unet(), loss)


def dpsgd_split() -> dict:
    dp = DPSGDConfig(
        max_grad_norm=0.1, sampling="poisson", max_batch_size=None, n_split=5, max_physical_batch_size=7
    )
    return trained(private_data(Release(NAME, None, 0.5, 5)), small_network(), cross_entropy, dp)


def dpsgd_one_record() -> dict:
    """Shares without a record in every step, and steps without a record in any share."""
    private = private_data(Release(NAME, None, 0.5, 6), num_records=1)
    return trained(private, small_network(), cross_entropy)


def dpsgd_seeded_noise() -> dict:
    private = private_data(Release(NAME, 3.0, 0.5, 5), epsilon=1e4)
    return trained(private, small_network(), cross_entropy)


def noise_of_dpsgd() -> torch.Tensor:
    """40 steps of pure noise in units of the stated deviation; the noise is the system's."""
    noise = distributed.from_main(NoiseSource)
    private = private_data(Release(NAME, 3.0, 0.5, 40), epsilon=1e4, noise=noise)
    network, moves = small_network(), []
    before = flat(network)
    for _ in dpsgd_steps(NAME, private, network, torch.optim.SGD(network.parameters(), 1.0), no_gradient, DP):
        moves.append(before - flat(network))
        before = flat(network)
    return torch.cat(moves) * (60 * 0.5) / (3.0 * 0.1)


def noise_of_a_sum() -> torch.Tensor:
    noise = distributed.from_main(NoiseSource)
    private = private_data(Release(NAME, 3.0), epsilon=1e4, noise=noise)
    return private.noisy_sum(NAME, lambda x, _: torch.zeros(len(x), 5000), l2_bound=0.5) / 1.5


def noise_of_a_sampled_sum() -> torch.Tensor:
    noise = distributed.from_main(NoiseSource)
    private = private_data(Release(NAME, 3.0, 1e-9), epsilon=1e4, noise=noise)
    return private.sampled_noisy_sum(NAME, lambda x, _: torch.ones(len(x), 5000), l2_bound=0.5) / 1.5


def one_sample_for_all() -> list[list[int]]:
    """Records read in 10 steps under a key that the system drew."""
    noise = distributed.from_main(NoiseSource)
    private = private_data(Release(NAME, 1.0, 0.5, 10), epsilon=1e4, noise=noise)
    return trained(private, small_network(), no_gradient)["read"]


def answers() -> dict:
    """Every other mechanism without noise."""
    private = private_data(
        Release("sum", None),
        Release("histogram", 1.0),
        Release("choice", 1.0, mechanism="report_noisy_max"),
        Release("latents", 1.0),
        Release("sampled sum", 1.0, 0.5),
    )
    halved = private.map(lambda images: images[..., ::2] / 2)
    return {
        "sum": private.noisy_sum("sum", lambda x, _: x.flatten(1), 1.0, by_class=True),
        "histogram": private.noisy_histogram(
            "histogram", lambda x, y: torch.stack([y, (y + 1) % 3], 1), 4, 2, by_class=True
        ),
        "choice": torch.tensor(private.report_noisy_max("choice", lambda x, y: F.one_hot(y % 2, 4) * 1.0)),
        "latents": halved.noisy_sum("latents", lambda x, _: x.flatten(1), 100.0),
        "sampled sum": private.sampled_noisy_sum(
            "sampled sum", lambda x, _: x.flatten(1), 1.0, by_class=True
        ),
    }


def diffusion_method(name: str) -> dict:
    """All stages of a method without noise, then samples."""
    config = small_config(name, ADVERSARIAL if name == "DP-LoRA" else (), "inf")
    if uses_public := has_public_images(config.public_data):
        section = dataclasses.replace(config.public_data, n_classes=PUBLIC_CLASSES, flip=True)
        config = dataclasses.replace(config, public_data=section)
    method = METHODS.resolve(name)(config, SPEC, Runtime())
    before = {key: tensor.clone() for key, tensor in method.network.state_dict().items()}
    private = private_data(*method.privacy_plan())
    public = PublicData("toy", random_samples(1, 48, PUBLIC_CLASSES), tuple("abcdef"))
    method.pretrain(public if uses_public else None, private)
    method.train(private)
    after = {key: tensor.clone() for key, tensor in method.network.state_dict().items()}
    return {
        "weights": after,
        "moved": max((after[key] - before[key]).abs().max().item() for key in before),
        "ledger": private.ledger.state_dict(),
        "samples": method.generate(17),
    }


def diffusion_methods() -> dict[str, dict]:
    return {name: diffusion_method(name) for name in DIFFUSION_METHODS}


def other_diffusion_methods() -> dict[str, dict]:
    return {name: diffusion_method(name) for name in OTHER_DIFFUSION_METHODS}


def messages() -> dict:
    """What the processes tell each other."""
    place = distributed.place()
    network = nn.Linear(2, 1)
    nn.init.constant_(network.weight, float(place.rank))
    distributed.copy_from_main(network.state_dict().values())
    network.weight.grad = torch.full((1, 2), place.rank + 1.0)
    distributed.sum_gradients(network.parameters())
    released = distributed.sum_on_main(torch.ones(3, dtype=torch.float64), lambda total: total.float() * 10)
    return {
        "rank": place.rank,
        "copied": network.weight.detach().clone(),
        "gradients": [network.weight.grad, network.bias.grad],
        "released": released,
        "from main": distributed.from_main(lambda: f"said by {place.rank}"),
        "rows": distributed.concatenate(torch.full((place.rank, 2), place.rank)),
        "shares": [list(range(count))[distributed.share(count)] for count in range(8)],
    }


SCENARIOS = (
    dpsgd,
    dpsgd_diffusion,
    dpsgd_split,
    dpsgd_one_record,
    dpsgd_seeded_noise,
    noise_of_dpsgd,
    noise_of_a_sum,
    noise_of_a_sampled_sum,
    one_sample_for_all,
    answers,
    diffusion_methods,
    messages,
)


def enact(rank: int, world_size: int, port: int, folder: Path, scenarios: tuple) -> None:
    """Process `rank` of a group: run the scenarios and keep what they return."""
    torch.set_num_threads(1)
    distributed._place = Place(rank, world_size, rank, world_size, "127.0.0.1", port, is_started=True)
    with distributed.processes("cpu", None, []):
        seen = {scenario.__name__: scenario() for scenario in scenarios}
        distributed.leave()
    torch.save(seen, folder / f"{rank}.pt")


def enacted(count: int, folder: Path, scenarios: tuple) -> list[dict]:
    """What each of `count` processes saw, by rank."""
    context, port, ranks = multiprocessing.get_context("spawn"), distributed._free_port(), range(count)
    workers = [context.Process(target=enact, args=(rank, count, port, folder, scenarios)) for rank in ranks]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0 for _ in ranks]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in ranks]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request, tmp_path_factory) -> list[dict]:
    return enacted(request.param, tmp_path_factory.mktemp("seen"), SCENARIOS)


# ------------------------------------------------------------------------------------------------ as in one process


@pytest.mark.parametrize(
    "scenario", [dpsgd, dpsgd_diffusion, dpsgd_split, dpsgd_one_record, dpsgd_seeded_noise]
)
def test_weights_and_ledger_are_those_of_one_process(together, scenario):
    alone, seen = scenario(), [process[scenario.__name__] for process in together]
    assert alone["moved"] > 1e-2
    for process in seen:
        torch.testing.assert_close(process["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
        assert torch.equal(process["weights"], seen[0]["weights"])
        assert process["ledger"] == alone["ledger"]
    for step, records in enumerate(alone["read"]):
        assert [record for process in seen for record in process["read"][step]] == records


def test_the_processes_read_one_poisson_sample(together):
    """Under the system's key: every step's shares are disjoint parts of one sample, and steps differ."""
    steps = list(zip(*(process["one_sample_for_all"] for process in together), strict=True))[:10]
    unions = [[record for share in shares for record in share] for shares in steps]
    assert all(union == sorted(set(union)) for union in unions)
    assert len({tuple(union) for union in unions}) > 1
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], 10 * 60, 0.5)
    assert low <= sum(map(len, unions)) <= high
    for shares in steps:
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("scenario", [noise_of_dpsgd, noise_of_a_sum, noise_of_a_sampled_sum])
def test_noise_is_added_once_and_all_receive_the_same(together, scenario):
    seen = [process[scenario.__name__].double() for process in together]
    assert all(torch.equal(noise, seen[0]) for noise in seen)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], seen[0].numel()) / seen[0].numel()
    assert low < seen[0].square().mean().item() < high
    assert 0.5 < low < high < 1.5  # noise on two processes would be 2, or 4 if it were the same


def test_other_mechanisms_give_the_results_of_one_process(together):
    alone = answers()
    assert alone["histogram"].sum() == pytest.approx(120, rel=1e-4)
    for process in together:
        for name, answer in alone.items():
            torch.testing.assert_close(process["answers"][name], answer, rtol=1e-5, atol=1e-5)


def same_as_alone(seen: list[dict]) -> None:
    """`seen`: by rank, what diffusion_method(name) returned by name."""
    for name in seen[0]:
        alone = diffusion_method(name)
        assert alone["moved"] > 1e-3 and alone["ledger"]["executed"]["dp-sgd"] > 0, name
        for process in seen:
            assert process[name]["ledger"] == alone["ledger"], name
            assert process[name]["weights"].keys() == alone["weights"].keys(), name
            for key, weights in process[name]["weights"].items():
                torch.testing.assert_close(weights, alone["weights"][key], rtol=1e-4, atol=1e-4, msg=name)
                assert torch.equal(weights, seen[0][name]["weights"][key]), name
            samples = process[name]["samples"]
            assert np.array_equal(samples.labels, alone["samples"].labels), name
            difference = samples.images.astype(int) - alone["samples"].images
            assert samples.images.shape == (17, 1, 8, 8) and np.abs(difference).max() <= 1, name


def test_diffusion_methods_train_and_sample_as_in_one_process(together):
    same_as_alone([process["diffusion_methods"] for process in together])


@pytest.mark.slow
def test_all_other_diffusion_methods_do_too(tmp_path):
    seen = enacted(2, tmp_path, (other_diffusion_methods,))
    same_as_alone([process["other_diffusion_methods"] for process in seen])


def test_messages(together):
    size = len(together)
    for rank, process in enumerate(together):
        seen = process["messages"]
        assert seen["rank"] == rank
        assert seen["from main"] == "said by 0"
        assert torch.equal(seen["copied"], torch.zeros(1, 2))
        assert torch.equal(seen["gradients"][0], torch.full((1, 2), size * (size + 1) / 2))
        assert torch.equal(seen["gradients"][1], torch.zeros(1))
        assert torch.equal(seen["released"], torch.full((3,), 10.0 * size))
        assert seen["rows"][:, 0].tolist() == [sender for sender in range(size) for _ in range(sender)]
    for count in range(8):
        shares = [process["messages"]["shares"][count] for process in together]
        assert [position for share in shares for position in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shares[0] or not count  # the main process speaks for all: it must have seen something


def test_in_one_process_nothing_is_exchanged():
    tensor = torch.ones(3)
    assert distributed.world_size() == 1 and distributed.is_main()
    assert distributed.share(5) == slice(0, 5)
    assert distributed.concatenate(tensor) is tensor
    assert distributed.sum_on_main(tensor, lambda total: total + 1).tolist() == [2, 2, 2]
    assert distributed.from_main(lambda: 7) == 7


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("setup.n_gpus_per_node=0", ["setup.n_gpus_per_node", "0", "from 1"]),
        ("setup.n_nodes=0", ["setup.n_nodes", "0", "from 1"]),
        ("setup.node_rank=1", ["setup.node_rank", "1", "from 0 to 0"]),
    ],
)
def test_impossible_devices_and_ranks_are_refused(setting, words, tmp_path):
    refusal = call(run_program.main, arguments("Noise", tmp_path / "exp", setting, "--dry_run")).refusal
    assert all(word in refusal for word in words), refusal


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(distributed, "_place", Place(0, 3, 0, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sees_two = pytest.raises(UserError, match=r"3 processes .*GPU.*\b2\b")
    with sees_two, distributed.processes("cuda:0", None, []):
        raise AssertionError("processes were started")


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setattr(distributed, "_place", Place(0, 4, 0, 4))
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    setup = SetupConfig("cpu", 4, 1, 0, "127.0.0.1", 6025, "float32", None)
    assert prepare_device(setup) == "cpu"
    prepare_device(dataclasses.replace(setup, omp_n_threads=5))
    assert chosen == [2, 5]


# ------------------------------------------------------------------------------------------------ the whole program

SETTINGS = ["eval=none", "setup.device=cpu", "privacy.noise_seed=3", "train.snapshot_freq=2"]


def account(folder: Path) -> dict:
    """What privacy.json says, but for the name of the run and what rounding of the samples may move."""
    content = strict_json(folder / "privacy.json")
    content.pop("sample_warnings")
    assert content.pop("run").endswith(folder.name)
    return content


def same_run(one: Path, other: Path) -> None:
    """Both folders hold the same ledger, the same report, the same samples, and weights equal up to rounding."""
    checkpoints = [
        torch.load(folder / "train/checkpoints/final_checkpoint.pth", weights_only=True)
        for folder in (one, other)
    ]
    assert checkpoints[0]["ledger"] == checkpoints[1]["ledger"]
    weights, others = (checkpoint["state"]["network"] for checkpoint in checkpoints)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-4)
    assert account(one) == account(other)
    samples, same = (read_samples(folder / "gen/gen.npz") for folder in (one, other))
    assert np.array_equal(samples.labels, same.labels)
    assert np.abs(samples.images.astype(int) - same.images).max() <= 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of PrivImage trained in one process."""
    done = execute(
        "run.py", arguments("PrivImage", tmp_path_factory.mktemp("exp"), *SETTINGS, "gen.batch_size=30")
    )
    assert done.code == 0, done.err
    return done.folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_a_run_in_several_processes_is_the_run_in_one(alone, tmp_path, count):
    settings = [*SETTINGS, "gen.batch_size=30", f"setup.n_gpus_per_node={count}"]
    done = execute("run.py", arguments("PrivImage", tmp_path, *settings))
    assert done.code == 0, done.err
    assert done.out.count("run folder: ") == 1 and done.out.count("\ntrain: done") == 1
    assert len(list(tmp_path.glob("*/*"))) == 1
    same_run(done.folder, alone)


@pytest.mark.slow
def test_processes_of_torchrun(alone, tmp_path):
    argv = arguments("PrivImage", tmp_path, *SETTINGS, "gen.batch_size=30")
    torchrun = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={distributed._free_port()}"]
    done = execute("-m", [*torchrun, "run.py", *argv])
    assert done.code == 0, done.err
    assert done.out.count("\ntrain: done") == 1
    same_run(done.folder, alone)


@pytest.mark.slow
def test_two_machines(alone, tmp_path):
    """Both on this one: the same command with another node_rank."""
    settings = [
        *SETTINGS,
        "gen.batch_size=30",
        "setup.n_nodes=2",
        f"setup.master_port={distributed._free_port()}",
    ]
    machines = [
        start("run.py", arguments("PrivImage", tmp_path, *settings, f"setup.node_rank={node}"))
        for node in range(2)
    ]
    outcomes = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outcomes
    assert "run folder" in outcomes[0][0] and outcomes[1][0] == ""
    (folder,) = tmp_path.glob("*/*")
    same_run(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resuming_with_another_number_of_processes(alone, tmp_path, before, after):
    argv = arguments("PrivImage", tmp_path, *SETTINGS, "gen.batch_size=30")
    folder = kill_when(
        [*argv, f"setup.n_gpus_per_node={before}"], tmp_path, "train/checkpoints/snapshot_checkpoint.pth"
    )
    done = execute("run.py", [*argv, f"setup.n_gpus_per_node={after}", "--resume_exp", folder.name])
    assert done.code == 0, done.err
    assert "resumed from train (snapshot)" in done.out
    same_run(folder, alone)


@pytest.mark.slow
def test_other_methods_run_in_several_processes(tmp_path):
    for method in ("Noise", "DP-MERF", "DPGAN", "GS-WGAN"):
        folders = []
        for count in (1, 2):
            settings = ["eval=none", "privacy.noise_seed=3", "setup.device=cpu", "gen.batch_size=30"]
            argv = arguments(method, tmp_path / str(count), *settings, f"setup.n_gpus_per_node={count}")
            done = execute("run.py", argv)
            assert done.code == 0, done.err
            folders.append(done.folder)
        reports = [account(folder) for folder in folders]
        images = [read_samples(folder / "gen/gen.npz").images.astype(int) for folder in folders]
        assert reports[0] == reports[1]
        assert np.abs(images[0] - images[1]).mean() < 1


# ------------------------------------------------------------------------------------------------ an orderly end

PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import run
from models.diffusion.synthesizer import DiffusionSynthesizer
from utils import distributed
from utils.device import prepare_device
from utils.errors import UserError

def fail(self, snapshot_freq):
    if self.step == 0:
        path = os.path.join({folder!r}, str(distributed.place().rank))
        os.symlink(str(os.getpid()), path)  # there at once, with its content
    if self.step == 2 and distributed.place().rank in {ranks!r}:
        {failure}
    self.step += 1

DiffusionSynthesizer._finish_step = fail
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell runs the tests in the background
    sys.exit(run.main(sys.argv[1:]))
"""


def start(program: str, argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, program, *argv]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def failing(tmp_path: Path, failure: str, *ranks: int, count: int = 3) -> Outcome:
    """DPDM in `count` processes of which `ranks` execute `failure` in the third step; all must be gone in a minute."""
    folder = tmp_path / "pids"
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), folder=str(folder), ranks=ranks, failure=failure))
    settings = ["eval=none", "setup.device=cpu", "train.n_epochs=500", f"setup.n_gpus_per_node={count}"]
    process = start(str(program), arguments("DPDM", tmp_path / "exp", *settings))
    try:
        while process.poll() is None and len(list(folder.iterdir())) < count:
            time.sleep(0.1)
        out, err = process.communicate(timeout=60)
        wait_until_gone([int(os.readlink(path)) for path in folder.iterdir()])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Outcome(process.returncode, out, err)


def wait_until_gone(pids: list[int]) -> None:
    assert pids
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} were left over"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def error_lines(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_run_and_is_reported(tmp_path):
    outcome = failing(tmp_path, "raise ValueError('a broken process')", 1)
    assert outcome.code == 1
    assert outcome.err.count("ValueError: a broken process") == 1
    assert error_lines(outcome) == ["error: process 1 of 3 failed; its error is above"]
    assert "--resume_exp" in outcome.out


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path):
    outcome = failing(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 2)
    assert outcome.code == 1
    assert error_lines(outcome) == ["error: process 2 of 3 was killed by signal 9"]
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_killed_main_process_leaves_no_orphans(tmp_path):
    assert failing(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", 0).code == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1, 2)])
def test_a_mistake_is_reported_in_one_line_by_any_process(tmp_path, ranks):
    outcome = failing(tmp_path, "raise UserError('thing: 3; it must be 4')", *ranks)
    assert outcome.err.count("error: thing: 3; it must be 4\n") == 1
    assert outcome.code == (2 if 0 in ranks else 1)
    found = [] if 0 in ranks else ["error: process 1 of 3 failed; its error is above"]
    assert [line for line in error_lines(outcome) if "thing" not in line] == found
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_an_exception_of_the_main_process_ends_the_others(tmp_path):
    outcome = failing(tmp_path, "raise ValueError('a broken process')", 0)
    assert outcome.code == 1
    assert outcome.err.count("Traceback") == 1


@pytest.mark.slow
def test_diverged_weights_end_all_processes_with_one_line(tmp_path):
    poison = "next(self.network.parameters()).data.fill_(float('nan')); self.runtime.snapshot('train')"
    outcome = failing(tmp_path, poison, 0, 1, 2)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    (line,) = error_lines(outcome)
    assert "diverged" in line and "train.optim.params.lr" in line


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    interrupt = "os.killpg(os.getpgid(0), signal.SIGINT); time.sleep(3)"
    outcome = failing(tmp_path, interrupt, 1)
    assert outcome.code == 130
    assert "--resume_exp" in outcome.out
    assert "Traceback" not in outcome.err and not error_lines(outcome)
