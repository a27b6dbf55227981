"""How long an evaluation will take on this machine, and a faster one."""

from data.sensitive import num_test_images
from data.spec import DataSpec
from evaluation.cost import classifier_costs, evaluation_costs
from evaluation.registry import need_classifiers
from evaluation.unfinished import Unfinished
from pipeline.planning import time_lines
from utils.config import Config
from utils.progress import duration

LONG = 10 * 60  # seconds of training classifiers after which the quick ones are pointed out


def evaluation_time_lines(config: Config, spec: DataSpec, num_samples: int, device: str) -> list[str]:
    """For --dry_run: the time of each part of the evaluation, from a few measured batches, and of all together."""
    num_test = num_test_images(config.sensitive_data, config.data_root)
    costs = evaluation_costs(config.eval, spec, num_samples, num_test, config.weights_root, device)
    trained = sum(cost.seconds for cost in costs if cost.stage.startswith("classifier "))
    advice = _speed_advice(config, trained)
    return [*time_lines(costs), *([advice] if advice else [])]


def classifier_time_line(
    config: Config,
    spec: DataSpec,
    num_samples: int,
    num_test: int,
    device: str,
    kept: Unfinished | None = None,
) -> str | None:
    """The time that training the classifiers on the samples will take, from a few measured batches; None if none is
    trained. Classifiers that `kept` holds are not trained again."""
    if not need_classifiers(config.eval.metrics):
        return None
    costs = classifier_costs(config.eval, spec, num_samples, num_test, device)
    left = {name: cost for name, cost in costs.items() if kept is None or not kept.has_classifier(name)}
    if not left:
        return None
    seconds = sum(cost.seconds for cost in left.values())
    each = ", ".join(f"{name} about {duration(cost.seconds)}" for name, cost in left.items())
    advice = _speed_advice(config, seconds)
    line = f"training classifiers on the samples (recipe {config.eval.recipe}): {each} here"
    line += f"; together about {duration(seconds)}" if len(left) > 1 else ""
    return line + (f"; {advice}" if advice else "")


def _speed_advice(config: Config, seconds: float) -> str | None:
    """Advice if training the classifiers takes long."""
    if seconds <= LONG or config.eval.recipe == "quick":
        return None
    is_run = config.images is None and config.exp_path is None  # of run.py; --resume_exp accepts eval= only
    setting = "eval=quick" if is_run else "preset=quick"
    return f"{setting} trains two small classifiers for a few epochs instead"
