"""A run of transformers' Trainer in a process of its own: ``trainer_runs.py FOLDER``."""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script finds its own folder alone
from tests.federation.test_local_trainer import federated, flat, llama, of_transformers, tokens


def main():
    folder = Path(sys.argv[1])
    clients = [tokens(8, seed=i) for i in range(3)]
    model = llama(dropout=0.1, parameterization="pfedpara")
    given = of_transformers(folder / "own", bf16=True)
    trainer = federated(folder, model, given, clients, rounds=2, client_store="disk")
    trainer.train()
    if trainer.accelerator.is_main_process:
        local = {f"{i} {n}": t for i in range(3) for n, t in trainer.client_state(i).local.items()}
        save_file({**flat(model), **local}, folder / "final.safetensors")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads must not outlive the interpreter
