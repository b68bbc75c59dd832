"""transformers' Trainer, on any number of processes: torchrun --nproc_per_node 2 trainer.py MODEL OUT"""

import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from ows_ds.integrations.transformers import OWSTrainer

path, out = sys.argv[1:]
args = TrainingArguments(
    out,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=3e-4,
    logging_steps=1,
    save_steps=4,
    report_to="tensorboard",
    use_cpu=not torch.cuda.is_available(),
)
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = OWSTrainer(
    AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16"),
    args,
    train_dataset=[tokenizer(f"{i} plus {i} is {2 * i}.") for i in range(64)],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ows={"rank": 128, "period": 4},
)
trainer.train()  # with resume_from_checkpoint=True it resumes
trainer.save_model(out)
