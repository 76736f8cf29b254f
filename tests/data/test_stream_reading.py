"""What a stream reads are the files as they were stored, with their names; what fails is named by its file."""

import io
import tarfile

import pytest
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from support.images import processor, write_images
from support.streams import image_bytes, write_parquet, write_tars

from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.data.streamed_splits import load_image_stream


STORED = image_bytes(26)


def stream_of(folder, **kwargs) -> ImageStream:
    splits = load_image_stream(str(folder))
    kwargs = {"shuffle_buffer_size": 0, "class_numbers": splits.class_numbers, "files": splits.files, **kwargs}
    return ImageStream(splits.stream, processor(), **kwargs)


def contents(images: ImageStream) -> list[bytes]:
    return [sample.image["bytes"] for sample in images.samples(0)]


def write_tar(path, *members: tuple[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def labelled(row: int, label: bytes = b"1", content: bytes | None = None) -> list[tuple[str, bytes]]:
    return [(f"{row:04d}.jpg", STORED[row] if content is None else content), (f"{row:04d}.cls", label)]


def write_parquet_with_names(folder, image_column: str, label_column: str) -> None:
    features = Features({image_column: Image(), label_column: ClassLabel(names=["cat", "dog"]), "id": Image()})
    for split in ("train", "test"):
        rows = [{image_column: {"bytes": each, "path": f"{row}.jpg"}, label_column: row % 2, "id": None}
                for row, each in enumerate(STORED)]  # fmt: skip
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")


# --- The files as they are ---


def test_images_of_tar_files_are_those_of_the_files_and_keep_their_names(tmp_path):
    images = stream_of(write_tars(tmp_path / "tars"))
    assert contents(images) == STORED
    assert [sample.image["path"] for sample in images.samples(0)] == [f"{row:08d}.jpg" for row in range(26)]


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("image", "fine_label")])
def test_images_of_parquet_files_are_those_of_the_files_and_keep_their_names(tmp_path, columns):
    write_parquet_with_names(tmp_path, *columns)
    images = stream_of(tmp_path)
    assert contents(images) == STORED
    assert [sample.image["path"] for sample in images.samples(0)] == [f"{row}.jpg" for row in range(26)]


def test_images_of_folders_are_read_by_the_workers(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path, *(f"{split}/{name}/{row}.png" for name in ("ant", "bee") for row in range(3)))
    read = [sample.image for sample in stream_of(tmp_path).samples(0)]
    assert all(image["bytes"] is None and image["path"].endswith(".png") for image in read)


def test_a_stream_that_is_filtered_and_mapped_keeps_the_files(tmp_path, caplog):
    splits = load_image_stream(write_tars(tmp_path / "tars"))
    kept = splits.stream.filter(lambda row: row["label"] == 1).map(lambda row: {"label": 0}, features=None)
    kept = kept.cast(splits.stream.features)
    images = ImageStream(kept, processor(), shuffle_buffer_size=0)
    assert contents(images) == STORED[1::2] and not caplog.text


def test_a_stream_that_was_renamed_with_decoded_images_warns(tmp_path, caplog):
    write_parquet_with_names(tmp_path, "img", "label")
    dataset = load_dataset("parquet", data_files=f"{tmp_path}/train.parquet", split="train", streaming=True)
    images = ImageStream(dataset.rename_columns({"img": "image"}), processor(), shuffle_buffer_size=0)
    assert contents(images) != STORED
    assert caplog.text.count("encoded anew, with loss; cast its column before") == 1
    caplog.clear()
    dataset = dataset.cast_column("img", Image(decode=False)).rename_columns({"img": "image"})
    assert contents(ImageStream(dataset, processor(), shuffle_buffer_size=0)) == STORED and not caplog.text


def test_the_first_images_are_decoded_for_those_who_look_at_them(tmp_path):
    head = load_image_stream(write_parquet(tmp_path / "images")).head()
    assert head[3]["image"].size == (23, 19)


# --- Faults ---


def test_damaged_images_of_tar_files_are_named_or_left_out(tmp_path, caplog):
    write_tar(tmp_path / "train-0.tar", *labelled(0), *labelled(1, content=b"no image"), *labelled(2))
    write_tar(tmp_path / "test-0.tar", *labelled(3), *labelled(4, b"0"))
    images = stream_of(tmp_path)
    samples = list(images.samples(0))
    with pytest.raises(ValueError, match=r"Image 1 of pass 0 over the stream \('0001.jpg'\) cannot be read"):
        images.__getitems__(samples)
    images.skip_damaged = True
    assert images.__getitems__(samples).unfinished["labels"].tolist() == [1, 1]
    assert "('0001.jpg') cannot be read: it is not an image of a known format. It is left out" in caplog.text
    assert len(load_image_stream(str(tmp_path)).head()) == 3


def test_an_image_that_is_missing_is_said_to_be(tmp_path):
    write_tar(tmp_path / "train-0.tar", *(each for row in range(6) for each in labelled(row)), ("0009.cls", b"1"))
    write_tar(tmp_path / "test-0.tar", *labelled(3), *labelled(4, b"0"))
    images = stream_of(tmp_path)
    with pytest.raises(ValueError, match=r"Image 6 of .* cannot be read: it is missing"):
        images.__getitems__(list(images.samples(0)))


def test_labels_that_are_no_classes_are_named_by_their_image(tmp_path):
    write_tar(tmp_path / "train-0.tar", *labelled(0), *labelled(1, b"7"))
    write_tar(tmp_path / "test-0.tar", *labelled(3), *labelled(4, b"0"))
    images = stream_of(tmp_path)
    with pytest.raises(ValueError, match=r"Image 1 of pass 0 over the stream \('0001.jpg'\) has the label 7"):
        images.__getitems__(list(images.samples(0)))


def test_a_label_that_cannot_be_read_is_named_by_its_file_and_the_image_before(tmp_path):
    write_tar(tmp_path / "train-0.tar", *(each for row in range(6) for each in labelled(row)), *labelled(6, b"1.0"))
    write_tar(tmp_path / "test-0.tar", *labelled(3), *labelled(4, b"0"))
    with pytest.raises(ValueError, match=r"train-0.tar' cannot be read behind the image '0005.jpg': .*b'1.0'"):
        list(stream_of(tmp_path).samples(0))
    with pytest.raises(ValueError, match=r"train-0.tar' cannot be read behind the image '0005.jpg'"):
        load_image_stream(str(tmp_path)).head()


def test_files_without_images_are_passed_over_wherever_they_are(tmp_path):
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar")
        write_tar(tmp_path / f"{split}-1.tar", *labelled(0), *labelled(1, b"0"))
        write_tar(tmp_path / f"{split}-2.tar")
    images = stream_of(tmp_path)
    assert contents(images) == STORED[:2] and images.num_pieces == 3
    write_tar(tmp_path / "train-1.tar")
    with pytest.raises(ValueError, match=r"all tar files of a split are empty: '.*train-0.tar', '.*train-1.tar', ..."):
        stream_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100])
def test_files_that_cannot_be_read_are_named(tmp_path, content):
    write_tar(tmp_path / "train-0.tar", *labelled(0), *labelled(1, b"0"))
    write_tar(tmp_path / "test-0.tar", *labelled(0), *labelled(1, b"0"))
    (tmp_path / "train-1.tar").write_bytes(content)
    images = stream_of(tmp_path)
    with pytest.raises(ValueError, match=r"train-1.tar' cannot be read at its first image: .* Mend the file or leave"):
        list(images.samples(0))
    splits = load_image_stream(str(tmp_path))
    with pytest.raises(ValueError, match="Part 1 of 2 of the stream cannot be read"):
        list(ImageStream(splits.stream, processor(), shuffle_buffer_size=0).samples(0))
    (tmp_path / "train-0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be streamed: '.*train-0.tar' cannot be read: "):
        stream_of(tmp_path)
