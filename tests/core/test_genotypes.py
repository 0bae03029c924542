import json
from pathlib import Path

import pytest

from neuroexapt.core.genotypes import DARTS_V2, GENOTYPES, Genotype, load_genotype
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
    assert Genotype.from_text(json.dumps(genotype.to_dict())) == genotype
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
        Genotype.from_text(text)


def test_load_by_name_file_and_run_folder(tmp_path: Path) -> None:
    assert load_genotype("darts-v2") == load_genotype("DARTS") == DARTS_V2
    file = tmp_path / "genotype.json"
    file.write_text(json.dumps(FIELDS))
    assert load_genotype(str(file)) == load_genotype(str(tmp_path)) == DARTS_V2
    assert load_genotype(str(DARTS_V2)) == load_genotype(json.dumps(FIELDS)) == DARTS_V2
    with pytest.raises(UserError, match="neither a file nor one of NASNet"):
        load_genotype("nonsense")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"genotype\.json"):
        load_genotype(str(file))
