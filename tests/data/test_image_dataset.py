import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, concatenate_datasets, load_from_disk
from support.images import image_dataset, processor, random_images
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, ViTImageProcessor, default_data_collator

import hf_layershuffle as ls
from hf_layershuffle.data import Augmentation
from hf_layershuffle.data.augmentation import crop, crop_indices, finish_batch
from hf_layershuffle.data.image_dataset import ImageClassificationDataset, collate_for_device, collate_images
from hf_layershuffle.data.image_fingerprint import fingerprint_images
from hf_layershuffle.data.pixel_cache import load_pixels


AUGMENTATION = {"augment": True, "crop_padding": 2, "horizontal_flip": True, "seed": 1}


@pytest.fixture
def on_disk(tmp_path):
    """A dataset that has files, as those that `load_dataset` makes."""
    DatasetDict({"train": image_dataset(20)}).save_to_disk(tmp_path / "data")
    return load_from_disk(tmp_path / "data")["train"]


def cache_files(dataset) -> list:
    return sorted(Path(dataset.cache_files[0]["filename"]).parent.glob("*layershuffle*"))


@pytest.fixture
def decoded(monkeypatch):
    """Rows decoded; grows whenever images are."""
    rows, decode = [], ImageClassificationDataset._decode_intact
    monkeypatch.setattr(
        ImageClassificationDataset,
        "_decode_intact",
        lambda self, indices: (rows.extend(indices), decode(self, indices))[1],
    )
    return rows


def pixels(dataset) -> torch.Tensor:
    return collate_images(dataset.__getitems__(list(range(len(dataset)))))["pixel_values"]


# --- The file of decoded images ---


def test_images_are_decoded_once_into_a_file_beside_the_datasets_own(on_disk, decoded):
    first = ImageClassificationDataset(on_disk, processor())
    (file,) = cache_files(on_disk)
    assert file.stat().st_size == 20 * 3 * 8 * 8 + 20
    assert decoded == [0, *range(20)]  # the first one tells the size
    decoded.clear()
    second = ImageClassificationDataset(on_disk, processor())
    assert pixels(second).equal(pixels(first))
    assert decoded == [0]
    in_memory = ImageClassificationDataset(image_dataset(20), processor())
    assert pixels(second).equal(pixels(in_memory))


def test_another_size_subset_or_channel_count_is_another_file_and_another_mean_is_not(on_disk):
    kwargs = {"image_mean": [0.1] * 3, "image_std": [1.0] * 3}
    ImageClassificationDataset(on_disk, processor())
    ImageClassificationDataset(on_disk, type(processor())(size={"height": 8, "width": 8}, **kwargs))
    assert len(cache_files(on_disk)) == 1
    ImageClassificationDataset(on_disk, processor(12))
    ImageClassificationDataset(on_disk, processor(channels=1), num_channels=1)
    subset = ImageClassificationDataset(on_disk.select([3, 1]), processor())
    assert len(cache_files(on_disk)) == 4
    assert pixels(subset).equal(pixels(ImageClassificationDataset(on_disk, processor()))[[3, 1]])


@pytest.mark.parametrize("reason", ["disabled", "limit", "disk", "folder"])
def test_without_a_place_for_the_file_images_are_the_same(on_disk, decoded, monkeypatch, reason):
    expected = pixels(ImageClassificationDataset(image_dataset(20), processor()))
    limit, full = 2**30, type("usage", (), {"free": 0})
    if reason == "disabled":
        monkeypatch.setattr("hf_layershuffle.data.pixel_cache.is_caching_enabled", lambda: False)
    elif reason == "limit":
        limit = 20 * 3 * 8 * 8 - 1
    elif reason == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    else:

        def refuse(*args, **kwargs):
            raise PermissionError("read-only")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    dataset = ImageClassificationDataset(on_disk, processor(), max_cached_bytes=limit)
    assert cache_files(on_disk) == []
    decoded.clear()
    assert pixels(dataset).equal(expected)
    assert len(decoded) == (20 if reason == "limit" else 0)


def test_a_file_that_was_cut_off_is_written_anew(on_disk):
    expected = pixels(ImageClassificationDataset(on_disk, processor()))
    (file,) = cache_files(on_disk)
    file.write_bytes(file.read_bytes()[:100])
    assert pixels(ImageClassificationDataset(on_disk, processor())).equal(expected)
    assert file.stat().st_size == 20 * 3 * 8 * 8 + 20


def test_a_failure_leaves_no_file_behind(on_disk):
    def decode(indices):
        raise ValueError("The image in row 3 cannot be read")

    with pytest.raises(ValueError, match="row 3"):
        load_pixels(on_disk, decode, (3, 8, 8), {}, max_bytes=2**30)
    assert cache_files(on_disk) == []


def test_two_processes_that_decode_at_once_do_not_disturb_each_other(on_disk):
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    results = []

    def load(decode):
        results.append(load_pixels(on_disk, decode, (3, 8, 8), {}, max_bytes=2**30)[0])

    def decode_while_the_other_starts_and_ends(indices):
        load(lambda indices: (images[indices], []))
        return images[indices], []

    load(decode_while_the_other_starts_and_ends)
    assert len(results) == 2 and all(result.equal(images) for result in results)
    assert len(cache_files(on_disk)) == 1


def test_the_mapped_images_cannot_be_changed_by_their_reader(on_disk):
    first = ImageClassificationDataset(on_disk, processor())
    expected = pixels(first)
    first._pixels.fill_(0)
    assert pixels(ImageClassificationDataset(on_disk, processor())).equal(expected)


# --- What the file belongs to ---


def files_dataset(folder: Path, seed: int = 0, size=(8, 8)):
    """Images that are files, as of an image folder, and a dataset with cache files that names them."""
    for row, image in enumerate(random_images(4, size=size, seed=seed)):
        image.save(folder / f"{row}.bmp")  # of the same length whatever is in them
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    paths = [str(folder / f"{row}.bmp") for row in range(4)]
    if not (folder / "data.arrow").exists():
        dataset = Dataset.from_dict({"image": paths, "label": [0, 1, 0, 1]}, features=features)
        dataset.map(lambda row: row, cache_file_name=str(folder / "data.arrow"))
    return Dataset.from_file(str(folder / "data.arrow"))


@pytest.mark.parametrize("size", [(8, 8), (200, 200)])
def test_images_replaced_with_the_same_size_and_time_are_decoded_anew(tmp_path, size):
    dataset = files_dataset(tmp_path, size=size)
    before, times = pixels(ImageClassificationDataset(dataset, processor())), {}
    for path in tmp_path.glob("*.bmp"):
        times[path] = path.stat()
    files_dataset(tmp_path, seed=1, size=size)
    for path, stat in times.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    after = pixels(ImageClassificationDataset(Dataset.from_file(str(tmp_path / "data.arrow")), processor()))
    assert not after.equal(before)
    assert after.equal(
        pixels(ImageClassificationDataset(dataset.map(lambda row: row, keep_in_memory=True), processor()))
    )


def test_a_dataset_written_anew_under_the_same_name_is_decoded_anew(tmp_path):
    stored = []
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        folder = tmp_path / f"cache{seed}"
        image_dataset(6, seed=seed).save_to_disk(folder)
        dataset = load_from_disk(folder)
        dataset._fingerprint = "the same"
        stored.append(fingerprint_images(dataset))
    assert stored[0] != stored[1]


def test_other_labels_of_the_same_images_use_the_same_file(on_disk, decoded):
    ImageClassificationDataset(on_disk, processor())
    decoded.clear()
    relabelled = on_disk.remove_columns("label").add_column("label", [1] * 20)
    assert ImageClassificationDataset(relabelled, processor()).labels.tolist() == [1] * 20
    assert len(cache_files(on_disk)) == 1 and decoded == [0]


def test_large_stores_are_sampled_but_all_lengths_are_read(monkeypatch):
    monkeypatch.setattr("hf_layershuffle.data.image_fingerprint.WHOLE_BYTES", 0)
    monkeypatch.setattr("hf_layershuffle.data.image_fingerprint.BLOCK", 8)
    data = image_dataset(20)

    def fingerprint(change) -> str:
        contents = [image["bytes"] for image in data.cast_column("image", Image(decode=False))["image"]]
        change(contents)
        images = [{"bytes": content, "path": None} for content in contents]
        return fingerprint_images(Dataset.from_dict({"image": images, "label": data["label"]}, features=data.features))

    def move_the_boundary(contents):  # all bytes stay where they are
        contents[13], contents[14] = contents[13] + contents[14][:1], contents[14][1:]

    def replace_some(contents):
        contents[10:14] = [bytes(len(content)) for content in contents[10:14]]

    def replace_one_byte(contents):
        contents[0] = contents[0][:20] + b"?" + contents[0][21:]

    same = fingerprint(lambda contents: None)
    assert fingerprint(move_the_boundary) != same and fingerprint(replace_some) != same
    assert fingerprint(replace_one_byte) == same
    monkeypatch.setattr("hf_layershuffle.data.image_fingerprint.WHOLE_BYTES", 2**30)
    assert fingerprint(replace_one_byte) != fingerprint(lambda contents: None)


def test_what_a_killed_writer_left_is_removed(on_disk):
    folder = Path(on_disk.cache_files[0]["filename"]).parent

    def die(indices):
        os._exit(9)

    if (child := os.fork()) == 0:
        load_pixels(on_disk, die, (3, 8, 8), {}, max_bytes=2**30)
    os.waitpid(child, 0)
    assert len(list(folder.glob(".layershuffle-pixels-*.partial-*"))) == 1
    ImageClassificationDataset(on_disk, processor(12))  # another cache file in the same folder
    assert not list(folder.glob(".layershuffle-pixels-*.partial-*"))


def test_damaged_images_are_remembered_beside_the_others(tmp_path, decoded):
    files_dataset(tmp_path)
    (tmp_path / "2.bmp").write_bytes(b"broken")
    dataset = Dataset.from_file(str(tmp_path / "data.arrow"))
    with pytest.raises(ValueError, match="row 2"):
        ImageClassificationDataset(dataset, processor())
    assert cache_files(dataset) == []
    kept = ImageClassificationDataset(dataset, processor(), skip_damaged=True)
    decoded.clear()
    again = ImageClassificationDataset(dataset, processor(), skip_damaged=True)
    assert len(again) == 3 and decoded == [0] and pixels(again).equal(pixels(kept))
    with pytest.raises(ValueError, match="row 2"):
        ImageClassificationDataset(dataset, processor())


def test_images_of_several_sizes_need_a_processor_that_resizes():
    dataset = concatenate_datasets([image_dataset(256), image_dataset(256, size=(9, 9))])
    as_they_are = ViTImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match=r"as \[3, 8, 8\] and as \[3, 9, 9\]; it must resize all to one size"):
        ImageClassificationDataset(dataset, as_they_are)


# --- Batches ---


@pytest.mark.parametrize("augmentation", [{}, AUGMENTATION])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_collators_give_the_same_batches(augmentation, num_workers):
    dataset = ImageClassificationDataset(image_dataset(20), processor(), **augmentation)
    loaders = [
        DataLoader(Subset(dataset, range(1, 20)), batch_size=8, num_workers=num_workers, collate_fn=collate)
        for collate in (default_data_collator, collate_images, collate_for_device)
    ]
    for expected, finished, unfinished in zip(*loaders):
        assert (unfinished["pixel_values"].dtype == torch.uint8) == bool(augmentation)
        for batch in (finished, finish_batch(unfinished)):
            assert sorted(batch) == ["labels", "pixel_values"]
            assert batch["pixel_values"].equal(expected["pixel_values"])
            assert batch["labels"].equal(expected["labels"]) and batch["labels"].dtype == torch.long


def test_a_batch_can_be_pinned():
    """Pinning refuses tensors of which several elements are one place in memory, such as expanded ones."""
    for preset in ("light", "deit"):
        images = ImageClassificationDataset(
            image_dataset(4), processor(), augmentation=Augmentation.from_preset(preset)
        )
        batch = images.__getitems__([0, 1, 2]).unfinished
        assert {name: value.is_contiguous() for name, value in batch.items()} == dict.fromkeys(batch, True)


def test_a_crop_is_a_shift_of_the_image_on_black(vit):
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    rows, columns = crop_indices(torch.tensor([[1, -2]]), torch.tensor([False]), (3, 4))
    assert crop(image, rows, columns)[0, 0].tolist() == [[0, 0, 5, 6], [0, 0, 9, 10], [0, 0, 0, 0]]
    rows, columns = crop_indices(torch.tensor([[0, 0]]), torch.tensor([True]), (3, 4))
    assert crop(image, rows, columns).equal(image.flip(-1))


@pytest.mark.parametrize("trainer_class", [ls.LayerShuffleTrainer, Trainer])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainer_feeds_the_augmented_images_of_each_epoch(vit, tmp_path, trainer_class, num_workers):
    dataset = ImageClassificationDataset(image_dataset(20), processor(), **AUGMENTATION)
    model, seen = vit.classifier(num_labels=2), []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    args = ls.LayerShuffleTrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no",
        dataloader_num_workers=num_workers, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(model, args, train_dataset=dataset, callbacks=[ls.LayerShuffleCallback()])
    trainer.train()
    assert [len(batch["labels"]) for batch in seen] == [8, 8, 4] * 2
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = {tuple(image.flatten().tolist()): label for image, label in map(dict.values, dataset)}
        batches = seen[3 * epoch : 3 * epoch + 3]
        fed = {
            tuple(image.flatten().tolist()): int(label)
            for batch in batches
            for image, label in zip(batch["pixel_values"], batch["labels"])
        }
        assert fed == expected and len(fed) == 20
    assert all(batch["pixel_values"].dtype == torch.float32 for batch in seen)


def test_the_trainer_still_removes_columns_of_other_datasets(vit, tmp_path):
    items = [{"pixel_values": torch.randn(3, 8, 8), "labels": 1, "name": index} for index in range(4)]
    args = ls.LayerShuffleTrainingArguments(tmp_path, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = ls.LayerShuffleTrainer(vit.classifier(), args, train_dataset=items)
    assert sorted(next(iter(trainer.get_train_dataloader()))) == ["labels", "pixel_values"]


@pytest.mark.parametrize("family", ["CLIP", "Bit", "Beit", "Siglip", "ViT"])
def test_images_of_unequal_sizes_become_what_each_familys_processor_makes_of_them(family):
    square = {"height": 16, "width": 16}
    settings = {
        "CLIP": {"size": {"shortest_edge": 18}, "crop_size": square},
        "Bit": {"size": {"shortest_edge": 16}, "crop_size": square},
        "Beit": {"size": {"height": 20, "width": 20}, "crop_size": square, "do_center_crop": True},
    }.get(family, {"size": square})
    image_processor = getattr(transformers, f"{family}ImageProcessorPil")(**settings)
    images = [image for size in ((16, 16), (20, 50), (41, 17), (7, 9)) for image in random_images(1, size)]
    data = Dataset.from_dict({"image": images, "label": [0] * 4}, features=image_dataset(1).features)
    dataset = ImageClassificationDataset(data, image_processor)
    expected = image_processor(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(torch.stack([item["pixel_values"] for item in dataset]), expected, atol=1e-5, rtol=1e-5)


def test_a_processor_without_one_size_or_with_patches_is_one_line():
    images = [image for size in ((16, 16), (20, 50)) for image in random_images(1, size)]
    data = Dataset.from_dict({"image": images, "label": [0] * 2}, features=image_dataset(1).features)
    uneven = transformers.CLIPImageProcessorPil(size={"shortest_edge": 18}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"as \[3, 18, 18\] and as \[3, 18, 45\]; it must resize all to one size"):
        ImageClassificationDataset(data, uneven)
    with pytest.raises(ValueError, match="Siglip2ImageProcessorPil makes lists of patches of images"):
        ImageClassificationDataset(data, transformers.Siglip2ImageProcessorPil())
