"""A loop of one's own, on one process: python plain.py MODEL OUT"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, get_scheduler

from ows_ds import OWS, score
from ows_ds.distributed.adopt import as_weights

path, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").to(device)
rows = [tokenizer(f"{i} plus {i} is {2 * i}.") for i in range(64)]
loader = DataLoader(rows, 8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))

weights = as_weights(model)  # on several processes: the same weights on all
scores = score(weights, loader)
ows = OWS(weights, scores=scores, rank=128, period=4, lr=3e-4, max_grad_norm=1.0)
schedule = get_scheduler("linear", ows, num_warmup_steps=0, num_training_steps=2 * len(loader))

model.train()
for _ in range(2):
    for batch in loader:
        loss = model(**batch.to(device)).loss
        ows.backward(loss)
        print(f"step {ows.steps + 1}  loss {loss.item():.4f}  layers {ows.layer_set}")
        ows.step()
        schedule.step()
        ows.zero_grad()

ows.close()  # the model now holds what was trained, as plain weights
model.save_pretrained(out)
tokenizer.save_pretrained(out)
