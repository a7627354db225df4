"""What a cartridge is trained on: prompts that the model asks itself about the document, and files of prompts."""
