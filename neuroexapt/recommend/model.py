"""A trained recommender: what is saved, loaded and served."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from neuroexapt.core.genotypes import RecommenderGenotype
from neuroexapt.core.sequence_network import SequenceNetwork
from neuroexapt.core.sequence_operations import SequenceSize
from neuroexapt.engine.checkpoint import load_checkpoint, save_checkpoint
from neuroexapt.engine.trained import load_trained
from neuroexapt.errors import UserError


class SequenceRecommender(nn.Module):
    """Scores the whole catalogue as the next item of histories.

    Items are numbered from 1 to ``num_items``; 0 pads histories at their ends. Of longer histories than
    ``max_length`` the caller keeps the newest items.

    ``item_counts``: [V + 1] int64, how often each item occurs in the training data, for users of whom nothing
    is known.

    >>> query = recommender(items, lengths, timestamps)
    >>> best = recommender.scores(query).topk(10).indices
    """

    item_counts: Tensor

    def __init__(self, network: SequenceNetwork, item_counts: Tensor | None = None) -> None:
        super().__init__()
        self.network = network
        if item_counts is None:
            item_counts = torch.zeros(network.num_items + 1, dtype=torch.int64)
        self.register_buffer("item_counts", item_counts.to(torch.int64))

    @property
    def num_items(self) -> int:
        return self.network.num_items

    @property
    def max_length(self) -> int:
        return self.network.size.max_length

    @property
    def has_times(self) -> bool:
        """Whether times make a difference."""
        return self.network.size.has_times

    def forward(self, items: Tensor, lengths: Tensor, timestamps: Tensor | None = None) -> Tensor:
        """The query of each history.

        Args:
            items: [B, N] int64, N up to ``max_length``, oldest first.
            lengths: [B], how many of them count; what lies behind is never read.
            timestamps: [B, N] int64 in seconds, of the items; None: no time bias.

        Returns:
            [B, D]; of an empty history what the head makes of no items.
        """
        is_item = torch.arange(items.shape[1], device=items.device) < lengths[:, None]
        channels = [items] if timestamps is None else [items, timestamps]
        return self.network.last_query(
            torch.stack([channel * is_item for channel in channels], dim=1)
        ).queries

    def scores(self, query: Tensor) -> Tensor:
        """Of every item as the next one: [B, V + 1] for queries [B, D]; −∞ for item 0, which is none."""
        scores = query @ self.network.stem.item_vectors().T
        is_item = torch.arange(scores.shape[1], device=scores.device) > 0
        return scores.masked_fill(~is_item, -torch.inf)

    def save(self, path: Path | str) -> None:
        """Write weights and configuration to one safetensors file; reading it runs no code. Its folder is
        made where it is missing."""
        path, network = Path(path), self.network
        path.parent.mkdir(parents=True, exist_ok=True)
        config = {
            "genotype": network.genotype.to_dict(),
            "num_items": network.num_items,
            "size": dataclasses.asdict(network.size),
            "layers": network.layers,
            "cosine": network.stem.cosine,
        }
        save_checkpoint(path, {"recommender": config, "state": self.state_dict()})

    @classmethod
    def load(cls, path: Path | str) -> "SequenceRecommender":
        """Read what ``save`` wrote, or what the run in a folder trained; in evaluation mode on the CPU."""
        if Path(path).is_dir():
            trained = load_trained(path)
            if not isinstance(trained.network, SequenceNetwork):
                raise UserError(
                    f"{path} holds a network for {trained.data['kind']}, which is no recommender; name a run "
                    "on histories, that is with --dataset seq:PATH"
                )
            return cls(trained.network, torch.tensor(trained.data["item_counts"])).eval()
        state = load_checkpoint(Path(path))
        if "recommender" not in state:
            raise UserError(f"{path} holds no recommender; SequenceRecommender.save writes one")
        config: dict[str, Any] = state["recommender"]
        network = SequenceNetwork(
            RecommenderGenotype.from_dict(config["genotype"]),
            num_items=config["num_items"],
            size=SequenceSize(**config["size"]),
            layers=config["layers"],
            cosine=config["cosine"],
        )
        recommender = cls(network)
        recommender.load_state_dict(state["state"])
        return recommender.eval()
