"""What a user asks, the words typed into the search, and what the answer must say, and where."""

#: (question, words typed, pages that answer, what the answer says there)
QUESTIONS = [
    ("How do I use my own optimizer?", "own optimizer", ["recipes", "from_scratch"],
     "optimizer=nadam"),
    ("How do I log to TensorBoard?", "tensorboard", ["recipes"], 'report_to="tensorboard"'),
    ("How do I stop early?", "early stopping", ["recipes", "training"], "early_stopping_patience"),
    ("How do I add a codec?", "codec", ["payloads"], "register"),
    ("How do I run over Flower?", "flower", ["flower"], "flwr run"),
    ("How many bytes will this cost?", "how many bytes", ["from_scratch", "trainer"], "plan(model"),
    ("How do I merge?", "merge", ["save_and_merge"], "merge_and_unload"),
    ("How do I convert a LoHa?", "convert loha", ["convert"], "loha_to_fedpara"),
    ("Which learning rate?", "learning rate", ["choosing", "from_scratch"],
     "factor_learning_rate"),
    ("Does it work on a quantized base?", "quantized base", ["finetune"], "bitsandbytes"),
    ("How do I resume after a kill?", "resume", ["resume"], "resume_from_checkpoint=True"),
    ("Is there differential privacy?", "differential privacy", ["payloads"],
     "dp_noise_multiplier"),
    ("How do I get one client's model?", "personal model",
     ["personalize", "examples/notebooks/personalize"], "client_model"),
    ("Can I use several GPUs?", "several gpus", ["processes"], "accelerate launch"),
    ("Which γ?", "gamma", ["choosing"], "Start between 0 and 0.4"),
    ("Why was an update refused?", "refused updates", ["errors", "payloads"],
     "refused"),
    ("Can vLLM serve it?", "vllm", ["convert"], "max_lora_rank"),
    ("How do I write a strategy?", "own strategy", ["strategies"], "Strategy"),
]  # fmt: skip
