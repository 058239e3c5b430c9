"""Facial expression recognition in stills and video for the Hugging Face ecosystem.

Importing the package makes `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and
`AutoModelForVideoClassification` know its models, and makes saved checkpoints carry the code that people
without the package need (`trust_remote_code=True`).
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from modeling_fer.configuration_fer import FerConfig
from modeling_fer.labels import CLASSES
from modeling_fer.modeling_fer import FerForImageClassification, FerForVideoClassification, FerModel

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

__all__ = ["CLASSES", "FerConfig", "FerForImageClassification", "FerForVideoClassification", "FerModel"]
