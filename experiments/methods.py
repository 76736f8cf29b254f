"""What the grid trains: methods, by further arguments of train.py, and presets, which are a model and a schedule."""

# With the initial weights of the preset, which suit the plain model too: the harder baseline
INITIALIZER_RANGE = ["--initializer_range", "{initializer_range}"]  # of the preset order-free at the model's width
PLAIN_INIT = ["--shuffle_mode", "none", *INITIALIZER_RANGE, "--residual_init_scale", "0"]
ORDER_FREE = ["--preset", "order-free"]
# Start from the model that method plain-init trained with the same seed, and learn from its answers
FINE_TUNED = ["--model_name_or_path", "{plain-init}"]
DISTILLED = ["--teacher_model_name_or_path", "{plain-init}"]
METHODS = {
    "plain": ["--shuffle_mode", "none"],
    "layerdrop": ["--shuffle_mode", "none", "--layerdrop", "0.2"],
    "layershuffle": [],
    "depth": ["--depth_embedding"],
    "predict": ["--position_predictor"],
    "layershuffle-layerdrop": ["--layerdrop", "0.2"],
    # Retrained with as many layers as the pruned models have: the fair baseline for pruning
    "plain-3": ["--shuffle_mode", "none", "--num_hidden_layers", "3"],
    "plain-6": ["--shuffle_mode", "none", "--num_hidden_layers", "6"],
    "plain-9": ["--shuffle_mode", "none", "--num_hidden_layers", "9"],
    "plain-width": ["--shuffle_mode", "none", *INITIALIZER_RANGE],
    "plain-init": PLAIN_INIT,
    # What a teacher does for a plain model
    "plain-init-distilled": [*PLAIN_INIT, *DISTILLED],
    # With as much training as the fine-tuned and distilled models in arbitrary order, from the same start
    "plain-init-finetuned-distilled": ["--shuffle_mode", "none", *FINE_TUNED, *DISTILLED],
    "order-free": ORDER_FREE,
    "order-free-distilled": [*ORDER_FREE, *DISTILLED],
    "order-free-finetuned": [*ORDER_FREE, *FINE_TUNED],
    "order-free-finetuned-distilled": [*ORDER_FREE, *FINE_TUNED, *DISTILLED],
    # A second time, from what it has become, and from the mean of its answers in eight orders of three quarters of the
    # layers; and the plain one again
    "order-free-again": [
        *ORDER_FREE,
        *("--model_name_or_path", "{order-free-finetuned-distilled}"),
        *("--teacher_model_name_or_path", "{order-free-finetuned-distilled}"),
        *("--teacher_orders", "8", "--teacher_layers", "{three_quarters}"),
    ],
    "plain-init-again": [
        *("--shuffle_mode", "none", "--model_name_or_path", "{plain-init-finetuned-distilled}"),
        *("--teacher_model_name_or_path", "{plain-init-finetuned-distilled}"),
    ],
    # Each batch in two orders, which shall agree: twice the work for the same images
    "order-free-finetuned-distilled-consistent": [*ORDER_FREE, "--order_consistency", "1", *FINE_TUNED, *DISTILLED],
    # For models that will run with layers missing
    "order-free-finetuned-distilled-layerdrop": [*ORDER_FREE, "--layerdrop", "0.2", *FINE_TUNED, *DISTILLED],
}
LABELS = {
    "plain": "plain ViT",
    "layerdrop": "LayerDrop 0.2",
    "layershuffle": "LayerShuffle",
    "depth": "LayerShuffle-position (depth embedding)",
    "predict": "LayerShuffle-predict (position predictor)",
    "layershuffle-layerdrop": "LayerShuffle + LayerDrop 0.2",
    "plain-3": "plain ViT of 3 layers",
    "plain-6": "plain ViT of 6 layers",
    "plain-9": "plain ViT of 9 layers",
    "plain-width": "plain ViT, initial weights scaled to the width",
    "plain-init": "plain ViT, initial weights of the preset",
    "plain-init-distilled": "plain ViT, initial weights of the preset, distilled",
    "plain-init-finetuned-distilled": "plain ViT, initial weights of the preset, fine-tuned and distilled",
    "order-free": "preset order-free, from scratch",
    "order-free-distilled": "preset order-free, distilled",
    "order-free-finetuned": "preset order-free, fine-tuned",
    "order-free-finetuned-distilled": "preset order-free, fine-tuned and distilled",
    "order-free-again": "preset order-free, fine-tuned and distilled twice, then by the mean over orders",
    "plain-init-again": "plain ViT, initial weights of the preset, fine-tuned and distilled twice",
    "order-free-finetuned-distilled-consistent": "preset order-free, fine-tuned and distilled, two orders that agree",
    "order-free-finetuned-distilled-layerdrop": "preset order-free, fine-tuned and distilled, LayerDrop 0.2",
}
# In pictures, beside the plain model
PICTURED = ("layerdrop", "layershuffle", "order-free", "order-free-finetuned-distilled")

# Attention of such short sequences is slow in PyTorch's fused kernel for the CPU, in bfloat16 many times so
PRECISION = ["--bf16", "--attn_implementation", "eager"]
# 49 patches instead of 16, 1.6 million parameters, more augmentation
FASHION_STRONG = (
    "--hidden_size 128 --num_hidden_layers 8 --patch_size 4 --num_channels 1 --learning_rate 1e-3 "
    "--augmentation light --crop_padding 2 --horizontal_flip True --random_erasing 0.25"
).split() + PRECISION
PRESETS = {
    # The defaults of train.py: 86,220 images seen
    "digits": [],
    # 480,000 images seen
    "fashion-mnist": (
        "--hidden_size 96 --num_hidden_layers 12 --patch_size 7 --num_channels 1 --num_train_epochs 8 "
        "--per_device_train_batch_size 128 --learning_rate 1e-3 --crop_padding 0"
    ).split()
    + PRECISION,
    # For a GPU: the shape of ViT-Lite-7/4 (arXiv 2104.05704), 3.7 million parameters; 2,000,000 images seen.
    # The paper's stronger augmentation (`cifar`) with batches of 1024 left so short a run far from trained
    "cifar10": (
        "--hidden_size 256 --num_hidden_layers 7 --num_attention_heads 4 --intermediate_size 512 --patch_size 4 "
        "--num_train_epochs 40 --per_device_train_batch_size 256 --learning_rate 1e-3 --augmentation light"
    ).split()
    + PRECISION,
    # For a GPU: 2,400,000 images seen
    "fashion-mnist-strong": [*FASHION_STRONG, "--num_train_epochs", "40", "--per_device_train_batch_size", "1024"],
    # 480,000 images seen: what a CPU can do
    "fashion-mnist-strong-small": [*FASHION_STRONG, "--num_train_epochs", "8", "--per_device_train_batch_size", "128"],
    # 500,000 images seen: what a CPU can do
    "cifar10-small": (
        "--hidden_size 96 --num_hidden_layers 12 --patch_size 8 --num_train_epochs 10 "
        "--per_device_train_batch_size 128 --learning_rate 1e-3 --crop_padding 0"
    ).split()
    + PRECISION,
}
# Sums rounded differently by another number of threads move 5 of the 360 digits; one thread is also the fastest there
ONE_THREAD = ("digits",)
# On a GPU: PyTorch's own attention; batches all of one size; no evaluation but the one that is recorded, and no
# checkpoints of runs of a minute. For images so small, batches from other processes cost more than they spare
ON_GPU = (
    "--attn_implementation sdpa --dataloader_num_workers 0 --dataloader_drop_last True --do_eval False "
    "--save_strategy no --logging_steps 0.1 --disable_tqdm True"
).split()
# What freedom of order may cost: the least ratio to a plain ViT, the most points of the worst order below the mean,
# and the least part of the accuracy that three quarters of the layers keep
TARGETS = {
    "cifar10": {"ratio": 0.99, "worst": 0.5, "kept": 0.97},
    "fashion-mnist-strong": {"ratio": 1.0, "worst": 0.5, "kept": 0.97},
    "fashion-mnist": {"ratio": 0.995, "worst": 0.5, "kept": 0.97},
    "fashion-mnist-strong-small": {"ratio": 1.0, "worst": 0.5, "kept": 0.97},
    "cifar10-small": {"ratio": 0.97, "worst": 1.0, "kept": 0.97},
}


def needed_method(method: str) -> str | None:
    """The method whose model, of the same seed, this one starts from or learns from."""
    named = [argument[1:-1] for argument in METHODS[method] if argument.startswith("{")]
    return next((name for name in named if name in METHODS), None)


def value_of(preset: str, name: str, default: str) -> str:
    """What a preset says of an argument of train.py, such as hidden_size."""
    arguments = PRESETS[preset]
    return arguments[arguments.index(f"--{name}") + 1] if f"--{name}" in arguments else default


def twice_as_long(preset: str) -> str:
    """Further training arguments by which a run of the preset sees twice as many images; "" if it says no number."""
    arguments = PRESETS[preset]
    if "--num_train_epochs" not in arguments:
        return ""
    return f"--num_train_epochs {2 * int(arguments[arguments.index('--num_train_epochs') + 1])}"
