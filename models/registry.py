"""Names that stand for a model, so that a person need not know where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass

from edgekv.models.default_model import SMOLLM2_135M, WheelModel

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """A named model.

    Attributes:
        title: What it is, for a person.
        license: SPDX identifier.
        wheel: Where its file is.
    """

    title: str
    license: str
    wheel: WheelModel


REGISTRY: Mapping[str, RegistryEntry] = {
    DEFAULT_MODEL: RegistryEntry(
        title="SmolLM2-135M-Instruct, Q4_1", license="Apache-2.0", wheel=SMOLLM2_135M
    ),
}
