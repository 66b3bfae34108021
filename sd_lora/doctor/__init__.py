"""`sd-lora doctor`: facts about the machine, and the reasons why a training cannot run on it."""
