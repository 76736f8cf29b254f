"""What a Trainer pushes while it trains, and of adapters; to the small Hub on the loopback, in one fresh process."""

import json
import time
from concurrent.futures import wait

import pytest
from conftest import REPOSITORY, run_python
from huggingface_hub import HfApi
from support.hub_server import HubServer

from hf_layershuffle.hub.published_files import package_code
from hf_layershuffle.training.hub_pushes import push_checkpoint


CODE_FILES = [path.name for path in package_code()]


PUSH = """
import sys
import peft, torch
import hf_layershuffle as ls
from pathlib import Path
from transformers import ViTImageProcessor
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from conftest import Architecture

folder, vit = Path(sys.argv[1]), Architecture("vit")
items = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(torch.randn(8, 3, 8, 8))]
processor = ViTImageProcessor(size={"height": 8, "width": 8})

def train(model, name, **kwargs):
    arguments = ls.LayerShuffleTrainingArguments(
        str(folder / name), max_steps=2, use_cpu=True, report_to="none", save_steps=1, hub_model_id=f"org/{name}",
        hub_token="hf_write", hub_always_push=True, **kwargs,
    )
    trainer = ls.LayerShuffleTrainer(model, arguments, train_dataset=items, processing_class=processor)
    trainer.train()
    return trainer

for strategy in ("every_save", "checkpoint"):
    train(vit.classifier(), strategy, push_to_hub=True, hub_strategy=strategy).push_to_hub(dataset="noise")

base = vit.classifier(shuffle_mode="arbitrary")
base.save_pretrained(folder / "base")
config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
model = peft.get_peft_model(ls.LayerShuffleViTForImageClassification.from_pretrained(folder / "base"), config)
model.add_adapter("second", config)
(folder / "lora").mkdir()
(folder / "lora" / "model.safetensors").write_text("of an earlier run")
trainer = train(model, "lora", push_to_hub=True, hub_strategy="every_save")
commit = trainer.push_to_hub(dataset="noise", commit_message="Adapter", revision="dev")
images = torch.randn(2, 3, 8, 8)
base = ls.LayerShuffleViTForImageClassification.from_pretrained(folder / "base")
loaded = peft.PeftModel.from_pretrained(base, "org/lora", revision="dev").eval()
expected = model.eval()(images, execution_order=[3, 1]).logits
torch.testing.assert_close(loaded(images, execution_order=[3, 1]).logits, expected)
try:
    from hf_layershuffle.training.hub_pushes import publish_adapter
    publish_adapter(folder / "base", "org/none")
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer() as server:
        home = tmp_path_factory.mktemp("home")
        result = run_python(
            PUSH, home / "runs", REPOSITORY / "tests", environment=server.environment(home, token=None)
        )
        assert result.returncode == 0, result.stderr
        assert "holds no adapter: 'adapter_config.json' is missing" in result.stdout
        server.folder = home / "runs"
        yield server


def test_what_is_pushed_while_training_is_a_whole_model_and_no_pickled_arguments(hub):
    for strategy in ("every_save", "checkpoint"):
        history = hub.repositories[f"org/{strategy}"].history()
        messages = [commit.message for commit in history]
        assert [m for m in messages if "checkpoint" not in m] == [
            "initial commit",
            *(f"Training in progress, step {step}" for step in (1, 2)),
            "End of training",
        ]
        model = {"config.json", "model.safetensors", "preprocessor_config.json", *CODE_FILES}
        for commit in history[1:]:
            names = {name for name in commit.files if "/" not in name} - {
                ".gitattributes",
                "README.md",
                "training.json",
            }
            assert names == model
            assert not any("training_args" in name for name in commit.files)
        kept = {name.split("/")[1] for name in history[-1].files if name.startswith("last-checkpoint/")}
        assert ({"optimizer.pt", "trainer_state.json"} <= kept) == (strategy == "checkpoint")
        weights = (hub.folder / strategy / "checkpoint-2" / "model.safetensors").read_bytes()
        assert history[-1].files["model.safetensors"] == history[-2].files["model.safetensors"] == weights
        assert history[1].files["model.safetensors"] != weights


def test_a_slow_push_does_not_come_after_a_newer_one(vit, tmp_path, monkeypatch):
    done = []

    def upload(name):
        time.sleep(0.5 if name == "first" else 0)
        done.append(name)

    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, *, commit_message, **kwargs: self.run_as_future(upload, commit_message)
    )
    vit.classifier().save_pretrained(tmp_path)
    jobs = [job for name in ("first", "second") for job in push_checkpoint(tmp_path, "org/model", commit_message=name)]
    wait(jobs)
    assert done == ["first", "second"]


def test_adapters_are_pushed_with_their_card_and_nothing_else(hub):
    repository = hub.repositories["org/lora"]
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    expected = {".gitattributes", "README.md", "preprocessor_config.json", *adapter}
    expected |= {f"second/{name}" for name in adapter}
    assert [commit.message for commit in repository.history()][-1].startswith("Training in progress")
    assert set(repository.files("main")) == expected
    files = repository.files("dev")
    assert set(files) == expected and repository.history("dev")[-1].message == "Adapter"
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    card = files["README.md"].decode()
    assert "library_name: peft" in card and "on the noise dataset" in card
