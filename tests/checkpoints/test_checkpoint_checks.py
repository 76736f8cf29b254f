"""What is no whole, trained, finite model is refused wherever one enters, in one line, and no code of it runs."""

import io
import json
import re
import shutil

import pytest
import torch
from conftest import TINY, Architecture
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    modeling_utils,
)

from hf_layershuffle.checkpoints import tensor_files
from hf_layershuffle.checkpoints.checks import check_complete
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import as_layershuffle, load_classifier
from hf_layershuffle.hub.merged_folder import merge
from hf_layershuffle.hub.published_files import check_folder
from hf_layershuffle.merging.plan import MergePlan
from hf_layershuffle_cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Architecture("vit").classifier(shuffle_mode="arbitrary").save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_index(folder, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def as_pickle(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_stopped_run(folder):
    """Its last checkpoint lacks its weights."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-11"):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(folder / file, folder / name)
    (folder / "checkpoint-11" / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def as_stopped_run_of_an_adapter(folder):
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "adapter_config.json").write_text("{}")
    for path in (folder / "config.json", folder / "model.safetensors"):
        path.unlink()


BROKEN = {
    "no head": (
        lambda f: edit_weights(f, lambda t: [t.pop("classifier.weight"), t.pop("classifier.bias")]),
        r"no trained image classifier: its weights lack classifier\.bias, classifier\.weight\. .* fine-tune it first",
    ),
    "a layer's tensor is missing": (
        lambda f: edit_weights(f, lambda t: t.pop("vit.layers.2.mlp.fc1.weight")),
        r"lacks? (tensors of this model: )?vit\.layers\.2\.mlp\.fc1\.weight\. .* incomplete|not complete",
    ),
    "deeper": (lambda f: edit_config(f, num_hidden_layers=5), r"lacks? .*vit\.layers\.4\..* and 1[23] more"),
    "shallower": (
        lambda f: edit_config(f, num_hidden_layers=3),
        r"holds weights of layers .* no place: vit\.layers\.3\.",
    ),
    "NaN": (
        lambda f: edit_weights(f, lambda t: t["vit.layers.1.mlp.fc1.bias"].fill_(float("nan"))),
        r"holds NaN or infinite values in vit\.layers\.1\.mlp\.fc1\.bias\. Its training diverged",
    ),
    "infinity": (
        lambda f: edit_weights(f, lambda t: t["classifier.weight"].__setitem__((0, 0), -float("inf"))),
        r"NaN or infinite values in classifier\.weight",
    ),
    "a run that was stopped": (
        as_stopped_run,
        r"holds checkpoints of a training, and no model beside them. Take a checkpoint: '.*checkpoint-10'",
    ),
    "a run of an adapter": (as_stopped_run_of_an_adapter, r"checkpoint-9' holds a PEFT adapter"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"holds a PEFT adapter.*merge_and_unload"),
    "pickle": (as_pickle, r"pytorch_model\.bin: pickles.*Take a checkpoint with safetensors"),
    "an index without weight_map": (lambda f: as_index(f, "{}"), "cannot be read|no safetensors weights"),
    "an index that is a list": (lambda f: as_index(f, "[]"), "cannot be read|no safetensors weights"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "ZeroDivisionError"),
    "a word for a number": (lambda f: edit_config(f, hidden_size="many"), "hidden_size"),
    "an unknown activation": (lambda f: edit_config(f, hidden_act="nope"), "'nope'"),
    "nested JSON": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "cannot be read|not valid JSON|nested more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_wherever_it_enters(folder, how):
    break_it, message = BROKEN[how]
    break_it(folder)
    for use in (load_classifier, lambda f: load_classifier(f, as_saved=True)):
        with pytest.raises((ValueError, OSError), match=message) as error:
            use(str(folder))
        assert "weights_only" not in str(error.value)
    with pytest.raises((ValueError, OSError), match=message):
        check_folder(folder)


def test_a_model_without_a_trained_head_is_refused(vit, tmp_path):
    vit.plain_model_class(vit.plain_classifier().config).save_pretrained(tmp_path / "base")
    ViTForMaskedImageModeling(ViTConfig(**TINY, encoder_stride=4)).save_pretrained(tmp_path / "masked")
    DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY)).save_pretrained(tmp_path / "distilled")
    for name, message in (
        ("base", "fine-tune it first"),
        ("masked", "fine-tune it first"),
        ("distilled", "a distilled DeiT, whose two heads"),
    ):
        for use in (load_classifier, check_folder):
            with pytest.raises(ValueError, match=rf"lack classifier\.bias, classifier\.weight\. .*{message}"):
                use(tmp_path / name)
        plan = MergePlan(sources={"a": str(tmp_path / name)}, layers=[{"source": "a", "layer": 0}])
        with pytest.raises(ValueError, match="Sources must be complete image classifiers"):
            merge(plan, tmp_path / "merged", progress=False)


def test_a_sound_model_is_loaded_without_a_word(folder, caplog):
    filters = list(modeling_utils.logger.filters)
    load_classifier(str(folder))
    assert not caplog.records and modeling_utils.logger.filters == filters


def test_what_is_asked_for_anew_may_be_missing(folder):
    model = load_classifier(str(folder), depth_embedding=True, position_predictor=True)
    assert model.base_model.depth_embedding is not None
    with pytest.raises(ValueError, match=r"lacks tensors of this model: classifier\.bias"):
        edit_weights(folder, lambda tensors: tensors.pop("classifier.bias"))
        load_classifier(str(folder), depth_embedding=True)


def test_layers_may_be_left_out_by_request(folder):
    assert load_classifier(str(folder), num_hidden_layers=2).config.num_hidden_layers == 2


def test_checkpoints_beside_a_model_do_not_matter(folder):
    (folder / "checkpoint-9").mkdir()
    shutil.copy(folder / "config.json", folder / "checkpoint-9")
    assert load_classifier(str(folder)).config.num_hidden_layers == 4


def test_a_model_may_lie_in_a_subfolder(folder):
    assert load_classifier(str(folder.parent), subfolder="model").config.shuffle_mode == "arbitrary"
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model' holds a PEFT adapter"):
        load_classifier(str(folder.parent), subfolder="model")


def test_weights_that_are_offloaded_to_disk_are_passed_over(folder, tmp_path):
    places = {"vit": "disk", "classifier": "cpu"}
    model = load_classifier(str(folder), device_map=places, offload_folder=str(tmp_path / "weights"))
    images = torch.randn(2, 3, 8, 8)
    expected = load_classifier(str(folder)).eval()(images, execution_order=[2, 0]).logits
    torch.testing.assert_close(model.eval()(images, execution_order=[2, 0]).logits, expected)


def bring_code(folder, where: str):
    """Gives a model code for its configuration or its image processor; returns the file that the code writes."""
    marker = folder / "ran"
    code = (
        "import pathlib\npathlib.Path({!r}).touch()\n"
        "from transformers import {} as Base\n\n\nclass Theirs(Base):\n    pass\n"
    )
    kind = "ViTConfig" if where == "config" else "ViTImageProcessor"
    (folder / "theirs.py").write_text(code.format(str(marker), kind))
    if where == "config":
        edit_config(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.Theirs"})
    else:
        values = {"image_processor_type": "Theirs", "auto_map": {"AutoImageProcessor": "theirs.Theirs"}}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return marker


@pytest.mark.parametrize("where", ["config", "image processor"])
def test_code_that_a_model_brings_runs_only_by_request(folder, where, monkeypatch, capsys):
    marker = bring_code(folder, where)
    load = load_classifier if where == "config" else load_image_processor
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")
    with pytest.raises(ValueError, match=r"comes with code of its own, which is not run.*--trust_remote_code"):
        load(str(folder))
    arguments = ["evaluate", folder, "--dataset_name", "digits", "--output_dir", folder.parent / "out"]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "--trust_remote_code" in errors.splitlines()[-1] and not marker.exists()
    run(monkeypatch, capsys, *arguments, "--trust_remote_code")
    assert marker.exists()


TRAIN = """
    train --max_train_samples 64 --max_eval_samples 40 --max_steps 1 --save_strategy no --eval_strategy no
    --final_eval_orders 8 --use_cpu --num_threads 1 --ignore_mismatched_sizes --output_dir out
""".split()


@pytest.mark.parametrize(
    ("argument", "where"),
    [
        ("--model_name_or_path", "image processor"),
        ("--teacher_model_name_or_path", "image processor"),
        ("--teacher_model_name_or_path", "config"),
    ],
)
def test_training_runs_the_code_of_a_checkpoint_or_teacher_only_by_request(
    folder, argument, where, monkeypatch, capsys
):
    marker = bring_code(folder, where)
    monkeypatch.setattr("builtins.input", lambda *prompt: "yes")
    arguments = [*TRAIN, argument, folder]
    code, _, errors = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "comes with code of its own" in errors.splitlines()[-1], errors
    assert not marker.exists() and not (folder.parent / "out").exists()
    run(monkeypatch, capsys, *arguments, "--trust_remote_code")
    assert marker.exists()


@pytest.mark.parametrize(
    ("argument", "how"),
    [
        *(("--teacher_model_name_or_path", how) for how in BROKEN),
        # whose classifier starts anew, whatever it was
        *(("--model_name_or_path", how) for how in BROKEN if how not in ("no head", "infinity")),
    ],
)
def test_training_refuses_a_broken_checkpoint_or_teacher_in_one_line(folder, argument, how, monkeypatch, capsys):
    break_it, message = BROKEN[how]
    break_it(folder)
    before = sorted(folder.parent.rglob("*"))
    code, output, errors = run(monkeypatch, capsys, *TRAIN, argument, folder)
    lines = [line for line in errors.splitlines() if line.startswith("hf-layershuffle")]
    assert (code, output, len(lines)) == (2, "", 1), errors
    assert sorted(folder.parent.rglob("*")) == before and len(lines[0]) < 1000
    assert re.search(f"{message}|holds no .*; only a trained classifier can teach", lines[0]), lines[0]


@pytest.mark.parametrize("content", ["null", "[]", "3", '"x"', '{"id2label": []}'])
def test_a_configuration_of_another_kind_is_one_line(folder, content, monkeypatch, capsys):
    (folder / "config.json").write_text(content)
    for argument in ("--model_name_or_path", "--teacher_model_name_or_path"):
        code, _, errors = run(monkeypatch, capsys, *TRAIN, argument, folder)
        assert code == 2 and "Traceback" not in errors and not (folder.parent / "out").exists(), errors


def run(monkeypatch, capsys, *arguments):
    """Runs the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr("sys.argv", ["hf-layershuffle", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return (stop.value.code or 0, *capsys.readouterr())


def test_every_command_refuses_it_in_one_line_and_writes_nothing(folder, monkeypatch, capsys):
    edit_weights(folder, lambda tensors: tensors["vit.layers.0.mlp.fc2.bias"].fill_(float("nan")))
    out = ["--output_dir", folder.parent / "out"]
    before = sorted(folder.parent.rglob("*"))
    for arguments in (
        ["evaluate", folder, "--dataset_name", "digits", *out],
        ["analyze", folder, "--dataset_name", "digits", *out],
        ["prune", folder, "--keep", "0,1", *out],
        ["merge", folder, "--average", *out],
        ["merge", folder, "--random", "2", "--evaluate", "digits", *out],
        ["publish", folder, "--card_only"],
        ["publish", folder, "--plain_vit", "--dry_run"],
    ):
        code, output, errors = run(monkeypatch, capsys, *arguments)
        lines = [line for line in errors.splitlines() if line.startswith("hf-layershuffle")]
        assert (code, output, len(lines)) == (2, "", 1), errors
        assert "Traceback" not in errors and "layers.0.mlp.fc2.bias" in lines[0].replace("'", ""), lines
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("ours"), 1, "this is a fault of the program"),
        (ImportError("No module named 'umap'", name="umap"), 2, "error: a package is missing or does not fit: No mod"),
        (ImportError("cannot import", name="hf_layershuffle.data.datasets"), 1, "this is a fault of the program"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nMore"),
            2,
            "not enough memory (CUDA out of memory.); take a smaller",
        ),
        (RuntimeError("ours too"), 1, "this is a fault of the program"),
    ],
)
def test_our_faults_keep_their_traceback_and_say_so(folder, monkeypatch, capsys, error, code, line):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_layershuffle_cli.inputs.load_model", fails)
    found, _, errors = run(monkeypatch, capsys, "evaluate", folder, "--output_dir", folder.parent / "out")
    assert found == code and line in errors.splitlines()[-1], errors
    assert ("Traceback" in errors) == (code == 1)


def test_a_model_in_memory_needs_a_head(vit):
    with pytest.raises(ValueError, match="is not a classifier of its whole input"):
        as_layershuffle(vit.plain_model_class(vit.plain_classifier().config))


@pytest.mark.parametrize("name", ["transformer.h.3.mlp.c_fc.weight", "timm_model.blocks.3.norm1.weight"])
def test_layers_without_a_place_are_found_in_all_families(name):
    with pytest.raises(ValueError, match=f"has no place: {name}"):
        check_complete("'x'", [], [name, "transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"])
    check_complete("'x'", [], ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"])


def test_a_read_that_gives_less_than_there_is_goes_on(tmp_path, monkeypatch):
    expected = torch.arange(1000.0)
    save_file({"a": expected}, tmp_path / "a.safetensors")
    (stored,) = tensor_files.list_tensors("x", tmp_path / "a.safetensors")

    class ShortReads(io.FileIO):
        def readinto(self, view):
            return super().readinto(memoryview(view)[:999])

    monkeypatch.setattr(tensor_files, "open", lambda path, *args, **kwargs: ShortReads(path), raising=False)
    assert torch.equal(torch.cat([chunk.clone() for chunk in stored.chunks()]), expected)
