"""In-distribution public data: records of the private set that sensitive_data.num_public declares public. They leave
the private set, so the settings must agree that they are used."""

from data.locations import IN_DISTRIBUTION, is_in_distribution
from data.spec import DataSpec, PublicData, Samples
from utils.errors import UserError
from utils.sections import PublicSetConfig, SensitiveDataConfig, check

NUM_PUBLIC = "sensitive_data.num_public"


def require_agreement(public: PublicSetConfig, section: SensitiveDataConfig) -> None:
    """Raise UserError if records are declared public that the public set does not contain, or the other way round, or
    if settings of another public set are given."""
    name = public.name
    if not is_in_distribution(public):
        if section.num_public:
            raise UserError(
                f"{NUM_PUBLIC}: {section.num_public} images would lose their protection for nothing, because "
                f"public_data.name is {'null' if name is None else name}; give public_data.name={IN_DISTRIBUTION}, or "
                f"{NUM_PUBLIC}=0"
            )
        return
    if section.name is None:
        raise UserError(
            f"public_data.name: {IN_DISTRIBUTION} needs private images (sensitive_data.name is null)"
        )
    if not section.num_public:
        raise UserError(
            f"{NUM_PUBLIC}: 0 is not allowed with public_data.name={IN_DISTRIBUTION}; give the number of training "
            f"images that are declared public, a multiple of the number of classes"
        )
    if public.train_path is not None:
        raise UserError(
            f"public_data.train_path: {public.train_path} is not allowed with public_data.name={IN_DISTRIBUTION}; give "
            f"the set in this path another name"
        )


def require_use(method: str, section: SensitiveDataConfig, learns: bool) -> None:
    """Raise UserError if records are declared public and the method does not learn from public images."""
    if section.num_public and not learns:
        raise UserError(
            f"{NUM_PUBLIC}: {section.num_public} images would lose their protection for nothing, because {method} does "
            f"not learn from public images with these settings; give {NUM_PUBLIC}=0"
        )


def require_class_count(public: PublicSetConfig, spec: DataSpec) -> int:
    """The number of private classes; UserError if public_data.n_classes states another one."""
    stated = public.n_classes
    check(stated in (None, spec.num_classes), "public_data.n_classes", stated, f"null or {spec.num_classes}")
    return spec.num_classes


def public_part(records: Samples, spec: DataSpec) -> PublicData:
    """The records that were declared public, as a public set with the private classes."""
    return PublicData(IN_DISTRIBUTION, records, spec.class_names)
