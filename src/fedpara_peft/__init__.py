"""FedPara for Hugging Face PEFT: low-rank Hadamard adapters and federated training.

Importing this package registers the method with PEFT.
"""

from .comm.codecs import Codec
from .comm.errors import CodecError, PayloadError, SecureAggregationError, StateError
from .comm.state import (
    communicated_state,
    load_communicated_state,
    load_local,
    load_local_state,
    local_state,
    save_local,
)
from .federation.arguments import FederatedArguments
from .federation.data.metrics import accuracy
from .federation.data.partition import partition
from .federation.errors import (
    AgreementError,
    ArgumentsError,
    ClientDataError,
    PartitionError,
    ResumeError,
    RoundError,
    RunFolderError,
)
from .federation.folder.history import History
from .federation.observers.callbacks import FederatedCallback
from .federation.observers.control import FederatedControl
from .federation.server.plan import Plan, plan
from .federation.strategies import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FedProx,
    FedYogi,
    LocalOnly,
    Scaffold,
    Strategy,
)
from .federation.trainer import FederatedTrainer
from .maths.errors import FedParaError, RankError
from .maths.rank import parameter_count, rank_bounds, rank_for_gamma, rank_for_ratio
from .tuner import (
    AdapterSummary,
    Conversion,
    ConvertedLayer,
    FedParaConfig,
    FedParaLayer,
    FedParaModel,
    FileLayer,
    composed_weight_decay,
    composed_weights,
    convert_adapter,
    fedpara_summary,
    inspect_adapter,
    jacobian_correction,
    loha_to_fedpara,
    save_as_loha,
    save_as_lora,
)
from .tuner.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    LayoutError,
    MixedBatchError,
    ReplacedWeightError,
    TargetError,
    UnsupportedLayerError,
    UnsupportedMethodError,
)

__version__ = "0.1.0"

__all__ = [
    "AdapterSummary",
    "AgreementError",
    "ArgumentsError",
    "CheckpointError",
    "ClientDataError",
    "Codec",
    "CodecError",
    "ConfigError",
    "Conversion",
    "ConversionError",
    "ConvertedLayer",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDyn",
    "FedParaConfig",
    "FedParaError",
    "FedParaLayer",
    "FedParaModel",
    "FedProx",
    "FedYogi",
    "FederatedArguments",
    "FederatedCallback",
    "FederatedControl",
    "FederatedTrainer",
    "FileLayer",
    "History",
    "LayoutError",
    "LocalOnly",
    "MixedBatchError",
    "PartitionError",
    "PayloadError",
    "Plan",
    "RankError",
    "ReplacedWeightError",
    "ResumeError",
    "RoundError",
    "RunFolderError",
    "Scaffold",
    "SecureAggregationError",
    "StateError",
    "Strategy",
    "TargetError",
    "UnsupportedLayerError",
    "UnsupportedMethodError",
    "accuracy",
    "communicated_state",
    "composed_weight_decay",
    "composed_weights",
    "convert_adapter",
    "fedpara_summary",
    "inspect_adapter",
    "jacobian_correction",
    "load_communicated_state",
    "load_local",
    "load_local_state",
    "local_state",
    "loha_to_fedpara",
    "parameter_count",
    "partition",
    "plan",
    "rank_bounds",
    "rank_for_gamma",
    "rank_for_ratio",
    "save_as_loha",
    "save_as_lora",
    "save_local",
]
