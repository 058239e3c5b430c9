"""Facial expression recognition in stills and video for the Hugging Face ecosystem.

Importing the package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoModelForVideoClassification` know its models and `pipeline` the task `facial-expression`, and makes saved
checkpoints carry the code that people without the package need (`trust_remote_code=True`).
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_fer.configuration_fer import FerConfig
from modeling_fer.labels import CLASSES
from modeling_fer.modeling_fer import FerForImageClassification, FerForVideoClassification, FerModel
from modeling_fer.pipeline_fer import TASK, FacialExpressionPipeline

__version__ = "0.1.0"

AutoConfig.register(FerConfig.model_type, FerConfig, exist_ok=True)
for auto_class, model_class in {
    AutoModel: FerModel,
    AutoModelForImageClassification: FerForImageClassification,
    AutoModelForVideoClassification: FerForVideoClassification,
}.items():
    auto_class.register(FerConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
FerConfig.register_for_auto_class()


class AutoModelForFacialExpression:
    """Loads a model of stills or of videos, as its configuration says."""

    @staticmethod
    def from_pretrained(name_or_path: str, **options: Any) -> Any:
        """See `AutoModel.from_pretrained`."""
        config = options.get("config") or AutoConfig.from_pretrained(name_or_path, **options)
        is_video = FerForVideoClassification.__name__ in (config.architectures or ())
        auto_class: Any = AutoModelForVideoClassification if is_video else AutoModelForImageClassification
        return auto_class.from_pretrained(name_or_path, **options)


class OwnPipelines:
    """Hides a configuration's `custom_pipelines` from reading, though not from saving.

    Else `pipeline` would want to run a checkpoint's code where the Auto classes take that of this package.
    """

    def __get__(self, config: Any, owner: type) -> dict[str, Any]:
        return {}

    def __set__(self, config: Any, value: dict[str, Any]) -> None:
        vars(config)["custom_pipelines"] = value


FerConfig.custom_pipelines = OwnPipelines()  # type: ignore[attr-defined]
PIPELINE_REGISTRY.register_pipeline(
    TASK, FacialExpressionPipeline, pt_model=AutoModelForFacialExpression, type="video"
)

__all__ = [
    "CLASSES",
    "FacialExpressionPipeline",
    "FerConfig",
    "FerForImageClassification",
    "FerForVideoClassification",
    "FerModel",
]
