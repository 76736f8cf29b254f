"""What a training command prints at its end, or why it ended."""

import pytest
from datasets import Dataset, Image
from support.images import image_dataset

from hf_layershuffle.training import session
from hf_layershuffle.training.argument_parser import parse_arguments
from hf_layershuffle.training.outcome import next_command


@pytest.mark.parametrize("mode", ["--streaming", "--augmentation=imagenet"])
def test_an_image_that_a_worker_cannot_read_is_named_in_one_line(tmp_path, mode):
    rows = image_dataset(8).cast_column("image", Image(decode=False)).to_list()
    for split in ("test", "train"):
        Dataset.from_list(rows, features=image_dataset(1).features).to_parquet(tmp_path / f"{split}-0.parquet")
        rows[5]["image"] = {"bytes": b"no image", "path": "5.png"}
    options = """
        --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --per_device_train_batch_size 8 --max_steps 1
        --eval_strategy no --save_strategy no --use_cpu --disable_tqdm True --report_to none --dataloader_num_workers 1
    """.split()
    with pytest.raises(ValueError, match=r"^(The i|I)mage .*\('5.png'\) cannot be read: .*skip_damaged.*") as caught:
        session.run([*options, mode, "--dataset_name", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [["--train_split", "extra"], ["--eval_fraction", "0.3"]])
def test_no_next_command_that_would_evaluate_on_other_images(options):
    arguments = ["--dataset_name", "data", "--output_dir", "out", "--use_cpu"]
    for argv, is_there in (([], True), (options, False)):
        _, data_args, args = parse_arguments([*arguments, *argv])
        assert (next_command(data_args, args) is not None) == is_there
