"""What the keys of an adapter file say: prefix, module, factor. A file's own name says nothing.

lora_unet_down_blocks_0_attn_to_q.hada_w1_a         diffusion_model.blocks.0.attn.hada_w1_a
└ prefix ┘└──── module ────────┘ └ factor ┘         └─── prefix ──┘└── module ──┘ └ factor ┘
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..._peft import WRAPPER_PREFIX
from ...errors import LayoutError

#: LoHa's factors: X, Y, T of either half.
LOHA = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))
#: LoRA's, by who writes them: up, down, and the core of a LoCon.
LORA = (
    ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
    ("lora_B.weight", "lora_A.weight", "lora_M.weight"),
    ("lora.up.weight", "lora.down.weight", "lora.mid.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight", "lora_linear_layer.mid"),
)
#: Factors that tell a layer's method, by its name. LoCon is a LoRA with a core.
METHODS: dict[str, tuple[str, ...]] = {
    "LoHa": sum(LOHA, ()),
    "LoRA": sum(LORA, ()),
    "LoKr": (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
        "lokr_t1", "lokr_t2",
    ),
    "full diff": ("diff", "diff_b"),
    "norm": ("w_norm", "b_norm"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "OFT": ("oft_blocks", "oft_diag", "rescale", "oft_R.weight"),
    "IA3": ("on_input",),
    "T-LoRA": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    "FedPara": tuple(f"fedpara_w{half}_{part}.weight" for half in (1, 2) for part in "xyt"),
    "LoRA of a table": ("lora_embedding_A", "lora_embedding_B"),
    "PEFT's DoRA": ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
}  # fmt: skip
#: What a layer of any method may have beside its factors.
ALPHA, DORA = "alpha", "dora_scale"
_SHARED = (ALPHA, DORA, "scalar")

_METHOD_OF = {factor: method for method, factors in METHODS.items() for factor in factors}
#: Longest first, for "lora.up.weight" ends in no shorter factor's name by accident.
_FACTORS = sorted((*_METHOD_OF, *_SHARED), key=lambda factor: (-len(factor), factor))


@dataclass(frozen=True)
class Prefix:
    """What a layout puts before a module's name.

    Attributes:
        text: the prefix itself.
        component: the part of a pipeline that the module is in, as diffusers calls it; "" for the
            one model that there is.
        underscored: whether the dots of the module's name are underscores.
        layout: who writes so.
    """

    text: str
    component: str
    underscored: bool
    layout: str


_KOHYA, _COMFY = "kohya", "ComfyUI"
#: The prefixes that say by themselves what follows, the more specific first.
_PLAIN = (
    Prefix("lora_prior_unet_", "prior", True, _KOHYA),
    Prefix("lora_prior_te_", "text_encoder", True, _KOHYA),
    Prefix("lora_unet_", "unet", True, _KOHYA),
    Prefix("lora_transformer_", "transformer", True, _KOHYA),
    Prefix("lora_te1_", "text_encoder", True, _KOHYA),
    Prefix("lora_te2_", "text_encoder_2", True, _KOHYA),
    Prefix("lora_te3_", "text_encoder_3", True, _KOHYA),
    Prefix("lora_te_", "text_encoder", True, _KOHYA),
    Prefix("lycoris_", "", True, "LyCORIS"),
    Prefix(WRAPPER_PREFIX, "", False, "PEFT"),
    Prefix("model.diffusion_model.", "unet", False, _COMFY),
    Prefix("diffusion_model.", "unet", False, _COMFY),
)
#: The parts of a pipeline, as diffusers calls them.
COMPONENTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
#: Prefixes that a module of a plain model may begin with as well: they count where all layers of a
#: file begin so.
_HEADS = tuple(Prefix(f"{name}.", name, False, "diffusers") for name in COMPONENTS)
BARE = Prefix("", "", False, "module paths")
#: A plain model may call its trunk so (GPT-2 does, MPT); diffusers' transformers continue thus.
_TRANSFORMERS = ("transformer_blocks.", "single_transformer_blocks.")

PREFIXES = {prefix.text: prefix for prefix in (*_PLAIN, *_HEADS, BARE)}


@dataclass(frozen=True)
class Group:
    """The keys of one layer.

    Attributes:
        module: the module as the file has it, with its prefix.
        prefix: what of it is the layout's.
        method: ``"LoHa"``, ``"LoRA"``, …
        keys: factor to key.
    """

    module: str
    prefix: Prefix
    method: str
    keys: Mapping[str, str]

    @property
    def name(self) -> str:
        """The module without the prefix."""
        return self.module.removeprefix(self.prefix.text)


def group_keys(keys: Iterable[str]) -> tuple[list[Group], list[str]]:
    """The layers of a file, in its order, and the keys that are no layer's.

    Raises:
        LayoutError: a layer has factors of several methods.
    """
    modules: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for key in keys:
        factor = next((f for f in _FACTORS if key.endswith(f".{f}")), None)
        if factor is None or len(key) == len(factor) + 1:
            rest.append(key)
        else:
            modules.setdefault(key[: -len(factor) - 1], {})[factor] = key
    methods = {
        module: sorted({_METHOD_OF[factor] for factor in own if factor in _METHOD_OF})
        for module, own in modules.items()
    }
    for module in [module for module, found in methods.items() if not found]:
        rest.extend(modules.pop(module).values())  # an alpha, say, of no layer
    prefixes = _prefixes(modules)
    groups = []
    for module, own in modules.items():
        if len(methods[module]) > 1:
            raise LayoutError(
                f"{module} has {', '.join(own)}, which are factors of "
                f"{' and '.join(methods[module])}: save it again"
            )
        groups.append(Group(module, prefixes[module], methods[module][0], own))
    return groups, rest


def _prefixes(modules: Iterable[str]) -> dict[str, Prefix]:
    """Each module's prefix."""
    found: dict[str, Prefix] = {}
    for module in modules:
        plain = (p for p in _PLAIN if module.startswith(p.text))
        # An underscored name has no dots: with one, the prefix is the beginning of a plain path.
        fitting = (p for p in plain if not (p.underscored and "." in module))
        found[module] = next(fitting, BARE)
    bare = [module for module, prefix in found.items() if prefix is BARE]
    heads = {module: _head(module) for module in bare}
    if bare and all(heads.values()) and len(bare) == len(found):
        found.update({module: head for module, head in heads.items() if head is not None})
    return found


def _head(module: str) -> Prefix | None:
    head = next((p for p in _HEADS if module.startswith(p.text)), None)
    if head is not None and head.component == "transformer":
        after = module.removeprefix(head.text)
        return head if after.startswith(_TRANSFORMERS) else None
    return head


def layout_of(groups: Iterable[Group]) -> str:
    """Who writes files so, and the prefixes found, for a reader."""
    seen: dict[str, list[str]] = {}
    for group in groups:
        texts = seen.setdefault(group.prefix.layout, [])
        if group.prefix.text and group.prefix.text not in texts:
            texts.append(group.prefix.text)
    shown = (f"{who} ({', '.join(texts)})" if texts else who for who, texts in seen.items())
    return " and ".join(shown) or "no layers"
