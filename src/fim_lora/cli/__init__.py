"""The command `fim-lora`; its entry point is `fim_lora_command.main`."""
