"""From which size on a kernel beats PyTorch: shipped defaults, measured crossovers, where they are kept."""

import functools
import logging
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from neuroexapt.backend.config import load_config, save_config
from neuroexapt.errors import UserError

logger = logging.getLogger(__name__)

NEVER = sys.maxsize
_DEFAULT_MIN_ELEMENTS = 1024
# These save device time but cost more Python than PyTorch's own. Launched one by one on an H100, separable
# convolutions and average pools were measured to pay off at 16 M elements, the others not yet; at 64 M their
# device time decides. What has a BatchNorm was not measured so and is taken for one of the former.
_LATER = {
    "sepconv": 2**24,
    "relu_conv_bn": 2**24,
    "factorized_reduce": 2**24,
    "avg_pool": 2**24,
    "max_pool": 2**26,
    "global_avg_pool": 2**26,
}
_DEFAULT_MIN_OPERANDS = {"softmax_sum": 4, "weighted_sum": 4}


@dataclass(frozen=True)
class Crossover:
    """From ``min_elements`` a tensor on, the tier's kernel was never measured more than 5 % slower."""

    op: str
    tier: str
    dtype: str
    operands: int
    min_elements: int


@dataclass(frozen=True)
class TuningConfig:
    """Measured crossovers and what they were measured with; without any, the shipped defaults rule."""

    device: str
    torch: str
    triton: str
    crossovers: tuple[Crossover, ...] = ()

    @classmethod
    def for_this_machine(cls, crossovers: tuple[Crossover, ...] = ()) -> "TuningConfig":
        """Crossovers under the name of this GPU and these versions."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return cls(device, torch.__version__, _version("triton"), crossovers)

    @classmethod
    def from_dict(cls, data: dict) -> "TuningConfig":
        """The inverse of ``dataclasses.asdict``, from JSON."""
        try:
            crossovers = tuple(Crossover(**entry) for entry in data["crossovers"])
            return cls(data["device"], data["torch"], data["triton"], crossovers)
        except (KeyError, TypeError) as error:
            raise UserError(f"not a tuning configuration ({error}); measure a new one") from error

    def min_elements(self, op: str, tier: str, dtype: str, operands: int) -> int:
        """The smallest tensor for which the kernel pays off; ``NEVER`` where none does."""
        measured = [c for c in self.crossovers if (c.op, c.tier, c.dtype) == (op, tier, dtype)]
        if not measured:
            enough = operands >= _DEFAULT_MIN_OPERANDS.get(op, 1)
            return _LATER.get(op, _DEFAULT_MIN_ELEMENTS) if enough else NEVER
        # Fewer operands than measured make the kernel pay off less, so round down.
        fitting = [c for c in measured if c.operands <= operands]
        return max(fitting, key=lambda c: c.operands).min_elements if fitting else NEVER


@functools.cache
def smallest_worthwhile_size(op: str, tier: str, dtype: torch.dtype, operands: int) -> int:
    """``TuningConfig.min_elements`` of the saved configuration."""
    return saved_tuning().min_elements(op, tier, str(dtype).removeprefix("torch."), operands)


@functools.cache
def saved_tuning() -> TuningConfig:
    """The saved crossovers, or the defaults where none were saved or they are another machine's."""
    saved = load_config().get("tuning")
    return TuningConfig.for_this_machine() if saved is None else checked(TuningConfig.from_dict(saved))


def apply_tuning(config: TuningConfig) -> None:
    """Save ``config`` and use it from now on."""
    save_config({"tuning": asdict(config)})
    saved_tuning.cache_clear()
    smallest_worthwhile_size.cache_clear()


def checked(config: TuningConfig) -> TuningConfig:
    """``config``, or the defaults with a warning where it belongs to another GPU or other versions."""
    here = TuningConfig.for_this_machine()
    if (config.device, config.torch, config.triton) == (here.device, here.torch, here.triton):
        return config
    logger.warning(
        "using the default thresholds: the saved ones are for %s, torch %s, triton %s",
        config.device,
        config.torch,
        config.triton,
    )
    return here


def write_tuning(path: Path, config: TuningConfig, backend: str) -> None:
    """Keep ``config`` and the backend it was measured for in a file of its own."""
    save_config({"backend": backend, "tuning": asdict(config)}, path)


def read_tuning(path: Path) -> TuningConfig:
    """What ``write_tuning`` wrote."""
    if not path.exists():
        raise UserError(f"no configuration at {path}")
    return checked(TuningConfig.from_dict(load_config(path).get("tuning", {})))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
