"""How classifiers are trained: the published recipes ("paper") and one that takes seconds ("quick")."""

from dataclasses import dataclass

from data.spec import DataSpec

QUICK_IMAGES_SEEN = 80_000  # training images x epochs of a quick training
QUICK_EPOCHS = (3, 20)  # minimum and maximum
# Generated images are smoother than real ones. A small network that is trained on them relies on smoothness and fails
# on real images; noise on its inputs makes it rely on shapes. docs/metrics.md has the measurements.
QUICK_NOISE = 0.5

# Increased with every change of a recipe, so that values of different versions are not mixed up.
RECIPE_VERSIONS = {"paper": 1, "quick": 2}  # quick 2: noise on the inputs


@dataclass(frozen=True)
class Recipe:
    """Optimizer and schedule.

    `optimizer`: "sgd" (momentum 0.9) or "adam". `decay_every`: epochs between multiplications of the learning rate
    by 0.2; None: one cycle up to `learning_rate` and down to zero. `num_splits`: parts into which a batch is split to
    save memory; more than one changes results, since batch normalisation sees each part. `input_noise`: maximum
    standard deviation of the Gaussian noise on training images in [-1, 1], see `with_noise`; 0: none.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    decay_every: int | None
    num_epochs: int
    batch_size: int
    num_splits: int = 1
    input_noise: float = 0.0


PAPER = {  # protocol of the dataset -> recipe
    "cifar": Recipe("sgd", 0.1, 5e-4, decay_every=60, num_epochs=200, batch_size=126),
    "standard": Recipe("adam", 0.01, 0.0, decay_every=20, num_epochs=50, batch_size=256),
}


def recipe_for(kind: str, spec: DataSpec, num_images: int) -> Recipe:
    """The recipe of `kind` ("paper" or "quick") for `num_images` training images."""
    if kind == "paper":
        return PAPER[spec.protocol]
    assert kind == "quick", kind
    least, most = QUICK_EPOCHS
    num_epochs = min(most, max(least, round(QUICK_IMAGES_SEEN / num_images)))
    return Recipe(
        "adam", 5e-3, 0.0, decay_every=None, num_epochs=num_epochs, batch_size=128, input_noise=QUICK_NOISE
    )
