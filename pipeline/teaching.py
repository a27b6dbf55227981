"""Add a teacher to a method (gen.teacher): its settings, and its share of the budget."""

from models import METHODS, TEACHERS
from models.synthesizer import Synthesizer
from opacus_ext.accounting import calibrate
from opacus_ext.ledger import Budget
from utils.config import COMMAND_LINE, Config, load_config
from utils.errors import UserError


def with_teacher(synthesizer: Synthesizer, config: Config, budget: Budget) -> Synthesizer:
    """`synthesizer` with the teacher of the configuration, if it has one. Raises UserError for its settings."""
    gen = config.gen
    if gen.teacher is None:
        for key in ("gen.teacher_use", "gen.teacher_share"):
            if config.provenance[key] == COMMAND_LINE:
                raise UserError(f"{key}: there is no teacher; add gen.teacher=[], or leave {key} out")
        return synthesizer
    from models.linear.features import FeatureMap  # not before: an evaluation needs no code of training
    from models.linear.fit import LinearFit
    from models.linear.taught import TEACHER, Taught

    if not synthesizer.makes_images:
        raise UserError(f"gen.teacher: {config.method} makes no images here that a teacher could label")
    section = teacher_settings(config)
    spec, runtime = synthesizer.spec, synthesizer.runtime
    features = FeatureMap(section.model, spec, runtime.weights_root, runtime.device)
    teacher = LinearFit(TEACHER, section.train, features, spec, runtime)
    try:
        steps = teacher.release().num_steps
    except UserError as error:
        raise UserError(f"gen.teacher: {error}") from error
    if steps == 0:
        raise UserError("gen.teacher: train.n_epochs: 0 is not allowed; a teacher must learn")
    noise_multiplier = 0.0
    if budget.private:
        noise_multiplier = calibrate(
            lambda noise: [teacher.release(noise)], gen.teacher_share * budget.epsilon, budget.delta,
            config.privacy.accountant, config.privacy.relation,
        )  # fmt: skip
    return Taught(synthesizer, teacher, noise_multiplier, gen.teacher_use)


def teacher_settings(config: Config) -> object:
    """The configuration of the method TEACHERS for the same data and budget, with the settings of gen.teacher."""
    foreign = [word for word in config.gen.teacher if not word.startswith(("model.", "train."))]
    if foreign:
        raise UserError(
            f"gen.teacher: {foreign[0]} is no setting of a teacher; allowed are those of model and train"
        )
    data = [word for word in config.words if word.partition("=")[0].startswith("sensitive_data.")]
    argv = ["--method", TEACHERS, "--data_name", config.data_name, "--epsilon", f"{config.epsilon:g}"]
    argv += ["--data_root", str(config.data_root), f"preset={config.preset}", *data, *config.gen.teacher]
    try:
        return load_config(argv, METHODS).method_config
    except UserError as error:
        raise UserError(f"gen.teacher: {error}") from error
