"""Ten thousand damaged files: a typed error that names the key, and nothing written."""

import json
import random
import shutil

import pytest
import safetensors.torch
import torch
from tests.convert.written import loha_factors

from fedpara_peft import ConversionError, convert_adapter

BASE = {"down.0.to_q": (6, 5), "conv_1": (4, 3, 3, 2)}
LAYERS = {"lora_unet_down_0_to_q": (6, 5, 2, ()), "lora_unet_conv_1": (4, 3, 2, (3, 2))}
FILES, CHUNKS = 10_000, 10


def sound():
    generator, state = torch.Generator().manual_seed(0), {}
    for name, (m, n, r, kernel) in LAYERS.items():
        own = loha_factors(m, n, r, kernel, generator=generator)
        state.update({f"{name}.{factor}": tensor for factor, tensor in own.items()})
        state[f"{name}.alpha"] = torch.tensor(1.5)
    return state


# Each returns the file's bytes and what the message must name; None: the file is none at all.


def cut_off(state, rng):
    data = safetensors.torch.save(state)
    return data[: rng.randrange(len(data))], None


def changed_byte_of_the_header(state, rng):
    data = bytearray(safetensors.torch.save(state))
    position = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    data[position] = rng.randrange(256)
    return bytes(data), ""


def missing_half(state, rng):
    key = rng.choice([key for key in state if not key.endswith("alpha")])
    del state[key]
    return safetensors.torch.save(state), key.rpartition(".")[0]


def missing_layer_but_its_alpha(state, rng):
    name = rng.choice(list(LAYERS))
    state = {k: v for k, v in state.items() if not k.startswith(name) or k.endswith("alpha")}
    return safetensors.torch.save(state), f"{name}.alpha"


def wrong_shape(state, rng):
    key = rng.choice(list(state))
    old = state[key]
    while state[key].shape == old.shape or (old.dim() == 0 and state[key].numel() == 1):
        dims = rng.choice([old.dim(), old.dim() + 1, max(0, old.dim() - 1)])
        state[key] = torch.randn([rng.randrange(5) for _ in range(dims)])
    return safetensors.torch.save(state), key.rpartition(".")[0]


def key_twice(state, rng):
    data = safetensors.torch.save(state)
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().rstrip()
    key = rng.choice(list(state))
    entry = json.dumps(json.loads(header)[key], separators=(",", ":"))
    header = f"{header[:-1]},{json.dumps(key)}:{entry}}}"
    header += " " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header.encode() + data[8 + size :], key


def alien_key(state, rng):
    key = rng.choice(
        ["first_stage.weight", "lora_unet_x", "emb.0", "lora_unet_x.hada_w3_a", ".alpha"]
    )
    state[key] = torch.randn(3)
    return safetensors.torch.save(state), key


def another_method_on_the_same_layer(state, rng):
    key = f"{rng.choice(list(LAYERS))}.{rng.choice(['lokr_w1', 'diff', 'lora_up.weight'])}"
    state[key] = torch.randn(3, 3)
    return safetensors.torch.save(state), key.partition(".")[0]


def alpha_that_is_no_scale(state, rng):
    key = f"{rng.choice(list(LAYERS))}.alpha"
    state[key] = torch.tensor(rng.choice([0.0, float("nan"), float("inf")]))
    return safetensors.torch.save(state), key


def not_finite(state, rng):
    key = rng.choice([key for key in state if not key.endswith("alpha")])
    state[key] = state[key].clone()
    flat = state[key].view(-1)
    flat[rng.randrange(flat.numel())] = rng.choice([float("nan"), float("inf")])
    return safetensors.torch.save(state), key


def integers(state, rng):
    key = rng.choice([key for key in state if not key.endswith("alpha")])
    state[key] = torch.ones(state[key].shape, dtype=rng.choice([torch.int64, torch.uint8]))
    return safetensors.torch.save(state), key


DAMAGE = (
    cut_off, changed_byte_of_the_header, missing_half, missing_layer_but_its_alpha, wrong_shape,
    key_twice, alien_key, another_method_on_the_same_layer, alpha_that_is_no_scale, not_finite,
    integers,
)  # fmt: skip


def refusal(source, target, to, base):
    """The message, None where the file was converted; any other error is the test's."""
    try:
        convert_adapter(source, target, to, base=base)
    except ConversionError as error:  # LayoutError is one
        return str(error)
    return None


@pytest.mark.parametrize(
    "chunk", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, CHUNKS))]
)
def test_a_damaged_file_is_refused_by_name_and_nothing_is_written(tmp_path, chunk):
    source, folder = tmp_path / "a.safetensors", tmp_path / "out"
    folder.mkdir()
    plain = sound()
    refused = 0
    for i in range(FILES // CHUNKS):
        rng = random.Random(chunk * FILES + i)
        damage = DAMAGE[i % len(DAMAGE)]
        torch.manual_seed(i)
        data, named = damage(dict(plain), rng)
        source.write_bytes(data)
        to = rng.choice(["kohya", "lycoris", "lora", "fedpara"])
        is_file = to in ("kohya", "lycoris")
        target = folder / ("b.safetensors" if is_file else "b")
        error = refusal(source, target, to, base=None if is_file else BASE)
        if error is None:  # another byte of a name or a number may make another sound file
            assert damage is changed_byte_of_the_header, (damage, named)
            target.unlink() if is_file else shutil.rmtree(target)
            continue
        refused += 1
        assert named in error if named is not None else str(source) in error, (damage, error)
        assert not list(folder.iterdir()), damage
    assert refused > 0.95 * FILES // CHUNKS


def test_a_sound_file_passes(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors.torch.save(sound()))
    done = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert [layer.rank for layer in done.layers] == [4, 4]
