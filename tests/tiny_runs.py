"""Runs that take seconds: settings, the programs called in this process or as a process, and what came of it."""

import atexit
import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SHARED = ["--data_name", "digits_8", "preset=quick", "gen.data_num=100"]
_PUBLIC = [
    "public_data.name=glyphs",
    "public_data.per_class=20",
    "pretrain.n_epochs=1",
    "pretrain.batch_size=256",
]
_DIFFUSION = [
    "model.network.nf=8",
    "model.network.ch_mult=[1,2]",
    "model.network.attn_resolutions=[]",
    "model.sampler.num_steps=2",
    "model.sampler_acc.type=ddim",
    "model.sampler_acc.num_steps=3",
    "train.n_epochs=2",
    "train.batch_size=null",  # every record in every step: the accounting is then a closed form
    "train.loss.n_noise_samples=1",
    "train.dp.max_physical_batch_size=512",
]
_QUERY = [
    "public_data.selective.ratio=0.17",
    "public_data.selective.sigma=8.0",
    "pretrain.query.network=small_cnn",
    "pretrain.query.image_size=8",
    "pretrain.query.n_epochs=1",
    "pretrain.query.batch_size=128",
]
_CENTRAL = [
    "public_data.central.sample_num=2",
    "public_data.central.sigma=8.0",
    "public_data.central.batch_size=1437",
    "pretrain.warm_up.n_epochs=2",
]
_FREQUENCY = [
    "freq.sigma=8.0",
    "freq.Generator.g_conv_dim=4",
    "freq.d_rff=100",
    "freq.fit.epochs=1",
    "freq.data_num=200",
    "freq.n_epochs=1",
]
_LATENT = [
    "model.network.nf=8",
    "model.network.attn_resolutions=[]",
    "model.sampler.num_steps=2",
    "model.sampler_acc.num_steps=3",
    "pretrain.autoencoder.ch=4",
    "pretrain.autoencoder.n_epochs=1",
    *[setting for setting in _DIFFUSION if not setting.startswith("model.")],
]
TINY = {
    "Noise": [],
    "DP-MERF": [
        "model.d_rff=100",
        "model.Generator.g_conv_dim=4",
        "train.epochs=1",
        "public_data.name=null",
    ],
    "DPGAN": [
        "model.Generator.g_conv_dim=2",
        "model.Discriminator.d_conv_dim=2",
        "train.batch_size=null",
        "train.n_epochs=4",
        "train.d_updates=2",
        "train.g_batch_size=16",
        "train.dp.max_physical_batch_size=512",
    ],
    "PE": [
        "train.num_samples_schedule=[100,100,100]",
        "train.variation_degree_schedule=[0,1,2]",
        "train.lookahead_degree=1",
        "model.feature_extractor=pixels",
    ],
    "PE-SD": [
        "train.num_samples_schedule=[100,100,100]",
        "train.variation_degree_schedule=[0,1,2]",
        "train.lookahead_degree=1",
        "public_data.name=glyphs",
        "public_data.per_class=20",
        "model.feature_extractor=pixels",
        "model.api_params.network.nf=8",
        "model.api_params.network.attn_resolutions=[]",
        "model.api_params.sampler.num_steps=3",
        "model.api_params.pretrain.n_epochs=1",
        "model.api_params.pretrain.batch_size=256",
    ],
    "DP-NTK": [
        "model.ntk_width=20",
        "model.Generator.g_conv_dim=4",
        "train.n_iter=4",
        "public_data.name=null",
    ],
    "GS-WGAN": [
        "model.Generator.g_conv_dim=2",
        "model.Discriminator.d_conv_dim=2",
        "model.num_discriminators=20",
        "train.iterations=6",
        "train.critic_iters=1",
        "train.refresh_every=4",
        "train.pretrain.iterations=2",
        "train.pretrain.critic_iters=2",
        "public_data.name=null",
    ],
    "DP-Kernel": [
        "model.d_rff=60",
        "model.Generator.g_conv_dim=4",
        "train.max_iter=10",
        "train.vis_step=4",
        "public_data.name=null",
    ],
    "DPDM": [*_DIFFUSION, "public_data.name=null"],
    "PDP-Diffusion": [*_DIFFUSION, *_PUBLIC, "public_data.selective.ratio=1.0"],
    "DP-LDM-SD": [*_DIFFUSION, *_PUBLIC, "public_data.selective.ratio=1.0"],
    "PrivImage": [*_DIFFUSION, *_PUBLIC, *_QUERY],
    "DP-FETA": [*_DIFFUSION, *_CENTRAL],
    "DP-FETA-Pro": [*_DIFFUSION, *_CENTRAL, *_FREQUENCY],
    "DP-LDM": [*_LATENT, *_PUBLIC],
    "DP-LoRA": [*_LATENT, *_PUBLIC],
}


@dataclass(frozen=True)
class Outcome:
    """What a program did: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run's folder, as the program names it."""
        lines = [line for line in self.out.splitlines() if line.startswith("run folder: ")]
        assert lines, f"no run folder was named (exit code {self.code}): {self.err}"
        return Path(lines[-1].removeprefix("run folder: "))

    @property
    def refusal(self) -> str:
        """The one line with which a user's mistake is refused; only progress bars may stand above it."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = [line for line in self.err.splitlines() if line and not re.search(r"\d+%\|", line)]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


@functools.cache
def data_root() -> Path:
    """A folder for prepared data that the whole test session shares: glyphs are rendered once."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def arguments(method: str, exp_root: Path, *more: str) -> list[str]:
    """The command line of a tiny run; settings in `more` take the place of tiny ones with the same key."""
    keys = {setting.partition("=")[0] for setting in more}
    flags = ["--method", method, "--exp_root", str(exp_root)]
    flags += [] if "--data_root" in more else ["--data_root", str(data_root())]
    shared = SHARED[2:] if "--data_name" in more else SHARED
    settings = [word for word in [*shared, *TINY[method]] if word.partition("=")[0] not in keys]
    return [*flags, *settings, *more]


def call(main: Callable[[list[str]], int], argv: list[str]) -> Outcome:
    """Call a program's `main` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return Outcome(code, out.getvalue(), err.getvalue())


def execute(program: str, argv: list[str], prefix: tuple[str, ...] = (), **environment: str) -> Outcome:
    """Run `python <program> <argv>` as a process in the project's folder."""
    command = [*prefix, sys.executable, program, *argv]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=550
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def kill_when(argv: list[str], exp_root: Path, pattern: str) -> Path:
    """Start run.py as a process, kill it as soon as a file of its run matches `pattern`; returns the run's folder."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(3000):
            if found := list(exp_root.glob(f"*/*/{pattern}")):
                break
            assert process.poll() is None, f"run.py ended with {process.returncode} before it wrote {pattern}"
            time.sleep(0.02)
        assert found, f"run.py did not write {pattern} within a minute"
    finally:
        process.kill()
        process.wait()
    return next(exp_root.glob("*/*"))


def strict_json(path: Path) -> object:
    """The content of a JSON file; NaN and Infinity, which are not JSON, fail."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
