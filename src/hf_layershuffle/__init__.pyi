"""The public names of the package: read by editors, and by `__init__.py`, which imports a name when it is first used."""

from .analysis import AnalysisReport as AnalysisReport
from .analysis import analyze as analyze
from .bundled import example_model as example_model
from .data import load_image_datasets as load_image_datasets
from .data import load_image_processor as load_image_processor
from .evaluation import evaluate_robustness as evaluate_robustness
from .evaluation import score_execution_orders as score_execution_orders
from .export import to_plain_vit as to_plain_vit
from .image_dataset import ImageClassificationDataset as ImageClassificationDataset
from .layerwise import LayerwiseClassifier as LayerwiseClassifier
from .layerwise import load_classifier as load_classifier
from .merge_plan import MergePlan as MergePlan
from .merging import merge as merge
from .model_card import write_model_card as write_model_card
from .models.configuration_layershuffle import LayerShuffleDeiTConfig as LayerShuffleDeiTConfig
from .models.configuration_layershuffle import LayerShuffleViTConfig as LayerShuffleViTConfig
from .models.execution_order import arbitrary_execution_orders as arbitrary_execution_orders
from .models.execution_order import check_execution_order as check_execution_order
from .models.modeling_layershuffle import (
    LayerShuffleDeiTForImageClassification as LayerShuffleDeiTForImageClassification,
)
from .models.modeling_layershuffle import LayerShuffleDeiTModel as LayerShuffleDeiTModel
from .models.modeling_layershuffle import (
    LayerShuffleViTForImageClassification as LayerShuffleViTForImageClassification,
)
from .models.modeling_layershuffle import LayerShuffleViTModel as LayerShuffleViTModel
from .models.modeling_layershuffle import free_order as free_order
from .pruning import layers_for_speedup as layers_for_speedup
from .pruning import prune_layers as prune_layers
from .pruning import search_layers as search_layers
from .publishing import publish as publish
from .random_merges import RandomMergeReport as RandomMergeReport
from .random_merges import evaluate_random_merges as evaluate_random_merges
from .report import RobustnessReport as RobustnessReport
from .report import compare_reports as compare_reports
from .training import Accuracy as Accuracy
from .training import LayerShuffleCallback as LayerShuffleCallback
from .training import LayerShuffleTrainer as LayerShuffleTrainer
from .training import LayerShuffleTrainingArguments as LayerShuffleTrainingArguments
from .training import OrderAccuracy as OrderAccuracy
from .training import compute_metrics as compute_metrics

__version__: str
