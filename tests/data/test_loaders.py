import os
import weakref
from itertools import islice

import pytest
import torch
from PIL import Image

from neuroexapt.data import loaders
from neuroexapt.data.augment import Augmentation
from neuroexapt.data.folders import decode_images
from neuroexapt.data.loaders import ResidentLoader, StreamingLoader, make_loader, split_indices
from neuroexapt.data.parts import ResidentImages, StreamedImages
from neuroexapt.errors import UserError

COUNT, BATCH = 22, 4
POLICY = Augmentation(crop_padding=1, flip=True, cutout=2)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.randint(
        256, (COUNT, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    paths = [folder / f"{index:02}.png" for index in range(COUNT)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture.numpy()).save(path)
    return StreamedImages(paths, torch.arange(COUNT), (3, 8, 8))


@pytest.fixture(scope="module")
def resident(streamed):
    return ResidentImages(decode_images(streamed.paths, streamed.shape, quiet=True), streamed.labels)


@pytest.fixture(params=["resident", "streaming", "streaming without workers"])
def loader_of(request, resident, streamed):
    """Makes a loader of each kind over the same images."""
    part = resident if request.param == "resident" else streamed
    workers = 0 if request.param == "streaming without workers" else 1

    def make(indices=None, *, seed=3, augmentation=POLICY, drop_last=True, batch_size=BATCH):
        return make_loader(
            part,
            indices,
            batch_size=batch_size,
            device="cpu",
            seed=seed,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.1),
            augmentation=augmentation,
            workers=workers,
            drop_last=drop_last,
        )

    return make


def assert_same_batches(left, right):
    for (x, y), (other_x, other_y) in zip(left, right, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_split_is_stratified_disjoint_and_complete():
    shuffle = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 3)[shuffle]
    train, valid = split_indices(labels, 0.75, seed=1)
    assert torch.cat([train, valid]).sort().values.tolist() == list(range(63))
    assert torch.bincount(labels[train]).tolist() == [30, 15, 2]
    assert torch.equal(train, train.sort().values)
    assert torch.equal(valid, valid.sort().values)


def test_split_depends_on_the_seed_alone():
    labels = torch.arange(60) % 3
    assert torch.equal(split_indices(labels, 0.5, 7)[0], split_indices(labels, 0.5, 7)[0])
    assert not torch.equal(split_indices(labels, 0.5, 7)[0], split_indices(labels, 0.5, 8)[0])


def test_split_leaves_every_class_on_both_sides():
    train, valid = split_indices(torch.tensor([0, 0, 1, 1]), 0.99, seed=0)
    assert len(train) == len(valid) == 2


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_split_refuses_an_empty_side(fraction):
    with pytest.raises(UserError, match="between 0 and 1"):
        split_indices(torch.tensor([0, 0, 1, 1]), fraction, seed=0)


def test_split_refuses_a_class_of_one_image():
    with pytest.raises(UserError, match="class 1 has one training image"):
        split_indices(torch.tensor([0, 0, 1]), 0.5, seed=0)
    with pytest.raises(UserError, match="class dog has one training image"):
        split_indices(torch.tensor([0, 0, 1]), 0.5, seed=0, classes=("cat", "dog"))


def test_the_part_decides_the_kind_of_loader(resident, streamed):
    settings = {"batch_size": 2, "device": "cpu", "seed": 0, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    assert isinstance(make_loader(resident, **settings), ResidentLoader)
    assert isinstance(make_loader(streamed, **settings), StreamingLoader)


def test_an_epoch_shows_each_image_at_most_once(loader_of):
    loader = loader_of()
    batches = list(loader.epoch(0))
    labels = torch.cat([y for _, y in batches])
    assert len(batches) == loader.steps_per_epoch == COUNT // BATCH
    assert len(labels.unique()) == len(labels) == COUNT // BATCH * BATCH
    assert all(x.shape == (BATCH, 3, 8, 8) and x.dtype == torch.float32 for x, _ in batches)


def test_epochs_and_seeds_differ(loader_of):
    def order(seed, epoch):
        return torch.cat([y for _, y in loader_of(seed=seed).epoch(epoch)]).tolist()

    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_an_incomplete_batch_is_kept_if_asked(loader_of):
    loader = loader_of(drop_last=False)
    labels = [y for _, y in loader.epoch(2)]
    assert [len(y) for y in labels] == [4, 4, 4, 4, 4, 2]
    assert loader.steps_per_epoch == 6
    assert torch.cat(labels).sort().values.tolist() == list(range(COUNT))


def test_resuming_gives_the_same_batches(loader_of):
    whole = list(loader_of().epoch(3))
    assert_same_batches(whole[2:], loader_of().epoch(3, start_step=2))


def test_forever_goes_through_the_epochs(loader_of):
    loader = loader_of()
    epochs = [*loader.epoch(0), *loader.epoch(1)]
    assert_same_batches(epochs, islice(loader_of().forever(), len(epochs)))
    assert_same_batches(epochs[7:], islice(loader_of().forever(start=7), len(epochs) - 7))


def test_only_the_chosen_indices_are_used(loader_of):
    indices = torch.tensor([3, 5, 8, 13, 21])
    assert sorted(torch.cat([y for _, y in loader_of(indices).evaluation()]).tolist()) == indices.tolist()
    assert {label for _, y in loader_of(indices).epoch(0) for label in y.tolist()} < set(indices.tolist())


def test_evaluation_shows_every_image_once_and_unaltered(loader_of, resident):
    images, labels = (torch.cat(values) for values in zip(*loader_of().evaluation(), strict=True))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    expected = (resident.images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    in_order = labels.argsort()  # every image has its number as label
    torch.testing.assert_close(images[in_order], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels[in_order], resident.labels)


def test_evaluation_mixes_what_lies_side_by_side(loader_of, monkeypatch):
    """Data that lie class by class would come in batches of one class, without meaningful statistics."""
    monkeypatch.setattr(loaders, "EVALUATED", 1)
    loader = loader_of()
    batches = list(loader.evaluation())
    assert_same_batches(batches, list(loader.evaluation()))
    for _, numbers in batches[:-1]:
        assert numbers.max() - numbers.min() > 2 * len(numbers)


def test_evaluation_does_not_disturb_an_endless_iteration(loader_of):
    expected = list(islice(loader_of().forever(), 4))
    loader = loader_of()
    batches = loader.forever()
    seen = [next(batches), next(batches)]
    list(loader.evaluation())
    assert_same_batches(expected, [*seen, next(batches), next(batches)])


def test_the_global_random_state_is_left_alone(loader_of):
    before = torch.get_rng_state()
    next(loader_of().epoch(0))
    next(loader_of().evaluation())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("augmentation", [None, POLICY])
def test_streaming_equals_resident(resident, streamed, augmentation):
    settings = {"batch_size": BATCH, "device": "cpu", "seed": 5, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    loaders = [
        make_loader(part, augmentation=augmentation, workers=1, **settings) for part in (resident, streamed)
    ]
    assert_same_batches(loaders[0].epoch(1), loaders[1].epoch(1))


def test_workers_outlive_the_epochs(streamed, tmp_path):
    class Recording(StreamedImages):
        def read(self, indices):
            (tmp_path / str(os.getpid())).touch()
            return super().read(indices)

    part = Recording(streamed.paths, streamed.labels, streamed.shape)
    loader = make_loader(part, batch_size=8, device="cpu", seed=0, mean=(0,) * 3, std=(1,) * 3, workers=1)
    for epoch in range(3):
        list(loader.epoch(epoch))
    next(loader.forever(start=4))
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / str(os.getpid())).exists()


def test_a_superseded_iteration_does_not_go_on_with_wrong_batches(streamed):
    loader = make_loader(streamed, batch_size=2, device="cpu", seed=0, mean=(0,) * 3, std=(1,) * 3, workers=1)
    earlier = loader.forever()
    next(earlier)
    next(loader.epoch(1))
    with pytest.raises(AssertionError, match="later iteration"):
        next(earlier)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_picture_is_named_in_one_line(tmp_path, workers):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    part = StreamedImages([tmp_path / "broken.png"] * 2, torch.tensor([0, 1]), (3, 8, 8))
    loader = make_loader(
        part, batch_size=2, device="cpu", seed=0, mean=(0,) * 3, std=(1,) * 3, workers=workers
    )
    with pytest.raises(UserError, match=r"broken\.png is not a readable picture") as caught:
        next(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_too_few_images_for_a_batch(loader_of):
    with pytest.raises(UserError, match="22 images do not fill a batch of 23; lower the batch size"):
        loader_of(batch_size=23)
    assert sum(len(y) for _, y in loader_of(batch_size=23, drop_last=False).evaluation()) == COUNT


def test_an_abandoned_iteration_does_not_keep_the_loader_alive(loader_of):
    loader = loader_of()
    next(loader.forever())
    reference = weakref.ref(loader)
    del loader
    assert reference() is None  # without the cycle collector, which would leave workers waiting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_streaming_equals_resident_and_steps_do_not_wait(resident, streamed):
    settings = {"batch_size": BATCH, "device": "cuda", "seed": 5, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    loaders = [make_loader(part, augmentation=POLICY, workers=1, **settings) for part in (resident, streamed)]
    assert_same_batches(loaders[0].epoch(1), loaders[1].epoch(1))
    for loader in loaders:
        batches = loader.epoch(1)
        assert next(batches)[0].is_cuda
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_on_the_gpu_a_batch_stays_what_it_is_until_a_slow_step_has_read_it(kind, request):
    part, first = request.getfixturevalue(kind), torch.arange(20)
    settings = {"batch_size": BATCH, "seed": 5, "mean": (0.5,) * 3, "std": (0.2,) * 3, "workers": 1}
    on_gpu, on_cpu = (make_loader(part, first, device=device, **settings) for device in ("cuda", "cpu"))
    sums = []
    for _, (images, labels) in zip(range(40), on_gpu.forever(), strict=False):
        torch.cuda._sleep(20_000_000)  # some 10 ms, in which the next batch is made
        sums.append((images.double().sum(), labels.sum()))
        del images, labels
    for (images_sum, labels_sum), (images, labels) in zip(sums, on_cpu.forever(), strict=False):
        torch.testing.assert_close(images_sum.cpu(), images.double().sum(), rtol=1e-6, atol=1e-6)
        assert labels_sum.item() == labels.sum().item()
