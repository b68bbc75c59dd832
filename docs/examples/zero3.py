"""A loop over ZeRO-3 shards: torchrun --nproc_per_node 2 zero3.py MODEL OUT"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from ows_ds import OWS, score
from ows_ds.distributed.communicator import join
from ows_ds.distributed.ds_config import DEFAULT_CONFIG, resolve_config
from ows_ds.distributed.zero3 import Zero3
from ows_ds.train.export import save_model

path, out = sys.argv[1:]
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
deepspeed.init_distributed()  # before `join`, which knows the process group that there is
comm = join(device)

config = resolve_config(DEFAULT_CONFIG, "bfloat16", micro_batch_size=4, accumulation=1, world_size=comm.world_size)
keep = HfDeepSpeedConfig(config)  # while it lives, transformers loads models into shards
model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
weights = Zero3(model, config, comm)  # makes the DeepSpeed engine, without an optimizer

tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
rows = [tokenizer(f"{i} plus {i} is {2 * i}.") for i in range(64)]
sampler = DistributedSampler(rows, comm.world_size, comm.rank)  # each process its own rows, and as many as the others
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(rows, 4, sampler=sampler, collate_fn=collate)

scores = score(weights, loader)
ows = OWS(weights, scores=scores, rank=128, period=4, lr=3e-4)
schedule = get_scheduler("linear", ows, num_warmup_steps=0, num_training_steps=len(loader))

model.train()
for batch in loader:
    loss = model(**batch.to(device)).loss  # the model, not the engine
    ows.backward(loss)
    ows.step()
    schedule.step()
    ows.zero_grad()
    if comm.rank == 0:
        print(f"step {ows.steps}  loss {loss.item():.4f}")

model.eval()
prompt = tokenizer("3 plus 3 is", return_tensors="pt").to(device)
answer = model.generate(**prompt, max_new_tokens=8, synced_gpus=True)  # on all processes, coordinates attached
weights.after_step()  # after every evaluation batch and every generation: nothing stays gathered
if comm.rank == 0:
    print(tokenizer.decode(answer[0]))

ows.close()
save_model(weights, tokenizer, Path(out))  # whole tensors, one run after the other; the folder must not exist
