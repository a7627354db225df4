"""How good a cartridge is: questions asked with it and without, and its divergence from the whole document."""
