"""The datasets of a run, where some images or labels are not as one would wish."""

import pytest
from datasets import Dataset, Image
from support.images import image_dataset, in_classes, random_images, write_images

from hf_layershuffle.training.session import TrainingSession


SMALL = """
    --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --per_device_train_batch_size 4 --max_steps 1
    --eval_strategy no --save_strategy no --use_cpu --disable_tqdm True --report_to none
""".split()


def write_some_broken(folder, broken: set[int], count: int = 12) -> str:
    """Parquet files of images, of which some are no images."""
    for split in ("train", "test"):
        images = image_dataset(count)
        rows = images.cast_column("image", Image(decode=False)).to_list()
        for row in broken if split == "train" else ():
            rows[row]["image"] = {"bytes": b"no image", "path": f"{row}.png"}
        Dataset.from_list(rows, features=images.features).to_parquet(folder / f"{split}-0.parquet")
    return str(folder)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_damaged_first_image_is_left_out_or_named(tmp_path, streaming, caplog):
    folder = write_some_broken(tmp_path, {0})
    options = [*SMALL, "--dataset_name", folder, "--output_dir", str(tmp_path / "run"), *streaming]
    with TrainingSession([*options, "--skip_damaged"]) as session:
        assert session.train_dataset.augmentation.horizontal_flip
        assert len(session.train_dataset) == (12 if streaming else 11)
    if not streaming:
        with pytest.raises(ValueError, match=r"row 0 \('0.png'\) cannot be read: .* not an image of a known format"):
            TrainingSession(options).__enter__()


@pytest.mark.parametrize(("grey", "flips"), [({0}, True), (set(range(1, 12)), False)])
def test_most_images_say_whether_to_mirror(tmp_path, grey, flips):
    """Not the first alone."""
    features = image_dataset(1).features
    images = [random_images(1, mode="L" if row in grey else "RGB", seed=row)[0] for row in range(12)]
    for split in ("train", "test"):
        dataset = Dataset.from_dict({"image": images, "label": [0, 1] * 6}, features=features)
        dataset.to_parquet(tmp_path / f"{split}-0.parquet")
    options = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "run")]
    with TrainingSession([*SMALL, *options]) as session:
        assert session.train_dataset.augmentation.horizontal_flip == flips


def test_one_class_is_named(tmp_path):
    write_images(tmp_path / "images", *in_classes("cat", count=6))
    with pytest.raises(ValueError, match=r"images' has one class only, 'cat'; training needs at least two. Give each"):
        TrainingSession([*SMALL, "--dataset_name", str(tmp_path / "images")]).__enter__()


def test_one_class_of_texts_is_named(tmp_path):
    texts = Dataset.from_dict({"text": ["a", "b"] * 5, "label": [7] * 10})
    texts.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has one class only, '7'; training needs"):
        TrainingSession(["--task", "text-classification", "--dataset_name", str(tmp_path)]).__enter__()
