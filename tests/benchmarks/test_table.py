import gzip
import sys
import types
from pathlib import Path

import pytest

from neuroexapt.benchmarks import load_table
from neuroexapt.core.genotypes import DARTS_V2, CellGenotype
from neuroexapt.errors import UserError

ARCH = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"
GENOTYPE = CellGenotype.from_text(ARCH)
CSV = f"index,arch,c10_test_200,c10_valid_12,params_c10\n7,{ARCH},93.5,81.25,1234\n"


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_csv_file_tells_what_its_columns_hold(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(CSV.encode()) if name.endswith("gz") else CSV.encode())
    found = load_table(path).query(GENOTYPE)
    assert found == {"cifar10_test": 0.935, "cifar10_valid_12": 0.8125, "parameters": 1234}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch,c10_test_200\n", "It lacks"),
        ("arch,accuracy\n", "it needs a column arch and some of c10_test_200"),
        ("", "it needs a column arch"),
        ("arch,c10_test_200\n|none~0|,high\n", "line 2: could not convert"),
        ("arch,c10_test_200\n|none~0|\n", "line 2"),
        ("arch,c10_test_200\n|none~0|,nan\n", "line 2: 'nan' is no accuracy"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_table(tmp_path / "table.csv").query(GENOTYPE)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no table .*; give a CSV file"):
        load_table(tmp_path / "table.csv")
    damaged = bytearray(gzip.compress("".join(f"{i % 7},{i}\n" for i in range(300)).encode()))
    damaged[12] ^= 0xFF
    for content in (CSV.encode(), damaged):
        (tmp_path / "table.csv.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot read the table"):
            load_table(tmp_path / "table.csv.gz")


def test_genotypes_of_another_space_are_not_held(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(CSV)
    with pytest.raises(UserError, match="not a table of this search space"):
        load_table(tmp_path / "table.csv").query(DARTS_V2)


class FakeApi:
    """Answers as the package nats_bench does, with a figure that tells what it was asked for."""

    def query_index_by_arch(self, arch: str) -> int:
        return 5 if arch == ARCH else -1

    def get_cost_info(self, index: int, dataset: str, hp: str) -> dict[str, float]:
        assert (index, dataset, hp) == (5, "cifar10", "200")
        return {"params": 0.8}

    def get_more_info(self, index: int, dataset: str, hp: str, is_random: bool) -> dict[str, float]:
        assert (index, is_random) == (5, False)
        start = 10 * ["cifar10", "cifar10-valid", "cifar100", "ImageNet16-120"].index(dataset)
        test = {"test-accuracy": start + (1 if hp == "200" else 2)}
        return test if dataset == "cifar10" else test | {"valid-accuracy": start + (3 if hp == "200" else 4)}


def test_the_files_of_nats_bench_are_read_through_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(path: str, space: str, fast_mode: bool, verbose: bool) -> FakeApi:
        assert (path, space, fast_mode, verbose) == (str(tmp_path), "topology", True, False)
        return FakeApi()

    monkeypatch.setitem(sys.modules, "nats_bench", types.SimpleNamespace(create=create))
    table = load_table(tmp_path)
    found = table.query(GENOTYPE)
    assert found.pop("parameters") == 800_000
    assert {name: round(100 * value) for name, value in found.items()} == {
        "cifar10_test": 1, "cifar10_test_12": 2, "cifar10_valid": 13, "cifar10_valid_12": 14,
        "cifar100_test": 21, "cifar100_test_12": 22, "cifar100_valid": 23, "cifar100_valid_12": 24,
        "imagenet16_test": 31, "imagenet16_test_12": 32, "imagenet16_valid": 33, "imagenet16_valid_12": 34,
    }  # fmt: skip
    with pytest.raises(UserError, match="It lacks"):
        table.query(CellGenotype.from_text("|max_pool_3x3~0|"))


def test_files_that_the_package_cannot_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*args: object, **kwargs: object) -> None:
        raise EOFError("ran out of input")

    monkeypatch.setitem(sys.modules, "nats_bench", types.SimpleNamespace(create=create))
    with pytest.raises(UserError, match=r"nats_bench cannot read .*: ran out of input"):
        load_table(tmp_path)


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(UserError, match="pip install nats_bench"):
        load_table(tmp_path)
