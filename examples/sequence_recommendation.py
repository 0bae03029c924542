"""Search a recommender for your histories, or train a published one, save it, and ask it for items.

    python examples/sequence_recommendation.py --data ratings.dat --mode exapt    search, train on, save
    python examples/sequence_recommendation.py --data ratings.dat --mode fixed --genotype SASRec

``--data`` names a file of events: MovieLens (u.data, ratings.dat, ratings.csv, RecBole's .inter), Amazon
reviews, or ``user item item …`` a line; see docs/sequence.md. Every option of ``neuroexapt search`` works.
The model's file is what ``neuroexapt serve-recommender`` serves.
"""

import enum
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from neuroexapt import SearchConfig, UserError, evaluate, search
from neuroexapt.cli.app import run_command
from neuroexapt.cli.options import dashes, with_settings
from neuroexapt.data.sequences import SequenceDataset, load_sequences
from neuroexapt.engine.config import make_config
from neuroexapt.recommend.model import SequenceRecommender

app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"token_normalize_func": dashes}
)


class Mode(str, enum.Enum):
    EXAPT = "exapt"
    FIXED = "fixed"


@app.command()
@with_settings(SearchConfig)
def main(
    settings: dict[str, Any],
    mode: Annotated[Mode, typer.Option(help="what to do")] = Mode.EXAPT,
    genotype: Annotated[
        str | None, typer.Option(help="of mode fixed: SASRec, HSTU (where none is given), or a file")
    ] = None,
    model: Annotated[Path, typer.Option(help="file to save the recommender in")] = Path(
        "recommender.safetensors"
    ),
) -> None:
    """Train a recommender, save it, and show what it recommends."""
    if "data_root" not in settings:
        raise UserError(
            "give a file of events with --data, such as ml-1m/ratings.dat of MovieLens-1M from "
            "https://grouplens.org/datasets/movielens"
        )
    if "dataset" in settings:
        raise UserError("leave out --dataset: --data names the file of events")
    if mode is Mode.EXAPT and genotype is not None:
        raise UserError("leave out --genotype, which is searched, or choose --mode fixed")
    if mode is Mode.FIXED and "epochs" in settings:
        raise UserError("mode fixed does not search: give --train-epochs instead of --epochs")
    path = settings.pop("data_root")
    settings = {"space": "seqrec", **settings, "dataset": f"seq:{path}"}
    settings.setdefault("out", Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{mode.value}")
    config = make_config(SearchConfig, settings)
    data = load_sequences(path, config.max_length)
    found = (
        search(**settings) if mode is Mode.EXAPT else evaluate(**config.settings_of_fixed(genotype or "HSTU"))
    )
    recommender = SequenceRecommender(found.model, data.item_counts).cpu().eval()
    recommender.save(model)
    print(f"saved {model}; serve it with: neuroexapt serve-recommender {model}")
    show(SequenceRecommender.load(model), data)


def show(recommender: SequenceRecommender, data: SequenceDataset, count: int = 5) -> None:
    """For the first users of the test: the end of the history, and the best items that are new to them."""
    inputs, names = data.test.inputs[:3], ("", *data.histories.items)
    items = inputs[:, 0]
    times = inputs[:, 1] if inputs.shape[1] > 1 else None
    with torch.no_grad():
        scores = recommender.scores(recommender(items, (items > 0).sum(dim=1), times))
    best = scores.scatter(1, items, -torch.inf).topk(count).indices
    for history, ranked in zip(items.tolist(), best.tolist(), strict=True):
        seen = [names[item] for item in history if item][-count:]
        print(f"after {', '.join(seen)}: {', '.join(names[item] for item in ranked)}")


if __name__ == "__main__":
    sys.exit(run_command(app))
