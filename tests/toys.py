"""Every method at toy size, in two forms: one table, one entry per method.

A trial calls the method directly on the 60 random images of conftest.py. A run goes through the command line with the
1,437 digits (tiny_runs.py). A setting has one value for both, or a pair (in trials, in runs) where None leaves it out.
"""

Settings = dict[str, str | tuple[str | None, str | None]]


def trial_only(settings: Settings) -> Settings:
    """The settings, left out of runs."""
    return {key: (value if isinstance(value, str) else value[0], None) for key, value in settings.items()}


PRIVATE_STEPS: Settings = {
    "train.batch_size": ("60", "null"),  # every record in every step: the accounting is then a closed form
    "train.n_epochs": ("4", "2"),
    "train.snapshot_freq": ("2", None),
    "train.loss.n_noise_samples": ("2", "1"),
    "train.dp.max_physical_batch_size": ("32", "512"),
    "gen.batch_size": ("8", None),
}
DIFFUSION: Settings = {
    "model.network.nf": "8",
    "model.network.ch_mult": "[1,2]",
    "model.network.attn_resolutions": ("[4]", "[]"),
    "model.network.num_res_blocks": ("1", None),
    "model.sampler.num_steps": "2",
    "model.sampler_acc.type": ("edm", "ddim"),
    "model.sampler_acc.num_steps": "3",
    **PRIVATE_STEPS,
}
LATENT: Settings = {
    "model.network.nf": "8",
    "model.network.ch_mult": ("[1,2]", None),
    "model.network.attn_resolutions": ("[2]", "[]"),
    "model.network.num_res_blocks": ("1", None),
    "model.network.head_width": ("4", None),
    "model.network.context_dim": ("6", None),
    "model.sampler.num_steps": "2",
    "model.sampler_acc.num_steps": "3",
    "pretrain.autoencoder.ch": "4",
    "pretrain.autoencoder.n_epochs": "1",
    "pretrain.autoencoder.batch_size": ("16", None),
    "pretrain.autoencoder.snapshot_freq": ("2", None),
    **PRIVATE_STEPS,
}
QUERY: Settings = {
    "pretrain.query.network": "small_cnn",
    "pretrain.query.image_size": "8",
    "pretrain.query.n_epochs": "1",
    "pretrain.query.batch_size": ("16", "128"),
}
SELECTIVE: Settings = {
    "public_data.selective.ratio": ("0.5", "0.17"),
    "public_data.selective.sigma": ("100.0", "8.0"),
}
PRETRAIN: Settings = {
    "public_data.name": "glyphs",
    "public_data.per_class": (None, "20"),
    "pretrain.n_epochs": "1",
    "pretrain.batch_size": ("16", "256"),
    "pretrain.snapshot_freq": ("2", None),
}
WHOLE_PUBLIC_SET: Settings = {"public_data.selective.ratio": (None, "1.0")}
NO_PUBLIC_SET: Settings = {"public_data.name": (None, "null")}
CENTRAL: Settings = {
    "public_data.central.sample_num": "2",
    "public_data.central.sigma": ("50.0", "8.0"),
    "public_data.central.batch_size": ("60", "1437"),  # every record in every query, as above
    "pretrain.warm_up.batch_size": ("4", None),
    "pretrain.warm_up.n_epochs": ("3", "2"),
    "pretrain.snapshot_freq": ("2", None),
}
FREQUENCY: Settings = {
    "freq.sigma": ("50.0", "8.0"),
    "freq.image_size": ("8", None),
    "freq.Generator.z_dim": ("6", None),
    "freq.Generator.g_shared_dim": ("4", None),
    "freq.Generator.g_conv_dim": "4",
    "freq.d_rff": ("20", "100"),
    "freq.fit.epochs": "1",
    "freq.fit.batch_size": ("10", None),
    "freq.data_num": ("24", "200"),
    "freq.batch_size": ("8", None),
    "freq.n_epochs": "1",
}
GENERATOR: Settings = {
    "model.Generator.z_dim": ("6", None),
    "model.Generator.g_shared_dim": ("4", None),
    "model.Generator.g_conv_dim": "4",
    "train.batch_size": ("10", None),
    "gen.batch_size": ("8", None),
    **NO_PUBLIC_SET,
}
ROUNDS: Settings = {
    "model.feature_extractor": "pixels",
    "train.num_samples_schedule": ("[30,30,30]", "[100,100,100]"),
    "train.variation_degree_schedule": "[0,1,2]",
    "train.lookahead_degree": "1",
    "train.count_threshold": ("0", None),
}
TOYS: dict[str, Settings] = {
    "Noise": {},
    "DP-Linear": {},
    "IDPS": {
        "sensitive_data.num_public": (None, "30"),
        "model.network.nf": ("4", "8"),
        "model.network.ch_mult": "[1,2]",
        "model.network.attn_resolutions": "[]",
        "model.network.num_res_blocks": ("1", None),
        "model.sampler.num_steps": "2",
        "model.sampler_acc.num_steps": "3",
        "pretrain.batch_size": ("16", "30"),
        "pretrain.n_epochs": ("1", "4"),
        "pretrain.snapshot_freq": "2",
        "pool.num": ("24", "60"),
        "warm_up.batch_size": ("12", "30"),
        "warm_up.n_epochs": "2",
        "warm_up.snapshot_freq": "2",
        "train.batch_size": (
            "60",
            "null",
        ),  # every record in every step: the accounting is then a closed form
        "train.n_epochs": ("4", "2"),
        "train.snapshot_freq": ("2", None),
        "train.augmult": "2",
        "gen.batch_size": ("8", None),
    },
    "DP-Distill": {
        "model.width": ("4", "8"),
        "model.d_rff": ("20", "200"),
        "train.images_per_class": ("2", "3"),
        "train.num_steps": ("4", "10"),
        "train.batch_size": ("4", None),
        "train.snapshot_freq": "2",
        **NO_PUBLIC_SET,
    },
    "DP-MERF": {**GENERATOR, "model.d_rff": ("20", "100"), "train.epochs": "1"},
    "DP-NTK": {
        **GENERATOR,
        "model.ntk_width": ("10", "20"),
        "train.n_iter": "4",
        "train.snapshot_freq": ("2", None),
        "pretrain.snapshot_freq": ("2", None),
    },
    "DP-Kernel": {
        **GENERATOR,
        "model.sigma_list": ("[2.0,8.0]", None),
        "model.d_rff": ("20", "60"),
        "train.max_iter": ("6", "10"),
        "train.vis_step": ("3", "4"),
    },
    "DPGAN": {
        "model.Generator.z_dim": ("6", None),
        "model.Generator.g_shared_dim": ("4", None),
        "model.Generator.g_conv_dim": "2",
        "model.Discriminator.d_conv_dim": "2",
        "train.batch_size": ("60", "null"),
        "train.n_epochs": "4",
        "train.d_updates": "2",
        "train.g_batch_size": ("8", "16"),
        "train.g_part_size": ("4", None),
        "train.snapshot_freq": ("2", None),
        "train.dp.max_physical_batch_size": ("32", "512"),
        "gen.batch_size": ("8", None),
    },
    "GS-WGAN": {
        "model.Generator.z_dim": ("4", None),
        "model.Generator.g_conv_dim": "2",
        "model.Discriminator.d_conv_dim": "2",
        "model.num_discriminators": ("4", "20"),
        "pretrain.iterations": ("2", None),
        "pretrain.critic_iters": ("2", None),
        "pretrain.batch_size": ("8", None),
        "train.iterations": ("5", "6"),
        "train.critic_iters": ("2", "1"),
        "train.batch_size": ("8", None),
        "train.refresh_iters": ("1", None),
        "train.refresh_every": ("2", "4"),
        "train.snapshot_freq": ("2", None),
        "train.pretrain.iterations": "2",
        "train.pretrain.critic_iters": "2",
        "train.pretrain.batch_size": ("4", None),
        "train.pretrain.at_once": ("3", None),
        "gen.batch_size": ("8", None),
        "public_data.name": "null",
        "public_data.selective.ratio": ("1.0", None),
    },
    "PE": ROUNDS,
    "PE-SD": {
        **ROUNDS,
        "public_data.name": "glyphs",
        "public_data.per_class": (None, "20"),
        "model.api_params.network.nf": ("4", "8"),
        "model.api_params.network.ch_mult": ("[1,2]", None),
        "model.api_params.network.attn_resolutions": "[]",
        "model.api_params.network.num_res_blocks": ("1", None),
        "model.api_params.sampler.num_steps": ("4", "3"),
        "model.api_params.pretrain.batch_size": ("16", "256"),
        "model.api_params.pretrain.n_epochs": "1",
        "model.api_params.pretrain.snapshot_freq": ("2", None),
    },
    "DPDM": {**DIFFUSION, **NO_PUBLIC_SET},
    "PDP-Diffusion": {**DIFFUSION, **PRETRAIN, **trial_only(QUERY), **WHOLE_PUBLIC_SET},
    "DP-LDM-SD": {**DIFFUSION, **PRETRAIN, **trial_only(QUERY), **WHOLE_PUBLIC_SET},
    "PrivImage": {**DIFFUSION, **PRETRAIN, **QUERY, **SELECTIVE},
    "DP-FETA": {**DIFFUSION, **CENTRAL},
    "DP-FETA-Pro": {**DIFFUSION, **CENTRAL, **FREQUENCY},
    "DP-LDM": {**LATENT, **PRETRAIN, **trial_only(QUERY)},
    "DP-LoRA": {
        **LATENT,
        **PRETRAIN,
        **trial_only(QUERY),
        "train.rank": ("2", None),
        "train.dp.max_grad_norm": ("1e-4", None),
    },
}


def trial_settings(settings: Settings) -> list[str]:
    """key=value for calling the method directly."""
    return _settings(settings, 0)


def run_settings(settings: Settings) -> list[str]:
    """key=value for the command line."""
    return _settings(settings, 1)


def _settings(settings: Settings, form: int) -> list[str]:
    values = {key: value if isinstance(value, str) else value[form] for key, value in settings.items()}
    return [f"{key}={value}" for key, value in values.items() if value is not None]
