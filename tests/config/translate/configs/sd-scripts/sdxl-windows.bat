@echo off
rem docs/sdxl_train_network.md, as a batch file
set MODEL=D:\models\sd_xl_base_1.0.safetensors
accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py ^
  --pretrained_model_name_or_path="%MODEL%" --train_data_dir="D:\train\img" --output_dir="D:\train\out" ^
  --output_name="my_sdxl_lora" --save_model_as=safetensors --network_module=networks.lora ^
  --network_dim=32 --network_alpha=16 --learning_rate=1e-4 --unet_lr=1e-4 --text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5 ^
  --optimizer_type="AdamW8bit" --lr_scheduler="constant" --max_train_epochs=10 --save_every_n_epochs=1 ^
  --mixed_precision="bf16" --gradient_checkpointing --network_train_unet_only --cache_text_encoder_outputs --cache_latents ^
  --enable_bucket --resolution=1024,1024
