import json

import pytest
from conftest import TINY, of_both_architectures

import hf_layershuffle as ls


@of_both_architectures
def test_flags_have_the_documented_defaults(architecture):
    config = architecture.config_class()
    assert config.shuffle_mode == "none"
    assert config.shuffle_window is None
    assert config.depth_embedding is False
    assert config.depth_embedding_dim == 32
    assert config.position_predictor is False
    assert config.position_loss_weight == 1.0
    assert config.layerdrop == 0.0
    assert config.execution_order == "sequential"
    assert config.model_type == f"layershuffle_{architecture.name}"


@of_both_architectures
def test_save_and_load_change_nothing(architecture, tmp_path):
    config = architecture.config(
        shuffle_mode="window", shuffle_window=2, layerdrop=0.1, depth_embedding=True, execution_order=(3, 1, 1)
    )
    config.save_pretrained(tmp_path)
    loaded = architecture.config_class.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.execution_order == [3, 1, 1]
    assert json.loads((tmp_path / "config.json").read_text())["shuffle_window"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"shuffle_mode": "random"}, "`shuffle_mode` is 'random'; it must be one of 'none', 'arbitrary', 'window'"),
        ({"shuffle_mode": None}, "`shuffle_mode` is None"),
        ({"shuffle_mode": "window"}, "needs `shuffle_window`.*an integer from 1 to 4"),
        ({"shuffle_mode": "window", "shuffle_window": 0}, "`shuffle_window` is 0"),
        ({"shuffle_mode": "window", "shuffle_window": 5}, "`shuffle_window` is 5, larger than the depth.*from 1 to 4"),
        ({"shuffle_mode": "window", "shuffle_window": 1.0}, "`shuffle_window` is 1.0"),
        ({"shuffle_mode": "window", "shuffle_window": True}, "`shuffle_window` is True"),
        ({"layerdrop": 1.0}, r"`layerdrop` is 1.0; it must be a fraction in \[0, 1\)"),
        ({"layerdrop": -0.1}, "`layerdrop` is -0.1"),
        ({"layerdrop": "0.1"}, "`layerdrop` is '0.1'"),
        ({"layerdrop": float("nan")}, "`layerdrop` is nan"),
        ({"depth_embedding": 1}, "`depth_embedding` is 1; it must be True or False"),
        ({"depth_embedding_dim": 0}, "`depth_embedding_dim` is 0"),
        ({"position_predictor": "yes"}, "`position_predictor` is 'yes'"),
        ({"position_loss_weight": -1}, "`position_loss_weight` is -1"),
        ({"position_loss_weight": float("inf")}, "`position_loss_weight` is inf"),
        ({"residual_init_scale": -0.5}, "`residual_init_scale` is -0.5; it must be a finite number of at least 0"),
        ({"residual_init_scale": float("nan")}, "`residual_init_scale` is nan"),
        ({"execution_order": "backwards"}, "`execution_order` is 'backwards'"),
        ({"execution_order": []}, "is empty"),
        ({"execution_order": [0, 4]}, "holds 4 at position 1"),
        ({"execution_order": [0, -1]}, "holds -1"),
        ({"execution_order": [0.0]}, "holds 0.0"),
        ({"execution_order": [False]}, "holds False"),
        ({"execution_order": 3}, "`execution_order` is 3"),
    ],
)
def test_bad_flags_are_refused(vit, flags, message):
    with pytest.raises(ValueError, match=message):
        vit.config(**flags)


def test_a_window_that_no_mode_uses_is_refused_where_it_is_passed_and_kept_where_it_is_stored(vit, tmp_path):
    vit.config(shuffle_window=2).save_pretrained(tmp_path / "none")
    vit.config(shuffle_mode="window", shuffle_window=2).save_pretrained(tmp_path / "window")
    load = vit.config_class.from_pretrained
    with pytest.raises(ValueError, match="`shuffle_window` is 3, which `shuffle_mode='none'` does not use"):
        load(tmp_path / "none", shuffle_window=3)
    with pytest.raises(ValueError, match="`shuffle_mode='arbitrary'` does not use"):
        load(tmp_path / "window", shuffle_mode="arbitrary", shuffle_window=3)
    assert load(tmp_path / "none").shuffle_window == 2
    assert load(tmp_path / "none", shuffle_mode="window", shuffle_window=3).shuffle_window == 3
    assert load(tmp_path / "window", shuffle_window=3).shuffle_mode == "window"
    assert load(tmp_path / "window", shuffle_mode="none").shuffle_mode == "none"


def test_assigning_a_bad_value_is_refused(vit):
    config = vit.config()
    with pytest.raises(ValueError, match=r"`layerdrop` is 2; it must be a fraction in \[0, 1\)"):
        config.layerdrop = 2
    assert config.layerdrop == 0.0


def test_fields_that_no_longer_fit_each_other_are_refused_by_the_model(vit):
    config = vit.config(execution_order=[3, 2, 1, 0])
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="holds 3 at position 0; layer indices are integers from 0 to 2"):
        ls.LayerShuffleViTModel(config)


def test_another_architecture_is_refused(tmp_path, vit):
    vit.plain_config_class(**TINY).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a model of type 'vit', whose weights LayerShuffleDeiTConfig cannot read"
    ):
        ls.LayerShuffleDeiTConfig.from_pretrained(tmp_path)
