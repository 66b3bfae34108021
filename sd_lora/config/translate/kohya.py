"""Flags of sd-scripts that are more or less than one option here."""

TRANSLATIONS: dict[str, str] = {
    "cache_latents_to_disk": "--cache_latents disk",
    "cache_text_encoder_outputs_to_disk": "--cache_text_embeddings disk",
    "enable_bucket": "the default; off: --no-aspect_ratio_buckets",
    "network_args": "--conv_rank, --conv_alpha and --method",
    "network_module": "--targets and --method",
    "network_train_unet_only": "the default; with text encoders: --train_text_encoder",
    "optimizer_type": "AdamW, or --use_8bit_adam",
    "output_name": "the last part of --output_dir",
    "random_crop": "--no-center_crop",
    "reg_data_dir": "--class_data_dir with --with_prior_preservation, or class sources",
    "v2": "not needed: the family is read from the model",
    "v_parameterization": "--prediction_type v_prediction",
    "xformers": "not needed: PyTorch's own memory-efficient attention is always used",
}
"""Flags of sd-scripts that are more or less than one option here; the others are in the rows."""
