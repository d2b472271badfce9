"""transformers' Trainer with a half of the model that stays on the client."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fedpara_peft import FedParaConfig, StateError, communicated_state, load_local, local_state
from fedpara_peft.integrations.transformers import LocalStateCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


class Rows(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = (torch.arange(8) * (i + 3)) % 60
        return {"input_ids": ids, "labels": ids}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def personal(name):
    torch.manual_seed(3)
    config = FedParaConfig(r=2, parameterization="pfedpara", target_modules="all-linear")
    return get_peft_model(base(), config, name)


def trainer(model, folder, steps, **changes):
    arguments = {
        "max_steps": steps, "per_device_train_batch_size": 4, "seed": 1, "learning_rate": 0.01,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, "save_steps": 2, **changes,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **arguments)
    return Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[LocalStateCallback()]
    )


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_model_is_of_one_step_whatever_the_adapters_name(tmp_path, name):
    model = personal(name)
    run = trainer(
        model, tmp_path, 6, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = tmp_path / "checkpoint-2"  # the worst by loss: not what training ended with
    assert run.state.best_model_checkpoint == str(best)
    folder = best if name == "default" else best / name
    saved = PeftModel.from_pretrained(base(), folder, name, is_trainable=True)
    load_local(saved, best)
    for state in (communicated_state, local_state):
        expected, found = state(saved), state(model)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    end = PeftModel.from_pretrained(
        base(), tmp_path / "checkpoint-6" / ("" if name == "default" else name), name,
        is_trainable=True,
    )  # fmt: skip
    key = next(iter(communicated_state(end)))
    assert not torch.equal(communicated_state(end)[key], communicated_state(model)[key])


@pytest.mark.parametrize("name", ["default", "mine"])
def test_resuming_is_exact_whatever_the_adapters_name(tmp_path, name):
    whole, resumed = personal(name), personal(name)
    trainer(whole, tmp_path / "a", 4).train()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/checkpoint-2").rename(tmp_path / "b/checkpoint-2")
    again = trainer(resumed, tmp_path / "b", 4)
    again.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-2"))
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_local_half_of_another_run_is_not_joined_to_what_was_resumed(tmp_path):
    trainer(personal("default"), tmp_path / "a", 2).train()
    trainer(personal("default"), tmp_path / "b", 2, learning_rate=0.02).train()
    run = trainer(personal("default"), tmp_path / "b", 4)
    with pytest.raises(StateError, match="would not go with what was loaded"):
        run.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
