simpletuner train --model_type=lora --model_family=sd2x --pretrained_model_name_or_path=stabilityai/stable-diffusion-2-1 \
  --data_backend_config=backend-512.json --output_dir=output --lora_rank=8 --lora_alpha=8 --lora_dropout=0.1 --max_train_steps=500 \
  --learning_rate=1e-4 --lr_scheduler=cosine --lr_warmup_steps=50 --train_batch_size=2 --gradient_accumulation_steps=2 \
  --mixed_precision=bf16 --optimizer=adamw_bf16 --snr_gamma=5 --rescale_betas_zero_snr --seed=1
