"""A recommender as it is saved and served."""

from pathlib import Path

import pytest
import torch

from neuroexapt.core.genotypes import load_genotype
from neuroexapt.engine.checkpoint import save_checkpoint
from neuroexapt.errors import UserError
from neuroexapt.recommend.model import SequenceRecommender
from neuroexapt.spaces.seqrec import SEQREC, SEQREC_SAMPLED, SequenceSpace


def make_recommender(space: SequenceSpace = SEQREC, genotype: str = "HSTU") -> SequenceRecommender:
    torch.manual_seed(0)
    facts = {"num_items": 9, "max_length": 6, "has_times": True}
    network = space.network(load_genotype(genotype), **facts, channels=8, layers=2)
    torch.nn.init.normal_(network.stem.items.weight)
    return SequenceRecommender(network, torch.arange(10)).eval()


CALL = (
    torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 0]]),
    torch.tensor([3, 6, 0]),
    torch.arange(6).mul(900).expand(3, 6),
)


def test_every_item_but_the_padding_has_a_finite_score() -> None:
    recommender = make_recommender()
    scores = recommender.scores(recommender(*CALL))
    assert scores.shape == (3, 10)
    assert scores[:, 1:].isfinite().all()
    assert (scores[:, 0] == -torch.inf).all()


def test_what_lies_behind_the_length_is_not_read() -> None:
    recommender = make_recommender()
    items, lengths, times = CALL
    other = items.clone()
    other[0, 3:] = torch.tensor([-5, 999, 7])
    assert torch.equal(recommender(other, lengths, times), recommender(*CALL))


def test_the_query_is_that_of_the_trained_network() -> None:
    recommender = make_recommender(genotype="SASRec")
    items, lengths, times = CALL
    queries = recommender.network(torch.stack([items, times], dim=1)).queries
    expected = queries[[0, 1], lengths[:2] - 1]
    torch.testing.assert_close(recommender(*CALL)[:2], expected)


@pytest.mark.parametrize("space", [SEQREC, SEQREC_SAMPLED])
def test_what_is_saved_is_loaded(tmp_path: Path, space: SequenceSpace) -> None:
    recommender = make_recommender(space)
    recommender.save(tmp_path / "new" / "model.safetensors")
    loaded = SequenceRecommender.load(tmp_path / "new" / "model.safetensors")
    assert not loaded.training
    assert torch.equal(loaded.scores(loaded(*CALL)), recommender.scores(recommender(*CALL)))
    assert torch.equal(loaded.item_counts, torch.arange(10))
    assert (loaded.num_items, loaded.max_length, loaded.has_times) == (9, 6, True)
    assert loaded.network.genotype == load_genotype("HSTU")


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", {"phase": {}})
    with pytest.raises(UserError, match="holds no recommender"):
        SequenceRecommender.load(tmp_path / "other.safetensors")
