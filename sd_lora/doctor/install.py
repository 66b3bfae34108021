"""The commands that install torch for each kind of device, from PyTorch's own index."""

_INDEX = "https://download.pytorch.org/whl"

NEWER = "other versions: https://pytorch.org/get-started/locally"

INSTALL = {
    "cuda": f"pip install --force-reinstall torch --index-url {_INDEX}/cu130",
    "rocm": f"pip install --force-reinstall torch --index-url {_INDEX}/rocm6.4",
    "xpu": f"pip install --force-reinstall torch --index-url {_INDEX}/xpu",
    "mps": "pip install --force-reinstall torch",
}
"""Kind of a build → its command. ROCm 6.4 is that of torch 2.9, the newest that was looked up; an
older driver of NVIDIA needs cu126."""

MAKERS = {
    "cuda": "an NVIDIA card (an older driver: cu126)",
    "rocm": "an AMD card on Linux",
    "xpu": "an Intel Arc card",
    "mps": "a Mac with Apple silicon, macOS 14 or later",
}
"""Kind of a build → the device that it is for."""

BY_VENDOR = {"0x10de": "cuda", "0x1002": "rocm", "0x8086": "xpu"}
"""Vendor of a graphics device on the PCI bus → the build for it."""
