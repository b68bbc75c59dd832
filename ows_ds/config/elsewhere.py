"""What LMFlow, LLaMA-Factory, axolotl, TRL and transformers call the recipe's keys, for whoever writes one of theirs.

docs/from_other_tools.md says it at length. A value is a key, or a key with the value that is meant.
"""

MEANINGS: dict[str, str] = {
    theirs: ours
    for ours, names in {
        "model.path": "model_name_or_path model_name base_model base_model_config pretrained_model_name_or_path",
        "model.revision": "model_revision revision_of_model",
        "model.dtype": "bf16 fp16 fp32 torch_dtype pure_bf16 tf32 precision load_in_half",
        "model.frozen int8": "load_in_8bit quantization quantization_bit bnb_config",
        "model.frozen nf4": "load_in_4bit use_qlora qlora bnb_4bit_quant_type",
        "model.attn_implementation": "flash_attn flash_attention use_flash_attention_2 use_flash_attn",
        "model.trust_remote_code": "trust_remote_code_model",
        "data.train": "dataset dataset_name dataset_path datasets train_file train_dataset data_path",
        "data.eval": "eval_dataset test_datasets validation_file eval_file val_dataset",
        "data.eval_split": "val_size val_set_size validation_split_percentage",
        "data.train_split": "max_samples max_train_samples dataset_train_split",
        "data.max_length": "cutoff_len block_size sequence_len max_seq_length max_seq_len model_max_length",
        "data.template": "conversation_template prompt_template prompt_style",
        "data.chat_template": "chat_template_jinja chat_template_path",
        "data.loss_on": "train_on_prompt train_on_inputs assistant_only_loss completion_only_loss train_on_input",
        "data.packing": "neat_packing sample_packing pack_sequences group_by_length",
        "data.cache": "tokenized_path dataset_prepared_path",
        "method.name": "finetuning_type adapter use_lora use_lisa use_galore use_badam use_dora peft_use_dora use_peft",
        "method.lora_rank": "lora_r",
        "method.lora_dropout": "lora_drop",
        "sampling.gamma": "lisa_activated_layers lisa_n_layers n_layers",
        "sampling.period": "lisa_interval_steps lisa_step_interval badam_switch_interval",
        "sampling.order": "badam_switch_mode",
        "optim.lr": "learning_rate peak_lr",
        "optim.rank": "galore_rank low_rank proj_rank",
        "optim.update_proj_gap": "galore_update_interval",
        "optim.scale": "galore_scale",
        "optim.schedule": "lr_scheduler_type lr_scheduler scheduler",
        "optim.warmup_steps": "warmup_ratio num_warmup_steps lr_warmup_steps",
        "optim.betas": "adam_beta1 adam_beta2",
        "optim.eps": "adam_epsilon",
        "optim.max_grad_norm": "gradient_clipping max_norm clip_grad",
        "train.epochs": "num_train_epochs num_epochs n_epochs",
        "train.steps": "max_steps num_steps num_iterations total_steps",
        "train.global_batch_size": "gradient_accumulation_steps accumulation total_batch_size",
        "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu device_batch_size",
        "train.eval_batch_size": "per_device_eval_batch_size",
        "train.eval_steps": "evaluation_strategy eval_strategy evals_per_epoch",
        "train.save_steps": "save_strategy saves_per_epoch checkpointing_steps",
        "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints resume_from",
        "train.ds_config": "deepspeed deepspeed_config",
        "train.sharding zero3": "fsdp fsdp_config zero_stage",
        "train.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
        "train.activation_offload": "activation_offloading offload_activations",
        "train.tiled_mlp": "use_tiled_mlp",
        "train.kernels liger": "use_liger_kernel enable_liger_kernel liger_rms_norm liger_glu_activation liger_rope "
        "liger_swiglu",
        "train.kernels compile": "torch_compile",
        "train.output_dir": "out_dir save_dir output_path",
        "train.timeout_seconds": "ddp_timeout",
        "log.trackers": "report_to use_wandb use_mlflow wandb_project",
        "log.progress": "disable_tqdm logging_steps log_level",
    }.items()
    for theirs in names.split()
}
