"""Models with flags and with weights that matter."""

import torch
from torch import nn


# The code that lies beside the weights of every saved model
TRAVELLING_FILES = {
    "auto_classes.py",
    "classification_heads.py",
    "configuration_layershuffle.py",
    "early_exit.py",
    "execution_order.py",
    "exit_rule.py",
    "families.py",
    "free_features.py",
    "free_forward.py",
    "free_generation.py",
    "free_layers.py",
    "halting_head.py",
    "initial_weights.py",
    "layer_budget.py",
    "layer_controller.py",
    "layer_lists.py",
    "layer_program.py",
    "mlp_skipping.py",
    "modeling_layershuffle.py",
    "order_check.py",
    "position_modules.py",
    "row_subsets.py",
    "saved_model.py",
    "small_copy.py",
    "timm_layers.py",
}
EXTRAS = {"depth_embedding": True, "position_predictor": True}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Large random weights, so that the order matters and nothing is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
