"""Search spaces by name. A space is a declaration; to add one, write its file and add one line here."""

from neuroexapt.errors import UserError
from neuroexapt.spaces.cell_space import CellSpace
from neuroexapt.spaces.darts import DARTS
from neuroexapt.spaces.mobile import MOBILE
from neuroexapt.spaces.nas_bench_201 import NAS_BENCH_201
from neuroexapt.spaces.robust_darts import S1, S2, S3, S4
from neuroexapt.spaces.seqrec import SEQREC, SEQREC_SAMPLED
from neuroexapt.spaces.space import Space

__all__ = ["BUILT_IN", "DARTS", "NAS_BENCH_201", "SPACES", "CellSpace", "Space", "get_space"]

SPACES: dict[str, Space] = {
    space.name: space for space in (DARTS, NAS_BENCH_201, S1, S2, S3, S4, MOBILE, SEQREC, SEQREC_SAMPLED)
}

BUILT_IN = frozenset(SPACES)


def get_space(name: str) -> Space:
    if name not in SPACES:
        raise UserError(
            f"unknown search space {name!r}; known are {', '.join(SPACES)}. Register one of your own first, "
            "from Python: SPACES[name] = CellSpace(...)"
        )
    return SPACES[name]
