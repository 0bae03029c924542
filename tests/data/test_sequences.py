"""Histories: formats, leaving one out, and batches."""

import gzip
from pathlib import Path

import pytest
import torch

from neuroexapt.data import load_dataset
from neuroexapt.data.sequences import (
    Histories,
    SequenceLoader,
    leave_one_out,
    load_sequences,
    read_histories,
)
from neuroexapt.errors import UserError

# Ann chose a, b, c and Bob b, c, each at a time of its own; the files list them out of order.
EVENTS = [("ann", "c", 30), ("bob", "b", 5), ("ann", "a", 10), ("bob", "c", 7), ("ann", "b", 20)]
FILES = {
    "events.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    + "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in EVENTS),
    "ratings.dat": "".join(f"{user}::{item}::5::{time}\n" for user, item, time in EVENTS),
    "ratings.csv": "userId,movieId,rating,timestamp\n"
    + "".join(f"{user},{item},5,{time}\n" for user, item, time in EVENTS),
    "amazon.csv": "".join(f"{user},{item},5.0,{time}\n" for user, item, time in EVENTS),
    "quoted.csv": '"userId","movieId","rating","timestamp"\n'
    + "".join(f'"{user}", "{item}",5,{time}\n\n' for user, item, time in EVENTS),
    "RATINGS.DAT": "".join(f"{user}::{item}::5::{time}\n" for user, item, time in EVENTS),
    "ratings.tsv": "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in EVENTS),
    "blank.inter": "user_id:token\titem_id:token\ttimestamp:float\n"
    + "".join(f"{user}\t{item}\t{time}\n\n" for user, item, time in EVENTS),
    "numbers.json": "".join(
        f'{{"reviewerID": "{user}", "asin": "{item}", "unixReviewTime": {time}}}\n\n'
        for user, item, time in EVENTS
    ),
    "u.data": "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in EVENTS),
    "reviews.json": "".join(
        f'{{"reviewerID": "{user}", "asin": "{item}", "unixReviewTime": {time}}}\n'
        for user, item, time in EVENTS
    ),
}


def named(histories: Histories) -> dict[str, list[str]]:
    return {
        user: [histories.items[number - 1] for number in sequence]
        for user, sequence in zip(histories.users, histories.sequences, strict=True)
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_with_times_is_read_and_sorted_by_them(tmp_path: Path, name: str, zipped: bool) -> None:
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(FILES[name].encode()) if zipped else FILES[name].encode())
    histories = read_histories(path, least_events=1)
    assert named(histories) == {"ann": ["a", "b", "c"], "bob": ["b", "c"]}
    assert histories.times is not None
    assert [times.tolist() for times in histories.times] == [[10, 20, 30], [5, 7]]


@pytest.mark.parametrize("text", ["1 a\n2 b\n1 b\n1 c\n2 c\n", "1 a b c\n2 b c\n", "\n1 a b c\n\n2 b c\n"])
def test_a_file_without_times_is_in_order(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sequences.txt"
    path.write_text(text)
    histories = read_histories(path, least_events=1)
    assert named(histories) == {"1": ["a", "b", "c"], "2": ["b", "c"]}
    assert histories.times is None


def test_users_and_items_with_few_events_are_left_out_until_none_is_left(tmp_path: Path) -> None:
    path = tmp_path / "sequences.txt"
    # d occurs once; without it u3 has one event; without that c has one, and so on.
    path.write_text("u1 a b a b\nu2 b a\nu3 d c\nu4 c a b\n")
    assert named(read_histories(path, least_events=2)) == {
        "u1": ["a", "b", "a", "b"],
        "u2": ["b", "a"],
        "u4": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.inter", "user\titem\n1\t2\n", "the first line must name the columns"),
        ("a.inter", "user_id:token\titem_id:token\n1\n", "line 2 does not fit the header"),
        ("a.csv", "1,2,5,10\n1,2\n", "line 2 is no `user, item, rating, time`"),
        ("a.csv", "user,item,time\n", "'user,item,time'; a header names userId, movieId, timestamp"),
        ("a.csv", "1,2,5,nan\n", "line 1 is no `user, item, rating, time`"),
        ("a.json", '{"reviewerID": "u", "asin": "x", "unixReviewTime": Infinity}\n', "line 1 is no review"),
        ("a.dat", "1::2::5::soon\n", "line 1 is no `user, item, rating, time`"),
        ("a.json", '{"asin": "x"}\n', "line 1 is no review"),
        ("a.json", '{"reviewerID": {}, "asin": "x", "unixReviewTime": 1}\n', "line 1 is no review"),
        ("a.txt", "1 a\n2\n", "line 2 is no `user item …`"),
        ("a.txt", "1 a\n", "leaves 0 users with at least 5 events"),
        ("a.txt.gz", "not zipped", "cannot be read"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_histories(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_comma_may_be_part_of_a_quoted_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('u,"a, b",5,1\nu,c,5,2\nv,"a, b",5,1\nv,c,5,2\n')
    histories = read_histories(str(tmp_path / "a.csv"), least_events=1)
    assert named(histories) == {"u": ["a, b", "c"], "v": ["a, b", "c"]}


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path) -> None:
    content = bytearray(gzip.compress("".join(f"{i % 7} {i}\n" for i in range(300)).encode()))
    content[12] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_histories(tmp_path / "a.txt.gz")


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    events = "".join(f"{user},{item},5,{item}\n" for user in range(5) for item in range(5))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + events, encoding="utf-8-sig")
    assert read_histories(tmp_path / "ratings.csv").events == 25


def test_a_missing_file_says_where_data_is_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grouplens\.org"):
        load_dataset(f"seq:{tmp_path / 'ratings.dat'}")


def make_histories(tmp_path: Path, text: str) -> Histories:
    (tmp_path / "made.txt").write_text(text)
    return read_histories(tmp_path / "made.txt", least_events=1)


def test_the_last_item_is_for_the_test_and_the_one_before_for_validation(tmp_path: Path) -> None:
    histories = make_histories(tmp_path, "u1 a b c d e\nu2 a b c\nu3 a b\n")  # items 1 to 5
    train, valid, test = leave_one_out(histories, max_length=4)
    # Of u2 nothing is left to train, u3 is too short for all three.
    assert train.inputs.tolist() == [[[1, 2, 0, 0]]]
    assert train.labels.tolist() == [[2, 3, 0, 0]]
    assert valid.inputs.tolist() == [[[1, 2, 3, 0]], [[1, 0, 0, 0]]]
    assert valid.labels.tolist() == [[0, 0, 4, 0], [2, 0, 0, 0]]
    assert test.inputs.tolist() == [[[1, 2, 3, 4]], [[1, 2, 0, 0]]]
    assert test.labels.tolist() == [[0, 0, 0, 5], [0, 3, 0, 0]]


def test_histories_keep_their_newest_items_and_times(tmp_path: Path) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text("".join(f"u{u}::{i}::5::{10 * i + u}\n" for u in range(2) for i in range(1, 7)))
    data = load_sequences(path, 2, least_events=1)
    assert data.test.inputs[0].tolist() == [[4, 5], [40, 50]]
    assert data.train.inputs[1].tolist() == [[2, 3], [21, 31]]
    assert data.train.labels[1].tolist() == [3, 4]
    assert data.facts == {"num_items": 6, "max_length": 2, "has_times": True}
    assert data.item_counts.tolist() == [0, 2, 2, 2, 2, 0, 0]  # what is held out is not counted


def test_the_baseline_is_the_ten_commonest_items(tmp_path: Path) -> None:
    """Every history trains on ten common items; half of them end with one of these."""
    common = " ".join(f"c{i}" for i in range(10))
    lines = [f"u{u} {common} v{u} {'c3' if u % 2 else f't{u}'}\n" for u in range(6)]
    (tmp_path / "made.txt").write_text("".join(lines))
    data = load_sequences(tmp_path / "made.txt", 20, least_events=1)
    assert data.baseline == ("the ten commonest items", 0.5)


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    histories = make_histories(tmp_path, "".join(f"u{u} a b c d e{u}\n" for u in range(10)))
    part = leave_one_out(histories, 5)[2]

    def loader(seed: int) -> SequenceLoader:
        return SequenceLoader(part, batch_size=4, device=torch.device("cpu"), seed=seed, drop_last=True)

    first, resumed = loader(1), loader(1).epoch(0, start_step=1)
    labels = [batch[1] for batch in first.epoch(0)]
    assert len(labels) == first.steps_per_epoch == 2
    assert torch.equal(labels[1], next(resumed)[1])
    assert not torch.equal(labels[0], next(loader(2).epoch(0))[1])
    assert torch.equal(torch.cat([batch[0] for batch in first.evaluation()]), part.inputs)


def test_too_few_histories_for_a_batch_are_refused(tmp_path: Path) -> None:
    part = leave_one_out(make_histories(tmp_path, "u1 a b c\nu2 c b a\n"), 5)[2]
    with pytest.raises(UserError, match="2 histories do not fill a batch of 3"):
        SequenceLoader(part, batch_size=3, device=torch.device("cpu"), seed=0, drop_last=True)
