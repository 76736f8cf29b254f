import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value, load_dataset
from support.images import processor
from support.streams import image_bytes, jpeg, write_parquet
from torch.utils.data import DataLoader

from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.augmentation_settings import Augmentation
from hf_layershuffle.data.image_dataset import ImageClassificationDataset, collate_for_device
from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.data.stream_batches import StreamBatches
from hf_layershuffle.data.streamed_splits import load_image_stream


CROPS = Augmentation(resized_crop_scale=(0.2, 1.0), horizontal_flip=True, random_erasing=0.5, mixup_alpha=0.5)
TOTAL = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("stream") / "images")


@pytest.fixture
def dataset(folder):
    return load_dataset("parquet", data_files=f"{folder}/data/train-*.parquet", split="train", streaming=True)


def stream(dataset, **kwargs) -> ImageStream:
    defaults = {"num_samples": TOTAL, "augmentation": CROPS, "shuffle_buffer_size": 6, "seed": 3}
    return ImageStream(dataset, processor(), **{**defaults, **kwargs})


def of_images(rows, features=None):
    features = features or Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_list(rows, features=features).to_iterable_dataset()


def drawn(images, epoch: int, *, share=(0, 1), batch_size: int = 4, **kwargs) -> list[tuple[int, int, bytes]]:
    """Pass, index and stored bytes of the images of an epoch, read from the start."""
    rank, world_size = share
    batches = StreamBatches(images, batch_size, rank=rank, world_size=world_size, **kwargs)
    images.set_epoch(epoch)
    return [(each.number, each.place, each.image["bytes"]) for batch in batches for each in batch]


def loaded(images, epoch: int = 0, skipped: int = 0, **kwargs) -> list[dict]:
    images.set_epoch(epoch)
    loader = DataLoader(images, batch_sampler=StreamBatches(images, 4), collate_fn=collate_for_device, **kwargs)
    return [finish_batch(batch) for batch in itertools.islice(loader, skipped, None)]


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second)
    )


# --- The order ---


def test_an_epoch_holds_each_image_once_in_another_order(dataset):
    images = stream(dataset)
    first, second = drawn(images, 0), drawn(images, 1)
    stored = sorted(row["image"]["bytes"] for row in dataset.cast_column("image", Image(decode=False)))
    assert sorted(content for *_, content in first) == sorted(content for *_, content in second) == stored
    assert [index for _, index, _ in first] == list(range(TOTAL))
    assert [content for *_, content in first] != [content for *_, content in second]
    assert first == drawn(stream(dataset), 0)
    assert first != drawn(stream(dataset, seed=4), 0)


def test_without_a_buffer_the_order_is_that_of_the_files(dataset):
    stored = [row["image"]["bytes"] for row in dataset.cast_column("image", Image(decode=False))]
    images = stream(dataset, shuffle_buffer_size=0)
    assert [content for *_, content in drawn(images, 0)] == [content for *_, content in drawn(images, 1)] == stored


def test_a_buffer_mixes_images_of_several_files(dataset):
    without = [content for *_, content in drawn(stream(dataset, shuffle_buffer_size=1), 0)]
    with_one = [content for *_, content in drawn(stream(dataset), 0)]
    moved = [abs(without.index(content) - place) for place, content in enumerate(with_one)]
    assert max(moved) > 3 and sum(distance == 0 for distance in moved) < TOTAL / 2


@pytest.mark.parametrize("world_size", [2, 4, 3])  # of four files: two each, one each, all of them
def test_processes_share_a_pass_without_repeats_and_losses(dataset, world_size):
    images = stream(dataset)
    contents, indices = [], []
    for rank in range(world_size):
        samples = list(images.samples(1, rank, world_size))
        contents += [sample.image["bytes"] for sample in samples]
        indices += [sample.place for sample in samples]
    assert len(contents) == len(set(contents)) == TOTAL
    assert len(set(indices)) == TOTAL  # so that no two images are augmented alike


@pytest.mark.parametrize(
    ("shards", "own"), [((13, 3), False), ((8, 8), True), ((5, 4, 3, 4), True), ((5, 6, 5), False)]
)
def test_processes_read_files_of_their_own_only_where_these_hold_as_many_images(tmp_path, shards, own):
    """So that an epoch of two processes gives each image once."""
    splits = load_image_stream(write_parquet(tmp_path / "images", shards=shards))
    options = {"num_samples": sum(shards), "is_length": True}
    for rows, is_own in (((), False), (splits.rows_of_files, own)):
        seen = []
        for rank in (0, 1):
            images = stream(splits.stream, rows_of_files=rows, **options)
            assert (images.own_pieces(rank, 2) is not None) == is_own
            passes = [drawn(images, epoch, share=(rank, 2), batch_size=2, drop_last=True) for epoch in (0, 1, 2)]
            seen += passes[0]
            whole = StreamBatches(images, 2, rank=rank, world_size=2, drop_last=True)
            for epoch, each in enumerate(passes):  # going on, as each alone, which is how a run is resumed
                images.set_epoch(epoch)
                assert [(one.number, one.place) for batch in whole for one in batch] == [one[:2] for one in each]
        assert len({content for *_, content in seen}) == len(seen) == sum(shards) // 4 * 4


def test_processes_with_files_of_their_own_share_a_pass(dataset):
    images = stream(dataset, rows_of_files=[7, 6, 5, 6], shuffle_buffer_size=0)
    assert [images.own_pieces(rank, 2) for rank in (0, 1)] == [[0, 2], [1, 3]]
    shares = [list(images.samples(1, rank, 2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [15, 11]  # as the files hold, not as was said
    assert len({sample.image["bytes"] for share in shares for sample in share}) == TOTAL
    assert len({sample.place for share in shares for sample in share}) == TOTAL
    for world_size, rows in ((3, [7, 6, 5, 6]), (2, [7, 6, 8, 5]), (2, [7, 6]), (8, [1, 1, 1, 1])):
        assert stream(dataset, rows_of_files=rows).own_pieces(0, world_size) is None


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_have_as_many_batches_and_lose_nothing_over_epochs(dataset, world_size):
    shares = []
    for rank in range(world_size):
        images = stream(dataset)
        batches = StreamBatches(images, 4, rank=rank, world_size=world_size)
        share = []
        for epoch in range(6):
            images.set_epoch(epoch)
            in_epoch = list(batches)
            assert len(in_epoch) == len(batches) == math.ceil(math.ceil(TOTAL / world_size) / 4)
            share += [(each.number, each.image["bytes"]) for batch in in_epoch for each in batch]
        shares.append(share)
    for share in shares:
        assert len(set(share)) == len(share)  # no image twice in a pass
    first_pass = [content for share in shares for number, content in share if number == 0]
    assert len(first_pass) == TOTAL


def test_an_epoch_that_is_no_pass_goes_on_in_the_next(dataset):
    images = stream(dataset, num_samples=10)
    batches = StreamBatches(images, 4)
    together = []
    for epoch in range(6):
        images.set_epoch(epoch)
        together += [(each.number, each.place) for batch in batches for each in batch]
    assert together == [(number, index) for number in range(3) for index in range(TOTAL)][:60]
    for epoch in (5, 2, 3):  # read from there
        assert [(number, index) for number, index, _ in drawn(images, epoch)] == together[10 * epoch : 10 * epoch + 10]


def test_epochs_of_full_batches_lose_nothing(dataset):
    images = stream(dataset)
    batches = StreamBatches(images, 4, drop_last=True)
    assert len(batches) == 6
    together = []
    for epoch in range(3):
        images.set_epoch(epoch)
        in_epoch = list(batches)
        assert [len(batch) for batch in in_epoch] == [4] * 6
        together += [(each.number, each.place) for batch in in_epoch for each in batch]
    assert together == [(number, index) for number in range(3) for index in range(TOTAL)][:72]


def test_a_stream_of_unknown_length_has_no_end(dataset):
    images = stream(dataset, num_samples=None)
    batches = StreamBatches(images, 4)
    for length in (images, batches):
        with pytest.raises(TypeError, match="length of the stream is not known"):
            len(length)
    numbers = [sample.number for batch in itertools.islice(batches, 19) for sample in batch]
    assert numbers == [0] * TOTAL + [1] * TOTAL + [2] * (76 - 2 * TOTAL)


def test_a_length_that_is_not_the_streams_is_refused(dataset):
    images = stream(dataset, num_samples=TOTAL + 1, is_length=True)
    with pytest.raises(ValueError, match=r"holds 26 images, and 27 were expected .*--num_train_samples"):
        list(StreamBatches(images, 4))
    images = stream(dataset, num_samples=10, is_length=True)
    batches = StreamBatches(images, 4)
    assert len(list(batches)) == 3
    images.set_epoch(1)
    with pytest.raises(ValueError, match=r"holds at least 11 images, and 10 were expected"):
        list(batches)


def test_a_process_without_images_is_named(dataset):
    images = stream(dataset.take(1), num_samples=5, shuffle_buffer_size=0)
    with pytest.raises(ValueError, match="Process 1 of 2 has no images"):
        list(StreamBatches(images, 2, rank=1, world_size=2))


# --- Pixels ---


def test_batches_are_the_same_for_any_number_of_workers(dataset):
    expected = loaded(stream(dataset))
    for num_workers in (1, 2):
        assert equal(loaded(stream(dataset), num_workers=num_workers), expected)
    assert not equal(loaded(stream(dataset), epoch=1), expected)


def test_pixels_of_an_image_do_not_depend_on_its_batch(dataset):
    settings = Augmentation(resized_crop_scale=(0.2, 1.0), horizontal_flip=True)
    images = stream(dataset, augmentation=settings)
    samples = list(images.samples(1))
    together = finish_batch(images.__getitems__(samples).unfinished)["pixel_values"]
    assert together[5].equal(images[samples[5]]["pixel_values"])
    two_passes = images.__getitems__([samples[5], *images.samples(2), samples[6]])
    pixels = finish_batch(two_passes.unfinished)["pixel_values"]
    assert pixels[0].equal(together[5])


def test_whole_images_are_those_of_the_stored_dataset(folder):
    paths = f"{folder}/data/train-*.parquet"
    stored = load_dataset("parquet", data_files=paths, split="train", cache_dir=f"{folder}/cache")
    settings = Augmentation(crop_padding=2, horizontal_flip=True)
    expected = ImageClassificationDataset(stored, processor(), augmentation=settings, seed=3)
    images = stream(stored.to_iterable_dataset(), augmentation=settings, shuffle_buffer_size=0)
    batch = finish_batch(images.__getitems__(list(images.samples(0))).unfinished)
    expected_batch = finish_batch(expected.__getitems__(list(range(TOTAL))).unfinished)
    assert batch["pixel_values"].equal(expected_batch["pixel_values"])
    assert batch["labels"].equal(expected_batch["labels"])


def test_grey_images_and_arrays(dataset):
    grey = ImageStream(dataset, processor(channels=1), num_channels=1, augmentation=CROPS)
    assert grey.__getitems__(list(itertools.islice(grey.samples(0), 3))).unfinished["pixel_values"].shape == (
        3,
        1,
        8,
        8,
    )
    arrays = np.random.default_rng(0).integers(0, 2**16, (3, 12, 10, 3), dtype=np.uint16)
    features = Features({"image": Array3D((12, 10, 3), "uint16"), "label": Value("int64")})
    rows = Dataset.from_dict({"image": arrays, "label": [0, 1, 2]}, features=features)
    images = ImageStream(rows.to_iterable_dataset(), processor(), shuffle_buffer_size=0)
    expected = ImageClassificationDataset(rows, processor())
    batch = images.__getitems__(list(images.samples(0)))
    assert batch.unfinished["pixel_values"].equal(expected.__getitems__([0, 1, 2]).unfinished["pixel_values"])


def test_a_stream_can_be_sent_to_workers_that_are_started_anew(dataset):
    images = stream(dataset)
    copy = pickle.loads(pickle.dumps(images))
    samples = list(itertools.islice(images.samples(0), 4))
    assert (
        copy.__getitems__(samples)
        .unfinished["pixel_values"]
        .equal(images.__getitems__(samples).unfinished["pixel_values"])
    )


# --- Faults ---


@pytest.mark.parametrize("settings", [None, CROPS])
def test_damaged_images_are_named_or_left_out(settings, caplog):
    whole = image_bytes(4)
    contents = [whole[0], b"no image", jpeg(2, (200, 200))[:1500], whole[3]]
    rows = [{"image": {"bytes": each, "path": f"{row}.jpg"}, "label": 0} for row, each in enumerate(contents)]
    images = stream(of_images(rows), augmentation=settings, shuffle_buffer_size=0)
    samples = list(images.samples(0))
    with pytest.raises(ValueError, match=r"Image 1 of pass 0 over the stream \('1.jpg'\) cannot .* not an image of a"):
        images.__getitems__(samples)
    with pytest.raises(ValueError, match=r"Image 2 .* truncated.*skip_damaged"):
        images.__getitems__(samples[2:])
    images.skip_damaged = True
    batch = images.__getitems__(samples).unfinished
    assert batch["pixel_values"].equal(images.__getitems__([samples[0], samples[3]]).unfinished["pixel_values"])
    assert all(len(values) == 2 for values in batch.values())
    assert caplog.text.count("It is left out") == 2
    with pytest.raises(ValueError, match="None of the 2 images of a batch can be read"):
        images.__getitems__(samples[1:3])


def test_labels_that_are_no_classes_are_named(dataset):
    rows = [{"image": {"bytes": each, "path": None}, "label": label} for each, label in zip(image_bytes(3), "abc")]
    features = Features({"image": Image(), "label": Value("string")})
    images = stream(of_images(rows, features), class_numbers={"a": 1, "b": 0}, shuffle_buffer_size=0)
    samples = list(images.samples(0))
    assert images.__getitems__(samples[:2]).unfinished["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"Image 2 .* has the label 'c'; the labels of this stream are 'a', 'b'"):
        images.__getitems__(samples)
    images.class_numbers = None
    with pytest.raises(ValueError, match=r"has the label 'a'; .* integers of at least 0"):
        images.__getitems__(samples[:1])


def test_who_asks_for_images_by_number_is_told_how_to_get_them(dataset):
    """As another Trainer does."""
    images = stream(dataset)
    for ask in (lambda: images[0], lambda: next(iter(DataLoader(images, batch_size=2, collate_fn=list)))):
        with pytest.raises(ValueError, match=r"asked for image \d, but .* as LayerShuffleTrainer draws them"):
            ask()


def test_arguments_are_checked(dataset):
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        stream(dataset, num_samples=0)
    with pytest.raises(ValueError, match="`shuffle_buffer_size` is -1"):
        stream(dataset, shuffle_buffer_size=-1)
    with pytest.raises(ValueError, match="`num_channels` is 4"):
        stream(dataset, num_channels=4)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        StreamBatches(stream(dataset), 0)
    with pytest.raises(ValueError, match="columns 'img', 'label' and no 'image'"):
        stream(dataset.rename_column("image", "img"))
    with pytest.raises(ValueError, match="None of the first 100 images"):
        stream(of_images([{"image": {"bytes": b"no", "path": None}, "label": 0}]))
