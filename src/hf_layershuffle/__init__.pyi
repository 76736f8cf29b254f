"""The public names of the package, for editors and for `__init__.py`, which imports a name when it is first used."""

from .adaptive.budget_evaluation import evaluate_budget as evaluate_budget
from .adaptive.budget_report import BudgetReport as BudgetReport
from .adaptive.exit_calibration import ExitCalibration as ExitCalibration
from .adaptive.exit_calibration import calibrate_exit as calibrate_exit
from .adaptive.layer_answers import LayerAnswers as LayerAnswers
from .adaptive.layer_answers import answers_after_layers as answers_after_layers
from .adaptive.mlp_skipping import MlpSimilarities as MlpSimilarities
from .adaptive.mlp_skipping import choose_skipped_mlps as choose_skipped_mlps
from .adaptive.mlp_skipping import mlp_similarities as mlp_similarities
from .adaptive.mlp_skipping import without_mlps as without_mlps
from .adaptive.predictor_training import train_program_predictor as train_program_predictor
from .adaptive.program_answers import ProgramAnswers as ProgramAnswers
from .adaptive.program_answers import answers_of_programs as answers_of_programs
from .adaptive.program_answers import programs_by_length as programs_by_length
from .adaptive.program_oracle import ProgramOracle as ProgramOracle
from .adaptive.program_oracle import program_oracle as program_oracle
from .adaptive.program_predictor import ProgramPredictor as ProgramPredictor
from .adaptive.program_search import search_program as search_program
from .analysis.analysis import analyze as analyze
from .analysis.report import AnalysisReport as AnalysisReport
from .bundled import example_model as example_model
from .checkpoints.auto_models import LayerShuffleAutoModel as LayerShuffleAutoModel
from .checkpoints.auto_models import (
    LayerShuffleAutoModelForAudioClassification as LayerShuffleAutoModelForAudioClassification,
)
from .checkpoints.auto_models import LayerShuffleAutoModelForCausalLM as LayerShuffleAutoModelForCausalLM
from .checkpoints.auto_models import (
    LayerShuffleAutoModelForImageClassification as LayerShuffleAutoModelForImageClassification,
)
from .checkpoints.auto_models import (
    LayerShuffleAutoModelForSequenceClassification as LayerShuffleAutoModelForSequenceClassification,
)
from .checkpoints.auto_models import (
    LayerShuffleAutoModelForVideoClassification as LayerShuffleAutoModelForVideoClassification,
)
from .checkpoints.image_processors import load_image_processor as load_image_processor
from .checkpoints.loading import load_classifier as load_classifier
from .compression.pruning import layers_for_speedup as layers_for_speedup
from .compression.pruning import prune_layers as prune_layers
from .compression.pruning import search_layers as search_layers
from .data.datasets import load_image_datasets as load_image_datasets
from .data.image_dataset import ImageClassificationDataset as ImageClassificationDataset
from .data.text_dataset import TextClassificationDataset as TextClassificationDataset
from .data.text_datasets import load_text_datasets as load_text_datasets
from .deployment.plain_vit import to_plain_vit as to_plain_vit
from .evaluation.report import RobustnessReport as RobustnessReport
from .evaluation.report import compare_reports as compare_reports
from .evaluation.robustness import evaluate_robustness as evaluate_robustness
from .evaluation.robustness import score_execution_orders as score_execution_orders
from .hub.merged_folder import merge as merge
from .hub.model_card import write_model_card as write_model_card
from .hub.publishing import publish as publish
from .layerwise import LayerwiseClassifier as LayerwiseClassifier
from .merging.plan import MergePlan as MergePlan
from .merging.random_merges import RandomMergeReport as RandomMergeReport
from .merging.random_merges import evaluate_random_merges as evaluate_random_merges
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
from .swarm.answers import DeadlineError as DeadlineError
from .swarm.answers import MissingLayersError as MissingLayersError
from .swarm.answers import SwarmAnswer as SwarmAnswer
from .swarm.answers import SwarmBusyError as SwarmBusyError
from .swarm.answers import SwarmClosedError as SwarmClosedError
from .swarm.answers import SwarmError as SwarmError
from .swarm.blocking import BlockingSwarm as BlockingSwarm
from .swarm.swarm import Swarm as Swarm
from .training import Accuracy as Accuracy
from .training import LayerShuffleCallback as LayerShuffleCallback
from .training import LayerShuffleTrainer as LayerShuffleTrainer
from .training import LayerShuffleTrainingArguments as LayerShuffleTrainingArguments
from .training import OrderAccuracy as OrderAccuracy
from .training import compute_metrics as compute_metrics

__version__: str
