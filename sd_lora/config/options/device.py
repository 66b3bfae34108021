"""Options of how a step goes through the device."""

from sd_lora.config.rows import Section, section

option = section("training")


class DeviceOptions(Section):
    """How a step goes through the device."""

    # fmt: off
    cuda_graphs: str = option("off",
        "record the UNet's forward and backward pass once for each form of batch, and launch it as "
        "one, which small batches on a fast GPU gain from: auto, where the run can; off",
        of_all_jobs=True, choices=("off", "auto"), without_gpu={"auto": "changes nothing"},
        may_change=True)
    compile: str = option("off",
        "torch.compile for the UNet's transformer blocks: auto measures before the first step "
        "whether it is faster, which takes about a minute, and says after how many batches it "
        "pays; off",
        of_all_jobs=True, choices=("off", "auto"), may_change=True)
    # fmt: on
