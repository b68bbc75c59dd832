"""A loop around Accelerate, on any number of processes: torchrun --nproc_per_node 2 accelerate_loop.py MODEL OUT"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, get_scheduler

from ows_ds import OWS, score
from ows_ds.distributed.adopt import as_weights

MICRO_BATCHES = 2  # a step, on each process

path, out = sys.argv[1:]
accelerator = Accelerator(log_with="tensorboard", project_dir=out, cpu=not torch.cuda.is_available())
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").to(accelerator.device)
rows = [tokenizer(f"{i} plus {i} is {2 * i}.") for i in range(64)]
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = accelerator.prepare(DataLoader(rows, 4, shuffle=True, collate_fn=collate))  # this alone is prepared

weights = as_weights(model)  # copies rank 0's weights to all; no DistributedDataParallel
assert weights.comm.world_size == accelerator.num_processes
scores = score(weights, loader)
ows = OWS(weights, scores=scores, rank=128, period=2, lr=3e-4, accumulation=MICRO_BATCHES)
schedule = get_scheduler("linear", ows, num_warmup_steps=0, num_training_steps=len(loader) // MICRO_BATCHES)
accelerator.init_trackers("ows")

model.train()
total = torch.zeros((), device=accelerator.device)
for index, batch in enumerate(loader):
    loss = model(**batch).loss / MICRO_BATCHES
    ows.backward(loss)  # not accelerator.backward
    total += loss.detach()
    if (index + 1) % MICRO_BATCHES == 0:
        sampled = ows.layer_set
        ows.step()  # averages over processes, and clips if max_grad_norm is given
        schedule.step()
        ows.zero_grad()
        mean = accelerator.gather(total).mean().item()
        accelerator.log({"loss": mean, "lr": ows.lr, "sampled_layers": str(sampled)}, step=ows.steps)
        accelerator.print(f"step {ows.steps}  loss {mean:.4f}  layers {sampled}")
        total.zero_()

ows.close()
if accelerator.is_main_process:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
accelerator.end_training()
