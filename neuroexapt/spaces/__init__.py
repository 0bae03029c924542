"""Search spaces by name. A space is a declaration; to add one, write its file and add one line here."""

from neuroexapt.errors import UserError
from neuroexapt.spaces.cell_space import CellSpace
from neuroexapt.spaces.darts import DARTS

SPACES: dict[str, CellSpace] = {space.name: space for space in (DARTS,)}

BUILT_IN = frozenset(SPACES)


def get_space(name: str) -> CellSpace:
    if name not in SPACES:
        raise UserError(
            f"unknown search space {name!r}; known are {', '.join(SPACES)}. Register one of your own first, "
            "from Python: SPACES[name] = CellSpace(...)"
        )
    return SPACES[name]
