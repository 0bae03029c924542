import json
from pathlib import Path

import pytest

from neuroexapt.core.genotypes import (
    DARTS_V2,
    GENOTYPES,
    CellGenotype,
    Genotype,
    genotype_from_dict,
    genotype_from_text,
    load_genotype,
)
from neuroexapt.core.operations import OPS
from neuroexapt.errors import UserError

PUBLISHED_DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
    "normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), "
    "('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), "
    "('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
FIELDS = DARTS_V2.to_dict()


def test_text_is_the_published_text() -> None:
    assert str(DARTS_V2) == PUBLISHED_DARTS_V2


@pytest.mark.parametrize("name", GENOTYPES)
def test_text_and_json_read_back(name: str) -> None:
    genotype = GENOTYPES[name]
    assert Genotype.from_text(str(genotype)) == genotype
    assert genotype_from_text(json.dumps(genotype.to_dict())) == genotype
    assert {op for op, _ in genotype.normal + genotype.reduce} <= set(OPS)


def test_text_with_ranges() -> None:
    text = PUBLISHED_DARTS_V2.replace("[2, 3, 4, 5]", "range(2, 6)")
    assert Genotype.from_text(text) == DARTS_V2


def test_edges_name_source_target_and_op() -> None:
    assert DARTS_V2.edges("normal")[:3] == (
        (0, 2, "sep_conv_3x3"),
        (1, 2, "sep_conv_3x3"),
        (0, 3, "sep_conv_3x3"),
    )
    assert DARTS_V2.edges("reduce")[-1] == (1, 5, "max_pool_3x3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"normal": [["sep_conv_3x3", 2], *FIELDS["normal"][1:]]},
            "normal cell: node 0 .* state 2, which does not",
        ),
        ({"reduce": [["sep_conv_3x3", -1], *FIELDS["reduce"][1:]]}, "state -1, which does not exist"),
        ({"normal": FIELDS["normal"][:3]}, "every node takes two edges, 3"),
        ({"normal": []}, "every node takes two edges, 0"),
        ({"normal": ["sep_conv_3x3"] * 2}, r"expected \(operation, source state\) pairs"),
        ({"normal": [["sep_conv_3x3", "0"], ["skip_connect", 1]]}, "is not an"),
        ({"normal_concat": [2, 9]}, r"joins states \[2, 9\]; list distinct states of 2 to 5"),
        ({"reduce_concat": []}, "list distinct states"),
        ({"reduce_concat": 5}, "list distinct states"),
        ({"reduce_concat": [2.0, 3.0]}, "list distinct states"),
        ({"reduce_concat": [[2]]}, "list distinct states"),
        ({"reduce_concat": [2, 2]}, "list distinct states"),
        ({"surplus": 1}, "exactly the fields"),
    ],
)
def test_refuses_what_is_no_genotype(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Genotype.from_dict({**FIELDS, **change})


@pytest.mark.parametrize(
    "text", ["", "{", "Genotype(", "__import__('os').system('true')", "[1, 2]", "Genotype(normal=range('a'))"]
)
def test_refuses_other_text(text: str) -> None:
    with pytest.raises(UserError):
        genotype_from_text(text)


def test_load_by_name_file_and_run_folder(tmp_path: Path) -> None:
    assert load_genotype("darts-v2") == load_genotype("DARTS") == DARTS_V2
    file = tmp_path / "genotype.json"
    file.write_text(json.dumps(FIELDS))
    assert load_genotype(str(file)) == load_genotype(str(tmp_path)) == DARTS_V2
    assert load_genotype(str(DARTS_V2)) == load_genotype(json.dumps(FIELDS)) == DARTS_V2
    with pytest.raises(UserError, match="nor the folder of a run that found one, nor one of NASNet"):
        load_genotype("nonsense")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"genotype\.json"):
        load_genotype(str(file))


ARCH = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"


def test_arch_strings_and_json_read_back(tmp_path: Path) -> None:
    genotype = CellGenotype.from_text(ARCH)
    assert str(genotype) == ARCH
    assert load_genotype(ARCH) == genotype_from_dict(genotype.to_dict()) == genotype
    (tmp_path / "genotype.json").write_text(json.dumps(genotype.to_dict()))
    assert load_genotype(str(tmp_path)) == genotype


def test_arch_string_names_edges_in_the_order_of_alpha() -> None:
    cell = CellGenotype.from_text(ARCH).cells["cell"]
    assert cell.edges[:3] == ((0, 1, "nor_conv_3x3"), (0, 2, "none"), (1, 2, "skip_connect"))
    assert cell.edges[-1] == (2, 3, "none")
    assert (cell.state_names, cell.concat) == (("0", "1", "2", "3"), (3,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|none~0|+|none~0|none~2|", "node 2 must name an operation for each state from 0 to 1"),
        ("|none~0|+|none~0|", "node 2"),
        ("|none|", "node 1"),
        ("|~0|", "node 1"),
        ("||", "node 1"),
        ('{"arch": 3}', "is an object like"),
        ('{"arch": "|none~0|", "more": 1}', "is an object like"),
    ],
)
def test_refuses_what_is_no_arch_string(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        genotype_from_text(text)
