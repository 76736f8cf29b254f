"""Small datasets in files that can be streamed: Parquet and tar files (WebDataset)."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


def jpeg(number: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    """A smooth image of (width, height) `size`, each `number` another one."""
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(coarse).resize(size, PILImage.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def image_bytes(count: int) -> list[bytes]:
    """Images of different sizes."""
    return [jpeg(number, (20 + number % 7, 16 + number % 5)) for number in range(count)]


def write_parquet(folder: Path, shards=(7, 6, 8, 5), test: int = 10, names=("cat", "dog")) -> str:
    """Of the form of ImageNet-1k's files: `data/train-00000-of-00004.parquet`, columns `image` and `label`."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    (folder / "data").mkdir(parents=True)
    images = image_bytes(sum(shards) + test)
    for split, sizes in (("train", shards), ("validation", (test,))):
        for shard, size in enumerate(sizes):
            rows = [
                {"image": {"bytes": images.pop(0), "path": None}, "label": row % len(names)} for row in range(size)
            ]
            path = folder / "data" / f"{split}-{shard:05d}-of-{len(sizes):05d}.parquet"
            Dataset.from_list(rows, features=features).to_parquet(path)
    return str(folder)


def write_tars(folder: Path, shards=(7, 6, 8, 5), test: int = 10, num_classes: int = 2, field: str = "") -> str:
    """Tar files of `00000001.jpg` and `00000001.cls`, as WebDataset names them, or `00000001.json` with a field."""
    folder.mkdir(parents=True)
    images = image_bytes(sum(shards) + test)
    number = 0
    for split, sizes in (("train", shards), ("test", (test,))):
        for shard, size in enumerate(sizes):
            with tarfile.open(folder / f"{split}-{shard:05d}.tar", "w") as file:
                for _ in range(size):
                    label = ("cls", str(number % num_classes).encode())
                    if field:
                        label = ("json", json.dumps({"width": 20, field: number % num_classes}).encode())
                    for suffix, content in (("jpg", images[number]), label):
                        member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                        member.size = len(content)
                        file.addfile(member, io.BytesIO(content))
                    number += 1
    return str(folder)
