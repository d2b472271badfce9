"""``FedParaConfig``: what to factorize, how, and what becomes of the base weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig, TaskType

from ...maths.errors import RankError
from ...maths.parameterizations import PARAMETERIZATIONS, Parameterization, get_parameterization
from ...maths.rank import check_gamma, check_rank
from ...maths.starts.named import STARTS, Start
from .._peft import FEDPARA
from ..errors import ConfigError
from .values import integer, is_one_of, names_of, pattern_of, real

BaseWeight = Literal["frozen", "replaced", "seeded"]
Bias = Literal["none", "all", "fedpara_only"]
ComputePath = Literal["auto", "compose", "khatri_rao"]

#: Tasks for which PEFT itself trains and saves the head.
HEAD_TASKS = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)

#: ``target_modules`` value that stands for every layer kind that can be factorized.
ALL_SUPPORTED = "all-supported"


@dataclass
class FedParaConfig(PeftConfig):
    """Configuration of FedPara adapters (arXiv:2108.06098).

    Two worlds. ``base_weight="frozen"`` adds to a pretrained weight, ``W = W₀ + (alpha/r) ΔW``.
    From scratch, with the rest of the model (biases, norms, layers left dense, buffers) trained and
    saved too: ``"replaced"`` composes W from factors alone, as the paper does; ``"seeded"`` has
    ``W = (W_seed - P(θ₀)) + P(θ)``, which begins as a dense weight and is sent and saved as factors
    all the same, because base and θ₀ are drawn from ``base_seed`` wherever they are needed.

    Args:
        r: inner rank of every factorized weight (each of the two halves has rank r). From scratch
            a weight whose factors would outnumber it stays dense.
        gamma: rank ratio γ in [0, 1]. When set, each weight's rank is
            ``⌈(1 - γ) r_min + γ r_max⌉`` and ``r`` is not used. ``lowrank`` then takes the least
            rank that reaches FedPara's parameter count in that weight.
        alpha: numerator of the frozen mode's scale ``alpha / r``; None means scale 1.
        use_rslora: scale by ``alpha / √r`` instead (rank-stabilized, arXiv:2312.03732).
        base_weight: ``"frozen"``, ``"replaced"`` or ``"seeded"``.
        base_seed: what the seeded mode's base and first factors are drawn from, by layer name.
        response: in seeded mode, how far one SGD step moves a factorized weight, where a dense one
            has 1; the variance of the first factors follows from it, layer by layer.
        base_digest: of the seeded bases, by layer; filled in when they are drawn, compared when the
            adapter is loaded.
        parameterization: ``"fedpara"`` (W₁ ⊙ W₂), ``"pfedpara"`` (W₁ ⊙ (W₂ + 1), W₂ local to the
            client), ``"lowrank"`` (X Yᵀ, Tucker-2 for kernels), or another that is registered in
            ``fedpara_peft.maths.parameterizations``.
        nonlinearity: ``"tanh"`` activates both halves, None does not.
        use_effective_conv2d: factorize convolution kernels by Prop. 3; False reshapes them to
            matrices (Prop. 1).
        rank_pattern: layer name or regex to rank; goes before ``r`` and ``gamma``. Of several that
            match a layer the most specific counts, in whatever order they stand: the full name (as
            ``"^name"`` it matches no other), then a name that ends it, the one of more dotted parts
            first, then a regex. Equally specific ones must agree.
        alpha_pattern: layer name or regex to alpha; likewise.
        rank_dropout: in training, probability of dropping an output feature of ΔW; kept ones are
            divided by ``1 - rank_dropout``.
        module_dropout: in training, probability of skipping ΔW in a forward pass.
        init_weights: how the frozen mode starts. True: ΔW = 0, and the first step goes as far as
            that of a LoRA of rank 2r, so that LoRA's learning rates fit. ``"loha"``, ``"lycoris"``,
            ``"abba"``: ΔW = 0 with factors as PEFT's LoHa, as LyCORIS, as ABBA draws them
            (fedpara without tanh alone; ``"abba"`` takes the singular vectors of W₀). False: a
            random ΔW. From scratch there is one start.
        target_modules: names, a regex, ``"all-linear"``, or ``"all-supported"`` for every layer
            kind that can be factorized.
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: layer indices to factorize.
        layers_pattern: name of the layer list the indices refer to.
        modules_to_save: modules trained and saved whole (frozen mode; in replaced mode everything
            is).
        bias: ``"none"``, ``"all"`` or ``"fedpara_only"`` (frozen mode).
        compute_path: how linear layers and convolutions apply the weight. ``"auto"`` takes the
            cheaper way by counted operations; ``"compose"`` always composes the weight;
            ``"khatri_rao"`` always applies its exact low-rank form, which tanh and grouped
            convolutions do not have.
        local_modules: names or a regex of modules that stay on the client whole, as FedPer's last
            layers do; they are never saved or pushed.
        remainder: whether every factorized weight has a dense tensor R beside its product,
            ``s · (P(θ) + R)``, zero at first, saved with the adapter and never trained. A federated
            run with ``exact_average`` sets it and moves R.

    Raises:
        ConfigError: a field has a value it cannot have, or two fields contradict each other.
    """

    r: int = field(default=8, metadata={"help": "Inner rank"})
    gamma: float | None = field(default=None, metadata={"help": "Rank ratio in [0, 1]"})
    alpha: float | None = field(default=None, metadata={"help": "Scale alpha / r; None: scale 1"})
    use_rslora: bool = field(default=False, metadata={"help": "Scale alpha / sqrt(r) instead"})
    base_weight: BaseWeight = field(
        default="frozen",
        metadata={
            "help": "'frozen': add to W0; 'replaced', 'seeded': train from scratch, the latter "
            "beginning as a dense weight drawn from base_seed"
        },
    )
    base_seed: int = field(default=0, metadata={"help": "Seed of the seeded mode's base"})
    response: float = field(
        default=1.0, metadata={"help": "Reach of a first step in seeded mode; a dense weight's: 1"}
    )
    base_digest: dict[str, str] | None = field(
        default=None, metadata={"help": "Digests of the seeded bases, filled in"}
    )
    parameterization: str = field(
        default="fedpara",
        metadata={"help": "; ".join(f"{p.name}: {p.formula}" for p in PARAMETERIZATIONS.values())},
    )
    nonlinearity: Literal["tanh"] | None = field(default=None, metadata={"help": "None or 'tanh'"})
    use_effective_conv2d: bool = field(
        default=True, metadata={"help": "Prop. 3 for convolution kernels; False: as matrices"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Layer name or regex to rank"}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Layer name or regex to alpha"}
    )
    rank_dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an output feature of the delta"}
    )
    module_dropout: float = field(
        default=0.0, metadata={"help": "Probability of skipping the delta in a forward pass"}
    )
    init_weights: bool | Start = field(
        default=True,
        metadata={"help": "Frozen start: True, 'loha', 'lycoris', 'abba'; False: a random delta"},
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, regex, 'all-linear' or 'all-supported'"}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave alone"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to factorize"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list the indices refer to"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole (frozen mode)"}
    )
    bias: Bias = field(default="none", metadata={"help": "'none', 'all' or 'fedpara_only'"})
    compute_path: ComputePath = field(
        default="auto", metadata={"help": "'auto', 'compose' or 'khatri_rao'"}
    )
    local_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules that stay on the client"}
    )
    remainder: bool = field(
        default=False,
        metadata={"help": "A dense tensor beside every product, not trained"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FEDPARA
        self._check_types()
        self._check_choices()
        self._check_ranks()
        self._check_targets()
        self._check_starts()
        if self.from_scratch:
            self._check_from_scratch()

    @property
    def from_scratch(self) -> bool:
        """Whether the whole model trains and is saved, rather than an adapter of a frozen one."""
        return self.base_weight != "frozen"

    @property
    def form(self) -> Parameterization:
        """What the parameterization's name stands for."""
        return get_parameterization(self.parameterization)

    def _check_types(self) -> None:
        for name in ("target_modules", "exclude_modules", "local_modules"):
            setattr(self, name, names_of(name, getattr(self, name), set))
        self.modules_to_save = names_of("modules_to_save", self.modules_to_save, list)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}"
            )
        self.r = integer("r", self.r)
        self.rank_pattern = pattern_of("rank_pattern", self.rank_pattern, integer)
        self.alpha_pattern = pattern_of("alpha_pattern", self.alpha_pattern, real)
        self.base_seed = integer("base_seed", self.base_seed)
        self.response = real("response", self.response)
        for name in ("gamma", "alpha"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else real(name, value))
        for name in ("rank_dropout", "module_dropout"):
            setattr(self, name, real(name, getattr(self, name)))
        for name in ("use_effective_conv2d", "use_rslora", "remainder"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self.layers_pattern = names_of("layers_pattern", self.layers_pattern, list)
        indices = self.layers_to_transform
        if isinstance(indices, list | tuple | set | range):
            self.layers_to_transform = [integer("layers_to_transform", i) for i in indices]
        elif indices is not None:
            self.layers_to_transform = integer("layers_to_transform", indices)

    def _check_choices(self) -> None:
        for name, choices in (
            ("base_weight", get_args(BaseWeight)),
            ("parameterization", tuple(PARAMETERIZATIONS)),
            ("nonlinearity", (None, "tanh")),
            ("bias", get_args(Bias)),
            ("compute_path", get_args(ComputePath)),
        ):
            if not is_one_of(getattr(self, name), choices):
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.nonlinearity is not None and not self.form.multiplies:
            raise ConfigError(
                f"parameterization={self.parameterization!r} has no nonlinearity (tanh(W₁) ⊙ "
                "tanh(W₂) needs two halves): use 'fedpara', or nonlinearity=None"
            )
        if self.compute_path == "khatri_rao" and self.nonlinearity is not None:
            raise ConfigError(
                f"compute_path='khatri_rao' with nonlinearity={self.nonlinearity!r}: W has no "
                "low-rank form then; use compute_path='auto', or nonlinearity=None"
            )

    def _check_ranks(self) -> None:
        try:
            if self.gamma is not None:
                check_gamma(self.gamma)
            for rank in (self.r, *self.rank_pattern.values()):
                check_rank(rank)
        except RankError as error:
            raise ConfigError(str(error)) from None

    def _check_targets(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str: it would have to be "
                    "part of the regex; give target_modules as a list"
                )
        if self.layers_pattern and self.layers_to_transform in (None, []):
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )

    def _check_starts(self) -> None:
        start = self.init_weights
        if not (isinstance(start, bool) or is_one_of(start, STARTS)):
            raise ConfigError(f"init_weights must be True, False or one of {STARTS}, got {start!r}")
        if isinstance(start, str) and (self.form.terms != ((0, 1),) or self.nonlinearity):
            raise ConfigError(
                f"init_weights={start!r} is a start of W₁ ⊙ W₂ without nonlinearity, not of "
                f"{self.form.formula}: leave init_weights out"
            )
        if self.use_rslora and self.alpha is None and not self.alpha_pattern:
            raise ConfigError(
                "use_rslora=True scales by alpha / √r and alpha is None: give alpha, or leave "
                "use_rslora out for scale 1"
            )
        if not self.response > 0:
            raise ConfigError(
                f"response must be positive, got {self.response}: a dense weight's is 1"
            )
        if self.base_weight == "seeded" and (self.nonlinearity or not self.form.is_multilinear):
            raise ConfigError(
                "base_weight='seeded' draws the same base on every machine, which tanh and powers "
                "of a half do not allow: use base_weight='replaced', or another form"
            )

    def _check_from_scratch(self) -> None:
        for name, unset, instead in (
            ("alpha", None, "there is no pretrained W₀ to scale against; leave alpha out"),
            ("alpha_pattern", {}, "there is no pretrained W₀ to scale against; leave it out"),
            ("bias", "none", "every bias is trained and saved already; leave bias out"),
            ("modules_to_save", None, "every module is trained and saved already; leave it out"),
            ("rank_dropout", 0.0, "it would drop whole outputs; put nn.Dropout in the model"),
            ("module_dropout", 0.0, "it would drop whole layers; put nn.Dropout in the model"),
            ("init_weights", True, "there is no identity to start from; leave init_weights out"),
        ):
            value = getattr(self, name)
            if name == "modules_to_save" and self.task_type in HEAD_TASKS:
                continue  # PEFT itself writes the head's name there
            if value != unset and value not in ([], {}):
                raise ConfigError(
                    f"{name}={value!r} has no meaning with base_weight={self.base_weight!r}: "
                    f"{instead}"
                )
