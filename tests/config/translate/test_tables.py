"""The tables of other trainers' names: each name leads to options that there are."""

import re
from typing import Any

import pytest

from sd_lora.config.command_line import parse
from sd_lora.config.optimizers import OPTIMIZERS
from sd_lora.config.rows import Option
from sd_lora.config.schema import OPTIONS
from sd_lora.config.translate.peers import PEERS, known_elsewhere
from sd_lora.config.translate.rows import Given, typed
from sd_lora.errors import UsageError

KOHYA = """
v2 v_parameterization tokenizer_cache_dir optimizer_type use_lion_optimizer
lr_scheduler_type lr_scheduler_args lr_scheduler_num_cycles lr_scheduler_power
fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio output_name huggingface_repo_id
huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility
save_state_to_huggingface resume_from_huggingface async_upload save_every_n_epochs
save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state save_last_n_steps
save_last_n_steps_state save_state save_state_on_train_end resume mem_eff_attn torch_compile
dynamo_backend xformers sdpa vae max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers full_fp16 full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view
ddp_static_graph log_with log_prefix log_tracker_name wandb_run_name log_tracker_config
wandb_api_key log_config ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr lowram
highvram sample_every_n_steps sample_at_first
sample_every_n_epochs sample_sampler config_file output_config conditioning_data_dir
masked_loss cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size
disable_mmap_load_safetensors cache_info caption_extention secondary_separator enable_wildcard
color_aug flip_aug face_crop_aug_range random_crop debug_dataset vae_batch_size
cache_latents_to_disk skip_cache_check enable_bucket min_bucket_reso max_bucket_reso
bucket_reso_steps resize_interpolation token_warmup_min token_warmup_step dataset_class
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json
dataset_repeats save_model_as use_safetensors cpu_offload_checkpointing no_metadata unet_lr
fp8_base_unet network_weights network_module network_dim network_alpha network_dropout network_args
network_train_unet_only network_train_text_encoder_only training_comment dim_from_weights
base_weights base_weights_multiplier no_half_vae skip_until_initial_step initial_epoch initial_step
validation_seed validation_split validate_every_n_steps validate_every_n_epochs
max_validation_steps min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss
weighted_captions deepspeed zero_stage
""".split()
"""Flags of sd-scripts' two network scripts that are no flags here."""


def test_every_flag_of_sd_scripts_is_answered_without_a_guess() -> None:
    """All flags of train_network.py and sdxl_train_network.py that are not ours, in one command:
    one line each, with an option or a reason, and no "Did you mean"."""
    assert len(KOHYA) == len(set(KOHYA)) > 98
    assert not OPTIONS.keys() & set(KOHYA)
    with pytest.raises(UsageError) as error:
        parse([word for name in KOHYA for word in (f"--{name}", "1")])
    told = {p.field: p.line() for p in error.value.problems}
    assert set(KOHYA) <= told.keys()
    assert "Did you mean" not in str(error.value)
    assert all(len(told[name]) > len(name) + 15 for name in KOHYA)


@pytest.mark.parametrize("peer", PEERS)
def test_no_known_name_is_guessed_at(peer: str) -> None:
    """Every name of every trainer's table is told without a guess, as a flag."""
    for name in PEERS[peer].all_rows:
        if name not in OPTIONS and known_elsewhere(name):
            with pytest.raises(UsageError) as error:
                parse([f"--{name}", "x"])
            assert "Did you mean" not in str(error.value), name


def test_a_guess_is_a_slip_of_the_finger() -> None:
    """A near typo has a guess; a word that merely shares letters with an option has none."""
    near = {"--rnak": "--rank", "--resolutoin": "--resolution", "--snr_gama": "--snr_gamma"}
    for word, meant in near.items():
        with pytest.raises(UsageError, match=f"Did you mean {meant}"):
            parse([word, "3"])
    for word in ("--save_when_done", "--colour", "--strength", "--blocks", "--gpu"):
        with pytest.raises(UsageError) as error:
            parse([word, "3"])
        assert "Did you mean" not in str(error.value), word


@pytest.mark.parametrize("peer", PEERS)
def test_every_flag_that_a_row_names_is_one(peer: str) -> None:
    """The flags in the rows' texts are options, or beginnings of commands."""
    rows = PEERS[peer].all_rows
    texts = [text for row in rows.values() for text in (row.here, row.reason)]
    named = {name for text in texts for name in re.findall(r"--(\w[\w-]*)", text)}
    assert {n.removeprefix("no-") for n in named} - OPTIONS.keys() <= {"config"}


def test_every_optimiser_of_ours_is_known_elsewhere() -> None:
    """An optimiser's names at other trainers are translated, and never told to be missing."""
    columns = {peer.column: peer for peer in PEERS.values()}
    told = 0
    for ours, optimizer in OPTIMIZERS.items():
        for column, names in optimizer.names.items():
            key = OPTIONS["optimizer"].names[column]
            row = columns[column].row(key)
            assert row is not None
            for name in names:
                taken = row.take(name, Given({key: name}))
                assert taken.kind != "absent", (column, name)
                assert str(taken.values.get("optimizer", "adamw")).lower() in (ours, name.lower())
                told += 1
    assert told >= 40


VALUES: dict[tuple[str, str], tuple[Any, Any, dict[str, Any]]] = {
    # peer, name there → value there, value here, other settings
    ("kohya", "network_module"): ("networks.lora_fa", "lora_fa", {}),
    ("kohya", "v_parameterization"): (True, "v_prediction", {}),
    ("kohya", "random_crop"): (True, False, {}),
    ("kohya", "clip_skip"): ("2", 1, {}),
    ("kohya", "optimizer_type"): ("AdamW8bit", "adamw8bit", {}),
    ("kohya", "optimizer_args"): ("d_coef=2", None, {}),
    ("kohya", "sample_prompts"): ("a dog --s 20", "a dog --s 20", {}),
    ("kohya", "save_precision"): ("float", "fp32", {}),
    ("kohya", "unet_lr"): ("1e-4", 1e-4, {}),
    ("kohya", "text_encoder_lr"): (["5e-5", "5e-5"], 5e-5, {}),
    ("kohya", "resolution"): ("512,512", 512, {}),
    ("kohya", "lr_warmup_steps"): ("0.1", 0.1, {"lr_scheduler": "linear"}),
    ("kohya", "save_last_n_steps_state"): (300, 3, {"save_every_n_steps": 100}),
    ("kohya", "cache_latents"): (True, None, {}),
    ("kohya", "cache_text_encoder_outputs"): (True, None, {}),
    ("kohya", "reg_data_dir"): ("reg", None, {}),
    ("kohya", "max_token_length"): (225, 225, {}),
    ("onetrainer", "layer_filter_preset"): ("attn-mlp", "transformer", {}),
    ("onetrainer", "peft_type"): ("LOHA", "loha", {}),
    ("onetrainer", "oft_block_size"): (32, 32, {"peft_type": "OFT_2"}),
    ("onetrainer", "lokr_use_tucker"): (True, True, {"peft_type": "LOKR"}),
    ("onetrainer", "lokr_decompose_factor"): (8, 8, {"peft_type": "LOKR"}),
    ("onetrainer", "lokr_full_matrix"): (True, True, {"peft_type": "LOKR"}),
    ("onetrainer", "lokr_decompose_both"): (True, True, {"peft_type": "LOKR"}),
    ("onetrainer", "concepts"): ([{"path": "d"}], None, {}),
    ("onetrainer", "resolution"): ("768", 768, {}),
    ("onetrainer", "train_dtype"): ("BFLOAT_16", "bf16", {}),
    ("onetrainer", "output_dtype"): ("FLOAT_16", "fp16", {}),
    ("onetrainer", "learning_rate_scheduler"): ("COSINE", "cosine", {}),
    ("onetrainer", "learning_rate_scaler"): ("BATCH", None, {}),
    ("onetrainer", "learning_rate_warmup_steps"): (200, 100, {"gradient_accumulation_steps": 2}),
    ("onetrainer", "optimizer.optimizer"): ("ADAMW_8BIT", "adamw8bit", {}),
    ("onetrainer", "backup_after"): (100, 100, {"backup_after_unit": "STEP"}),
    ("onetrainer", "rolling_backup_count"): (3, 3, {"rolling_backup": True}),
    ("onetrainer", "continue_last_backup"): (True, "latest-if-any", {}),
    ("onetrainer", "text_encoder.stop_training_after"): (
        100, 100, {"text_encoder.stop_training_after_unit": "STEP"}),
    ("onetrainer", "min_noising_strength"): (0.1, 100, {}),
    ("onetrainer", "max_noising_strength"): (0.9, 900, {}),
    ("onetrainer", "loss_weight_strength"): (5, None, {}),
    ("onetrainer", "rescale_noise_scheduler_to_zero_terminal_snr"): (True, True, {}),
    ("onetrainer", "unmasked_weight"): (0.2, 0.2, {"masked_training": True}),
    ("onetrainer", "samples"): ([{"prompt": "a dog"}], "a dog", {}),
    ("onetrainer", "text_encoder.train"): (True, True, {}),
    ("onetrainer", "latent_caching"): (False, "no", {}),
    ("onetrainer", "output_model_destination"): ("a/b.safetensors", "a/b", {}),
    ("kohya", "save_every_n_steps"): (100, 100, {}),
    ("ai_toolkit", "network.type"): ("lokr", "lokr", {}),
    ("ai_toolkit", "network.lokr_factor"): (8, 8, {"network.type": "lokr"}),
    ("ai_toolkit", "network.lokr_full_rank"): (True, None, {}),
    ("ai_toolkit", "model.arch"): ("sdxl", "sdxl", {}),
    ("ai_toolkit", "model.is_v_pred"): (True, "v_prediction", {}),
    ("ai_toolkit", "train.dtype"): ("bf16", "bf16", {}),
    ("ai_toolkit", "save.dtype"): ("float16", "fp16", {}),
    ("ai_toolkit", "train.text_encoder_lr"): (1e-5, 1e-5, {"train.train_text_encoder": True}),
    ("ai_toolkit", "train.optimizer"): ("adamw8bit", "adamw8bit", {}),
    ("ai_toolkit", "train.min_denoising_steps"): (100, 100, {}),
    ("ai_toolkit", "train.max_denoising_steps"): (899, 900, {}),
    ("ai_toolkit", "train.lr_scheduler"): ("cosine", "cosine", {}),
    ("ai_toolkit", "sample.prompts"): (["a dog"], "a dog", {}),
    ("ai_toolkit", "save.hf_repo_id"): ("me/robot", "me/robot", {"save.push_to_hub": True}),
    ("ai_toolkit", "save.hf_private"): (True, True, {"save.push_to_hub": True}),
    ("simpletuner", "hub_model_id"): ("me/robot", "me/robot", {"push_to_hub": True}),
    ("ai_toolkit", "logging.use_wandb"): (True, "wandb", {}),
    ("simpletuner", "lr_warmup_steps"): (100, 100, {"lr_scheduler": "linear"}),
    ("simpletuner", "noise_offset"): (0.1, 0.1, {"offset_noise": True}),
    ("simpletuner", "max_grad_norm"): (1.0, 1.0, {"grad_clip_method": "norm"}),
    ("simpletuner", "lora_init_type"): ("pissa", "pissa", {}),
}  # fmt: skip
"""Names with values of their own there; None here: another option, or none, says it."""


def sample(option: Option) -> Any:
    """A value of an option beside its default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    low = max(option.range.get("ge", 0), option.range.get("gt", 0))
    step = option.range.get("multiple_of", 1)
    values = {"bool": not option.default, "int": int(low + 2 * step), "float": 0.05, "str": "some"}
    return values.get(option.kind)


OF_SOURCES = ("datasets.", "text.", "image.", "additional_embeddings.")
"""Beginnings of keys of a [[sources]] table or a word, which the page's examples show."""

NAMES = [
    (peer, option.name)
    for peer, known in PEERS.items()
    for option in OPTIONS.values()
    if known.column in option.names and not option.names[known.column].startswith(OF_SOURCES)
]


@pytest.mark.parametrize(("peer", "name"), NAMES)
def test_an_options_name_elsewhere_gives_the_option_back(peer: str, name: str) -> None:
    """The name that an option's row has for another trainer is translated to that option, with the
    value: as it is, or as the list above says."""
    option, known = OPTIONS[name], PEERS[peer]
    theirs = option.names[known.column]
    value, here, beside = VALUES.get((known.column, theirs), (sample(option), sample(option), {}))
    row = known.row(theirs)
    assert row is not None
    given = Given(beside | {theirs: value})
    taken = typed(row.take(value, given), OPTIONS)
    if here is None:
        assert name not in taken.values
    else:
        assert taken.values[name] == here
