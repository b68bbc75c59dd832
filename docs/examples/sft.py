"""TRL's SFTTrainer, on any number of processes: torchrun --nproc_per_node 2 sft.py MODEL OUT"""

import sys

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ows_ds.integrations.transformers import OWSTrainerMixin


class OWSSFTTrainer(OWSTrainerMixin, SFTTrainer): ...  # the mixin first


path, out = sys.argv[1:]
trainer = OWSSFTTrainer(
    path,
    SFTConfig(
        out,
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=3e-4,
        logging_steps=1,
        save_steps=4,
        report_to="tensorboard",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{i} plus {i} is ", "completion": f"{2 * i}."} for i in range(64)]),
    ows={"rank": 128, "period": 4},
)
trainer.train()
trainer.save_model(out)
